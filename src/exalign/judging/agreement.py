"""What comparisons say together: win, tie and lose of each match-up, and how far the judges agree.

Alpha is Krippendorff's, 1 − D_o / D_e: the disagreement observed between judgements of the same item over that expected
if the same judgements were dealt out at random (K. Krippendorff, "Computing Krippendorff's Alpha-Reliability", 2011). 1
is perfect agreement, 0 is chance, below 0 is systematic disagreement. Any number of judges, any of them missing
anywhere. It is computed here, since no library gives it from sums of coincidences, of which its interval needs
thousands: one for each resample of the prompts.

Shapes: V distinct values in their order. The prompt is the unit of every interval (95 %).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import replace
from itertools import product
from typing import Any

import numpy as np

from exalign.evaluation.schema import AssessorAgreement, Interval, Tally
from exalign.evaluation.statistics import BOOTSTRAP, Array, interval_of, resample_weights
from exalign.judging.comparisons import Comparison, Verdict

OVERALL = "overall"
ORDER = {"second": 0.0, "tie": 1.0, "first": 2.0}


def verdict_on(comparison: Comparison, criterion: str) -> Verdict | None:
    """The overall verdict, or the one for a criterion; None where the judge left the criterion open."""
    return comparison.verdict if criterion == OVERALL else comparison.criteria.get(criterion)


def tally(comparisons: Iterable[Comparison], criterion: str = OVERALL) -> list[Tally]:
    """One `Tally` per match-up, in the order and orientation in which match-ups first occur.

    >>> judged = [Comparison(str(i), "Hi", "exo", "sft", "a", "b", "ann", verdict)
    ...           for i, verdict in enumerate(["first", "first", "tie", "second"])]
    >>> [(t.first, t.win.estimate, t.tie.estimate, t.score.estimate) for t in tally(judged)]
    [('exo', 0.5, 0.25, 0.625)]
    """
    match_ups: dict[frozenset[str], tuple[str, str]] = {}
    verdicts: dict[tuple[str, str], dict[str, list[Verdict]]] = {}
    for comparison in comparisons:
        systems = comparison.first, comparison.second
        names = match_ups.setdefault(frozenset(systems), systems)
        by_prompt = verdicts.setdefault(names, defaultdict(list))
        if (verdict := verdict_on(comparison.oriented(*names), criterion)) is not None:
            by_prompt[comparison.prompt_id].append(verdict)
    return [_tally(names, criterion, by_prompt) for names, by_prompt in verdicts.items()]


def _tally(names: tuple[str, str], criterion: str, by_prompt: dict[str, list[Verdict]]) -> Tally:
    readable = [[verdict for verdict in said if verdict != "unreadable"] for said in by_prompt.values()]

    def share(**worth: float) -> Interval | None:
        means = [np.mean([worth.get(verdict, 0.0) for verdict in said]) for said in readable if said]
        return BOOTSTRAP.share(np.array(means)) if means else None

    judgements = sum(map(len, readable))
    return Tally(
        *names,
        criterion,
        win=share(first=1),
        tie=share(tie=1),
        lose=share(second=1),
        score=share(first=1, tie=0.5),
        num_judgements=judgements,
        unreadable=sum(map(len, by_prompt.values())) - judgements,
    )


def krippendorff_alpha(coincidences: Array) -> float | None:
    """Ordinal alpha from the coincidences `[V, V]` of values in their order; None where it does not exist: no item with
    two judgements, or every one of those the same.

    The squared distance of two ranks is (Σ_{g=c..k} n_g − (n_c + n_k)/2)²: how many judgements lie between them, those
    at the ends by half.

    >>> krippendorff_alpha(coincidences([[1, 1], [2, 2]], [1, 2])), krippendorff_alpha(coincidences([[1, 1]], [1, 2]))
    (1.0, None)
    """
    counts = coincidences.sum(axis=1)
    middles = np.cumsum(counts) - counts / 2
    distances = (middles[:, None] - middles[None, :]) ** 2
    expected = counts @ distances @ counts
    return None if expected == 0 else float(1 - (counts.sum() - 1) * (coincidences * distances).sum() / expected)


def coincidences(items: Iterable[Sequence[float]], values: Sequence[float]) -> Array:
    """`[V, V]`: ordered pairs of the m judgements of each item, each counted 1/(m − 1)."""
    table = np.zeros((len(values), len(values)))
    for item in items:
        if len(item) > 1:
            counts = np.array([list(item).count(value) for value in values], dtype=np.float64)
            table += (np.outer(counts, counts) - np.diag(counts)) / (len(item) - 1)
    return table


def pairwise_agreement(item: Sequence[float]) -> float | None:
    """Share of the pairs of judgements of one item that are equal; None with fewer than two."""
    pairs = len(item) * (len(item) - 1)
    return sum(n * (n - 1) for n in np.unique(item, return_counts=True)[1]) / pairs if pairs else None


def cohen_kappa(pairs: Sequence[tuple[str, str]]) -> float | None:
    """(p_o − p_e) / (1 − p_e) over pairs of verdicts by two judges: agreement beyond that of their own frequencies.

    None where it does not exist: no pairs, or both always say the same one thing.

    >>> cohen_kappa([("first", "first"), ("second", "second"), ("first", "second"), ("second", "first")])
    0.0
    """
    if not pairs:
        return None
    ours, theirs = ([pair[side] for pair in pairs] for side in (0, 1))
    observed = sum(a == b for a, b in pairs) / len(pairs)
    expected = sum(ours.count(said) * theirs.count(said) for said in set(ours)) / len(pairs) ** 2
    return None if expected == 1 else (observed - expected) / (1 - expected)


def agreement(comparisons: Iterable[Comparison], criterion: str = OVERALL) -> AssessorAgreement:
    """How far the judges of these comparisons agree with one another, on the pairs that at least two of them judged.

    Match-ups are taken in the orientation in which each first occurs. Unreadable and absent verdicts take no part. A
    model asked in both orders must be reduced to one verdict per pair first, or its agreement with itself is counted.
    """
    items = [said for said in _items(comparisons, criterion, {}).values() if len(said) > 1]
    values = [(said[0][0].prompt_id, [value for _, value in said]) for said in items]
    by_prompt: dict[str, list[list[float]]] = defaultdict(list)
    for prompt, item in values:
        by_prompt[prompt].append(item)
    decided = [(prompt, [value for value in item if value != ORDER["tie"]]) for prompt, item in values]
    return AssessorAgreement(
        criterion,
        alpha=_alpha_interval(list(by_prompt.values())),
        pairwise=mean_by_prompt((prompt, pairwise_agreement(item)) for prompt, item in values),
        without_ties=mean_by_prompt((prompt, pairwise_agreement(item)) for prompt, item in decided),
        num_items=len(items),
        num_assessors=len({comparison.judge for said in items for comparison, _ in said}),
    )


def agreement_between(first: Iterable[Comparison], second: Iterable[Comparison]) -> Interval | None:
    """Share of equal verdicts over all pairs of one judgement from each side on the same item (a model and people).

    None where they have no item in common. Its interval is over prompts.
    """
    orientation: dict[frozenset[str], tuple[str, str]] = {}
    ours, theirs = _items(first, OVERALL, orientation), _items(second, OVERALL, orientation)
    both = [(said, theirs[pair]) for pair, said in ours.items() if pair in theirs]
    return mean_by_prompt(
        (said[0][0].prompt_id, float(np.mean([a == b for (_, a), (_, b) in product(said, other)])))
        for said, other in both
    )


def agreement_with(ours: Iterable[Comparison], theirs: Iterable[Comparison]) -> dict[str, Any] | None:
    """Agreement of a judge with others on the pairs that both judged, or None where there is no such pair.

    `ours` holds one verdict per pair that was asked about, `theirs` any number. `raw` is the share of equal verdicts
    over (ours, theirs), `without_ties` the same where neither said tie, both with intervals over prompts; `kappa` is
    Cohen's over the same pairs of verdicts (with several others they are pooled); `alpha` is Krippendorff's ordinal
    alpha of all of them; `theirs_among_themselves` is the share of equal pairs among the others, which bounds what can
    be asked of a judge.
    """
    others: dict[str, list[Comparison]] = defaultdict(list)
    for other in theirs:
        if other.verdict != "unreadable":
            others[other.pair].append(other)
    shared = [one for one in ours if one.verdict != "unreadable" and one.pair in others]
    if not shared:
        return None
    both = [(one, other.oriented(one.first, one.second)) for one in shared for other in others[one.pair]]
    matched = [other for _, other in both]
    decided, theirs_decided = ([one for one in side if one.verdict != "tie"] for side in (shared, matched))
    return {
        "with": sorted({other.judge for other in matched}),
        "pairs": len(shared),
        "verdicts": len(both),
        "raw": agreement_between(shared, matched),
        "without_ties": agreement_between(decided, theirs_decided),
        "kappa": cohen_kappa([(one.verdict, other.verdict) for one, other in both]),
        "alpha": agreement([*shared, *matched]).alpha,
        "theirs_among_themselves": agreement(matched).pairwise,
    }


def _items(
    comparisons: Iterable[Comparison], criterion: str, orientation: dict[frozenset[str], tuple[str, str]]
) -> dict[str, list[tuple[Comparison, float]]]:
    """The judgements with their values in `ORDER`, by what was compared; all of a match-up in one orientation: that of
    its first occurrence, which `orientation` keeps."""
    items: dict[str, list[tuple[Comparison, float]]] = defaultdict(list)
    for comparison in comparisons:
        systems = comparison.first, comparison.second
        names = orientation.setdefault(frozenset(systems), systems)
        verdict = verdict_on(comparison.oriented(*names), criterion)
        if verdict is not None and verdict != "unreadable":
            items[comparison.pair].append((comparison, ORDER[verdict]))
    return items


def _alpha_interval(prompts: list[list[list[float]]]) -> Interval | None:
    """Ordinal alpha with its bootstrap interval; resamples in which it does not exist (no variation) are left out."""
    tables = np.array([coincidences(items, sorted(ORDER.values())) for items in prompts]).reshape(-1, 3, 3)
    estimate = krippendorff_alpha(tables.sum(axis=0))
    if estimate is None:
        return None
    drawn = np.einsum("rp,pij->rij", resample_weights(len(prompts)) * len(prompts), tables)
    resampled = [alpha for table in drawn if (alpha := krippendorff_alpha(table)) is not None]
    found = interval_of(estimate, np.array(resampled), len(prompts))
    if found.low is None or found.high is None or found.high - found.low < 1e-9:
        return replace(found, low=None, high=None)  # no resample disagrees: of few items that is no certainty
    return replace(found, high=min(found.high, 1.0))


def mean_by_prompt(shares: Iterable[tuple[str, float | None]]) -> Interval | None:
    """The mean of shares that are each of a prompt, every prompt weighing the same; None where none is known."""
    by_prompt: dict[str, list[float]] = defaultdict(list)
    for prompt, share in shares:
        if share is not None:
            by_prompt[prompt].append(share)
    return BOOTSTRAP.share(np.array([np.mean(values) for values in by_prompt.values()])) if by_prompt else None
