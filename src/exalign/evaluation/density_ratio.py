"""How a policy moved the probability of π_sft's own samples: π(y|x)/π_sft(y|x) along log π_sft(y|x), prompt by prompt.

Over M samples y_i of π_sft a policy has the self-normalised weights `w_i ∝ π_θ(y_i|x)/π_sft(y_i|x)`, and the optimum
`w_i ∝ exp(r(x, y_i)/β)` (§4.1, Figures 3 and 9). Kernel density estimates along t = log π_sft(y|x), of the weighted
samples and of the unweighted ones, then have the ratio

    ρ(t) = Σ_i w_i K((t − t_i)/h) / (1/M) Σ_i K((t − t_i)/h),

the local mean of the density ratios M w_i. The bandwidth h is the same above and below, and for every policy: Scott's
rule on the unweighted samples. A bandwidth taken from the weighted samples vanishes where one of them carries all the
weight, which is what a small β does to the optimum; with a given h the estimate is one sum, written out here.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from exalign.data.record import Record
from exalign.errors import InputError
from exalign.evaluation.examples import render_prompt
from exalign.evaluation.schema import DensityCurve, DensityRatios, PromptDensity
from exalign.evaluation.statistics import CONFIDENCE, NUM_RESAMPLES, Array, resample_weights

OPTIMUM = "estimated optimum"
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
    confidence: float = CONFIDENCE,
    num_resamples: int = NUM_RESAMPLES,
    seed: int = 0,
) -> DensityCurve:
    """The curve of a policy from its unnormalised log-weights `[M]`, `log π − log π_sft` up to a constant.

    The bounds are percentiles over resamples of the M samples, each normalised again, around the bandwidth chosen.
    """
    # Imported here so that reading evidence never loads torch.
    import torch

    from exalign.objectives.estimators import density_ratio, effective_sample_size, log_importance_weights

    target = torch.from_numpy(np.asarray(log_weights, dtype=np.float64))[None]
    log_w = log_importance_weights(target, torch.zeros_like(target))
    ratios = density_ratio(log_w)[0].numpy()
    estimate = smoothed_ratio(ratios, kernel)
    counts = resample_weights(len(ratios), num_resamples=num_resamples, seed=seed)
    # A resample without any sample near a grid point, or without any weight, says nothing there: NaN, passed over.
    with np.errstate(divide="ignore", invalid="ignore"):
        resampled = (counts * ratios) @ kernel.T / (counts @ ratios)[:, None] / (counts @ kernel.T)
    tail = (1 - confidence) / 2
    known = np.isfinite(resampled)
    low, high = np.quantile(np.where(known, resampled, estimate), [tail, 1 - tail], axis=0)
    effective = float(effective_sample_size(log_w)[0])
    return DensityCurve(policy, estimate.tolist(), low.tolist(), high.tolist(), effective)


def density_ratios(
    records: Mapping[str, Sequence[Record]],
    settings: Mapping[str, Mapping[str, Any]],
    notes: list[str],
    **options: Any,
) -> DensityRatios | None:
    """Density ratios of every method and of the optimum on the prompts of `records`, or None where there are none.

    Args:
        records: per method, the same samples of π_sft, with log π_θ as `logprob`, log π_sft as `reference_logprob`
            and rewards.
        settings: the settings of each method, whose first one with a reward target names the optimum's β = β_π·β_r.
        notes: takes a sentence for what is left out.
        options: those of `density_curve` but for its arrays.

    Raises:
        InputError: a sample without log-probabilities or reward.
    """
    beta_of, beta = _optimum_of(records, settings)
    by_prompt: dict[str, dict[str, Record]] = {}
    for method, found in records.items():
        for record in found:
            by_prompt.setdefault(record.id, {})[method] = record
    counts: Counter[str] = Counter()
    prompts = []
    for of_methods in by_prompt.values():
        one = _prompt_density(of_methods, beta, options)
        if one is None:
            counts["alike"] += 1
        else:
            prompts.append(one)
    if counts["alike"]:
        notes.append(f"No density ratio on {counts['alike']} prompts: all samples there are equally likely.")
    if prompts and beta is None:
        notes.append("No method has a reward target, so no β for the optimum's density ratio.")
    return DensityRatios(prompts, beta, beta_of) if prompts else None


def _optimum_of(
    records: Mapping[str, Sequence[Record]], settings: Mapping[str, Mapping[str, Any]]
) -> tuple[str | None, float | None]:
    for method in records:
        values = settings.get(method, {})
        if values.get("target") == "reward" and values.get("beta_pi") and values.get("beta_r"):
            return method, float(values["beta_pi"]) * float(values["beta_r"])
    return None, None


def _prompt_density(
    of_methods: Mapping[str, Record], beta: float | None, options: Mapping[str, Any]
) -> PromptDensity | None:
    columns = {method: _columns(method, record) for method, record in of_methods.items()}
    record, (_, log_sft, rewards) = next(iter(of_methods.values())), next(iter(columns.values()))
    if len(log_sft) < 2 or np.ptp(log_sft) == 0:
        return None
    bandwidth = scott_bandwidth(log_sft)
    grid = np.linspace(log_sft.min(), log_sft.max(), GRID_POINTS)
    curves = []
    if beta is not None:
        curves.append(density_curve(OPTIMUM, rewards / beta, kernel(grid, log_sft, bandwidth), **options))
    for method, (logp, reference, _) in columns.items():
        curves.append(density_curve(method, logp - reference, kernel(grid, reference, bandwidth), **options))
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
