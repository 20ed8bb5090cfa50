"""Means with confidence intervals in which the prompt is the unit.

Samples of one prompt are not independent evidence about other prompts, so a bootstrap resample draws prompts, each
with all of its samples. Two quantities computed from the same resamples are paired: prompts that are hard for one
policy are hard for the other in the same resample, and their difference has the smaller interval it deserves.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray
from scipy.special import ndtri, stdtrit

from exalign.evaluation.schema import Interval

Array = NDArray[np.float64]

CONFIDENCE = 0.95
NUM_RESAMPLES = 2000
RIDGE = 0.1
_ITERATIONS = 60
_BLOCK = 1 << 19
"""Weights that are in memory several times over while one block of resamples is fitted."""


@lru_cache(maxsize=4)
def resample_weights(num_prompts: int, *, num_resamples: int = NUM_RESAMPLES, seed: int = 0) -> Array:
    """Bootstrap resamples as weights `[R, P]`: row b says how often each prompt was drawn, divided by P.

    `weights @ values` are the R resampled means. The same `num_prompts` and `seed` give the same resamples.

    >>> resample_weights(3, num_resamples=4).sum(axis=1)
    array([1., 1., 1., 1.])
    """
    if num_prompts < 1 or num_resamples < 1:
        raise ValueError(f"need at least one prompt and one resample, got {num_prompts} and {num_resamples}")
    generator = np.random.default_rng(seed)
    draws = generator.multinomial(num_prompts, np.full(num_prompts, 1 / num_prompts), num_resamples)
    weights = draws / num_prompts
    weights.setflags(write=False)
    return weights


@dataclass(frozen=True)
class Bootstrap:
    """How intervals are made: the same resamples for every quantity of a run."""

    num_resamples: int = NUM_RESAMPLES
    seed: int = 0

    def weights(self, num_prompts: int) -> Array:
        return resample_weights(num_prompts, num_resamples=self.num_resamples, seed=self.seed)

    def mean(self, prompt_means: Array) -> Interval:
        """The mean of `[P]` per-prompt values with its bootstrap interval over prompts; P = 0 raises `ValueError`.

        A quantity averaged within each prompt first weighs every prompt alike, however many samples it has.

        >>> Bootstrap().mean(np.array([1.0, 2.0, 3.0])).estimate
        2.0
        """
        values = _finite(prompt_means)
        return interval_of(values.mean(), self.weights(len(values)) @ values, len(values))

    def share(self, prompt_shares: Array, sizes: Array | None = None) -> Interval:
        """The mean of `[P]` shares, weighed by `sizes` above 0 if given, with an interval cut to what a share can be.

        Where all are 0, or all are 1, resamples know of no doubt: Wilson's interval of P prompts stands for theirs.

        >>> won = Bootstrap().share(np.ones(10))
        >>> won.estimate, round(won.low, 3), won.high
        (1.0, 0.722, 1.0)
        """
        return _of_share(
            self.mean(prompt_shares) if sizes is None else self.ratio(prompt_shares * sizes, sizes, paired=True)
        )

    def difference(self, first: Array, second: Array) -> Interval:
        """Mean of `first − second` over the same P prompts, with an interval that uses the pairing."""
        if len(first) != len(second):
            raise ValueError(f"paired values need the same prompts, got {len(first)} and {len(second)}")
        return self.mean(_finite(first) - _finite(second))

    def ratio(self, first: Array, second: Array, *, paired: bool = False) -> Interval:
        """Mean of `first` over that of `second`, which is above 0, of P and Q prompts, resampled each on their own.

        `paired`: of the same prompts, resampled together. Without an interval where there are resamples whose `second`
        is not above 0.

        >>> Bootstrap().ratio(np.ones(3), np.full(2, 4.0))
        Interval(estimate=0.25, low=0.25, high=0.25, num_prompts=2)
        """
        seed = self.seed if paired else self.seed + 1
        below = resample_weights(len(second), num_resamples=self.num_resamples, seed=seed) @ _finite(second)
        share, fewest = first.mean() / second.mean(), min(len(first), len(second))
        if not (below > 0).all():
            return Interval(float(share), None, None, fewest)
        return interval_of(share, (self.weights(len(first)) @ _finite(first)) / below, fewest)

    def over_pairs(
        self, values: Array, pairs: NDArray[np.bool_], prompts: NDArray[np.intp] | None = None, *, share: bool = False
    ) -> Interval:
        """The mean of `values` `[N, N]` over those of two of N answers that are `pairs` `[N, N]`.

        `prompts` `[N]` numbers the prompts from 0, which are resampled, and with them both answers of a pair. `share`:
        the values are shares. Without an interval where a resample has no pair.

        >>> labels, scores = np.array([1, 1, 0, 0]), np.array([0.9, 0.4, 0.5, 0.1])
        >>> wins, better = scores[:, None] > scores, labels[:, None] > labels
        >>> Bootstrap().over_pairs(wins, better, share=True).estimate  # the area under the ROC curve
        0.75
        """
        prompts = np.arange(len(values)) if prompts is None else prompts
        count = int(prompts.max()) + 1
        weights, chosen = self.weights(count)[:, prompts], _finite(values) * pairs
        total, number = (((weights @ matrix) * weights).sum(axis=1) for matrix in (chosen, pairs.astype(np.float64)))
        estimate = float(chosen.sum() / pairs.sum())
        if not (number > 0).all():
            return Interval(estimate, None, None, count)
        found = interval_of(estimate, total / number, count)
        return _of_share(found) if share else found


BOOTSTRAP = Bootstrap()


def interval_of(estimate: float, resampled: Array, num_prompts: int) -> Interval:
    """Percentile interval around `estimate` from the R resampled values of the same quantity.

    The percentile bootstrap is too narrow for few prompts: it divides by P where P − 1 is right, and has the normal
    distribution's tails where Student's are. The resampled deviations are widened by both (Hesterberg, "What Teachers
    Should Know About the Bootstrap", 2015, calls it expanded). A single prompt gives no interval.
    """
    if num_prompts < 2:
        return Interval(float(estimate), None, None, num_prompts)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(resampled, [tail, 1 - tail]) - estimate
    widen = np.sqrt(num_prompts / (num_prompts - 1)) * stdtrit(num_prompts - 1, 1 - tail) / ndtri(1 - tail)
    return Interval(float(estimate), float(estimate + low * widen), float(estimate + high * widen), num_prompts)


def wilson(share: float, number: float) -> tuple[float, float]:
    """Wilson's 95 % interval of a share of `number` independent cases.

    >>> [round(bound, 3) for bound in wilson(0.63, 400)]
    [0.582, 0.676]
    """
    z = float(ndtri((1 + CONFIDENCE) / 2))
    middle = (share + z**2 / (2 * number)) / (1 + z**2 / number)
    half = z * np.sqrt(share * (1 - share) / number + z**2 / (4 * number**2)) / (1 + z**2 / number)
    return float(middle - half), float(middle + half)


def surely_above(value: Interval, among: int) -> float:
    """The lower end of an interval, lowered so far that those of `among` intervals hold at once (Bonferroni's, by the
    normal distribution's tails); the estimate where there is no interval.

    >>> [round(surely_above(Interval(1.0, 0.5, 1.5, 100), among), 3) for among in (1, 16)]
    [0.5, 0.246]
    """
    tail = (1 - CONFIDENCE) / 2
    return value.estimate - (value.estimate - value.ends[0]) * float(ndtri(1 - tail / among) / ndtri(1 - tail))


def _of_share(found: Interval) -> Interval:
    if found.low is None or found.high is None:
        return found
    low, high = found.low, found.high
    if round(found.estimate, 9) in (0.0, 1.0):
        low, high = wilson(found.estimate, found.num_prompts)
        low, high = min(low, found.estimate), max(high, found.estimate)  # but for rounding
    return replace(found, low=max(0.0, low), high=min(1.0, high))


@dataclass(frozen=True)
class LengthControl:
    """The win rate that would stand if both answers were equally long.

    `rate` is that win rate. `length_effect` is φ, the change in log-odds of winning for a large advantage in length;
    `longer` is the share of prompts on which the first answer is the longer one.
    """

    rate: Interval
    length_effect: float
    longer: float


def length_controlled_win_rate(
    scores: Array, length_differences: Array, prompts: NDArray[np.intp] | None = None, bootstrap: Bootstrap = BOOTSTRAP
) -> LengthControl:
    """Logistic regression of the verdict on the difference in length, read off at no difference.

    `scores` `[P]` are 1 for a win, ½ for a tie, 0 for a loss; `length_differences` `[P]` are first minus second in
    characters, P ≥ 1; `prompts` `[P]` numbers the prompts from 0 where there are several pairs of one, and each prompt
    weighs the same. With x_i = tanh(Δ_i / std(Δ)), the model is P(win_i) = σ(θ + φ x_i), fitted by maximum likelihood
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
    prompts, spread = np.arange(len(scores)) if prompts is None else prompts, length_differences.std()
    num_pairs = np.bincount(prompts)
    each, num_prompts = 1 / num_pairs[prompts], len(num_pairs)
    x = np.tanh(length_differences / spread) if spread > 0 else np.zeros(len(scores))
    (theta,), (phi,) = _fit(scores, x, each[None], start=(0.0, 0.0))
    weights = bootstrap.weights(num_prompts) * num_prompts
    blocks = np.array_split(weights, 1 + len(weights) * len(x) // _BLOCK)
    resampled = np.concatenate([_fit(scores, x, block[:, prompts] * each, start=(theta, phi))[0] for block in blocks])
    rate = _of_share(interval_of(float(_sigmoid(theta)), _sigmoid(resampled), num_prompts))
    return LengthControl(rate, float(phi), float(np.mean(length_differences > 0)))


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


def _finite(values: Array) -> Array:
    values = np.asarray(values, dtype=np.float64)
    if not len(values):
        raise ValueError("no prompts: a mean over nothing does not exist")
    if not np.isfinite(values).all():
        raise ValueError("a value is NaN or infinite; leave such prompts out and count them")
    return values
