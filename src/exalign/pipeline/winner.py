"""The weights of a search's best trial, from the trial to the stage that trains its method, which need not do it again.

While a search is under way the best trial so far keeps its weights; at its end they are put into `handed-over` in the
search's folder, and the method's stage moves them into its own. There they are what an interrupted training leaves, all
of its steps done. Every step of this can be interrupted, and what is missing or damaged is trained again.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from exalign.checksums import damaged_files
from exalign.storage import atomic_path, remove_folder

CHECKPOINTS = "checkpoints"
OWN = ("settings.json", "result.json")
"""What is the trial's, not its training's."""


def forget_weights(trial: Path) -> None:
    """Delete a trial's weights, and the samples that its policies were scored by before they were scored."""
    for folder in (trial / "policies", trial / CHECKPOINTS):
        if folder.exists():
            remove_folder(folder)
    forget_what_is_made_again(trial)


def forget_what_is_made_again(trial: Path) -> None:
    """Delete the final model, which the last checkpoint holds too, and unscored samples."""
    for folder in (trial / "model", *trial.glob("evaluated/*/drawn")):
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
    for path in sorted(paths, key=lambda path: path.name == CHECKPOINTS):
        if (to / path.name).is_dir():
            remove_folder(to / path.name)
        os.replace(path, to / path.name)
