"""Plan a study from a run's evaluation samples: which answers meet, who judges them, and what stands on the left.

Everything is a function of the samples and the seed. The first sample of each system answers for it, so that
nobody chose it. All match-ups use the same prompts, so that they can be compared.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from exalign.data.record import Prompt
from exalign.data.store import iter_records
from exalign.errors import InputError
from exalign.judging.comparison import Side

REFERENCE = "reference"
"""The system name of the reference texts: `--match exo:reference` sets a method against them."""


@dataclass(frozen=True, slots=True)
class Item:
    """Two answers to one prompt, and the reference answer that the assessor may fold out (where there is one)."""

    prompt_id: str
    prompt: Prompt
    first: str
    second: str
    first_text: str
    second_text: str
    reference: str | None


@dataclass(frozen=True, slots=True)
class Assignment:
    """Assessor (index) judges item (index) as number `position` (from 1), with the side `left` on the left."""

    assessor: int
    item: int
    position: int
    left: Side


@dataclass(frozen=True, slots=True)
class Study:
    """A planned study. `counts` says what is worth knowing about the items (`identical_pair`, `no_reference`)."""

    name: str
    seed: int
    assessors: tuple[str, ...]
    items: tuple[Item, ...]
    assignments: tuple[Assignment, ...]
    counts: dict[str, int]


def parse_matches(text: str) -> list[tuple[str, str]]:
    """`exo:dpo,exo:sft` as pairs of systems.

    >>> parse_matches("exo:dpo, exo:sft")
    [('exo', 'dpo'), ('exo', 'sft')]
    """
    pairs = []
    for part in text.split(","):
        names = [name.strip() for name in part.split(":")]
        if len(names) != 2 or not all(names):
            raise InputError(f"--match: {part.strip()!r} is not FIRST:SECOND (for example exo:dpo,exo:sft).")
        if names[0] == names[1]:
            raise InputError(f"--match: {names[0]} cannot meet itself.")
        pairs.append((names[0], names[1]))
    if len({frozenset(pair) for pair in pairs}) < len(pairs):
        raise InputError(f"--match: {text} names a match-up twice.")
    return pairs


def plan_study(
    run: Path,
    matches: Sequence[tuple[str, str]],
    *,
    name: str,
    num_prompts: int,
    assessors: Sequence[str],
    per_item: int | None = None,
    seed: int = 0,
) -> Study:
    """A study of `num_prompts` prompts × matches, each judged by `per_item` of the assessors (default: by all).

    A system is `sft`, `reference`, a method (its last evaluated step) or METHOD@STEP. Too few prompts that all
    systems answered, or more judgements per item than assessors, is an `InputError`.
    """
    per_item = len(assessors) if per_item is None else per_item
    if not 1 <= per_item <= len(assessors):
        raise InputError(f"{per_item} judgements per comparison need as many assessors; there are {len(assessors)}.")
    if len(set(assessors)) < len(assessors):
        raise InputError("Two assessors have the same name; their verdicts could not be told apart.")
    items, counts = _items(Path(run), matches, num_prompts, random.Random(f"items-{seed}"))
    assignments = assign(len(items), len(assessors), per_item, num_matches=len(matches), seed=seed)
    return Study(name, seed, tuple(assessors), items, assignments, dict(counts))


def assign(num_items: int, num_assessors: int, per_item: int, *, num_matches: int, seed: int) -> tuple[Assignment, ...]:
    """Who judges which item, in which order and with which side on the left; item i belongs to match-up i % matches.

    Balanced: assessors' loads differ by at most 1. Of the judgements of one item, the sides differ by at most 1. For
    one assessor in one match-up they are kept as even as the items allow (a test bounds the difference by 3).
    Blind: each assessor's order is shuffled on its own, so that it tells nothing about match-up or side.
    """
    rng = random.Random(f"assign-{seed}")
    turn = rng.sample(range(num_assessors), num_assessors)
    chosen: list[list[tuple[int, Side]]] = [[] for _ in range(num_assessors)]
    leaning = Counter[tuple[int, int]]()
    order = [i for match in range(num_matches) for i in range(match, num_items, num_matches)]
    for rank, item in enumerate(order):
        people = [turn[(rank * per_item + k) % num_assessors] for k in range(per_item)]
        rng.shuffle(people)
        people.sort(key=lambda person: leaning[person, item % num_matches])
        for k, person in enumerate(people):
            lean = leaning[person, item % num_matches]
            middle = per_item % 2 == 1 and k == per_item // 2
            on_left = (lean < 0 or (lean == 0 and rng.random() < 0.5)) if middle else k < per_item // 2
            leaning[person, item % num_matches] += 1 if on_left else -1
            chosen[person].append((item, "first" if on_left else "second"))
    assignments = []
    for person, tasks in enumerate(chosen):
        rng.shuffle(tasks)
        assignments += [Assignment(person, item, n, left) for n, (item, left) in enumerate(tasks, start=1)]
    return tuple(assignments)


def _items(
    run: Path, matches: Sequence[tuple[str, str]], num_prompts: int, rng: random.Random
) -> tuple[tuple[Item, ...], Counter[str]]:
    names = list(dict.fromkeys(name for match in matches for name in match))
    answers = {name: first_answers(run, name) for name in names}
    references = _references(run)
    prompts: dict[str, Prompt] = {}
    for name in names:
        for prompt_id, (prompt, _) in answers[name].items():
            if prompts.setdefault(prompt_id, prompt) != prompt:
                raise InputError(f"Prompt {prompt_id} differs between the samples of {name} and others of {run}.")
    shared = sorted(prompt_id for prompt_id in prompts if all(prompt_id in answers[name] for name in names))
    if len(shared) < num_prompts:
        raise InputError(f"{num_prompts} prompts asked for, but {', '.join(names)} share only {len(shared)} in {run}.")
    counts: Counter[str] = Counter()
    items = []
    for prompt_id in rng.sample(shared, num_prompts):
        for first, second in matches:
            reference = None if REFERENCE in (first, second) else references.get(prompt_id)
            first_text, second_text = answers[first][prompt_id][1], answers[second][prompt_id][1]
            items.append(Item(prompt_id, prompts[prompt_id], first, second, first_text, second_text, reference))
            counts["identical_pair"] += first_text == second_text
            counts["no_reference"] += reference is None
    return tuple(items), +counts


def first_answers(run: Path, name: str) -> dict[str, tuple[Prompt, str]]:
    """The first sample of every prompt that the system answered."""
    folder = run / "evaluation" / "prompts" if name == REFERENCE else _samples_folder(run, name)
    answers = {r.id: (r.prompt, r.completions[0].text) for r in iter_records(folder) if r.completions}
    if not answers:
        raise InputError(f"{folder} holds no {'reference texts' if name == REFERENCE else 'samples'}.")
    return answers


def _references(run: Path) -> dict[str, str]:
    folder = run / "evaluation" / "prompts"
    return {r.id: r.completions[0].text for r in iter_records(folder) if r.completions} if folder.exists() else {}


def _samples_folder(run: Path, name: str) -> Path:
    method, _, step = name.partition("@")
    base = run / "evaluation" / method
    if name == "sft":
        found = [base / "samples"]
    elif step:
        found = [path for path in base.glob("step-*/samples") if path.parent.name == f"step-{step.zfill(6)}"]
    else:
        found = sorted(base.glob("step-*/samples"))[-1:]
    if not found or not found[0].exists():
        there = sorted(path.name for path in (run / "evaluation").glob("*") if path.is_dir())
        known = ", ".join(n for n in there if n not in ("prompts", "pool", "density")) or "nothing"
        raise InputError(f"{run} has no evaluation samples of {name}; evaluated there: {known}.")
    return found[0]
