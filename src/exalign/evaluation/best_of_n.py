"""Best-of-N from the same pool: what one gets without training, by drawing N samples and keeping the best."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from exalign.evaluation.schema import BestOfN, WinRate
from exalign.evaluation.statistics import CONFIDENCE, NUM_RESAMPLES, Array, mean_interval
from exalign.evaluation.tables import SampleTable


def rank_weights(num_samples: int, n: int) -> Array:
    """`[N]`: the probability that the i-th smallest of N samples is the best of n of them, drawn without replacement.

    The i-th smallest is the largest of a subset of size n in C(i−1, n−1) of the C(N, n) cases: no draw is simulated.
    Equal samples may be ranked either way.

    >>> rank_weights(3, 2)
    array([0.        , 0.33333333, 0.66666667])
    """
    if not 1 <= n <= num_samples:
        raise ValueError(f"n must be between 1 and the {num_samples} rewards, not {n}")
    total = math.comb(num_samples, n)
    return np.array([math.comb(i, n - 1) / total for i in range(num_samples)])


def expected_best(rewards: Sequence[float], n: int) -> float:
    """The mean of the largest of `n` rewards over all subsets of size n of the pool.

    >>> round(expected_best([0.0, 1.0, 2.0], 2), 4)
    1.6667
    """
    return float(rank_weights(len(rewards), n) @ np.sort(rewards))


def best_of_n_shares(pool: Sequence[float], theirs: Array, n: int) -> tuple[float, float]:
    """Shares of wins (a tie counts half) and of ties of the best of `n` of the pool against each of `theirs`.

    The means over all subsets of size n of the pool, all of `theirs`, of one prompt; of the whole pool where n = N.

    >>> best_of_n_shares([0.0, 1.0, 2.0], np.array([1.0]), 2)
    (0.8333333333333333, 0.3333333333333333)
    """
    weights, difference = rank_weights(len(pool), n), np.sort(pool)[:, None] - theirs[None, :]
    ties = float(weights @ (difference == 0).mean(axis=1))
    return float(weights @ (difference > 0).mean(axis=1)) + ties / 2, ties


def best_of_n(
    pool: Mapping[str, Sequence[float]],
    opponents: Mapping[str, SampleTable] | None = None,
    *,
    confidence: float = CONFIDENCE,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> list[BestOfN]:
    """Best of 1, 2, 4, … and of as many as the smallest pool of a prompt has; empty without a pool.

    KL bound: log N − (N−1)/N. Each has its win rates against `opponents`, by name, scored by the pool's scorer and
    independent of the pool, on the prompts that both have.
    """
    options: dict[str, Any] = {"confidence": confidence, "num_resamples": num_resamples, "seed": seed}
    fewest = min(map(len, pool.values()), default=0)
    points = []
    for n in sorted({2**power for power in range(fewest.bit_length())} | ({fewest} if fewest else set())):
        best = np.array([expected_best(rewards, n) for rewards in pool.values()])
        rates = [_win_rate(pool, table, n, who, options) for who, table in (opponents or {}).items()]
        won = [rate for rate in rates if rate is not None]
        points.append(BestOfN(n, mean_interval(best, **options), math.log(n) - (n - 1) / n, won))
    return points


def _win_rate(
    pool: Mapping[str, Sequence[float]], theirs: SampleTable, n: int, opponent: str, options: Mapping[str, Any]
) -> WinRate | None:
    """As `winrate.win_rate`, with the pairs weighted by `rank_weights`; `num_pairs` counts them before that."""
    against = {key: rewards for key, rewards in zip(theirs.ids, theirs.rewards, strict=True) if key in pool}
    if not against:
        return None
    shares = np.array([best_of_n_shares(pool[key], rewards, n) for key, rewards in against.items()])
    return WinRate(
        opponent=opponent,
        rate=mean_interval(shares[:, 0], **options),
        ties=float(shares[:, 1].mean()),
        num_pairs=sum(len(pool[key]) * len(rewards) for key, rewards in against.items()),
        missing_prompts=len(set(pool).symmetric_difference(theirs.ids)),
    )
