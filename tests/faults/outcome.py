"""What a run leaves, so that two runs can be compared byte by byte.

Only what a clock wrote is left out, because no two runs take the same time: `WALL_TIME` says which fields those are.
Everything else, every other file and field, counts.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

WALL_TIME = {
    "metrics.jsonl": {"seconds", "drawing_seconds", "scoring_seconds", "tokens_per_second"},
    "done.json": {"seconds", "seal"},
    "checkpoint.json": {"metrics", "seal"},
    "environment.json": {"begun"},
    "evidence.json": {"begun", "seconds", "drawing_seconds", "scoring_seconds", "tokens_per_second", "seal"},
}
"""Fields that depend on a clock: durations, when a run began, and checksums over what holds them."""
DRAWN = "report/"
"""The page and its figures print durations and draw speeds; they are made from evidence.json, which is compared."""
OF_THE_START = {".lock", ".holder", "inputs.json"}
"""Of the process that has the run its number, and when the files that the recipe names were changed last."""


def artefacts(folder: Path) -> dict[str, str]:
    """Every file of a run by its path, with a hash of its content without wall times."""
    found = {}
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_file() and name not in OF_THE_START:
            drawn = name.startswith(DRAWN)
            found[name] = "" if drawn else hashlib.sha256(_without_wall_time(path)).hexdigest()
    return found


def differing(folder: Path, undisturbed: Path) -> list[str]:
    """The files that only one of the two has, or that differ."""
    ours, theirs = artefacts(folder), artefacts(undisturbed)
    return sorted(name for name in {*ours, *theirs} if ours.get(name) != theirs.get(name))


def _without_wall_time(path: Path) -> bytes:
    left_out = WALL_TIME.get(path.name)
    if left_out is None:
        return path.read_bytes()
    try:
        text = path.read_text()
        values: Any = [json.loads(line) for line in text.splitlines()] if path.suffix == ".jsonl" else json.loads(text)
        if path.name == "done.json":
            stamps = {n: stamp for n, stamp in values["files"].items() if Path(n).name not in WALL_TIME}
            values["files"] = {n: [size, sha256] for n, (size, _, sha256) in stamps.items()}
    except (ValueError, LookupError, TypeError, AttributeError):  # a damaged file, left as it is
        return path.read_bytes()
    return json.dumps(_stripped(values, left_out)).encode()


def _stripped(values: Any, left_out: set[str]) -> Any:
    if isinstance(values, dict):
        return {name: _stripped(value, left_out) for name, value in values.items() if name not in left_out}
    return [_stripped(value, left_out) for value in values] if isinstance(values, list) else values
