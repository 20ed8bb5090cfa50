"""Plan a study by people: which answers meet, who judges them, and what stands on the left.

Everything is a function of the samples and the seed. All match-ups use the same prompts, so that they can be compared,
and those are the prompts that `exalign judge` takes with the same seed.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from exalign.errors import InputError
from exalign.evaluation.run_folder import RunFolder
from exalign.judging.comparisons import Pair, Side
from exalign.judging.pairing import choose, match_up, reference_texts, system


@dataclass(frozen=True, slots=True)
class Assignment:
    """Assessor (index) judges item (index) as number `position` (from 1), with the side `left` on the left."""

    assessor: int
    item: int
    position: int
    left: Side


@dataclass(frozen=True, slots=True)
class Study:
    """A planned study. `counts` says what was left out, and what is worth knowing about the items (`identical_pair`,
    `no_reference`)."""

    name: str
    seed: int
    assessors: tuple[str, ...]
    items: tuple[Pair, ...]
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

    The systems are named as `pairing` says. Too few prompts that all of them answered, or more judgements per item than
    assessors, is an `InputError`.
    """
    per_item = len(assessors) if per_item is None else per_item
    if not 1 <= per_item <= len(assessors):
        raise InputError(f"{per_item} judgements per comparison need as many assessors; there are {len(assessors)}.")
    if len(set(assessors)) < len(assessors):
        raise InputError("Two assessors have the same name; their verdicts could not be told apart.")
    folder = RunFolder(run)
    systems = {one: system(folder, one) for one in dict.fromkeys(one for match in matches for one in match)}
    references = reference_texts(folder)
    found = [match_up(systems[first], systems[second], references) for first, second in matches]
    shared = set.intersection(*({pair.prompt_id for pair in one.pairs} for one in found))
    if len(shared) < num_prompts:
        said = f"{', '.join(systems)} share only {len(shared)} in {run}"
        raise InputError(f"{num_prompts} prompts asked for, but {said}.")
    # Chosen pairs stay in the order of the match-ups within each prompt, which `assign` relies on.
    pairs = (pair for one in found for pair in one.pairs if pair.prompt_id in shared)
    items = choose(pairs, prompts=num_prompts, seed=seed)
    counts = sum((one.counts for one in found), Counter())
    del counts["prompts_available"]
    for item in items:
        counts["identical_pair"] += item.identical
        counts["no_reference"] += item.reference is None
    assignments = assign(len(items), len(assessors), per_item, num_matches=len(matches), seed=seed)
    return Study(name, seed, tuple(assessors), items, assignments, dict(+counts))


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
