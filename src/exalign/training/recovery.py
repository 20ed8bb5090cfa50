"""From the last good checkpoint of a training that stopped, on with other settings; and what was done, kept for good.

Everything in a step is a function of (seed, step), so a training that stopped because loss or gradient was not finite
comes to the same end under the same settings. What helps is a lower learning rate or clipping: `ADJUSTABLE`. Skipped
steps move no weight: all of them failed on the weights that the last step before them made. The last good checkpoint is
one from before that step, when a loss was still finite.

`stopped.json` says where and why a training stopped. `recover` enters it in `recoveries.json`, which lists every
recovery with the settings before and after. A model that was recovered is not that of its final settings alone, and
this list is what tells them apart.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from exalign.errors import InputError
from exalign.storage import read_json, read_object, write_json
from exalign.training.settings import ADJUSTABLE
from exalign.training.state import drop_checkpoints


def adjustable(settings: Mapping[str, Any]) -> dict[str, Any]:
    """The settings among these that a recovery may change."""
    return {name: settings[name] for name in ADJUSTABLE if name in settings}


def record_stop(folder: Path, reason: str, settings: Mapping[str, Any], *, after_step: int) -> None:
    """Write `stopped.json`."""
    values = {"after_step": after_step, "reason": reason, "settings": adjustable(settings)}
    write_json(folder / "stopped.json", values)


def forget_stop(folder: Path) -> None:
    """Remove `stopped.json`: the training goes on, and may stop elsewhere."""
    (folder / "stopped.json").unlink(missing_ok=True)


def recoveries(folder: Path) -> list[dict[str, Any]]:
    """What was recovered, in order: `after_step`, `reason`, the `settings` from there on and those that `were`."""
    path = folder / "recoveries.json"
    found = read_json(path) if path.exists() else []
    if not isinstance(found, list) or not all(_is_recovery(entry) for entry in found):
        raise InputError(f"{path} is damaged: it is no list of recoveries.")
    return found


def next_recovery(folder: Path, settings: Mapping[str, Any]) -> dict[str, Any] | None:
    """What `recover` would add with these settings; None where no training stopped. `InputError` if nothing differs."""
    path = folder / "stopped.json"
    if not path.exists():
        return None
    stopped = read_object(path)
    now = adjustable(settings)
    entry = {name: stopped.get(name) for name in ("after_step", "reason")}
    entry |= {"were": stopped.get("settings"), "settings": now}
    if not _is_recovery(entry):
        raise InputError(f"{path} is damaged; delete it and run the stage again.")
    if now == entry["were"]:
        raise InputError(f"{folder} stopped with these very settings, and would again; lower {' or '.join(now)}.")
    return entry


def recover(folder: Path, settings: Mapping[str, Any]) -> None:
    """Let the training that stopped in `folder` go on from its last checkpoint with these settings.

    `settings` are those that it is then called with, `settings.model_dump()`. Nothing else than `ADJUSTABLE` may
    differ, which the training itself checks. `InputError` where it did not stop, or where nothing differs.
    """
    folder = Path(folder)
    entry = next_recovery(folder, settings)
    if entry is None:
        raise InputError(f"{folder}: no training stopped here, so there is nothing to recover.")
    add_recovery(folder, entry)


def add_recovery(folder: Path, entry: dict[str, Any]) -> None:
    """Write the entry into `recoveries.json` and drop later checkpoints; the training, as it goes on, forgets the stop.

    Where no checkpoint is left, nothing is left of the settings before, and there is nothing to tell.
    """
    if entry["after_step"]:
        write_json(folder / "recoveries.json", extended(recoveries(folder), entry))
    drop_checkpoints(folder / "checkpoints", after=entry["after_step"])


def extended(before: list[dict[str, Any]], entry: dict[str, Any]) -> list[dict[str, Any]]:
    """The list with the entry as its last, once, however often a process that does so is killed."""
    return before if before[-1:] == [entry] else [*before, entry]


def recovered_after(folder: Path, settings: Mapping[str, Any]) -> int:
    """Up to which step a checkpoint may have been made with other `ADJUSTABLE` settings than these; 0: none may."""
    last = recoveries(folder)[-1:]
    return max((entry["after_step"] for entry in last if entry["settings"] == adjustable(settings)), default=0)


def with_recoveries(card: str, folder: Path) -> str:
    """A model card that tells of every recovery: after which step training went on, and with what."""
    sentences = [
        f"Training went on after step {entry['after_step']} with "
        + ", ".join(f"{name} {now} (was {entry['were'].get(name)})" for name, now in _changes(entry))
        + ", because loss or gradient had not been finite.\n"
        for entry in recoveries(folder)
    ]
    return "\n".join([card, *sentences])


def _changes(entry: dict[str, Any]) -> list[tuple[str, Any]]:
    return [(name, now) for name, now in entry["settings"].items() if entry["were"].get(name) != now]


def _is_recovery(entry: Any) -> bool:
    if not isinstance(entry, dict) or type(entry.get("after_step")) is not int or entry["after_step"] < 0:
        return False
    return isinstance(entry.get("were"), dict) and isinstance(entry.get("settings"), dict)
