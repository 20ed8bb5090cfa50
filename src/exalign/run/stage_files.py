"""The files of a stage: what was written is what later stages read, or it is said which file is not.

`done.json` lists every file of a complete stage: size, time of change, SHA-256. A start compares sizes and times and
reads no file whose are the same; what a stage then reads as its input is compared with its checksum there. What an
interrupted stage had finished is vouched for piece by piece: models and records by the SHA256SUMS in their folders,
checkpoints by their own hashes. `verify` reads everything.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exalign import checksums
from exalign.checksums import Stamp, is_unchanged, stamp
from exalign.errors import InputError
from exalign.storage import fingerprint_path, read_sealed, write_sealed

MARKERS = ("done.json", "started.json")
_NO_INPUT = ("checkpoints", "skipped")
"""Folders of a training that no later stage reads."""


def stage_checksums(folder: Path) -> dict[str, Stamp]:
    """The stamp of every file of a stage that has just ended, by relative name.

    Where a SHA256SUMS has a checksum it is taken: it was computed when the file was written, not after it may have
    changed.
    """
    files, known = sorted(_files(folder)), dict[Path, str]()
    for owner in (path.parent for path in files if path.name == checksums.NAME):
        known |= {owner / name: digest for name, digest in checksums.read_sums(owner).items()}
    return {path.relative_to(folder).as_posix(): stamp(path, known=known.get(path)) for path in files}


def check_complete(stage: str, folder: Path, wanted: Mapping[str, Sequence[Any]]) -> None:
    """Compare a complete stage with its stamps; the first file that is missing or differs is an `InputError`.

    Files that are the same with other times, as in a copy of a run, are read this once: their times are noted anew.
    """
    moved = False
    for name, values in wanted.items():
        path, written = folder / name, Stamp(*values)
        if not is_unchanged(path, written):
            raise _damaged(path, stage)
        moved = moved or path.stat().st_mtime_ns != written.time
    if moved:
        done = folder / "done.json"
        whole, before = read_sealed(done), done.stat()
        whole["files"] = {name: stamp(folder / name, known=digest) for name, (*_, digest) in wanted.items()}
        write_sealed(done, whole)
        os.utime(done, ns=(before.st_atime_ns, before.st_mtime_ns))  # it tells the order in which stages ended


def check_inputs(stage: str, folder: Path) -> None:
    """Before a stage works that needs this one: compare the checksums of the files that nobody checks who reads them.

    Models and records are checked by their readers, with the SHA256SUMS of their folders, which is one of these files.
    """
    listed = {Path(name): digest for name, digest in _listed(folder / "done.json").items()}
    vouching = {path.parent for path in listed if path.name == checksums.NAME}
    for path, digest in listed.items():
        vouched = path.name != checksums.NAME and not vouching.isdisjoint(path.parents)
        if not (vouched or path.parts[0] in _NO_INPUT or checksums.holds(folder / path, digest)):
            raise _damaged(folder / path, stage)


def forget_damaged_records(folder: Path) -> Iterator[Path]:
    """Before an interrupted stage continues: files of finished records that are damaged, removed to be made again.

    With a shard goes the header of its folder, which says that the folder is complete. A damaged model, which only
    training anew could make again, is an `InputError`. Files from before their SHA256SUMS was written are not read.
    """
    for path in list(checksums.damaged_files(folder, newer=True)):
        header = path.parent / "header.json"
        if not header.exists():
            if path.suffix == ".parquet" or (path.name == checksums.NAME and any(path.parent.glob("part-*.parquet"))):
                continue  # of records under way: their writer sees to it
            if path.name == "header.json":
                continue
            raise InputError(f"{path} is damaged; restore it, or delete {folder} to make the stage anew.")
        path.unlink(missing_ok=True)
        header.unlink(missing_ok=True)
        if path.name == checksums.NAME:  # then nothing vouches for any shard
            for shard in path.parent.glob("part-*.parquet"):
                shard.unlink()
        yield path


@dataclass(frozen=True)
class Verified:
    """What `verify` found: how many files and bytes it read, and which of the files are not what was written."""

    files: int
    size: int
    damaged: list[Path]


def verify(run: Path) -> Verified:
    """Read every file of a run that something vouches for, in stages that are complete or under way."""
    run, intact = Path(run), dict[Path, bool]()

    def look(lists: Iterable[Path], read: Callable[[Path], Mapping[str, str]]) -> None:
        """The files beside each list, by the checksums that stand in it; a damaged list is one of the damaged files."""
        for path in sorted({*lists} - {*intact}):
            try:
                for name, digest in read(path).items():
                    file = path.parent / name
                    intact[file] = checksums.holds(file, digest) and intact.get(file, True)
            except (InputError, OSError):
                intact[path] = False

    look((path for name in MARKERS for path in run.rglob(name)), _listed)
    look(run.rglob(checksums.NAME), lambda path: checksums.read_sums(path.parent))
    look(run.rglob(checksums.BEGUN), lambda path: {n: w.sha256 for n, w in checksums.begun_by(path).items()})
    for checkpoint in sorted({*run.rglob("checkpoint.json")} - {*intact}):
        state = checkpoint.with_name("state.pt")
        try:
            intact[state] = read_sealed(checkpoint).get("state") == fingerprint_path(state)
        except (InputError, OSError):
            intact[checkpoint] = False
    if not intact:
        raise InputError(f"{run} holds no stage of a run.")
    size = sum(path.stat().st_size for path in intact if path.is_file())
    return Verified(len(intact), size, [path for path, whole in intact.items() if not whole])


def _listed(marker: Path) -> dict[str, str]:
    return {name: digest for name, (*_, digest) in read_sealed(marker).get("files", {}).items()}


def _damaged(path: Path, stage: str) -> InputError:
    what = "is damaged: it is not what" if path.is_file() else "is missing from what"
    return InputError(
        f"{path} {what} the stage {stage} wrote; restore it, or delete it and pass --redo to make the stage again."
    )


def _files(folder: Path) -> Iterator[Path]:
    """The files of a stage, but not those of stages whose folders lie below it."""
    for path in folder.iterdir():
        if path.is_dir():
            if not any((path / marker).exists() for marker in MARKERS):
                yield from _files(path)
        elif path.name not in MARKERS:
            yield path
