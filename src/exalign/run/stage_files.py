"""The files of a stage: what was written is what later stages read, or it is said which file is not.

`done.json` lists every file of a complete stage with its checksum. What an interrupted stage had finished is vouched
for piece by piece: models and records by the SHA256SUMS in their folders, checkpoints by their own hashes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from exalign import checksums
from exalign.errors import InputError
from exalign.storage import read_sealed

MARKERS = ("done.json", "started.json")
HANDED_OVER = "handed-over"
"""A folder in a stage's that a later stage takes away, so that it is no part of what stays."""


def stage_checksums(folder: Path) -> dict[str, str]:
    """The checksum of every file of a stage that has just ended, by relative name.

    Where a SHA256SUMS has one it is taken: it was computed when the file was written, not after it may have changed.
    """
    found: dict[str, str] = {}
    sums: dict[Path, dict[str, str]] = {}
    for path in sorted(_files(folder)):
        owner = next((p for p in path.parents if (p / checksums.NAME).is_file()), None)
        if owner is not None and owner.is_relative_to(folder):
            known = sums.setdefault(owner, checksums.read_sums(owner)).get(path.relative_to(owner).as_posix())
        else:
            known = None
        found[path.relative_to(folder).as_posix()] = known or checksums.checksum(path)
    return found


def check_complete(stage: str, folder: Path, wanted: Mapping[str, str]) -> None:
    """Compare a complete stage with its checksums; the first file that is missing or differs is an `InputError`."""
    for name, digest in wanted.items():
        path = folder / name
        if not path.is_file() or checksums.checksum(path) != digest:
            what = "is damaged: it is not what" if path.is_file() else "is missing from what"
            raise InputError(
                f"{path} {what} the stage {stage} wrote; restore it, or pass --redo to make the stage again."
            )


def forget_damaged_records(folder: Path) -> Iterator[Path]:
    """Before an interrupted stage continues: files of finished records that are damaged, removed to be made again.

    With a shard goes the header of its folder, which says that the folder is complete. A damaged model, which only
    training anew could make again, is an `InputError`, and so is a speed that may not be measured again. What is
    handed over is looked at by the stage that takes it.
    """
    for path in folder.rglob("speed.json"):
        if HANDED_OVER not in path.relative_to(folder).parts:
            read_sealed(path)
    for path in list(checksums.damaged_files(folder)):
        if HANDED_OVER in path.relative_to(folder).parts:
            continue
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


def _files(folder: Path) -> Iterator[Path]:
    """The files of a stage, but not those of stages whose folders lie below it."""
    for path in folder.iterdir():
        if path.is_dir():
            if path.name != HANDED_OVER and not any((path / marker).exists() for marker in MARKERS):
                yield from _files(path)
        elif path.name not in MARKERS:
            yield path
