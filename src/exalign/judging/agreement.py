"""How far judges agree: Krippendorff's alpha and the share of agreeing pairs.

Alpha is 1 − D_o / D_e: the disagreement observed between judgements of the same item over that expected if the same
judgements were dealt out at random (K. Krippendorff, "Computing Krippendorff's Alpha-Reliability", 2011). 1 is perfect
agreement, 0 is chance, below 0 is systematic disagreement. Any number of judges, any of them missing anywhere.

Shapes: U items, V distinct values in their order.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import product

import numpy as np
from numpy.typing import NDArray

from exalign.evaluation.schema import Interval
from exalign.evaluation.statistics import interval_of, mean_interval, resample_weights
from exalign.judging.comparison import Comparison
from exalign.judging.tally import OVERALL, verdict_on

Array = NDArray[np.float64]
Distance = Callable[[Array, Array], Array]
"""From the V values and how often each was given, the squared distances `[V, V]` between them."""
ORDER = {"second": 0.0, "tie": 1.0, "first": 2.0}


def nominal_distance(values: Array, counts: Array) -> Array:
    """0 for equal values, 1 for others."""
    return 1.0 - np.eye(len(values))


def ordinal_distance(values: Array, counts: Array) -> Array:
    """(Σ_{g=c..k} n_g − (n_c + n_k)/2)²: how many judgements lie between two ranks, those at the ends by half."""
    middles = np.cumsum(counts) - counts / 2
    return (middles[:, None] - middles[None, :]) ** 2


def interval_distance(values: Array, counts: Array) -> Array:
    """(c − k)²."""
    return (values[:, None] - values[None, :]) ** 2


def krippendorff_alpha(items: Sequence[Sequence[float]], distance: Distance = ordinal_distance) -> float | None:
    """Alpha of the judgements of each item (who gave which does not matter; absent ones are just not there).

    None where it does not exist: no item with two judgements, or every pairable judgement the same.

    >>> krippendorff_alpha([[1, 1], [2, 2], [3, 3]]), krippendorff_alpha([[1, 1], [1, 1]])
    (1.0, None)
    """
    values = np.unique([value for item in items for value in item])
    return _alpha(values, _coincidences(items, values).sum(axis=0), distance)


def pairwise_agreement(item: Sequence[float]) -> float | None:
    """Share of the pairs of judgements of one item that are equal; None with fewer than two."""
    pairs = len(item) * (len(item) - 1)
    return sum(n * (n - 1) for n in np.unique(item, return_counts=True)[1]) / pairs if pairs else None


@dataclass(frozen=True)
class Agreement:
    """Agreement of judges on the items (two answers to one prompt) that at least two of them judged.

    `alpha` is ordinal over lose < tie < win; `pairwise` the share of equal pairs of judgements; `without_ties` the same
    over pairs in which neither said tie. Intervals (95 %) are over prompts; None where a quantity does not exist.
    """

    criterion: str
    alpha: Interval | None
    pairwise: Interval | None
    without_ties: Interval | None
    num_items: int
    num_judgements: int
    judges: tuple[str, ...]


def agreement(comparisons: Iterable[Comparison], criterion: str = OVERALL) -> Agreement:
    """How far the judges of these comparisons agree with one another.

    Match-ups are taken in the orientation in which each first occurs. Unreadable and absent verdicts take no part. A
    model asked in both orders must be reduced to one verdict per pair first, or its agreement with itself is counted.
    """
    items = {pair: item for pair, item in _items(comparisons, criterion).items() if len(item.values) > 1}
    by_prompt: dict[str, list[_Item]] = defaultdict(list)
    for item in items.values():
        by_prompt[item.prompt_id].append(item)
    without_ties = [[value for value in item.values if value != ORDER["tie"]] for item in items.values()]
    prompts = [item.prompt_id for item in items.values()]
    return Agreement(
        criterion=criterion,
        alpha=_alpha_interval([[item.values for item in group] for group in by_prompt.values()]),
        pairwise=_mean_by_prompt(prompts, [pairwise_agreement(item.values) for item in items.values()]),
        without_ties=_mean_by_prompt(prompts, [pairwise_agreement(values) for values in without_ties]),
        num_items=len(items),
        num_judgements=sum(len(item.values) for item in items.values()),
        judges=tuple(sorted({judge for item in items.values() for judge in item.judges})),
    )


def agreement_between(
    first: Iterable[Comparison], second: Iterable[Comparison], criterion: str = OVERALL
) -> Interval | None:
    """Share of equal verdicts over all pairs of one judgement from each side on the same item (a model and people).

    None where they have no item in common. Its interval is over prompts.
    """
    first = list(first)
    orientation = {frozenset((c.first, c.second)): (c.first, c.second) for c in reversed(first)}
    ours, theirs = _items(first, criterion, orientation), _items(second, criterion, orientation)
    both = [(ours[pair], theirs[pair]) for pair in ours if pair in theirs]
    shares = [float(np.mean([a == b for a, b in product(ours.values, theirs.values)])) for ours, theirs in both]
    return _mean_by_prompt([item.prompt_id for item, _ in both], list(shares))


@dataclass(frozen=True)
class _Item:
    prompt_id: str
    values: list[float]
    judges: list[str]


def _items(
    comparisons: Iterable[Comparison], criterion: str, orientation: dict[frozenset[str], tuple[str, str]] | None = None
) -> dict[str, _Item]:
    """The judgements by what was compared, all of a match-up in one orientation."""
    orientation = {} if orientation is None else orientation
    items: dict[str, _Item] = {}
    for comparison in comparisons:
        systems = comparison.first, comparison.second
        names = orientation.setdefault(frozenset(systems), systems)
        verdict = verdict_on(comparison.oriented(*names), criterion)
        if verdict is not None and verdict != "unreadable":
            item = items.setdefault(comparison.pair, _Item(comparison.prompt_id, [], []))
            item.values.append(ORDER[verdict])
            item.judges.append(comparison.judge)
    return items


def _coincidences(items: Sequence[Sequence[float]], values: Array) -> Array:
    """`[U, V, V]`: per item, ordered pairs of its m judgements, each counted 1/(m − 1)."""
    tables = np.zeros((len(items), len(values), len(values)))
    for table, item in zip(tables, items, strict=True):
        if len(item) > 1:
            counts = (np.asarray(item)[:, None] == values).sum(axis=0).astype(np.float64)
            table[:] = (np.outer(counts, counts) - np.diag(counts)) / (len(item) - 1)
    return tables


def _alpha(values: Array, coincidences: Array, distance: Distance) -> float | None:
    counts = coincidences.sum(axis=1)
    total = counts.sum()
    distances = distance(values, counts)
    expected = counts @ distances @ counts
    return None if expected == 0 else float(1 - (total - 1) * (coincidences * distances).sum() / expected)


def _alpha_interval(prompts: list[list[list[float]]]) -> Interval | None:
    """Ordinal alpha with its bootstrap interval; resamples in which it does not exist (no variation) are left out."""
    values = np.array(sorted(ORDER.values()))
    tables = np.array([_coincidences(items, values).sum(axis=0) for items in prompts]).reshape(-1, 3, 3)
    estimate = _alpha(values, tables.sum(axis=0), ordinal_distance)
    if estimate is None:
        return None
    drawn = np.einsum("rp,pij->rij", resample_weights(len(prompts)) * len(prompts), tables)
    resampled = [alpha for table in drawn if (alpha := _alpha(values, table, ordinal_distance)) is not None]
    return interval_of(estimate, np.array(resampled), len(prompts))


def _mean_by_prompt(prompts: Sequence[str], shares: Sequence[float | None]) -> Interval | None:
    by_prompt: dict[str, list[float]] = defaultdict(list)
    for prompt, share in zip(prompts, shares, strict=True):
        if share is not None:
            by_prompt[prompt].append(share)
    return mean_interval(np.array([np.mean(values) for values in by_prompt.values()])) if by_prompt else None
