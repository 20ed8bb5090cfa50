"""The checkpoint that a KL budget allows: of every method, the one with the most reward among those within it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from exalign.errors import InputError
from exalign.evaluation.frontier import select_within
from exalign.evaluation.schema import FrontierPoint, read_evidence


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
    path = run / "evaluation" / "evidence.json"
    if not path.is_file():
        raise InputError(f"{run} has no evaluation/evidence.json; finish it with `exalign run` first.")
    found, without = [], []
    for method in read_evidence(path).methods:
        point = select_within(method.points, kl_budget)
        if point is None:
            without.append(method.name)
        else:
            place = Path("align") / method.name / "policies" / f"step-{point.step:06d}"
            found.append(Selected(method.name, point, place))
    return sorted(found, key=lambda selected: -selected.point.reward.estimate), without
