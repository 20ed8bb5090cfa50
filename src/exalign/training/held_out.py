"""Held-out groups along a training: what the task's loss makes of them at every saved policy, and when that ends it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from exalign.data.batching import Group, microbatches
from exalign.errors import InputError
from exalign.models.memory import computed, fitting
from exalign.processes import several
from exalign.storage import link_folder, remove_folder, write_json
from exalign.training.checkpoint import rows_up_to

Loss = Callable[[Sequence[Group]], tuple[Tensor, dict[str, Tensor]]]
Weight = Callable[[Sequence[Group]], float]
SHOWN = ("loss", "accuracy", "margin", "reward_correlation")
"""Those of a task's numbers that are measured, as `held_out_loss` … of the step's row of metrics."""


@dataclass(slots=True)
class HeldOut:
    """Groups that nothing is trained on. With `stop_after` n a training ends where n saved policies in a row have no
    lower loss on them than the best before, and what it leaves ends with that one.

    A function of the weights alone, and read back from the metrics: an interrupted training ends where it would have.
    """

    groups: Sequence[Group] = ()
    stop_after: int | None = None
    losses: dict[int, float] = field(default_factory=dict)
    """By the steps after which a policy was saved; what is not a number is never the best."""

    def begin(self, metrics: Path, step: int) -> None:
        """Take up what was measured up to `step`."""
        if self.stop_after is not None and not self.groups:
            raise InputError("stop_after looks at held-out preferences or rewards, and there are none.")
        self.losses = {}
        for row in map(json.loads, rows_up_to(metrics, step)):
            if "held_out_loss" in row:
                self._note(row["step"], row["held_out_loss"])

    def measure(self, loss_of: Loss, weight_of: Weight, step: int, *, token_budget: int) -> dict[str, float]:
        """A task's means over the groups, by the code path of training; every process computes all of them.

        Several processes work in step, and none can begin a part again alone: `TooLargeError` where one does not fit.
        """
        sums: dict[str, float] = {}
        by_parts = _in_step if several() else computed
        with torch.no_grad():
            for part, (loss, metrics) in by_parts(loss_of, self.groups, token_budget=token_budget):
                values = {"loss": loss} | metrics | {"weight": loss.new_tensor(weight_of(part))}
                for name in {*SHOWN, "weight"} & values.keys():
                    sums[name] = sums.get(name, 0.0) + float(values[name])
        found = {f"held_out_{name}": sums[name] / (sums["weight"] or 1.0) for name in SHOWN if name in sums}
        self._note(step, found["held_out_loss"])
        return found

    def _note(self, step: int, loss: float | None) -> None:
        self.losses[step] = loss if loss is not None and math.isfinite(loss) else math.inf

    @property
    def best(self) -> int:
        """The step with the lowest loss, the first of several."""
        return min(self.losses, key=lambda step: (self.losses[step], step))

    @property
    def stops(self) -> bool:
        """Whether training has come to its end."""
        if self.stop_after is None or not self.losses:
            return False
        return sum(step > self.best for step in self.losses) >= self.stop_after

    def keep_best(self, folder: Path) -> str:
        """Take the policies after the best away, and name that one the model; a sentence that says so."""
        for path in sorted((folder / "policies").glob("step-*")):
            if int(path.name[5:]) > self.best:
                remove_folder(path)
        link_folder(folder / "policies" / f"step-{self.best:06d}", folder / "model")
        last = max(self.losses)
        sentence = f"the held-out loss is lowest after step {self.best} ({self.losses[self.best]:.4g}), which is kept; "
        sentence += (
            f"training stopped after step {last} ({self.losses[last]:.4g}), {self.stop_after} saved policies later"
            if self.stops
            else f"training went on to step {last} ({self.losses[last]:.4g})"
        )
        write_json(folder / "held-out.json", {"best": self.best, "last": last, "sentence": sentence})
        return sentence


def _in_step(loss_of: Loss, groups: Sequence[Group], *, token_budget: int) -> Iterator[tuple[list[Group], Any]]:
    for part in microbatches(groups, token_budget=token_budget):
        with fitting(part):
            found = loss_of(part)
        yield part, found
