"""What a search over settings may vary: the same number of trials for every method, and a range for each setting."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any, TypeVar

from pydantic import Field, model_validator

from exalign.settings import NO_RESULT, Settings
from exalign.training.train_settings import TrainSettings

Value = bool | int | float | str | None

_FIXED = {
    "method": "give the other method a name of its own",
    "seed": "a search over seeds would choose luck",
    "save_policies": "it decides which policies a trial is ranked by",
    "target": "the stages before the method are made for it; give the other target a method of its own",
    "fresh_every": "the stages before the method are made for it; give the other one a method of its own",
    "precision": "the stages before the method are made for it; give the other precision a method of its own",
}


def fixed_settings(settings: type[Settings]) -> dict[str, str]:
    """Settings that are not searched over, and why."""
    return _FIXED | dict.fromkeys(sorted(settings.marked(NO_RESULT)), "it changes no result")


class Range(Settings):
    """The values that a setting may take: all between two numbers, or some that are listed."""

    low: int | float | None = Field(None, description="least value")
    high: int | float | None = Field(None, description="greatest value")
    log: bool = Field(False, description="spread the values evenly in their logarithm")
    choices: tuple[Value, ...] | None = Field(None, description="the values themselves, instead of low and high")

    @model_validator(mode="after")
    def _one_kind(self) -> Range:
        if self.choices is not None:
            if self.low is not None or self.high is not None or self.log:
                raise ValueError("give choices, or low and high, not both")
            if not self.choices or len({(type(value), value) for value in self.choices}) < len(self.choices):
                raise ValueError("choices must be at least one value, and each once")
        elif self.low is None or self.high is None:
            raise ValueError("give low and high, or choices")
        elif not self.low < self.high:
            raise ValueError(f"low must be below high, and {self.low} is not below {self.high}")
        elif self.log and not self.low > 0:
            raise ValueError(f"log needs low above 0, not {self.low}")
        return self

    @property
    def extremes(self) -> tuple[Value, ...]:
        """Every choice, or both ends."""
        return (self.low, self.high) if self.choices is None else self.choices

    def contains(self, value: Any) -> bool:
        """Whether the value is one of those."""
        if self.choices is not None:
            return value in self.choices
        return value is not None and self.low <= value <= self.high


class SearchSettings(Settings):
    """A search for the settings with which each method does best, before it is aligned with them.

    Trial 0 has the recipe's own settings. A trial's value is its mean reward on validation prompts at `kl` nats from
    π_sft, interpolated along its saved policies, or at its reach where that is less. Ranges that are all lists, with
    no more combinations than trials, are tried as a grid.
    """

    trials: int = Field(8, gt=1, description="trials of each method, the recipe's own settings among them")
    kl: float = Field(gt=0, description="nats; trials are ranked by reward at this KL, or at what they reach below it")
    prompts: int = Field(
        64, gt=0, description="validation prompts: of data.validation, or of data.evaluation after evaluate.prompts"
    )
    samples: int = Field(2, gt=0, description="samples of each saved policy of a trial for each validation prompt")
    methods: dict[str, dict[str, Range]] = Field(
        min_length=1, description="for each method of align that is searched: its settings, each with a range"
    )


Chosen = TypeVar("Chosen", bound=TrainSettings)


def changed(settings: Chosen, values: Mapping[str, Value]) -> Chosen:
    """The settings with other values for some; what a setting does not allow is pydantic's `ValidationError`."""
    return type(settings).model_validate_json(json.dumps({**settings.model_dump(mode="json"), **values}))
