"""The checkpoint that a KL budget allows: of every method, the one with the most reward among those within it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from exalign.errors import InputError
from exalign.evaluation.frontier import select_within
from exalign.evaluation.run_folder import RunFolder
from exalign.evaluation.schema import FrontierPoint


@dataclass(frozen=True)
class Selected:
    """A method and its best checkpoint within the budget: the point, and the folder of the model inside the run."""

    method: str
    point: FrontierPoint
    folder: Path


def select(run: Path, kl_budget: float) -> tuple[list[Selected], list[str]]:
    """The selected checkpoint of each method, most reward first, and the methods that have none within the budget.

    A checkpoint is within `kl_budget` (nats) where its estimated KL is. Selection is on the very samples that measured
    the rewards, so the best of many checkpoints looks a little better than it is. A run without an evaluation is an
    `InputError`.
    """
    if not kl_budget > 0:
        raise InputError(f"--kl-budget {kl_budget:g} allows no checkpoint; give a number of nats above 0.")
    place = RunFolder(run)
    found, without = [], []
    for method in place.read_evidence().methods:
        point = select_within(method.points, kl_budget)
        if point is None:
            without.append(method.name)
        else:
            policy = place.policy(method.name, point.step)
            found.append(Selected(method.name, point, policy.relative_to(run)))
    return sorted(found, key=lambda selected: -selected.point.reward.estimate), without
