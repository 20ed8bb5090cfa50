"""How often a policy's sample has the higher reward: over all pairs, by prompt."""

from __future__ import annotations

import numpy as np

from exalign.evaluation.schema import WinRate
from exalign.evaluation.statistics import CONFIDENCE, NUM_RESAMPLES, Array, mean_interval
from exalign.evaluation.tables import SampleTable, common_prompts


def pair_shares(ours: Array, theirs: Array) -> tuple[float, float]:
    """Shares of wins (a tie counts half) and of ties over all M × N pairs of rewards of one prompt.

    >>> pair_shares(np.array([1.0, 3.0]), np.array([1.0, 2.0]))
    (0.625, 0.25)
    """
    difference = ours[:, None] - theirs[None, :]
    ties = float((difference == 0).mean())
    return float((difference > 0).mean()) + ties / 2, ties


def win_rate(
    ours: SampleTable,
    theirs: SampleTable,
    *,
    opponent: str,
    confidence: float = CONFIDENCE,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> WinRate | None:
    """Win rate of `ours` over `theirs`, both scored by the same scorer: the mean over prompts of the share of pairs.

    Prompts that only one side has are counted in `missing_prompts`; None where no prompt is shared.
    """
    ids = common_prompts([ours, theirs])
    if not ids:
        return None
    pairs = [(ours.rewards[i], theirs.rewards[j]) for i, j in zip(ours.at(ids), theirs.at(ids), strict=True)]
    shares = np.array([pair_shares(mine, other) for mine, other in pairs])
    return WinRate(
        opponent=opponent,
        rate=mean_interval(shares[:, 0], confidence=confidence, num_resamples=num_resamples, seed=seed),
        ties=float(shares[:, 1].mean()),
        num_pairs=sum(len(mine) * len(other) for mine, other in pairs),
        missing_prompts=len(set(ours.ids).symmetric_difference(theirs.ids)),
    )
