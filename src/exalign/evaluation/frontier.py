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
        reward_std_within=_spread_within(table.rewards),
    )


def select_within(points: Sequence[FrontierPoint], kl_budget: float) -> FrontierPoint | None:
    """The checkpoint with the highest mean reward among those whose KL is within the budget (nats), or None."""
    within = [point for point in points if point.kl.estimate <= kl_budget]
    return max(within, key=lambda point: point.reward.estimate, default=None)


def reward_at_kl(kls: Array, rewards: Array, kl: float) -> Array:
    """`[P]` values whose mean over prompts is the mean reward at `kl`, interpolated between checkpoints.

    `kls` and `rewards` are `[P, C]`; column 0 is π_sft, the others its checkpoints in any order, and `kl` lies between
    0 and `reach`. A checkpoint that another one beats in reward at no more KL is passed over.

    Between two checkpoints reward is linear in √KL: along any smooth path away from π_sft the reward changes in
    proportion to the step and KL to its square, so that a straight line in KL would be far too low near π_sft.

    A prompt's value is the mean reward at `kl` plus its own (first-order) deviation in rewards and in KL, so that the
    values carry the uncertainty of both. The slope that weighs the KL is kept between 0 and that of the curve from
    π_sft, lest two checkpoints of nearly equal KL make it meaningless.

    >>> reward_at_kl(np.array([[0.0, 4.0]]), np.array([[1.0, 2.0]]), 1.0)
    array([1.5])
    """
    mean_kl, mean_reward = kls.mean(axis=0), rewards.mean(axis=0)
    left, right = _neighbours(mean_kl, mean_reward, kl)
    root = np.sqrt(np.maximum(mean_kl, 0))
    width = root[right] - root[left]
    share = min(1.0, (np.sqrt(kl) - root[left]) / width) if width > 0 else 1.0
    here = (1 - share) * mean_reward[left] + share * mean_reward[right]
    steepest = max(0.0, (here - mean_reward[0]) / np.sqrt(kl)) if kl > 0 else 0.0
    slope = np.clip((mean_reward[right] - mean_reward[left]) / width, 0, steepest) if width > 0 else 0.0
    values = np.full(len(kls), here)
    for place, weight in ((left, 1 - share), (right, share)):
        values += weight * (rewards[:, place] - mean_reward[place])
        if root[place] > 0:
            values -= weight * slope * (kls[:, place] - mean_kl[place]) / (2 * root[place])
    return values


def reach(kls: Array, rewards: Array) -> float:
    """The KL of the farthest checkpoint that no other beats; columns as in `reward_at_kl`. Never below 0."""
    mean_kl, mean_reward = kls.mean(axis=0), rewards.mean(axis=0)
    return max(0.0, float(mean_kl[_unbeaten(mean_kl, mean_reward)[-1]]))


def _unbeaten(mean_kl: Array, mean_reward: Array) -> list[int]:
    """π_sft (column 0), then the checkpoints that none beats in reward at no more KL, in order of KL."""
    order = [int(c) for c in np.lexsort((-mean_reward[1:], mean_kl[1:])) + 1]
    kept = [0]
    for column in order:
        if len(kept) == 1 or mean_reward[column] > mean_reward[kept[-1]]:
            kept.append(column)
    return kept


def _neighbours(mean_kl: Array, mean_reward: Array, kl: float) -> tuple[int, int]:
    """Unbeaten columns between which `kl` lies; the last two where it lies beyond."""
    kept = _unbeaten(mean_kl, mean_reward)
    last = next((i for i, column in enumerate(kept) if i > 0 and mean_kl[column] >= kl), len(kept) - 1)
    return kept[last - 1], kept[last]


def _share_positive(rewards: Ragged) -> Array:
    """`[P]` shares of samples with reward > 0."""
    return np.array([(values > 0).mean() for values in rewards])


def _spread(rewards: Ragged) -> float:
    """Standard deviation over samples, every prompt weighing the same."""
    mean = prompt_means(rewards).mean()
    return float(np.sqrt(np.mean([((values - mean) ** 2).mean() for values in rewards])))


def _spread_within(rewards: Ragged) -> float | None:
    """Standard deviation over the samples of a prompt (dividing by M − 1), averaged over the prompts that have two."""
    spreads = [values.std(ddof=1) for values in rewards if len(values) > 1]
    return float(np.mean(spreads)) if spreads else None
