"""The folders of a search's trials: `trial-000` and on, and `earlier-000` and on for those of a search before it.

A trial is known by what it tried: its settings, and what they were tried on (`base`: model, data, validation prompts).
A search that is made again, with more trials, other ranges or another KL to rank at, finds what was tried already and
does not try it again; what it does not try stays as an earlier trial.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from exalign.errors import InputError
from exalign.storage import read_sealed, remove_folder, write_sealed

KEPT = ("trial-*", "earlier-*")
"""Folders of a search that stay when the search is made again."""
_TRIED = "settings.json"


def trial_folder(search: Path, number: int) -> Path:
    """The folder of a trial.

    >>> trial_folder(Path("search/exo-rw"), 7).as_posix()
    'search/exo-rw/trial-007'
    """
    return search / f"trial-{number:03d}"


def tried_in(search: Path) -> Iterator[Path]:
    """The folders of all trials, those of a search before among them."""
    return (folder for pattern in KEPT for folder in sorted(search.glob(pattern)))


def put_in_place(search: Path, number: int, tried: dict[str, Any] | None) -> Path:
    """The folder of trial `number`, with what an earlier trial of the same left, or with what it tries alone.

    What stood there and tried something else steps aside. `tried` are the settings as JSON has them, and the base;
    None for a trial that only repeats one before it.
    """
    place = trial_folder(search, number)
    if place.exists() and _tried(place) != tried:
        _step_aside(place)
    place.mkdir(exist_ok=True)
    if tried is None or _tried(place) == tried:
        return place
    taken = {trial_folder(search, before) for before in range(number)}
    same = next((folder for folder in tried_in(search) if folder not in taken and _tried(folder) == tried), None)
    if same is not None:
        os.replace(same, place)
    else:
        write_sealed(place / _TRIED, tried)
    return place


def step_aside_from(search: Path, number: int) -> None:
    """Make earlier trials of those from `number` on, which a search with more trials left."""
    for folder in sorted(search.glob("trial-*")):
        if folder.name >= trial_folder(search, number).name:
            _step_aside(folder)


def forget_others(search: Path, base: str) -> None:
    """Delete the trials that were made on something else: a search that tries their settings has other results."""
    for folder in list(tried_in(search)):
        if (_tried(folder) or {}).get("base") != base:
            remove_folder(folder)


def _tried(folder: Path) -> dict[str, Any] | None:
    """What was tried in a folder; None where that does not stand there whole."""
    try:
        return read_sealed(folder / _TRIED)
    except (InputError, OSError):
        return None


def _step_aside(trial: Path) -> None:
    names = {folder.name for folder in tried_in(trial.parent)}
    free = next(name for number in range(len(names) + 1) if (name := f"earlier-{number:03d}") not in names)
    os.replace(trial, trial.with_name(free))
