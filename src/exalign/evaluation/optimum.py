"""The best any policy could do: the frontier of π*_β ∝ π_sft exp(r/β), estimated from many samples of π_sft.

Each prompt's pool of N samples is reweighted by exp(r/β). As β falls the weight gathers on few samples; the estimate
cannot leave the pool (its KL never exceeds log N), so a point counts only while its effective sample size holds up.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from exalign.evaluation.comparison import path
from exalign.evaluation.frontier import reach, reward_at_kl
from exalign.evaluation.schema import Gap, Interval, Optimum, OptimumPoint
from exalign.evaluation.statistics import CONFIDENCE, NUM_RESAMPLES, Array, interval_of, mean_interval, resample_weights
from exalign.evaluation.tables import SampleTable, prompt_means

NUM_BETAS = 32
LEAST_ESS = 10.0
"""Below this effective sample size (median over prompts) a point is marked as unreliable.

Self-normalised weights are biased by about 1/ESS of the reward's spread: one tenth here."""


@dataclass(frozen=True, eq=False)
class PoolFrontier:
    """The estimated optimum of each prompt: `base` `[P]` is the mean reward of π_sft, the others are `[P, G]`."""

    ids: tuple[str, ...]
    betas: Array
    base: Array
    reward: Array
    kl: Array
    ess: Array
    num_samples: NDArray[np.int64]

    @property
    def reliable(self) -> NDArray[np.bool_]:
        """`[G]` bool."""
        return np.median(self.ess, axis=0) >= LEAST_ESS


def pool_frontier(pool: Mapping[str, Sequence[float]], betas: Array | None = None) -> PoolFrontier | None:
    """The optimum of every prompt from the rewards of its pool; prompts may have different numbers of samples.

    By default β runs over a geometric grid around the rewards' spread within prompts. None where the pool has no
    prompt with two samples, or no reward differs from its prompt's others: then every policy is optimal.
    """
    # Imported here so that reading evidence never loads torch.
    import torch

    from exalign.objectives.estimators import optimal_frontier

    usable = {name: np.asarray(rewards, dtype=np.float64) for name, rewards in pool.items() if len(rewards) > 1}
    spread = np.sqrt(np.mean([rewards.var() for rewards in usable.values()])) if usable else 0.0
    if spread == 0:
        return None
    if betas is None:
        betas = spread * np.geomspace(10, 0.1, NUM_BETAS)
    counts = np.array([len(rewards) for rewards in usable.values()])
    mask = np.arange(counts.max())[None, :] < counts[:, None]
    padded = np.zeros(mask.shape)
    padded[mask] = np.concatenate(list(usable.values()))
    frontier = optimal_frontier(torch.from_numpy(padded), torch.from_numpy(betas), torch.from_numpy(mask))
    return PoolFrontier(
        ids=tuple(usable),
        betas=betas,
        base=prompt_means(tuple(usable.values())),
        reward=frontier.reward.numpy(),
        kl=frontier.kl.numpy(),
        ess=frontier.effective_samples.numpy(),
        num_samples=counts,
    )


def optimum(
    pool: PoolFrontier, *, confidence: float = CONFIDENCE, num_resamples: int = NUM_RESAMPLES, seed: int = 0
) -> Optimum:
    """The frontier of the optimum over all pool prompts at a common β, with intervals over prompts."""
    count = len(pool.ids)
    weights = resample_weights(count, num_resamples=num_resamples, seed=seed)

    def intervals(values: Array) -> list[Interval]:
        resampled = weights @ values
        return [
            interval_of(values[:, g].mean(), resampled[:, g], count, confidence=confidence)
            for g in range(len(pool.betas))
        ]

    ess, reliable = np.median(pool.ess, axis=0), pool.reliable
    columns = zip(pool.betas, intervals(pool.reward), intervals(pool.kl), ess, reliable, strict=True)
    points = [OptimumPoint(float(b), reward, kl, float(e), bool(ok)) for b, reward, kl, e, ok in columns]
    return Optimum(
        points=sorted(points, key=lambda point: point.kl.estimate),
        num_prompts=count,
        fewest_samples=int(pool.num_samples.min()),
        most_samples=int(pool.num_samples.max()),
        least_ess=LEAST_ESS,
    )


def optimum_path(pool: PoolFrontier) -> tuple[Array, Array]:
    """KL and reward `[P, 1 + G]` of the optimum where it is reliable; first π_sft, which is π*_β at β = ∞."""
    kls = np.hstack([np.zeros((len(pool.ids), 1)), pool.kl[:, pool.reliable]])
    return kls, np.hstack([pool.base[:, None], pool.reward[:, pool.reliable]])


def gap_to_optimum(
    pool: PoolFrontier,
    sft: SampleTable,
    checkpoints: Sequence[SampleTable],
    **options: Any,
) -> Gap | None:
    """Optimum's reward minus the method's at equal KL, over the prompts that the pool and all samples share.

    The KL is the method's `reach`, or the largest where the optimum is reliable if that is smaller. None where
    nothing is shared, the method did not leave π_sft, or no point of the optimum is reliable. `options` are those of
    `mean_interval`.
    """
    shared = set(pool.ids).intersection(sft.ids, *(table.ids for table in checkpoints))
    ids = [name for name in pool.ids if name in shared]
    if not ids or not checkpoints or not pool.reliable.any():
        return None
    rows = [i for i, name in enumerate(pool.ids) if name in shared]
    kls, rewards = path(sft, checkpoints, ids)
    best_kls, best_rewards = (values[rows] for values in optimum_path(pool))
    kl = float(min(reach(kls, rewards), best_kls.mean(axis=0).max()))
    if kl <= 0:
        return None
    gaps = reward_at_kl(best_kls, best_rewards, kl) - reward_at_kl(kls, rewards, kl)
    first = float(kls[:, 1:].mean(axis=0).min())
    # The method's own largest KL is one of its checkpoints, up to rounding.
    return Gap(kl, mean_interval(gaps, **options), kl < first * (1 - 1e-9))
