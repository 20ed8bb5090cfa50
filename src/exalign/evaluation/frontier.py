"""The frontier: what reward a checkpoint reaches, and how far from π_sft it went for it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from exalign.errors import InputError
from exalign.evaluation.schema import FrontierPoint, Interval, WinRate
from exalign.evaluation.statistics import CONFIDENCE, NUM_RESAMPLES, Array, interval_of, resample_weights
from exalign.evaluation.tables import Ragged, SampleTable, prompt_means


def frontier_point(
    table: SampleTable,
    *,
    step: int,
    rewards_are_log_odds: bool = False,
    win_vs_sft: WinRate | None = None,
    confidence: float = CONFIDENCE,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> FrontierPoint:
    """One checkpoint's mean reward and KL(π_θ‖π_sft) ≈ mean(log π_θ − log π_sft), with intervals over prompts.

    Every prompt weighs the same, however many samples it has. Where rewards are a classifier's log-odds, the share
    with reward > 0 is the accuracy: how often the classifier calls the sample positive. The KL estimate is unbiased
    but may come out slightly negative for a policy that hardly moved; it is reported as it is.
    """
    if not table.ids:
        raise InputError(f"step {step}: there are no samples to evaluate.")
    if table.log_ratios is None:
        raise InputError(f"step {step}: samples have no logprob and reference_logprob, which the KL needs.")
    weights = resample_weights(len(table.ids), num_resamples=num_resamples, seed=seed)

    def interval(means: Array) -> Interval:
        return interval_of(means.mean(), weights @ means, len(means), confidence=confidence)

    return FrontierPoint(
        step=step,
        reward=interval(prompt_means(table.rewards)),
        kl=interval(prompt_means(table.log_ratios)),
        reward_std=_spread(table.rewards),
        num_samples=table.num_samples,
        accuracy=interval(_share_positive(table.rewards)) if rewards_are_log_odds else None,
        tokens=None if table.lengths is None else float(prompt_means(table.lengths).mean()),
        finished=None if table.finished is None else float(prompt_means(table.finished).mean()),
        win_vs_sft=win_vs_sft,
    )


def select_within(points: Sequence[FrontierPoint], kl_budget: float) -> FrontierPoint | None:
    """The checkpoint with the highest mean reward among those whose KL is within the budget (nats), or None."""
    within = [point for point in points if point.kl.estimate <= kl_budget]
    return max(within, key=lambda point: point.reward.estimate, default=None)


def reward_at_kl(kls: Array, rewards: Array, kl: float) -> Array:
    """`[P]` values whose mean over prompts is the mean reward at `kl`, on the straight lines between checkpoints.

    `kls` and `rewards` are `[P, C]`; column 0 is π_sft, the others its checkpoints in any order, and `kl` lies between
    0 and the largest mean KL. A prompt's value is its reward, interpolated, minus slope · (its own KL − `kl`), so that
    the values carry the uncertainty of the KL too (to first order). A frontier is concave: the slope is kept between
    0 and that of the line from π_sft, lest two checkpoints of nearly equal KL make it meaningless.

    >>> reward_at_kl(np.array([[0.0, 2.0]]), np.array([[1.0, 2.0]]), 1.0)
    array([1.5])
    """
    mean_kl, mean_reward = kls.mean(axis=0), rewards.mean(axis=0)
    order = np.argsort(mean_kl, kind="stable")
    right = order[np.clip(np.searchsorted(mean_kl[order], kl), 1, len(order) - 1)]
    left = order[np.flatnonzero(order == right)[0] - 1]
    width = mean_kl[right] - mean_kl[left]
    share = (kl - mean_kl[left]) / width if width > 0 else 1.0
    slope = (mean_reward[right] - mean_reward[left]) / width if width > 0 else 0.0
    here = mean_reward[left] + share * (mean_reward[right] - mean_reward[left])
    slope = np.clip(slope, 0, max(0.0, (here - mean_reward[0]) / kl) if kl > 0 else 0.0)

    def between(values: Array) -> Array:
        return (1 - share) * values[:, left] + share * values[:, right]

    return between(rewards) - slope * (between(kls) - kl)


def _share_positive(rewards: Ragged) -> Array:
    """`[P]` shares of samples with reward > 0."""
    return np.array([(values > 0).mean() for values in rewards])


def _spread(rewards: Ragged) -> float:
    """Standard deviation over samples, every prompt weighing the same."""
    mean = prompt_means(rewards).mean()
    return float(np.sqrt(np.mean([((values - mean) ** 2).mean() for values in rewards])))
