"""The win rate that would stand if both answers were equally long."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from exalign.evaluation.schema import Interval
from exalign.evaluation.statistics import interval_of, resample_weights

Array = NDArray[np.float64]
RIDGE = 0.1
_ITERATIONS = 60
_BLOCK = 1 << 19
"""Weights that are in memory several times over while one block of resamples is fitted."""


@dataclass(frozen=True)
class LengthControl:
    """`rate` is the length-controlled win rate. `length_effect` is φ, the change in log-odds of winning for a large
    advantage in length; `longer` is the share of prompts on which the first answer is the longer one."""

    rate: Interval
    length_effect: float
    longer: float


def length_controlled_win_rate(scores: Array, length_differences: Array) -> LengthControl:
    """Logistic regression of the verdict on the difference in length, read off at no difference.

    `scores` `[P]` are 1 for a win, ½ for a tie, 0 for a loss; `length_differences` `[P]` are first minus second in
    characters, P ≥ 1. With x_i = tanh(Δ_i / std(Δ)), the model is P(win_i) = σ(θ + φ x_i), fitted by maximum likelihood
    with the penalty RIDGE·φ²/2, without which lengths that separate wins from losses have no finite fit. The rate is
    σ(θ), its interval the bootstrap over prompts with the fit repeated in each resample.

    The idea and the tanh are those of AlpacaEval 2 (Dubois et al., "Length-Controlled AlpacaEval", 2024). Departures:
    each match-up is fitted alone, without a term for the difficulty of the instruction, which needs many models judged
    on the same prompts; verdicts are 1, ½, 0 where AlpacaEval has the probability of the judge's token; the verdict is
    the one on which both orders agree.

    >>> same_lengths = length_controlled_win_rate(np.array([1, 1, 0.5, 0]), np.zeros(4))
    >>> round(same_lengths.rate.estimate, 9)
    0.625
    """
    scores = np.asarray(scores, dtype=np.float64)
    differences = np.asarray(length_differences, dtype=np.float64)
    if not len(scores) or scores.shape != differences.shape:
        raise ValueError(
            f"need as many scores as length differences, at least one: {scores.shape}, {differences.shape}"
        )
    spread = differences.std()
    x = np.tanh(differences / spread) if spread > 0 else np.zeros_like(differences)
    num_prompts = len(scores)
    (theta,), (phi,) = _fit(scores, x, np.ones((1, num_prompts)), start=(0.0, 0.0))
    weights = resample_weights(num_prompts) * num_prompts
    blocks = np.array_split(weights, 1 + weights.size // _BLOCK)
    resampled = np.concatenate([_fit(scores, x, block, start=(theta, phi))[0] for block in blocks])
    rate = interval_of(float(_sigmoid(theta)), _sigmoid(resampled), num_prompts)
    return LengthControl(_within(rate), float(phi), float(np.mean(differences > 0)))


def _fit(scores: Array, x: Array, weights: Array, *, start: tuple[float, float]) -> tuple[Array, Array]:
    """θ and φ `[R]` for each row of weights `[R, P]`, by damped Newton steps on a concave objective.

    Where every verdict is a win, θ grows without bound; the iterations end where σ(θ) is 1 to rounding.
    """
    theta = np.full(len(weights), start[0])
    phi = np.full(len(weights), start[1])
    for _ in range(_ITERATIONS):
        p = _sigmoid(theta[:, None] + phi[:, None] * x)
        residual, curvature = weights * (scores - p), weights * p * (1 - p)
        g0, g1 = residual.sum(axis=1), residual @ x - RIDGE * phi
        h00, h01, h11 = curvature.sum(axis=1) + 1e-12, curvature @ x, curvature @ (x * x) + RIDGE
        determinant = h00 * h11 - h01**2
        step_theta = (h11 * g0 - h01 * g1) / determinant
        step_phi = (h00 * g1 - h01 * g0) / determinant
        theta += np.clip(step_theta, -1, 1)
        phi += np.clip(step_phi, -1, 1)
        if max(np.abs(step_theta).max(), np.abs(step_phi).max()) < 1e-10:
            break
    return theta, phi


def _sigmoid(values: Array) -> Array:
    return 0.5 * (1 + np.tanh(values / 2))


def _within(rate: Interval) -> Interval:
    """The interval cut to [0, 1], beyond which the widening for few prompts can reach."""
    low, high = (None if bound is None else min(1.0, max(0.0, bound)) for bound in (rate.low, rate.high))
    return Interval(rate.estimate, low, high, rate.num_prompts)
