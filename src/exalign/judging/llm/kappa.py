"""Agreement of a judge with other judges of the same pairs: what `summary.json` says about it."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import asdict
from typing import Any

import numpy as np

from exalign.judging.agreement import agreement, agreement_between
from exalign.judging.comparison import Comparison


def cohen_kappa(pairs: Sequence[tuple[str, str]]) -> float | None:
    """(p_o − p_e) / (1 − p_e) over pairs of verdicts by two judges: agreement beyond that of their own frequencies.

    None where it does not exist: no pairs, or both always say the same one thing.

    >>> cohen_kappa([("first", "first"), ("second", "second"), ("first", "second"), ("second", "first")])
    0.0
    """
    if not pairs:
        return None
    said = sorted({verdict for pair in pairs for verdict in pair})
    table = np.zeros((len(said), len(said)))
    for ours, theirs in pairs:
        table[said.index(ours), said.index(theirs)] += 1 / len(pairs)
    expected = float(table.sum(axis=1) @ table.sum(axis=0))
    return None if expected > 1 - 1e-12 else float((np.trace(table) - expected) / (1 - expected))


def agreement_with(ours: Sequence[Comparison], theirs: Sequence[Comparison]) -> dict[str, Any] | None:
    """Agreement of a judge with others on the pairs that both judged, or None where there is no such pair.

    `ours` holds one verdict per pair that was asked about, `theirs` any number. `raw` is the share of equal verdicts
    over (ours, theirs), `without_ties` the same where neither said tie, both with intervals over prompts; `kappa` is
    Cohen's over the same pairs of verdicts (with several others they are pooled); `alpha` is Krippendorff's ordinal
    alpha of all of them; `theirs_among_themselves` is the share of equal pairs among the others, which bounds what can
    be asked of a judge.
    """
    readable = [comparison for comparison in ours if comparison.verdict != "unreadable"]
    others = _by_pair(comparison for comparison in theirs if comparison.verdict != "unreadable")
    shared = [comparison for comparison in readable if comparison.pair in others]
    if not shared:
        return None
    matched = [other for comparison in shared for other in others[comparison.pair]]
    verdicts = [
        (comparison.verdict, other.oriented(comparison.first, comparison.second).verdict)
        for comparison in shared
        for other in others[comparison.pair]
    ]
    decided = [c for c in shared if c.verdict != "tie"], [c for c in matched if c.verdict != "tie"]
    raw, without_ties = agreement_between(shared, matched), agreement_between(*decided)
    alpha, among = agreement([*shared, *matched]).alpha, agreement(matched)
    return {
        "with": sorted({comparison.judge for comparison in matched}),
        "pairs": len(shared),
        "verdicts": len(verdicts),
        "raw": asdict(raw) if raw else None,
        "without_ties": asdict(without_ties) if without_ties else None,
        "kappa": cohen_kappa(verdicts),
        "alpha": asdict(alpha) if alpha else None,
        "theirs_among_themselves": asdict(among.pairwise) if among.pairwise else None,
    }


def _by_pair(comparisons: Iterable[Comparison]) -> dict[str, list[Comparison]]:
    found: dict[str, list[Comparison]] = defaultdict(list)
    for comparison in comparisons:
        found[comparison.pair].append(comparison)
    return found
