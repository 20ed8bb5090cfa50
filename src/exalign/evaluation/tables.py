"""Evaluation records as arrays per prompt: what every number of the evidence is computed from."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from exalign.data.record import Completion, Record
from exalign.errors import InputError
from exalign.evaluation.statistics import Array

Ragged = tuple[Array, ...]
"""One array per prompt, over that prompt's samples."""


@dataclass(frozen=True, eq=False)
class SampleTable:
    """The samples of one policy: per prompt, in the order of `ids`, arrays over its M_p ≥ 1 samples.

    `log_ratios` (log π_θ − log π_sft, nats), `lengths` (tokens) and `finished` (0 or 1) are None where the samples
    do not say. `empty_prompts` had no sample and are left out.
    """

    ids: tuple[str, ...]
    rewards: Ragged
    log_ratios: Ragged | None
    lengths: Ragged | None
    finished: Ragged | None
    empty_prompts: int = 0

    @property
    def num_samples(self) -> int:
        return sum(len(values) for values in self.rewards)

    def as_reference(self) -> SampleTable:
        """The same samples as those of π_sft itself, whose log-ratios are 0 by definition."""
        return replace(self, log_ratios=tuple(np.zeros(len(values)) for values in self.rewards))

    def at(self, ids: Sequence[str]) -> list[int]:
        """Positions of `ids` in this table; each must be there."""
        position = {name: i for i, name in enumerate(self.ids)}
        return [position[name] for name in ids]


def tabulate(records: Iterable[Record], where: str) -> SampleTable:
    """Read samples; `where` names them in messages.

    A reward that is missing, NaN or infinite, log-probabilities that only some samples have, and an id that occurs
    twice are an `InputError` that names the record.
    """
    kept: list[Record] = []
    seen: set[str] = set()
    empty = 0
    for record in records:
        if record.id in seen:
            raise InputError(f"{where}: the prompt {record.id!r} occurs twice; ids must be unique.")
        seen.add(record.id)
        if record.completions:
            kept.append(record)
        else:
            empty += 1
    return SampleTable(
        ids=tuple(record.id for record in kept),
        rewards=tuple(np.array([_reward(record, c, where) for c in record.completions]) for record in kept),
        log_ratios=_log_ratios(kept, where),
        lengths=_where_all_say(kept, lambda c: None if c.token_ids is None else len(c.token_ids)),
        finished=_where_all_say(kept, lambda c: None if c.finish_reason is None else c.finish_reason == "stop"),
        empty_prompts=empty,
    )


def prompt_means(ragged: Ragged) -> Array:
    """`[P]` means within each prompt."""
    return np.array([values.mean() for values in ragged])


def common_prompts(tables: Iterable[SampleTable]) -> list[str]:
    """The ids that every table has, in the order of the first; empty for no tables."""
    tables = list(tables)
    if not tables:
        return []
    shared = set(tables[0].ids).intersection(*(table.ids for table in tables[1:]))
    return [name for name in tables[0].ids if name in shared]


def log_ratio(completion: Completion) -> float | None:
    """log π_θ(y|x) − log π_sft(y|x) in nats, or None where one of them is not recorded."""
    if completion.logprob is None or completion.reference_logprob is None:
        return None
    return completion.logprob - completion.reference_logprob


def _reward(record: Record, completion: Completion, where: str) -> float:
    if completion.reward is None or not math.isfinite(completion.reward):
        raise InputError(f"{where}: a completion of {record.id!r} has reward {completion.reward}; score it again.")
    return completion.reward


def _log_ratios(records: list[Record], where: str) -> Ragged | None:
    columns = [[log_ratio(c) for c in record.completions] for record in records]
    known = sum(value is not None for column in columns for value in column)
    if not known:
        return None
    for record, column in zip(records, columns, strict=True):
        if any(value is None or not math.isfinite(value) for value in column):
            raise InputError(
                f"{where}: a completion of {record.id!r} lacks a finite logprob or reference_logprob; evaluate again."
            )
    return tuple(np.array(column, dtype=np.float64) for column in columns)


def _where_all_say(records: list[Record], read: Callable[[Completion], float | None]) -> Ragged | None:
    columns = [[read(c) for c in record.completions] for record in records]
    if not columns or any(value is None for column in columns for value in column):
        return None
    return tuple(np.array(column, dtype=np.float64) for column in columns)
