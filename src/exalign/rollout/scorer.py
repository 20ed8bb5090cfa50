"""What every scorer is: records in, one reward for each completion out."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from typing import Protocol

from exalign.data.record import Record
from exalign.errors import InputError


class Scorer(Protocol):
    """Gives each completion a reward r(x, y): a finite number, higher is better.

    `score` returns one list per record, as long as the record has completions, in the same order. A completion's
    reward depends on its prompt and itself alone, never on what else is scored with it.
    """

    def score(self, records: Sequence[Record]) -> list[list[float]]: ...


def scored(scorer: Scorer, records: Sequence[Record], counts: Counter[str]) -> list[Record]:
    """The records with the scorer's rewards.

    What the scorer cut to read it, which changes a reward and no record, is added to `counts`: `prompts_cut_in_scoring`
    and `completions_cut_in_scoring`.
    """
    before = Counter(_cuts(scorer))
    rewards = scorer.score(records)
    for name, number in (_cuts(scorer) - before).items():
        counts[f"{name}_in_scoring"] += number
    return [record.with_rewards(row) for record, row in zip(records, rewards, strict=True)]


def _cuts(scorer: Scorer) -> Counter[str]:
    """What a scorer has cut so far; those of other people's making may not say."""
    counts = getattr(scorer, "counts", None)
    return counts if isinstance(counts, Counter) else Counter()


def check_rewards(rewards: Sequence[Sequence[float]], records: Sequence[Record], *, source: str) -> list[list[float]]:
    """The rewards as lists of floats; a wrong count, a value that is no number, NaN or infinity is an `InputError`.

    >>> from exalign.data.record import Completion
    >>> record = Record(id="7", prompt="Hi", completions=(Completion("a"), Completion("b")))
    >>> check_rewards([[1, 2.5]], [record], source="length")
    [[1.0, 2.5]]
    >>> check_rewards([[1.0, float("nan")]], [record], source="length")
    Traceback (most recent call last):
    exalign.errors.InputError: length gave the reward nan to completion 1 of record 7; rewards must be finite numbers.
    """
    if len(rewards) != len(records):
        raise InputError(f"{source} gave rewards for {len(rewards)} prompts, but there are {len(records)}.")
    checked = []
    for values, record in zip(rewards, records, strict=True):
        if len(values) != len(record.completions):
            raise InputError(
                f"{source} gave {len(values)} rewards to record {record.id}, which has {len(record.completions)} "
                "completions."
            )
        checked.append([_finite(value, record, position, source) for position, value in enumerate(values)])
    return checked


def _finite(value: object, record: Record, position: int, source: str) -> float:
    try:
        number = float(value)  # type: ignore[arg-type]
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise InputError(
            f"{source} gave the reward {value} to completion {position} of record {record.id}; "
            "rewards must be finite numbers."
        )
    return number
