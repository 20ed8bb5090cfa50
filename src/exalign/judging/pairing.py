"""What is compared: answers of two systems of a run to the same prompts. Models and people are shown the same pairs.

A system is `sft`, `reference` (the reference texts of the evaluation prompts), a method (at its last evaluated step) or
METHOD@STEP. Its first sample of a prompt is its answer, so that nobody chose it. `best-of-N` answers with the one of
the highest reward of the first N samples of π_sft that the evaluation's pool has.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path

from exalign.data.record import Record
from exalign.data.store import iter_records
from exalign.errors import InputError
from exalign.evaluation.run_folder import BEST_OF, REFERENCE, SUPERVISED, RunFolder
from exalign.judging.comparisons import Pair


@dataclass(frozen=True)
class System:
    """Where the answers of one system stand, and what it is called; with `best_of`, of how many the best is taken."""

    name: str
    samples: Path
    best_of: int | None = None

    @cached_property
    def records(self) -> dict[str, Record]:
        """Its samples by prompt; read when they are first asked for."""
        records = iter_records(self.samples)
        return {r.id: r if self.best_of is None else _with_the_best(r, self.best_of) for r in records}

    @property
    def answers(self) -> dict[str, str]:
        return {name: record.completions[0].text for name, record in self.records.items() if record.completions}


@dataclass(frozen=True, slots=True)
class MatchUp:
    """The pairs of two systems. `counts` says what was left out; `sources` are the folders that were read."""

    first: str
    second: str
    pairs: tuple[Pair, ...]
    counts: Counter[str]
    sources: tuple[str, str]


def system(run: RunFolder, name: str) -> System:
    """A system of a run by its name; `InputError` where the run has no answers of it."""
    if not (n := name.removeprefix(BEST_OF)).isdecimal() or n == name:
        return System(name, run.answers(name))
    if not (run.pool / "header.json").is_file():
        raise InputError(f"{run.path} has no pool of samples for {name}; evaluate.pool_prompts draws one.")
    return System(name, run.pool, int(n))


def _with_the_best(record: Record, n: int) -> Record:
    """Of equal rewards the first; fewer than N samples, or one without a finite reward, is an `InputError`."""
    if not 1 <= n <= len(record.completions):
        raise InputError(f"{BEST_OF}{n}: the pool has {len(record.completions)} samples of the prompt {record.id}.")
    rewards = record.rewards
    if rewards is None or not all(map(math.isfinite, rewards)):
        raise InputError(f"{BEST_OF}{n}: a sample of the prompt {record.id} has no finite reward; score it again.")
    return replace(record, completions=(record.completions[rewards.index(max(rewards[:n]))],))


def _systems(path: Path) -> tuple[RunFolder, list[System]]:
    """A run, and which of its systems `path` names: the run directory all of its methods at their last step,
    `RUN/evaluation/METHOD` or a step below it that one.
    """
    run, name = RunFolder.around(path)
    names = [name] if name else [method for method in run.evaluated() if run.sampled_steps(method)]
    if not names:
        raise InputError(f"{path} has no samples of an aligned model; evaluate one (`exalign run` does).")
    return run, [system(run, name) for name in names]


def match_ups(path: Path, against: str, best_of: int | None = None) -> tuple[RunFolder, list[MatchUp]]:
    """The run, and one match-up for each of its systems that `path` names, and for the best of `best_of`, against
    `sft`, `chosen` (the reference texts), another system of the same run, or another run directory (there: the method
    of the same name, or its only one).
    """
    run, named = _systems(path)
    if best_of is not None:
        named.append(system(run, f"{BEST_OF}{best_of}"))
    references = reference_texts(run)
    met = [(one, _opponent(run, one, against)) for one in named]
    met = [(one, other) for one, other in met if (one.samples, one.best_of) != (other.samples, other.best_of)]
    if not met:
        raise InputError(f"Nothing to compare: {against} is the only policy of {run.path}.")
    return run, [match_up(one, other, references) for one, other in met]


def _opponent(run: RunFolder, one: System, against: str) -> System:
    try:
        return system(run, REFERENCE if against == "chosen" else against)
    except InputError:
        if against.startswith(BEST_OF):
            raise
        if not Path(against).is_dir():
            names = ", ".join([SUPERVISED, "chosen", *run.evaluated()])
            raise InputError(f"--against {against}: neither one of {names} nor a run directory.") from None
    other, found = _systems(Path(against))
    same_name = [candidate for candidate in found if candidate.name == one.name] or found
    if len(same_name) > 1:
        names = ", ".join(candidate.name for candidate in found)
        raise InputError(f"{against} has no {one.name} but {names}: name one as {against}/evaluation/METHOD.")
    return System(f"{other.path.resolve().name}:{same_name[0].name}", same_name[0].samples)


def reference_texts(run: RunFolder) -> dict[str, str]:
    """The reference answers of a run's evaluation prompts, where it has any."""
    return system(run, REFERENCE).answers if run.prompts.is_dir() else {}


def match_up(one: System, other: System, references: dict[str, str]) -> MatchUp:
    """Every prompt that both systems answered; `InputError` where there is none."""
    counts: Counter[str] = Counter()
    pairs = []
    for record in one.records.values():
        met = other.records.get(record.id)
        if not record.completions:
            counts["prompt_without_sample"] += 1
        elif met is None:
            counts["prompt_missing_at_opponent"] += 1
        elif not met.completions:
            counts["no_reference_text" if other.name == REFERENCE else "prompt_without_sample_at_opponent"] += 1
        elif record.prompt != met.prompt:
            counts["prompt_differs_at_opponent"] += 1
        else:
            texts = record.completions[0].text, met.completions[0].text
            reference = None if REFERENCE in (one.name, other.name) else references.get(record.id)
            pairs.append(Pair(record.id, record.prompt, one.name, other.name, *texts, reference=reference))
    if not pairs:
        said = ", ".join(f"{value} {name.replace('_', ' ')}" for name, value in counts.items()) or "no samples"
        raise InputError(f"No prompt is answered by both {one.name} and {other.name} ({said}).")
    counts["prompts_available"] = len(pairs)
    return MatchUp(one.name, other.name, tuple(pairs), counts, (str(one.samples), str(other.samples)))


def choose(pairs: Iterable[Pair], *, prompts: int, seed: int) -> tuple[Pair, ...]:
    """The pairs of `prompts` prompts, in the order of a hash of the seed and the prompt's id: the same prompts for
    every match-up, and for a study by people; more prompts contain fewer.

    >>> pairs = [Pair(str(i), "Hi", "a", "b", "x", "y") for i in range(9)]
    >>> few, more = choose(pairs, prompts=3, seed=1), choose(pairs, prompts=5, seed=1)
    >>> few == more[:3], len(more)
    (True, 5)
    """

    def rank(pair: Pair) -> str:
        return hashlib.sha256(f"{seed}:{pair.prompt_id}".encode()).hexdigest()

    ordered = sorted(pairs, key=rank)
    kept = set(list(dict.fromkeys(pair.prompt_id for pair in ordered))[:prompts])
    return tuple(pair for pair in ordered if pair.prompt_id in kept)
