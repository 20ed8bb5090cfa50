"""What a trial tries, from the results of the trials before it: Optuna's tree-structured Parzen estimator, or a grid.

The study lives in the results alone: it is built anew from them for every proposal, and its sampler is seeded by the
proposal's number. Optuna is known in this file only.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import product
from math import prod
from typing import Any

from exalign.errors import InputError
from exalign.run.search_settings import Range, Value
from exalign.storage import fingerprint

STARTUP = 4
"""Results that the estimator needs; before them values are drawn from the ranges at random."""


class Proposer:
    """Proposes values from `ranges`, which are those of settings of the class `owner`, for the highest value.

    A proposal is a function of `seed`, the number of trials and the results alone.
    """

    def __init__(self, ranges: Mapping[str, Range], owner: type[Any], *, trials: int, seed: Any) -> None:
        self.ranges = ranges
        self._owner = owner
        self._trials = trials
        self._seed = seed

    def propose(self, results: Sequence[tuple[Mapping[str, Value], float | None]]) -> dict[str, Value]:
        """What to try after these results: values with what came of them, None where that failed.

        Where every range is a list and there are no more combinations than trials, each is tried once before any is
        tried again: a grid. Results from outside the ranges are not learned from.
        """
        optuna = _optuna()
        tried = [dict(values) for values, _ in results]
        untried = [values for values in self._grid() if values not in tried]
        if untried:
            return untried[0]
        seed = int(fingerprint([self._seed, len(results)]), 16) % 2**32
        sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=STARTUP)
        study = optuna.create_study(direction="maximize", sampler=sampler)
        distributions = {name: self._distribution(name) for name in self.ranges}
        states = optuna.trial.TrialState
        for values, value in results:
            if all(self.ranges[name].contains(found) for name, found in values.items()):
                outcome = {"state": states.FAIL} if value is None else {"value": value}
                study.add_trial(optuna.create_trial(params=dict(values), distributions=distributions, **outcome))
        return dict(study.ask(distributions).params)

    def _grid(self) -> list[dict[str, Value]]:
        """Every combination, in the order of the lists; none where they are more than the trials, or no lists."""
        lists = [values.choices for values in self.ranges.values()]
        if (
            any(choices is None for choices in lists)
            or prod(len(choices) for choices in lists if choices) > self._trials
        ):
            return []
        return [
            dict(zip(self.ranges, values, strict=True)) for values in product(*(choices or () for choices in lists))
        ]

    def _distribution(self, name: str) -> Any:
        optuna, values = _optuna(), self.ranges[name]
        if values.choices is not None:
            return optuna.distributions.CategoricalDistribution(values.choices)
        if self._owner.model_fields[name].annotation in (int, int | None):
            return optuna.distributions.IntDistribution(values.low, values.high, log=values.log)
        return optuna.distributions.FloatDistribution(values.low, values.high, log=values.log)


def _optuna() -> Any:
    try:
        import optuna
    except ImportError:
        raise InputError('A search needs Optuna: pip install "exalign[search]".') from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna
