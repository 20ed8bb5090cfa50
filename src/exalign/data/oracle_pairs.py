"""Preference pairs from scored samples: what a person (or here the oracle) says of two samples of π_sft."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace

from exalign.data.records import Record
from exalign.errors import InputError


def pairs_from_rewards(records: Iterable[Record], counts: Counter[str]) -> Iterator[Record]:
    """Pairs of samples of one prompt, the one with the higher reward preferred (the paper's preference data).

    The K samples of a record are taken two by two as they stand, (1, 2), (3, 4), …: disjoint pairs of independent
    samples, as when each pair had been drawn for itself. Taking the best against the worst instead would change the
    distribution that the preferences come from. Counted: `pairs`, and what is dropped, `pairs_tied` (equal
    rewards) and `samples_without_partner` (K odd). Ids are those of the records, with `#2`, `#3`, … for further
    pairs. A record without rewards, or with one that is not finite, is an `InputError` that names it.

    >>> from exalign.data.records import Completion
    >>> scored = Record("7", "Hi", tuple(Completion(t, reward=r) for t, r in [("a", 0.0), ("b", 2.0), ("c", 1.0)]))
    >>> [(p.id, [c.text for c in p.completions], p.preferred) for p in pairs_from_rewards([scored], Counter())]
    [('7', ['a', 'b'], 1)]
    """
    for record in records:
        rewards = record.rewards
        if rewards is None or not all(math.isfinite(reward) for reward in rewards):
            raise InputError(f"Record {record.id} has no finite reward for each completion: score the records first.")
        if len(rewards) % 2:
            counts["samples_without_partner"] += 1
        for first in range(0, len(rewards) - 1, 2):
            left, right = rewards[first : first + 2]
            if left == right:
                counts["pairs_tied"] += 1
                continue
            counts["pairs"] += 1
            yield replace(
                record,
                id=record.id if first == 0 else f"{record.id}#{first // 2 + 1}",
                completions=record.completions[first : first + 2],
                preferred=0 if left > right else 1,
            )
