"""Methods compared at equal KL: the only fair comparison of rewards, since reward can be bought with KL.

A method's path is π_sft (KL 0) and its best checkpoints in order of their KL (see `reward_at_kl`). All quantities
come from the same prompts, so differences between methods are paired.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import combinations
from typing import Any

import numpy as np

from exalign.evaluation.frontier import reach, reward_at_kl
from exalign.evaluation.schema import Comparison, EqualKL, Interval, Standing
from exalign.evaluation.statistics import Array, mean_interval, paired_difference
from exalign.evaluation.tables import SampleTable, common_prompts, prompt_means

LEAST_MOVE = 0.05
"""A method whose reach in KL is below this share of the farthest of all is not compared at the common KL."""


class Paths:
    """Every method's path over the prompts that all of them share: `[P, C]` KL and reward, π_sft in column 0."""

    def __init__(self, sft: SampleTable, methods: Mapping[str, Sequence[SampleTable]], **options: Any) -> None:
        evaluated = {name: checkpoints for name, checkpoints in methods.items() if checkpoints}
        self.ids = common_prompts([sft, *(table for tables in evaluated.values() for table in tables)])
        self._options = options
        self._columns = {name: path(sft, tables, self.ids) for name, tables in evaluated.items() if self.ids}

    @property
    def methods(self) -> list[str]:
        return list(self._columns)

    def reach(self, method: str) -> float:
        """The KL of a method's farthest checkpoint that no other of its own beats."""
        return reach(*self._columns[method])

    def reward(self, method: str, kl: float) -> Array:
        """`[P]` values whose mean is the method's reward at `kl`; the same prompts for every method."""
        return reward_at_kl(*self._columns[method], kl)

    def interval(self, values: Array) -> Interval:
        """The mean of `[P]` values with the interval that the options given to the constructor ask for."""
        return mean_interval(values, **self._options)


def path(sft: SampleTable, checkpoints: Sequence[SampleTable], ids: Sequence[str]) -> tuple[Array, Array]:
    """Per-prompt mean KL and reward `[P, 1 + C]` over `ids`: π_sft in column 0, then the checkpoints."""
    kls, rewards = [], []
    for table in (sft.as_reference(), *checkpoints):
        if table.log_ratios is None:
            raise ValueError("a method's samples need log-ratios")
        at = table.at(ids)
        kls.append(prompt_means(table.log_ratios)[at])
        rewards.append(prompt_means(table.rewards)[at])
    return np.stack(kls, axis=1), np.stack(rewards, axis=1)


def compare_pairs(paths: Paths) -> list[Comparison]:
    """Every two methods at the largest KL both reach, the better one first; without a positive KL there is none."""
    found = []
    for first, second in combinations(paths.methods, 2):
        kl = min(paths.reach(first), paths.reach(second))
        if kl <= 0:
            continue
        difference = paths.reward(first, kl) - paths.reward(second, kl)
        if difference.mean() < 0:
            first, second, difference = second, first, -difference
        found.append(Comparison(first, second, kl, paths.interval(difference)))
    return found


def compare_all(paths: Paths, *, among: Sequence[str]) -> EqualKL | None:
    """The methods `among`, ranked by reward at the largest KL that all of them reach.

    A method that hardly left π_sft would drag the common KL to where all are alike: it is named, not compared.
    """
    reaches = {name: paths.reach(name) for name in paths.methods if name in among}
    farthest = max(reaches.values(), default=0.0)
    compared = {name: reach for name, reach in reaches.items() if reach > LEAST_MOVE * farthest}
    if not compared:
        return None
    kl = min(compared.values())
    readings = {name: paths.reward(name, kl) for name in compared}
    ranked = sorted(readings, key=lambda name: -readings[name].mean())
    lead = readings[ranked[0]]
    standings = [
        Standing(name, paths.interval(readings[name]), None if i == 0 else paths.interval(lead - readings[name]))
        for i, name in enumerate(ranked)
    ]
    return EqualKL(kl, standings, [name for name in reaches if name not in compared])


def reward_gain(table: SampleTable, sft: SampleTable, **options: Any) -> Interval | None:
    """Mean reward of a policy minus that of π_sft over the prompts both have, paired; None where they share none."""
    ids = common_prompts([table, sft])
    if not ids:
        return None
    ours, theirs = (prompt_means(t.rewards)[t.at(ids)] for t in (table, sft))
    return paired_difference(ours, theirs, **options)
