"""One byte changed, or the second half lost, in every file of a run, one after the other."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from faults.outcome import LOCK, artefacts, differing
from faults.starts import Starter


def flip(path: Path, rng: random.Random) -> None:
    """Change one bit of one byte."""
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def truncate(path: Path, rng: random.Random) -> None:
    """Lose the end, from any byte on."""
    path.write_bytes(path.read_bytes()[: rng.randrange(path.stat().st_size)])


DAMAGES: tuple[Callable[[Path, random.Random], None], ...] = (flip, truncate)


@dataclass(frozen=True)
class Outcome:
    """What a command did about one damaged file."""

    file: str
    damage: str
    named: bool
    """It left with one sentence that names the file."""
    mended: bool
    """It ended, with the same artefacts as a run that nothing disturbed."""
    said: bool
    """Where it mended something that it does not make anew each time, it said which file."""
    printed: str


def kinds(folder: Path) -> list[str]:
    """A file of every kind: of those that differ in numbers only (steps, shards), the last one."""
    found = {}
    for name in artefacts(folder):
        kind = "".join(letter for letter in name if not letter.isdigit())
        found[kind] = name
    return sorted(name for name in found.values() if name != LOCK)


def damage_each(
    starter: Starter,
    arguments: list[object],
    whole: Path,
    expected: Path,
    place: Path,
    *,
    files: list[str],
    rng: random.Random,
) -> Iterator[Outcome]:
    """Damage each of the files of `whole` in a copy, in every way, run the command on it, and look what it did."""
    folder = place / "damaged"
    for name in files:
        for damage in DAMAGES:
            if folder.exists():
                shutil.rmtree(folder)
            shutil.copytree(whole, folder)
            if not (folder / name).stat().st_size:
                continue
            damage(folder / name, rng)
            ended = starter.exalign(*arguments, "--run", folder, log=place / "log")
            sentence = ended.status == 2 and "Traceback" not in ended.printed
            named = sentence and str(folder / name) in ended.printed
            mended = ended.status == 0 and not differing(folder, expected)
            said = str(folder / name) in ended.printed or str((folder / name).parent) in ended.printed
            yield Outcome(name, damage.__name__, named, mended, said, ended.printed)
