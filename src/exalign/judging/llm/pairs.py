"""What a judge compares: answers of two systems to the same prompts, found in the directories of runs."""

from __future__ import annotations

import hashlib
import re
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from exalign.data.record import Prompt, Record
from exalign.data.store import iter_records
from exalign.errors import InputError
from exalign.judging.comparison import Comparison, Side, Verdict

_STEP = re.compile(r"step-(\d+)")
_NOT_METHODS = ("sft", "prompts", "pool", "density")
REFERENCE = "reference"
"""The system name of the reference texts, in studies by people too."""


@dataclass(frozen=True, slots=True)
class Pair:
    """Two answers to one prompt: `first_text` by the system `first`, `second_text` by `second`."""

    prompt_id: str
    prompt: Prompt
    first: str
    second: str
    first_text: str
    second_text: str
    reference: str | None = None

    @property
    def identical(self) -> bool:
        """Both answers are the same text: a tie that no judge has to be asked about."""
        return self.first_text == self.second_text

    def text(self, side: Side) -> str:
        return self.first_text if side == "first" else self.second_text

    def judged(self, judge: str, verdict: Verdict, *, left: Side | None, comment: str | None = None) -> Comparison:
        """The comparison record of a verdict on this pair."""
        return Comparison(
            prompt_id=self.prompt_id,
            prompt=self.prompt,
            first=self.first,
            second=self.second,
            first_text=self.first_text,
            second_text=self.second_text,
            judge=judge,
            verdict=verdict,
            left=left,
            reference=self.reference,
            comment=comment,
        )


@dataclass(frozen=True, slots=True)
class MatchUp:
    """The pairs of two systems. `counts` says what was left out; `sources` are the folders that were read."""

    first: str
    second: str
    pairs: tuple[Pair, ...]
    counts: Counter[str]
    sources: tuple[str, str]


@dataclass(frozen=True, slots=True)
class Policy:
    """Where the answers of one system stand."""

    name: str
    samples: Path


@dataclass(frozen=True, slots=True)
class RunPolicies:
    """A run directory (or one method of it): `root`, and the policies whose samples it holds, at their last step."""

    root: Path
    policies: tuple[Policy, ...]


def open_run(path: Path) -> RunPolicies:
    """The policies of a run directory, of `RUN/evaluation/METHOD`, or of `RUN/evaluation/METHOD/step-NNNNNN`.

    A run directory means all of its methods, each at its last step.
    """
    path = Path(path)
    evaluation = path / "evaluation"
    if evaluation.is_dir():
        found = (_policy(folder, folder.name) for folder in sorted(evaluation.iterdir()) if _is_method(folder))
        policies = tuple(policy for policy in found if policy)
        if not policies:
            raise InputError(f"{path} has no samples of an aligned model (evaluation/METHOD/step-*/samples).")
        return RunPolicies(path, policies)
    parts = path.resolve().parts
    if "evaluation" not in parts[:-1]:
        raise InputError(f"{path} is no run directory with evaluation samples, nor a folder below RUN/evaluation.")
    depth = len(parts) - 1 - parts[::-1].index("evaluation")
    named = [part for part in parts[depth + 1 :] if part != "samples"]
    name = "@".join(str(int(step[1])) if (step := _STEP.fullmatch(part)) else part for part in named)
    policy = Policy(name, path) if path.name == "samples" and path.is_dir() else _policy(path, name)
    if policy is None:
        raise InputError(f"{path} holds no evaluation samples (expected samples, or step-*/samples).")
    return RunPolicies(Path(*parts[:depth]), (policy,))


def match_ups(run: RunPolicies, against: str, *, prompts: int, seed: int) -> list[MatchUp]:
    """One match-up for each policy of `run` against `sft`, `chosen` (the reference texts), a method of the same run,
    or another run directory (there: the method of the same name, or its only one).

    Each side's first sample of a prompt is its answer. Prompts are chosen by a hash of seed and id, so that the
    same prompts are judged for every method, and more prompts contain fewer.
    """
    references = _references(run.root)
    result = []
    for policy in run.policies:
        opponent = _opponent(run, policy, against)
        if opponent.samples.resolve() == policy.samples.resolve():
            continue  # a method against itself, where all methods of a run are judged against one of them
        result.append(_match_up(policy, opponent, references, prompts=prompts, seed=seed))
    if not result:
        raise InputError(f"Nothing to compare: {against} is the only policy of {run.root}.")
    return result


def _is_method(folder: Path) -> bool:
    return folder.is_dir() and folder.name not in _NOT_METHODS


def _policy(folder: Path, name: str) -> Policy | None:
    if (folder / "samples").is_dir():
        return Policy(name, folder / "samples")
    steps = [step for step in folder.glob("step-*") if _STEP.fullmatch(step.name) and (step / "samples").is_dir()]
    last = max(steps, key=lambda step: int(step.name.removeprefix("step-")), default=None)
    return None if last is None else Policy(name, last / "samples")


def _opponent(run: RunPolicies, policy: Policy, against: str) -> Policy:
    evaluation = run.root / "evaluation"
    if against in ("chosen", REFERENCE):
        return Policy(REFERENCE, evaluation / "prompts")
    if against not in ("prompts", "pool") and (evaluation / against).is_dir() and "/" not in against:
        found = _policy(evaluation / against, against)
        if found is None:
            raise InputError(f"{evaluation / against} holds no samples yet.")
        return found
    if not Path(against).is_dir():
        names = ", ".join(["sft", "chosen", *(other.name for other in run.policies)])
        raise InputError(f"--against {against}: neither one of {names} nor a run directory.")
    other = open_run(Path(against))
    same_name = [candidate for candidate in other.policies if candidate.name == policy.name]
    candidates = same_name or list(other.policies)
    if len(candidates) > 1:
        names = ", ".join(candidate.name for candidate in candidates)
        raise InputError(f"{against} has no {policy.name} but {names}: name one as {against}/evaluation/METHOD.")
    return Policy(f"{other.root.resolve().name}:{candidates[0].name}", candidates[0].samples)


def _references(root: Path) -> dict[str, str]:
    folder = root / "evaluation" / "prompts"
    if not folder.is_dir():
        return {}
    return {record.id: record.completions[0].text for record in iter_records(folder) if record.completions}


def _match_up(policy: Policy, opponent: Policy, references: dict[str, str], *, prompts: int, seed: int) -> MatchUp:
    counts: Counter[str] = Counter()
    theirs = {record.id: record for record in iter_records(opponent.samples)}
    is_reference = opponent.name == REFERENCE
    pairs = []
    for record in iter_records(policy.samples):
        other = theirs.get(record.id)
        if (problem := _problem(record, other, is_reference)) is not None:
            counts[problem] += 1
            continue
        assert other is not None
        pairs.append(
            Pair(
                prompt_id=record.id,
                prompt=record.prompt,
                first=policy.name,
                second=opponent.name,
                first_text=record.completions[0].text,
                second_text=other.completions[0].text,
                reference=None if is_reference else references.get(record.id),
            )
        )
    if not pairs:
        said = ", ".join(f"{value} {name.replace('_', ' ')}" for name, value in counts.items()) or "no samples"
        raise InputError(f"No prompt is answered by both {policy.name} and {opponent.name} ({said}).")
    counts["prompts_available"] = len(pairs)
    chosen = choose(pairs, prompts=prompts, seed=seed)
    return MatchUp(policy.name, opponent.name, chosen, counts, (str(policy.samples), str(opponent.samples)))


def _problem(record: Record, other: Record | None, is_reference: bool) -> str | None:
    if not record.completions:
        return "prompt_without_sample"
    if other is None:
        return "prompt_missing_at_opponent"
    if not other.completions:
        return "no_reference_text" if is_reference else "prompt_without_sample_at_opponent"
    return "prompt_differs_at_opponent" if record.prompt != other.prompt else None


def choose(pairs: Iterable[Pair], *, prompts: int, seed: int) -> tuple[Pair, ...]:
    """The pairs of `prompts` prompts, in the order of a hash of the seed and the prompt's id.

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
