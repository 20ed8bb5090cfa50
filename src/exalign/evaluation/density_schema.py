"""What `evaluation/evidence.json` holds about density ratios (Figures 3 and 9)."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class DensityCurve:
    """π(y|x)/π_sft(y|x) along log π_sft(y|x) for one policy, with the bounds of its interval over the samples.

    `effective_samples` says how many equal weights the policy's importance weights are worth: near 1 a single sample
    carries the whole curve.
    """

    policy: str
    ratio: list[float]
    low: list[float]
    high: list[float]
    effective_samples: float


@dataclass(frozen=True)
class PromptDensity:
    """The curves of one prompt over `grid` (log π_sft, nats), and the `samples` of π_sft (sorted) they come from.

    All curves of a prompt are smoothed by the same Gaussian kernel with standard deviation `bandwidth` (nats).
    """

    id: str
    prompt: str
    samples: list[float]
    grid: list[float]
    bandwidth: float
    curves: list[DensityCurve]


@dataclass(frozen=True)
class DensityRatios:
    """Density ratios on a few prompts. `beta` = β_π·β_r of the method `beta_of` is the optimum's; None without one."""

    prompts: list[PromptDensity]
    beta: float | None = None
    beta_of: str | None = None
