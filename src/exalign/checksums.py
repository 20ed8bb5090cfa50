"""What a file held when it was written, so that a byte that changes on a disk, in a copy or in an upload is noticed.

A finished folder of a model or of records has SHA256SUMS, in the format of `sha256sum`: whoever reads a file there
looks whether it is what was written, here or with `sha256sum --check SHA256SUMS`. A folder without one is not checked.

While records are under way a file `.SHARD.begun` beside each shard has its checksum, before the shard stands. It tells
size and time of change as well: as long as both are the same a file is taken for unchanged, and is not read.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

from exalign.errors import InputError
from exalign.storage import atomic_path, read_sealed, write_sealed, write_text

NAME = "SHA256SUMS"
_LINE = re.compile(r"([0-9a-f]{64})  (.+)")
BEGUN = ".*.begun"


class Stamp(NamedTuple):
    """A file when it was written: its bytes, its time of change in nanoseconds, its SHA-256 as 64 hex digits."""

    size: int
    time: int
    sha256: str


def checksum(path: Path) -> str:
    with Path(path).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def stamp(path: Path, *, known: str | None = None) -> Stamp:
    found = path.stat()
    return Stamp(found.st_size, found.st_mtime_ns, known or checksum(path))


def is_unchanged(path: Path, written: Stamp) -> bool:
    """Whether a file is there as it was written. It is read only where its time of change is another one."""
    try:
        found = path.stat()
    except OSError:
        return False
    same_size = found.st_size == written.size
    return same_size and (found.st_mtime_ns == written.time or checksum(path) == written.sha256)


def read_sums(folder: Path) -> dict[str, str]:
    """What stands in the folder's SHA256SUMS, by relative name; nothing where it has none."""
    path = Path(folder) / NAME
    if not path.is_file():
        return {}
    sums = _parsed(path.read_text(encoding="utf-8", errors="replace"))
    if sums is None:
        raise InputError(f"{path} is damaged: its lines are not those written; restore the folder, or make it again.")
    return dict(sums)


@lru_cache(maxsize=4)
def _parsed(text: str) -> dict[str, str] | None:
    """The lines of a SHA256SUMS, which is read again for every shard; None where it is not as it was written."""
    found = [_LINE.fullmatch(line) for line in text.split("\n")[:-2]]
    sums = {match[2]: match[1] for match in found if match}
    return sums if text == sums_text(sums) else None


def write_sums(folder: Path) -> None:
    """Vouch for every file below a folder that was just written."""
    files = [path for path in Path(folder).rglob("*") if path.is_file() and path.name != NAME]
    write_text(folder / NAME, sums_text({path.relative_to(folder).as_posix(): checksum(path) for path in files}))


@contextmanager
def vouched_path(path: Path) -> Iterator[Path]:
    """`storage.atomic_path` for a file of a folder under way, to which several processes may write at once."""
    with atomic_path(path) as temporary:
        yield temporary
        write_sealed(path.with_name(f".{path.name}.begun"), stamp(temporary)._asdict())


def begun_by(path: Path) -> dict[str, Stamp]:
    """What one such file vouches for; a damaged one is an `InputError`."""
    return {path.name[1:].removesuffix(".begun"): Stamp(**read_sealed(path))}


def begun(folder: Path) -> dict[str, Stamp]:
    """The files that a folder under way has had so far; what a damaged file says is passed over."""
    found: dict[str, Stamp] = {}
    for path in folder.glob(BEGUN):
        with suppress(InputError):
            found |= begun_by(path)
    return found


def unvouched(folder: Path, files: Sequence[Path]) -> Iterator[Path]:
    """Of these files of a folder under way those that changed, or that nothing vouches for.

    A SHA256SUMS that is damaged vouches for none, and is removed.
    """
    stamps, sums = begun(folder), {}
    try:
        sums = read_sums(folder)
    except InputError:
        (folder / NAME).unlink()
    for file in files:
        written = stamps.get(file.name)
        intact = is_unchanged(file, written) if written else file.name in sums and checksum(file) == sums[file.name]
        if not intact:
            yield file


def settle(folder: Path, more: Mapping[str, str]) -> None:
    """Write the SHA256SUMS of a folder that is finished, from the one before and what was begun since.

    `more` are checksums of what is about to be written.
    """
    known = read_sums(folder) | {name: written.sha256 for name, written in begun(folder).items()}
    sums = {name: digest for name, digest in known.items() if (folder / name).exists()}
    write_text(folder / NAME, sums_text({**sums, **more}))
    for path in folder.glob(BEGUN):
        path.unlink()


def check_file(path: Path) -> None:
    """A file that is not what the SHA256SUMS beside it says is an `InputError`."""
    digest = read_sums(path.parent).get(path.name)
    if digest is not None and not holds(path, digest):
        raise InputError(f"{path} is damaged: it is not what {NAME} says; delete it and run the stage again.")


def check_folder(folder: Path, *, but: str = "") -> None:
    """A file of a finished folder that is not what its SHA256SUMS says is an `InputError`; those with the suffix `but`
    are not read. A SHA256SUMS of somebody else's making is not looked at.
    """
    path = Path(folder) / NAME
    if path.is_file() and "\n# " in path.read_text(encoding="utf-8", errors="replace"):
        for name, digest in read_sums(folder).items():
            if not (but and name.endswith(but)) and not holds(folder / name, digest):
                raise InputError(
                    f"{folder / name} is damaged: it is not what {path} says; restore it, or delete the folder."
                )


def damaged_files(folder: Path, *, newer: bool = False) -> Iterator[Path]:
    """Every file below `folder` that a SHA256SUMS there lists and that is missing or holds something else.

    A SHA256SUMS that is itself damaged is yielded too. With `newer` only what changed after it was written is read.
    """
    for path in sorted(Path(folder).rglob(NAME)):
        try:
            sums = read_sums(path.parent)
        except InputError:
            yield path
            continue
        written = path.stat().st_mtime_ns
        for name, digest in sums.items():
            file = path.parent / name
            unread = newer and file.is_file() and file.stat().st_mtime_ns <= written
            if not (unread or holds(file, digest)):
                yield file


def holds(file: Path, digest: str) -> bool:
    return file.is_file() and checksum(file) == digest


def sums_text(sums: Mapping[str, str]) -> str:
    """A line for each file. The last, a comment to `sha256sum`, has the number of lines above and their own SHA-256, so
    that none is lost or changed unnoticed, a name no more than a checksum."""
    lines = "".join(f"{sums[name]}  {name}\n" for name in sorted(sums))
    return lines + f"# {len(sums)} files, {hashlib.sha256(lines.encode()).hexdigest()}\n"
