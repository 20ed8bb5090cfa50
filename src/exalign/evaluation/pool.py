"""What a pool of many samples of π_sft tells: the best any policy could do, best of N, and what became of the samples.

The optimum π*_β ∝ π_sft exp(r/β): each prompt's pool of N samples is reweighted by exp(r/β). As β falls the weight
gathers on few samples; the estimate cannot leave the pool (its KL never exceeds log N), so a point counts only while
its effective sample size holds up.

Density ratios π(y|x)/π_sft(y|x) along log π_sft(y|x), prompt by prompt: over M samples y_i of π_sft a policy has the
self-normalised weights `w_i ∝ π_θ(y_i|x)/π_sft(y_i|x)`, and the optimum `w_i ∝ exp(r(x, y_i)/β)` (§4.1, Figures 3
and 9). Kernel density estimates along t = log π_sft(y|x), of the weighted samples and of the others, have the ratio

    ρ(t) = Σ_i w_i K((t − t_i)/h) / (1/M) Σ_i K((t − t_i)/h),

the local mean of the density ratios M w_i. The bandwidth h is the same above and below, and for every policy: Scott's
rule on the unweighted samples. A bandwidth taken from the weighted samples vanishes where one of them carries all the
weight, which is what a small β does to the optimum; with a given h the estimate is one sum, written out here.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial

import numpy as np
from numpy.typing import NDArray

from exalign.data.record import Record
from exalign.errors import InputError
from exalign.evaluation.frontier import path, reach, reward_at_kl, win_rate
from exalign.evaluation.sample_table import SampleTable, common_prompts, prompt_means, render_prompt
from exalign.evaluation.schema import (
    BestOfN,
    DensityCurve,
    DensityRatios,
    Gap,
    Interval,
    Optimum,
    OptimumPoint,
    PromptDensity,
)
from exalign.evaluation.statistics import BOOTSTRAP, CONFIDENCE, Array, Bootstrap, interval_of

NUM_BETAS = 96
LEAST_ESS = 10.0
"""Below this effective sample size (median over prompts whose rewards differ) a point is marked as unreliable.

Self-normalised weights are biased by about 1/ESS of the reward's spread: one tenth here."""


@dataclass(frozen=True, eq=False)
class PoolFrontier:
    """The estimated optimum of each prompt: `base` `[P]` is the mean reward of π_sft, the others are `[P, G]`.

    `varied` `[P]` says whether a prompt's samples have different rewards.
    """

    ids: tuple[str, ...]
    betas: Array
    base: Array
    reward: Array
    kl: Array
    ess: Array
    num_samples: NDArray[np.int64]
    varied: NDArray[np.bool_]

    @property
    def typical_ess(self) -> Array:
        """`[G]`, the median over the prompts that a reward can change: those of one reward keep all their samples."""
        return np.median(self.ess[self.varied], axis=0)

    @property
    def reliable(self) -> NDArray[np.bool_]:
        """`[G]` bool."""
        return self.typical_ess >= LEAST_ESS

    @property
    def ends(self) -> bool:
        """Whether the optimum comes to its end, as at the higher of two rewards, while enough samples carry it.

        Farther away nothing is to be gained: of a nat at most the smallest β, a fiftieth of the rewards' spread.
        """
        return bool(self.reliable.all())


def pool_frontier(
    pool: Mapping[str, Sequence[float]],
    betas: Array | None = None,
    judged: Mapping[str, Sequence[float]] | None = None,
) -> PoolFrontier | None:
    """The optimum of every prompt from the rewards of its pool; prompts may have different numbers of samples.

    With other rewards `judged` of the same samples it is the optimum for those of `pool`, with the judged reward.

    By default β runs over a geometric grid from ten times the rewards' spread within prompts to a fiftieth, where even
    thousands of samples have ended. None where the pool has no prompt with two samples, or no reward differs from its
    prompt's others: then every policy is optimal.
    """
    # Imported here so that reading evidence never loads torch.
    import torch

    from exalign.objectives.estimators import optimal_frontier

    usable = {name: np.asarray(rewards, dtype=np.float64) for name, rewards in pool.items() if len(rewards) > 1}
    varied = np.array([np.ptp(rewards) > 0 for rewards in usable.values()])
    if not varied.any():
        return None
    if betas is None:
        spread = np.sqrt(np.mean([rewards.var() for rewards in usable.values()]))
        betas = spread * np.geomspace(10, 0.02, NUM_BETAS)
    counts = np.array([len(rewards) for rewards in usable.values()])
    mask = np.arange(counts.max())[None, :] < counts[:, None]
    seen = usable if judged is None else {name: np.asarray(judged[name], dtype=np.float64) for name in usable}
    rewards, means = (torch.zeros(mask.shape, dtype=torch.float64) for _ in range(2))
    for padded, values in ((rewards, usable), (means, seen)):
        padded[torch.from_numpy(mask)] = torch.from_numpy(np.concatenate(list(values.values())))
    frontier = optimal_frontier(rewards, torch.from_numpy(betas), torch.from_numpy(mask), judged=means)
    return PoolFrontier(
        ids=tuple(usable),
        betas=betas,
        base=prompt_means(tuple(seen.values())),
        reward=frontier.reward.numpy(),
        kl=frontier.kl.numpy(),
        ess=frontier.effective_samples.numpy(),
        num_samples=counts,
        varied=varied,
    )


def beta_at(pool: Mapping[str, Sequence[float]], kl: float) -> float:
    """β of the optimum whose KL to π_sft, a mean over the prompts of the pool, is `kl` nats.

    What the pool's samples cannot show, at fewer than `LEAST_ESS` effective ones, is an `InputError` that says how far
    they reach.

    >>> round(beta_at({"x": [0.0, 1.0] * 50}, 0.1), 3)  # KL(p‖½) = 0.1 at p = 0.72, and β = 1/log(p/(1 − p))
    1.06
    """
    from scipy.optimize import brentq

    found = pool_frontier(pool)
    if found is None:
        raise InputError("All pooled samples of a prompt have the same reward, so no β leads to any KL.")

    def at(log_beta: float) -> PoolFrontier:
        one = pool_frontier(pool, np.array([math.exp(log_beta)]))
        assert one is not None
        return one

    near, far = math.log(found.betas.max() * 1e3), math.log(found.betas.min() / 1e3)
    end = at(far)
    if end.kl.mean() > kl:
        log_beta = brentq(lambda value: float(at(value).kl.mean()) - kl, far, near, xtol=1e-6)
        if at(log_beta).reliable.all():
            return math.exp(log_beta)
    elif end.reliable.all():
        raise InputError(
            f"No β leads {kl:g} nats away: at {end.kl.mean():.2f} nats the optimum has the highest reward of each "
            "prompt's samples; aim nearer."
        )
    reach = max(found.kl[:, found.reliable].mean(axis=0), default=0.0)
    raise InputError(
        f"The optimum at {kl:g} nats cannot be told from {int(found.num_samples.max()):,} samples a prompt, which show "
        f"it as far as {reach:.2f} nats; aim nearer, or raise evaluate.pool_samples."
    )


def optimum(pool: PoolFrontier, bootstrap: Bootstrap = BOOTSTRAP) -> Optimum:
    """The frontier of the optimum over all pool prompts at a common β, with intervals over prompts."""
    count = len(pool.ids)
    weights = bootstrap.weights(count)

    def intervals(values: Array) -> list[Interval]:
        resampled = weights @ values
        return [interval_of(values[:, g].mean(), resampled[:, g], count) for g in range(len(pool.betas))]

    columns = zip(pool.betas, intervals(pool.reward), intervals(pool.kl), pool.typical_ess, pool.reliable, strict=True)
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


def gain_at(pool: PoolFrontier, kl: float) -> Array | None:
    """`[P]` what the optimum gains over π_sft at `kl` nats; None where the pool does not show it so far away."""
    kls, rewards = optimum_path(pool)
    shown = pool.ends or kl <= kls.mean(axis=0).max()
    return reward_at_kl(kls, rewards, kl) - rewards[:, 0] if kl > 0 and shown else None


def proxy_share(
    proxy: PoolFrontier, pool: PoolFrontier, kl: float, bootstrap: Bootstrap = BOOTSTRAP
) -> Interval | None:
    """What the optimum for a `proxy` gains at `kl` nats, as a share of what that for the pool's own rewards gains.

    None where the samples do not show one of them so far away, or nothing is to be gained.
    """
    ours, most = gain_at(proxy, kl), gain_at(pool, kl)
    return None if ours is None or most is None or most.mean() <= 0 else bootstrap.ratio(ours, most, paired=True)


def gap_to_optimum(
    pool: PoolFrontier,
    sft: SampleTable,
    checkpoints: Sequence[SampleTable],
    bootstrap: Bootstrap = BOOTSTRAP,
) -> Gap | None:
    """Optimum's reward minus the method's at equal KL, over the prompts that the pool and all samples share.

    The KL is the method's `reach`, or the largest where the optimum is reliable if that is smaller and not its end.
    None where nothing is shared, the method did not leave π_sft, or no point of the optimum is reliable.
    """
    shared = set(pool.ids).intersection(sft.ids, *(table.ids for table in checkpoints))
    ids = [name for name in pool.ids if name in shared]
    if not ids or not checkpoints or not pool.reliable.any():
        return None
    rows = [i for i, name in enumerate(pool.ids) if name in shared]
    kls, rewards = path(sft, checkpoints, ids)
    best_kls, best_rewards = (values[rows] for values in optimum_path(pool))
    kl = reach(kls, rewards)
    if not pool.ends:
        kl = min(kl, float(best_kls.mean(axis=0).max()))
    if kl <= 0:
        return None
    gaps = reward_at_kl(best_kls, best_rewards, kl) - reward_at_kl(kls, rewards, kl)
    first = float(kls[:, 1:].mean(axis=0).min())
    # The method's own largest KL is one of its checkpoints, up to rounding.
    return Gap(kl, bootstrap.mean(gaps), kl < first * (1 - 1e-9))


def objective_share(
    pool: Mapping[str, Sequence[float]],
    beta: float,
    sft: SampleTable,
    policy: SampleTable,
    bootstrap: Bootstrap = BOOTSTRAP,
) -> Interval | None:
    """What a policy has of all that can be gained over π_sft in the objective J = E r − β KL (Eq. 4), as a share.

    The most is J(π*_β) = β log Z_β. As J(π*_β) − J(π) = β KL(π‖π*_β), the share is 1 − KL(π_θ‖π*_β) / KL(π_sft‖π*_β):
    how much of the way from π_sft to the optimum is behind the policy. Below 0 it is farther from it than π_sft. None
    where the policy has no KL, the pool's samples do not show that optimum (`LEAST_ESS`), or nothing can be gained.
    """
    found = pool_frontier(pool, np.array([beta]))
    ids = [] if policy.log_ratios is None else common_prompts([policy, sft])
    if found is None or not found.reliable.all() or not ids:
        return None
    kls, rewards = path(sft, [policy], ids)
    gained = rewards[:, 1] - rewards[:, 0] - beta * kls[:, 1]
    most = found.reward[:, 0] - found.base - beta * found.kl[:, 0]
    return bootstrap.ratio(gained, most) if most.mean() > 0 else None


@lru_cache(maxsize=64)
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
    weights = np.array([math.comb(i, n - 1) / total for i in range(num_samples)])
    weights.setflags(write=False)
    return weights


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
    bootstrap: Bootstrap = BOOTSTRAP,
) -> list[BestOfN]:
    """Best of 1, 2, 4, … and of as many as the smallest pool of a prompt has; empty without a pool.

    KL bound: log N − (N−1)/N. Each has its win rates against `opponents`, by name, scored by the pool's scorer and
    independent of the pool, on the prompts that both have.
    """
    fewest = min(map(len, pool.values()), default=0)
    arrays = {name: np.array(rewards) for name, rewards in pool.items()}
    points = []
    for n in sorted({2**power for power in range(fewest.bit_length())} | ({fewest} if fewest else set())):
        best = np.array([expected_best(rewards, n) for rewards in pool.values()])
        against = partial(win_rate, arrays, shares=partial(best_of_n_shares, n=n), bootstrap=bootstrap)
        rates = [against(table.by_prompt, opponent=who) for who, table in (opponents or {}).items()]
        won = [rate for rate in rates if rate is not None]
        points.append(BestOfN(n, bootstrap.mean(best), math.log(n) - (n - 1) / n, won))
    return points


OPTIMUM, PROXY_OPTIMUM = "estimated optimum", "optimum of the training reward"
GRID_POINTS = 80


def scott_bandwidth(samples: Array) -> float:
    """Scott's rule in one dimension, `std · M^(−1/5)`: the standard deviation of the kernel.

    >>> scott_bandwidth(np.array([1.0, 3.0])) == 2**0.5 * 2**-0.2
    True
    """
    return float(np.std(samples, ddof=1) * len(samples) ** -0.2)


def kernel(grid: Array, samples: Array, bandwidth: float) -> Array:
    """Gaussian kernel `[G, M]`, each grid point's row scaled so that its nearest sample has 1: ratios need no more."""
    squares = ((grid[:, None] - samples[None, :]) / bandwidth) ** 2 / 2
    return np.exp(squares.min(axis=1, keepdims=True) - squares)


def smoothed_ratio(ratios: Array, kernel: Array) -> Array:
    """ρ at each grid point `[G]` from the density ratios `M w_i` of the samples `[M]` and their `kernel` `[G, M]`.

    >>> smoothed_ratio(np.array([0.5, 1.5]), np.array([[1.0, 0.0], [1.0, 1.0]]))
    array([0.5, 1. ])
    """
    return (kernel @ ratios) / kernel.sum(axis=1)


def density_curve(
    policy: str,
    log_weights: Array,
    kernel: Array,
    *,
    bootstrap: Bootstrap = BOOTSTRAP,
) -> DensityCurve:
    """The curve of a policy from its unnormalised log-weights `[M]`, `log π − log π_sft` up to a constant.

    The bounds are percentiles over resamples of the M samples, each normalised again, around the bandwidth chosen.

    >>> density_curve("a", np.log([1.0, 3.0]), np.eye(2)).ratio
    [0.5, 1.5]
    """
    ratios = np.exp(log_weights - np.max(log_weights))
    ratios /= ratios.mean()
    estimate, counts = smoothed_ratio(ratios, kernel), bootstrap.weights(len(ratios))
    # A resample without any sample near a grid point, or without any weight, says nothing there: NaN, passed over.
    with np.errstate(divide="ignore", invalid="ignore"):
        resampled = (counts * ratios) @ kernel.T / (counts @ ratios)[:, None] / (counts @ kernel.T)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.nanquantile(np.where(np.isfinite(resampled), resampled, np.nan), [tail, 1 - tail], axis=0)
    effective = float(ratios.sum() ** 2 / (ratios @ ratios))
    return DensityCurve(policy, estimate.tolist(), low.tolist(), high.tolist(), effective)


def density_ratios(
    records: Mapping[str, Sequence[Record]],
    betas: Mapping[str, float | None],
    notes: list[str],
    bootstrap: Bootstrap = BOOTSTRAP,
) -> DensityRatios | None:
    """Density ratios of every method and of the optimum on the prompts of `records`, or None where there are none.

    `records` are the same samples of π_sft for each method, with log π_θ as `logprob`, log π_sft as `reference_logprob`
    and rewards; a sample that lacks one is an `InputError`. The optimum's β is that of the first method that aims at
    one, by `betas`. `notes` takes a sentence for what is left out.
    """
    beta_of, beta = next(((name, beta) for name in records if (beta := betas.get(name))), (None, None))
    by_prompt: dict[str, dict[str, Record]] = {}
    for method, found in records.items():
        for record in found:
            by_prompt.setdefault(record.id, {})[method] = record
    found_on = [_prompt_density(of_methods, beta, bootstrap) for of_methods in by_prompt.values()]
    prompts = [one for one in found_on if one is not None]
    if alike := len(found_on) - len(prompts):
        notes.append(f"No density ratio on {alike} prompts: all samples there are equally likely.")
    if prompts and beta is None:
        notes.append("No method has a reward target, so no β for the optimum's density ratio.")
    return DensityRatios(prompts, beta, beta_of) if prompts else None


def _prompt_density(of_methods: Mapping[str, Record], beta: float | None, bootstrap: Bootstrap) -> PromptDensity | None:
    columns = {method: _columns(method, record) for method, record in of_methods.items()}
    record, (_, log_sft, rewards) = next(iter(of_methods.values())), next(iter(columns.values()))
    if len(log_sft) < 2 or np.ptp(log_sft) == 0:
        return None
    bandwidth = scott_bandwidth(log_sft)
    grid = np.linspace(log_sft.min(), log_sft.max(), GRID_POINTS)
    curves = []
    if beta is not None:
        curves.append(density_curve(OPTIMUM, rewards / beta, kernel(grid, log_sft, bandwidth), bootstrap=bootstrap))
    for method, (logp, reference, _) in columns.items():
        curves.append(density_curve(method, logp - reference, kernel(grid, reference, bandwidth), bootstrap=bootstrap))
    prompt = render_prompt(record.prompt)
    return PromptDensity(record.id, prompt, np.sort(log_sft).tolist(), grid.tolist(), bandwidth, curves)


def _columns(method: str, record: Record) -> tuple[Array, Array, Array]:
    """log π_θ, log π_sft and rewards `[M]` of one prompt's samples."""
    rows = [(c.logprob, c.reference_logprob, c.reward) for c in record.completions]
    values = np.array(rows, dtype=np.float64).reshape(-1, 3)  # None becomes NaN
    if not np.isfinite(values).all():
        raise InputError(
            f"evaluation/density/{method}: a completion of {record.id!r} lacks a finite logprob, reference_logprob or "
            "reward; delete that folder and evaluate again."
        )
    return values[:, 0], values[:, 1], values[:, 2]
