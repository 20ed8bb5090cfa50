"""Reward against KL: what a checkpoint reaches, how far from π_sft it went for it, and methods compared at equal KL.

Equal KL is the only fair comparison of rewards, since reward can be bought with KL. A method's path is π_sft (KL 0) and
its best checkpoints in order of their KL (see `reward_at_kl`). All quantities come from the same prompts, so that
differences between methods are paired.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from itertools import combinations

import numpy as np
from scipy.special import expit

from exalign.errors import InputError
from exalign.evaluation.sample_table import LabelTable, PairTable, Ragged, SampleTable, common_prompts, prompt_means
from exalign.evaluation.schema import Comparison, EqualKL, FrontierPoint, HeldOut, Interval, Standing, WinRate
from exalign.evaluation.statistics import BOOTSTRAP, Array, Bootstrap, length_controlled_win_rate, surely_above


def frontier_point(
    table: SampleTable,
    *,
    step: int,
    rewards_are_log_odds: bool = False,
    bootstrap: Bootstrap = BOOTSTRAP,
) -> FrontierPoint:
    """One checkpoint's mean reward and KL(π_θ‖π_sft) ≈ mean(log π_θ − log π_sft), with intervals over prompts.

    Every prompt weighs the same, however many samples it has. Where rewards are a classifier's log-odds,
    their mean sigmoid is the accuracy, the probability of its label (Fig. 7). The KL estimate is unbiased
    but may come out slightly negative for a policy that hardly moved; it is reported as it is.
    """
    if not table.ids:
        raise InputError(f"step {step}: there are no samples to evaluate.")

    def mean(values: Ragged | None) -> float | None:
        return None if values is None else float(prompt_means(values).mean())

    return FrontierPoint(
        step=step,
        reward=bootstrap.mean(table.mean_rewards) if table.scored else None,
        kl=None if table.log_ratios is None else bootstrap.mean(prompt_means(table.log_ratios)),
        reward_std=_spread(table.rewards) if table.scored else None,
        num_samples=sum(map(len, table.rewards)),
        accuracy=bootstrap.share(np.array([expit(r).mean() for r in table.rewards])) if rewards_are_log_odds else None,
        tokens=mean(table.lengths),
        finished=mean(table.finished),
        reward_std_within=_spread_within(table.rewards) if table.scored else None,
        repetition=mean(table.repeated),
        parts={name: float(prompt_means(rewards).mean()) for name, rewards in table.parts.items()},
    )


def held_out(pairs: PairTable, bootstrap: Bootstrap = BOOTSTRAP) -> HeldOut:
    """Accuracy and margin of the implicit reward on held-out pairs: means over pairs, with intervals over prompts."""
    accuracy = bootstrap.share(pairs.wins, pairs.sizes)
    means = pairs.preferred - pairs.rejected, pairs.preferred, pairs.rejected
    return HeldOut(accuracy, *(bootstrap.ratio(mean * pairs.sizes, pairs.sizes, paired=True) for mean in means))


def held_out_labels(answers: LabelTable, bootstrap: Bootstrap = BOOTSTRAP) -> HeldOut:
    """The same of held-out answers with a label each, of which two are a pair where one has the higher label."""
    first, second = np.broadcast_arrays(answers.log_ratios[:, None], answers.log_ratios)
    over = partial(bootstrap.over_pairs, pairs=answers.labels[:, None] > answers.labels, prompts=answers.prompts)
    wins = (first > second) + (first == second) / 2
    return HeldOut(over(wins, share=True), *map(over, (first - second, first, second)))


def select_within(points: Sequence[FrontierPoint], kl_budget: float) -> FrontierPoint | None:
    """The best checkpoint by `merit` among those whose KL is within the budget (nats), or None."""
    within = [point for point in points if point.nats <= kl_budget and point.measured]
    return max(within, key=lambda point: merit(point, len(within)), default=None)


def merit(point: FrontierPoint, among: int) -> tuple[bool, float]:
    """By which `among` checkpoints within a KL budget are ranked: those that surely gained come first, and of these the
    one with the most reward; without rewards the one with the highest lower bound of the accuracy on held-out pairs."""
    low = lower_bound(point, among)
    return low > 0, low if point.reward is None else point.reward.estimate


def lower_bound(point: FrontierPoint, among: int) -> float:
    """That of the gain in reward over π_sft, without rewards of the accuracy on held-out pairs over one half.

    The bounds of `among` checkpoints, of which one is chosen by them, hold at once (`surely_above`). −∞ where nothing
    was measured.
    """
    value, base = (point.gain, 0.0) if point.reward else (point.measured, 0.5)
    return -math.inf if value is None else surely_above(value, among) - base


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
    """π_sft (column 0), then the checkpoints that none beats in reward at no more KL, in order of KL.

    Where all have less reward than π_sft itself, they are held against one another.
    """
    order = np.lexsort((-mean_reward[1:], mean_kl[1:])) + 1

    def rising(best: float) -> list[int]:
        kept = []
        for column in order:
            if mean_reward[column] > best:
                kept.append(int(column))
                best = mean_reward[column]
        return kept

    return [0, *(rising(mean_reward[0]) or rising(-np.inf))]


def _neighbours(mean_kl: Array, mean_reward: Array, kl: float) -> tuple[int, int]:
    """Unbeaten columns between which `kl` lies; the last two where it lies beyond."""
    kept = _unbeaten(mean_kl, mean_reward)
    last = next((i for i, column in enumerate(kept) if i > 0 and mean_kl[column] >= kl), len(kept) - 1)
    return kept[last - 1], kept[last]


def _spread(rewards: Ragged) -> float:
    """Standard deviation over samples, every prompt weighing the same."""
    mean = prompt_means(rewards).mean()
    return float(np.sqrt(np.mean([((values - mean) ** 2).mean() for values in rewards])))


def _spread_within(rewards: Ragged) -> float | None:
    """Standard deviation over the samples of a prompt (dividing by M − 1), averaged over the prompts that have two."""
    spreads = [values.std(ddof=1) for values in rewards if len(values) > 1]
    return float(np.mean(spreads)) if spreads else None


def pair_shares(ours: Array, theirs: Array) -> tuple[float, float]:
    """Shares of wins (a tie counts half) and of ties over all M × N pairs of rewards of one prompt.

    >>> pair_shares(np.array([1.0, 3.0]), np.array([1.0, 2.0]))
    (0.625, 0.25)
    """
    difference = ours[:, None] - theirs[None, :]
    ties = float((difference == 0).mean())
    return float((difference > 0).mean()) + ties / 2, ties


def win_rate(
    ours: Mapping[str, Array],
    theirs: Mapping[str, Array],
    *,
    opponent: str,
    shares: Callable[[Array, Array], tuple[float, float]] = pair_shares,
    bootstrap: Bootstrap = BOOTSTRAP,
) -> WinRate | None:
    """Win rate of `ours` over `theirs`, rewards by prompt of one scorer: the mean over prompts of the share of pairs.

    `shares` are those of wins and of ties on one prompt. Prompts that only one side has are counted in
    `missing_prompts`; None where no prompt is shared.
    """
    pairs = [(rewards, theirs[name]) for name, rewards in ours.items() if name in theirs]
    if not pairs:
        return None
    wins, ties = np.array([shares(*pair) for pair in pairs]).T
    num_pairs = sum(len(mine) * len(other) for mine, other in pairs)
    return WinRate(opponent, bootstrap.share(wins), float(ties.mean()), num_pairs, len(ours.keys() ^ theirs.keys()))


def at_equal_length(ours: SampleTable, theirs: SampleTable, bootstrap: Bootstrap = BOOTSTRAP) -> Interval:
    """The win rate over all pairs of samples of the shared prompts that would stand if both were equally long."""
    ids = common_prompts([ours, theirs])
    rows = list(zip(ours.at(ids), theirs.at(ids), strict=True))
    scores = [(np.sign(ours.rewards[i][:, None] - theirs.rewards[j]).ravel() + 1) / 2 for i, j in rows]
    longer = [(ours.characters[i][:, None] - theirs.characters[j]).ravel() for i, j in rows]
    prompts = np.repeat(np.arange(len(ids)), [len(pairs) for pairs in scores])
    return length_controlled_win_rate(np.concatenate(scores), np.concatenate(longer), prompts, bootstrap).rate


LEAST_MOVE = 0.05
"""A method whose reach in KL is below this share of the median of all is not compared at the common KL."""


class Paths:
    """Every method's path over the prompts that all of them share: `[P, C]` KL and reward, π_sft in column 0.

    Checkpoints without a KL are on no path.
    """

    def __init__(
        self, sft: SampleTable, methods: Mapping[str, Sequence[SampleTable]], bootstrap: Bootstrap = BOOTSTRAP
    ) -> None:
        known = {name: [t for t in tables if t.log_ratios is not None] for name, tables in methods.items()}
        evaluated = {name: checkpoints for name, checkpoints in known.items() if checkpoints}
        ids = common_prompts([sft, *(table for tables in evaluated.values() for table in tables)])
        self.bootstrap = bootstrap
        self._columns = {name: path(sft, tables, ids) for name, tables in evaluated.items() if ids}

    @property
    def methods(self) -> list[str]:
        return list(self._columns)

    def reach(self, method: str) -> float:
        """The KL of a method's farthest checkpoint that no other of its own beats."""
        return reach(*self._columns[method])

    def reward(self, method: str, kl: float) -> Array:
        """`[P]` values whose mean is the method's reward at `kl`; the same prompts for every method."""
        return reward_at_kl(*self._columns[method], kl)

    def gain(self, method: str, kl: float) -> Array:
        """`[P]` values whose mean is what the method gains over π_sft at `kl`."""
        return self.reward(method, kl) - self._columns[method][1][:, 0]


def path(sft: SampleTable, checkpoints: Sequence[SampleTable], ids: Sequence[str]) -> tuple[Array, Array]:
    """Per-prompt mean KL and reward `[P, 1 + C]` over `ids`: π_sft in column 0, then the checkpoints."""
    kls, rewards = [], []
    for table in (sft.as_reference(), *checkpoints):
        if table.log_ratios is None:
            raise ValueError("a method's samples need log-ratios")
        at = table.at(ids)
        kls.append(prompt_means(table.log_ratios)[at])
        rewards.append(table.mean_rewards[at])
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
        found.append(Comparison(first, second, kl, paths.bootstrap.mean(difference)))
    return found


def compare_all(paths: Paths, *, among: Sequence[str]) -> EqualKL | None:
    """The methods `among`, ranked by reward at the largest KL that all of them reach.

    A method that hardly left π_sft would drag the common KL to where all are alike: it is named, not compared.
    """
    reaches = {name: paths.reach(name) for name in paths.methods if name in among}
    usual = float(np.median(list(reaches.values()))) if reaches else 0.0
    compared = {name: reach for name, reach in reaches.items() if reach > LEAST_MOVE * usual}
    if not compared:
        return None
    kl = min(compared.values())
    readings = {name: paths.reward(name, kl) for name in compared}
    ranked = sorted(readings, key=lambda name: -readings[name].mean())
    lead, mean = readings[ranked[0]], paths.bootstrap.mean
    standings = [
        Standing(name, mean(readings[name]), None if i == 0 else mean(lead - readings[name]))
        for i, name in enumerate(ranked)
    ]
    return EqualKL(kl, standings, [name for name in reaches if name not in compared])


CHANGING: dict[str, Callable[[SampleTable], Array | None]] = {
    "reward": lambda table: table.mean_rewards if table.scored else None,
    "tokens": lambda table: _means(table.lengths),
    "finished": lambda table: _means(table.finished),
    "repetition": lambda table: _means(table.repeated),
}
"""What a policy's samples have a mean of, by the name that a `FrontierPoint` has for it."""


def changes(table: SampleTable, sft: SampleTable, bootstrap: Bootstrap = BOOTSTRAP) -> dict[str, Interval]:
    """The mean of each of `CHANGING` under a policy minus that under π_sft, paired over the prompts both have.

    Without what the samples of one do not say; empty where they share no prompt.
    """
    ids, found = common_prompts([table, sft]), {}
    for name, read in CHANGING.items():
        both = [(means, t.at(ids)) for t in (table, sft) if (means := read(t)) is not None]
        if ids and len(both) == 2:
            found[name] = bootstrap.difference(*(means[at] for means, at in both))
    return found


def _means(values: Ragged | None) -> Array | None:
    return None if values is None else prompt_means(values)
