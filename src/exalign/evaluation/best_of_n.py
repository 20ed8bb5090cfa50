"""Best-of-N from the same pool: what one gets without training, by drawing N samples and keeping the best."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from exalign.evaluation.schema import BestOfN
from exalign.evaluation.statistics import CONFIDENCE, NUM_RESAMPLES, mean_interval


def expected_best(rewards: Sequence[float], n: int) -> float:
    """The mean of the largest of `n` rewards over all subsets of size n of the pool: no draw is simulated.

    The i-th smallest of N is the largest of a subset in C(i−1, n−1) of the C(N, n) cases.

    >>> round(expected_best([0.0, 1.0, 2.0], 2), 4)
    1.6667
    """
    if not 1 <= n <= len(rewards):
        raise ValueError(f"n must be between 1 and the {len(rewards)} rewards, not {n}")
    total = math.comb(len(rewards), n)
    return sum(math.comb(i, n - 1) / total * value for i, value in enumerate(sorted(rewards)))


def best_of_n(
    pool: Mapping[str, Sequence[float]],
    *,
    confidence: float = CONFIDENCE,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> list[BestOfN]:
    """Best of 1, 2, 4, … up to the smallest pool of a prompt; empty without a pool. KL bound: log N − (N−1)/N."""
    fewest = min(map(len, pool.values()), default=0)
    points = []
    for n in (2**power for power in range(fewest.bit_length())):
        best = np.array([expected_best(rewards, n) for rewards in pool.values()])
        reward = mean_interval(best, confidence=confidence, num_resamples=num_resamples, seed=seed)
        points.append(BestOfN(n, reward, math.log(n) - (n - 1) / n))
    return points
