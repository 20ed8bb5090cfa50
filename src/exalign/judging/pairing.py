"""What is compared: answers of two systems of a run to the same prompts. Models and people are shown the same pairs.

A system is `sft`, `reference` (the reference texts of the evaluation prompts), a method (at its last evaluated step) or
METHOD@STEP. Its first sample of a prompt is its answer, so that nobody chose it.
"""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TypeVar

from exalign.data.record import Record
from exalign.data.store import iter_records
from exalign.errors import InputError
from exalign.judging.comparisons import Pair

P = TypeVar("P", bound=Pair)
REFERENCE = "reference"
"""The system name of the reference texts."""
_STEP = re.compile(r"step-(\d+)")


@dataclass(frozen=True)
class System:
    """Where the answers of one system stand, and what it is called."""

    name: str
    samples: Path

    @cached_property
    def records(self) -> dict[str, Record]:
        """Its samples by prompt; read when they are first asked for."""
        return {record.id: record for record in iter_records(self.samples)}

    @property
    def answers(self) -> dict[str, str]:
        """Its answer to every prompt that it answered."""
        return {name: record.completions[0].text for name, record in self.records.items() if record.completions}


@dataclass(frozen=True, slots=True)
class MatchUp:
    """The pairs of two systems. `counts` says what was left out; `sources` are the folders that were read."""

    first: str
    second: str
    pairs: tuple[Pair, ...]
    counts: Counter[str]
    sources: tuple[str, str]


def system(run: Path, name: str) -> System:
    """A system of a run by its name; `InputError` where the run has no answers of it."""
    if (found := _samples(run).get(name)) is None:
        known = ", ".join(name for name in _samples(run) if "@" not in name and name != REFERENCE) or "nothing"
        raise InputError(f"{run} has no evaluation samples of {name}; evaluated there: {known}.")
    return System(name, found)


def _samples(run: Path) -> dict[str, Path]:
    """Where the answers of every system of a run stand, by its name."""
    evaluation = run / "evaluation"
    places = {"sft": evaluation / "sft" / "samples", REFERENCE: evaluation / "prompts"}
    steps = [(int(found[1]), path) for path in evaluation.glob("*/step-*/samples")
             if (found := _STEP.fullmatch(path.parent.name))]  # fmt: skip
    for step, path in sorted(steps):
        method = path.parent.parent.name
        places[method] = places[f"{method}@{step}"] = path  # of the bare name the last step stays
    return {name: path for name, path in sorted(places.items()) if path.is_dir()}


def systems(path: Path) -> tuple[Path, list[System]]:
    """A run, and which of its systems `path` names: the run directory all of its methods at their last step,
    `RUN/evaluation/METHOD` or a step below it that one.
    """
    path = Path(path)
    if (path / "evaluation").is_dir():
        names = [name for name in _samples(path) if name not in ("sft", REFERENCE) and "@" not in name]
        if not names:
            raise InputError(f"{path} has no samples of an aligned model (evaluation/METHOD/step-*/samples).")
        return path, [system(path, name) for name in names]
    parts = path.resolve().parts
    if "evaluation" not in parts[:-1]:
        raise InputError(f"{path} is no run directory with evaluation samples, nor a folder below RUN/evaluation.")
    depth = len(parts) - 1 - parts[::-1].index("evaluation")
    named = [part for part in parts[depth + 1 :] if part != "samples"]
    name = "@".join(str(int(step[1])) if (step := _STEP.fullmatch(part)) else part for part in named)
    run = Path(*parts[:depth])
    return run, [system(run, name)]


def match_ups(path: Path, against: str) -> tuple[Path, list[MatchUp]]:
    """The run, and one match-up for each of its systems that `path` names against `sft`, `chosen` (the reference
    texts), another system of the same run, or another run directory (there: the method of the same name, or its only
    one).
    """
    run, named = systems(path)
    opponents = [_opponent(run, one, against) for one in named]
    # A method against itself is left out, where all methods of a run are judged against one of them.
    met = [
        (one, other)
        for one, other in zip(named, opponents, strict=True)
        if one.samples.resolve() != other.samples.resolve()
    ]
    if not met:
        raise InputError(f"Nothing to compare: {against} is the only policy of {run}.")
    references = reference_texts(run)
    return run, [match_up(one, other, references) for one, other in met]


def _opponent(run: Path, one: System, against: str) -> System:
    name, known = REFERENCE if against == "chosen" else against, _samples(run)
    if name in known:
        return system(run, name)
    if not Path(against).is_dir():
        names = ", ".join(["sft", "chosen", *(name for name in known if name not in ("sft", REFERENCE))])
        raise InputError(f"--against {against}: neither one of {names} nor a run directory.")
    other, found = systems(Path(against))
    same_name = [candidate for candidate in found if candidate.name == one.name] or found
    if len(same_name) > 1:
        names = ", ".join(candidate.name for candidate in found)
        raise InputError(f"{against} has no {one.name} but {names}: name one as {against}/evaluation/METHOD.")
    return System(f"{other.resolve().name}:{same_name[0].name}", same_name[0].samples)


def reference_texts(run: Path) -> dict[str, str]:
    """The reference answers of a run's evaluation prompts, where it has any."""
    return system(run, REFERENCE).answers if REFERENCE in _samples(run) else {}


def match_up(one: System, other: System, references: dict[str, str]) -> MatchUp:
    """Every prompt that both systems answered; `InputError` where there is none."""
    counts: Counter[str] = Counter()
    pairs = []
    for record in one.records.values():
        met = other.records.get(record.id)
        if (problem := _problem(record, met, other.name == REFERENCE)) is not None:
            counts[problem] += 1
            continue
        assert met is not None
        texts = record.completions[0].text, met.completions[0].text
        reference = None if REFERENCE in (one.name, other.name) else references.get(record.id)
        pairs.append(Pair(record.id, record.prompt, one.name, other.name, *texts, reference=reference))
    if not pairs:
        said = ", ".join(f"{value} {name.replace('_', ' ')}" for name, value in counts.items()) or "no samples"
        raise InputError(f"No prompt is answered by both {one.name} and {other.name} ({said}).")
    counts["prompts_available"] = len(pairs)
    return MatchUp(one.name, other.name, tuple(pairs), counts, (str(one.samples), str(other.samples)))


def _problem(record: Record, other: Record | None, is_reference: bool) -> str | None:
    if not record.completions:
        return "prompt_without_sample"
    if other is None:
        return "prompt_missing_at_opponent"
    if not other.completions:
        return "no_reference_text" if is_reference else "prompt_without_sample_at_opponent"
    return "prompt_differs_at_opponent" if record.prompt != other.prompt else None


def choose(pairs: Iterable[P], *, prompts: int, seed: int) -> tuple[P, ...]:
    """The pairs of `prompts` prompts, in the order of a hash of the seed and the prompt's id: the same prompts for
    every match-up, and for a study by people; more prompts contain fewer.

    >>> pairs = [Pair(str(i), "Hi", "a", "b", "x", "y") for i in range(9)]
    >>> few, more = choose(pairs, prompts=3, seed=1), choose(pairs, prompts=5, seed=1)
    >>> few == more[:3], len(more)
    (True, 5)
    """

    def rank(pair: P) -> str:
        return hashlib.sha256(f"{seed}:{pair.prompt_id}".encode()).hexdigest()

    ordered = sorted(pairs, key=rank)
    kept = set(list(dict.fromkeys(pair.prompt_id for pair in ordered))[:prompts])
    return tuple(pair for pair in ordered if pair.prompt_id in kept)
