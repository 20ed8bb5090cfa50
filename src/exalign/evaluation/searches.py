"""Searches for the settings of methods, as a run folder keeps them: their trials."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from exalign.storage import read_json, read_sealed


@dataclass(frozen=True)
class Trial:
    """What one trial tried, and what came of it: `value` is the mean reward at `kl` nats, or None where it `failed`.

    `values` are the settings that are searched over, `settings` all of them. `points` are the saved policies: step,
    mean reward, mean KL. `seconds` are those of the training steps. A trial that tries what an earlier one tried is
    the `same_as` that one and is not trained again.
    """

    number: int
    values: dict[str, Any]
    settings: dict[str, Any]
    value: float | None = None
    kl: float | None = None
    points: list[dict[str, float]] = field(default_factory=list)
    seconds: float = 0.0
    counts: dict[str, int] = field(default_factory=dict)
    failed: str | None = None
    same_as: int | None = None


@dataclass(frozen=True)
class Search:
    """All trials of one method, ranked by mean reward at `kl` nats, and the number of the best."""

    method: str
    kl: float
    best: int
    trials: list[Trial]


def read_searches(run: Path, methods: Iterable[str]) -> list[Search]:
    """The finished searches of a run folder, in the order of `methods`."""
    found = []
    for method in methods:
        folder = run / "search" / method
        if (folder / "best.json").is_file():
            trials = [Trial(**read_sealed(path)) for path in sorted(folder.glob("trial-*/result.json"))]
            best = read_json(folder / "best.json")
            found.append(Search(method, best["ranked_at"], best["trial"], trials))
    return found


def searched_settings(run: Path, method: str) -> dict[str, Any]:
    """The settings that a search chose and the method was aligned with; empty where there was none."""
    path = run / "align" / method / "settings.json"
    return {k: v for k, v in read_json(path)["settings"].items() if v is not None} if path.is_file() else {}
