"""Means with confidence intervals in which the prompt is the unit.

Samples of one prompt are not independent evidence about other prompts, so a bootstrap resample draws prompts, each
with all of its samples. Two quantities computed from the same resamples are paired: prompts that are hard for one
policy are hard for the other in the same resample, and their difference has the smaller interval it deserves.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from exalign.evaluation.schema import Interval

Array = NDArray[np.float64]

CONFIDENCE = 0.95
NUM_RESAMPLES = 2000


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


BOOTSTRAP = Bootstrap()
mean_interval = BOOTSTRAP.mean


def interval_of(estimate: float, resampled: Array, num_prompts: int) -> Interval:
    """Percentile interval around `estimate` from the R resampled values of the same quantity.

    The percentile bootstrap is too narrow by the factor √((P−1)/P), which matters for few prompts: the resampled
    deviations are widened by its inverse. A single prompt gives no interval.
    """
    if num_prompts < 2:
        return Interval(float(estimate), None, None, num_prompts)
    tail = (1 - CONFIDENCE) / 2
    low, high = np.quantile(resampled, [tail, 1 - tail]) - estimate
    widen = np.sqrt(num_prompts / (num_prompts - 1))
    return Interval(float(estimate), float(estimate + low * widen), float(estimate + high * widen), num_prompts)


def _finite(values: Array) -> Array:
    values = np.asarray(values, dtype=np.float64)
    if not len(values):
        raise ValueError("no prompts: a mean over nothing does not exist")
    if not np.isfinite(values).all():
        raise ValueError("a value is NaN or infinite; leave such prompts out and count them")
    return values
