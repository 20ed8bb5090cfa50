"""The weights of a search's best trial, from the trial to the stage that trains its method, which need not do it again.

While a search is under way the best trial so far keeps its weights; at its end they are put into `handed-over` in the
search's folder, and the method's stage moves them into its own. There they are what an interrupted training leaves, all
of its steps done. A search that is made again first gives them back to their trial, which may be the best once more.
Every step of this can be interrupted, and what is missing or damaged is trained again.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from exalign.checksums import damaged_files
from exalign.storage import atomic_path, remove_folder

CHECKPOINTS, POLICIES, MODEL, METRICS = "checkpoints", "policies", "model", "metrics.jsonl"
OWN = ("settings.json", "result.json")
"""What is the trial's, not its training's."""


def forget_weights(trial: Path) -> None:
    """Delete a trial's weights, and the samples that its policies were scored by before they were scored."""
    for folder in (trial / POLICIES, trial / CHECKPOINTS):
        if folder.exists():
            remove_folder(folder)
    forget_what_is_made_again(trial)


def forget_what_is_made_again(trial: Path) -> None:
    """Delete the final model, which the last checkpoint holds too, and unscored samples."""
    for folder in (trial / MODEL, *trial.glob("evaluated/*/drawn")):
        if folder.exists():
            remove_folder(folder)


def hand_over(trial: Path, to: Path) -> None:
    """Move what training left in a trial's folder into `to`, files by a copy, checkpoints last of all."""
    if not (trial / CHECKPOINTS).exists():
        return  # moved before
    to.mkdir(exist_ok=True)
    for file in (path for path in trial.iterdir() if path.is_file() and path.name not in OWN):
        with atomic_path(to / file.name) as temporary:
            shutil.copyfile(file, temporary)
    _move([path for path in trial.iterdir() if path.is_dir() and path.name != "evaluated"], to)


def give_back(trials: Sequence[Path], handed: Path, stage: Path) -> None:
    """Give weights that an earlier search handed over, or that its method's stage has since, back to their trial.

    That is the one with the same metrics, times among them. The stage keeps what it has: the files get second names.
    """
    for source in (handed, stage):
        owner = _owner(source, trials)
        if owner is not None and not (owner / CHECKPOINTS).exists() and _has_all_of(source, owner):
            for folder in sorted((path for path in source.iterdir() if path.is_dir()), key=_checkpoints_last):
                if folder.name != MODEL:
                    with atomic_path(owner / folder.name) as temporary:
                        shutil.copytree(folder, temporary, copy_function=_link)
    owner = _owner(handed, trials)
    under_way = owner is not None and (owner / CHECKPOINTS).exists() and not (handed / CHECKPOINTS).exists()
    if handed.exists() and not under_way:
        remove_folder(handed)


def _owner(source: Path, trials: Sequence[Path]) -> Path | None:
    """The complete trial that left the metrics which stand in `source`."""
    if not (source / METRICS).exists():
        return None
    metrics = (source / METRICS).read_bytes()
    done = (trial for trial in trials if (trial / "result.json").exists() and (trial / METRICS).exists())
    return next((trial for trial in done if (trial / METRICS).read_bytes() == metrics), None)


def _has_all_of(source: Path, trial: Path) -> bool:
    """Whether every policy that the trial was ranked by is there, and the checkpoints."""
    ranked_by = {folder.name for folder in (trial / "evaluated").glob("step-*")}
    return (source / CHECKPOINTS).exists() and ranked_by == {
        folder.name for folder in (source / POLICIES).glob("step-*")
    }


def _link(source: str, target: str) -> None:
    """A second name for a file, none of which is ever written in place; a copy where there are no links."""
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)


def take_over(handed: Path, folder: Path) -> bool:
    """Move what a search handed over into the folder of the stage that trains the method; whether there was any.

    With a file that is damaged in it, all of it is deleted.
    """
    if not (handed / CHECKPOINTS).exists():
        return False
    if any(damaged_files(handed)):
        remove_folder(handed)
        return False
    _move(list(handed.iterdir()), folder)
    handed.rmdir()
    return True


def _move(paths: list[Path], to: Path) -> None:
    for path in sorted(paths, key=_checkpoints_last):
        if (to / path.name).is_dir():
            remove_folder(to / path.name)
        os.replace(path, to / path.name)


def _checkpoints_last(path: Path) -> bool:
    return path.name == CHECKPOINTS
