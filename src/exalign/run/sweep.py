"""A method trained once for each value of one setting: the ends of the trainings are the points of its frontier.

A frontier along one training shows the way to one optimum; the optima themselves are a family over β, and end points
over β are compared with it. Each training stands in `at-1`, `at-2`, … of the method's folder, and its last policy gets
a second name as `policies/step-000001`, …, where everything that reads a method's policies finds it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch

from exalign.data.store import read_records
from exalign.evaluation.pool import beta_at
from exalign.evaluation.run_folder import pool_rewards, step_name
from exalign.methods.method import Material, Method
from exalign.processes import gathered, leads
from exalign.rollout.scorers import scored
from exalign.run.materials import Scoring, seeded
from exalign.run.view import View
from exalign.storage import link_folder
from exalign.terminal import shown

POOL = "evaluation/pool"


def trained(
    view: View, method: Method, material: Callable[[View], Material], folder: Path, scorer: Scoring | None
) -> Iterator[tuple[Method, Material, Path]]:
    """Train a method in `folder`, a sweep value by value; gives each training's settings, material and folder.

    `scorer` rewards the pool's samples again where their rewards are not those that it trains on.
    """
    members = [(method, folder)]
    if method.swept is not None:
        members = [(one, folder / f"at-{number}") for number, one in enumerate(swept(view, method, scorer), start=1)]
    for number, (one, place) in enumerate(members, start=1):
        settings = seeded(one, view.recipe)
        if len(members) > 1:
            view.console.print(shown(f"  {number} of {len(members)}: {one.line}", "dim"), soft_wrap=True)
        torch.manual_seed(settings.seed)
        given = material(view)
        settings.train(given, place)
        yield settings, given, place
    if method.swept is not None:
        if leads():
            for number, (_, place) in enumerate(members, start=1):
                link_folder(place / "model", folder / "policies" / step_name(number))
            link_folder(members[-1][1] / "model", folder / "model")
        gathered(None)


def swept(view: View, method: Method, scorer: Scoring | None) -> list[Method]:
    """The methods that a sweep consists of; for `kl` with the β at which the optimum lies at so many nats."""
    assert method.swept is not None
    setting, values = method.swept
    if setting != "kl":
        return [method.at(setting, value) for value in values]
    if scorer is None:
        rewards = pool_rewards(view.path(POOL))
    else:
        records = scored(scorer.load(view), read_records(view.path(POOL)), view.counts)
        rewards = {record.id: [c.reward for c in record.completions if c.reward is not None] for record in records}
    return [method.at_beta(beta_at(rewards, kl)) for kl in values]


def described(method: Method, members: Sequence[Method]) -> dict[str, Any]:
    """What a report knows of a sweep: its last policy's method, and of each policy its value and the β aimed at."""
    assert method.swept is not None
    setting, values = method.swept
    points = [{"value": value, "beta": one.optimum_beta} for value, one in zip(values, members, strict=True)]
    each = "the β of an optimum" if setting == "kl" else setting
    listed = ", ".join(f"{value:g}" for value in values) + (" nats" if setting == "kl" else "")
    line = f"{method.label}, a policy trained for {each} at each of {listed}"
    own = {"line": line, "settings": method.model_dump(mode="json")}
    return members[-1].described() | own | {"sweep": {"setting": setting, "points": points}}
