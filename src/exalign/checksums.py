"""SHA256SUMS: what a file held when it was written, kept beside it in the format of `sha256sum`.

A folder of a model or of records has one, so that a byte that changes on a disk, in a copy or in an upload is noticed
by whoever reads the folder next, here or with `sha256sum --check SHA256SUMS`. A folder without one is not checked.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from exalign.errors import InputError
from exalign.storage import atomic_path, write_text

NAME = "SHA256SUMS"
_LINE = re.compile(r"([0-9a-f]{64})  (.+)")
_END = "# {count} files, {digest}\n"
"""The last line, a comment to `sha256sum`: how many lines stand above and their own SHA-256, so that none is lost or
changed unnoticed, a name no more than a checksum."""


def checksum(path: Path) -> str:
    """The SHA-256 of a file, as 64 hex digits."""
    with Path(path).open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def read_sums(folder: Path) -> dict[str, str]:
    """What stands in the folder's SHA256SUMS, by relative name; nothing where it has none."""
    path = Path(folder) / NAME
    if not path.is_file():
        return {}
    text = path.read_text(encoding="utf-8", errors="replace")
    found = [_LINE.fullmatch(line) for line in text.split("\n")[:-2]]
    sums = {match[2]: match[1] for match in found if match}
    if text != _text(sums):
        raise InputError(f"{path} is damaged: its lines are not those written; restore the folder, or make it again.")
    return sums


def write_sums(folder: Path) -> None:
    """Vouch for every file below a folder that was just written."""
    files = [path for path in Path(folder).rglob("*") if path.is_file() and path.name != NAME]
    _write(folder, {path.relative_to(folder).as_posix(): checksum(path) for path in files})


@contextmanager
def vouched_path(path: Path) -> Iterator[Path]:
    """`storage.atomic_path` for a file; its checksum stands in the folder before the file does."""
    with atomic_path(path) as temporary:
        yield temporary
        _write(path.parent, {**read_sums(path.parent), path.name: checksum(temporary)})


def is_intact(path: Path, sums: Mapping[str, str]) -> bool:
    """Whether a file holds what `sums` of its folder says; one that is not listed counts as intact."""
    return sums.get(path.name) in (None, checksum(path))


def check_file(path: Path) -> None:
    """A file that is not what the SHA256SUMS beside it says is an `InputError`."""
    if not is_intact(path, read_sums(path.parent)):
        raise InputError(f"{path} is damaged: it is not what {NAME} says; delete it and run the stage again.")


def damaged_files(folder: Path) -> Iterator[Path]:
    """Every file below `folder` that a SHA256SUMS there lists and that is missing or holds something else.

    A SHA256SUMS that is itself damaged is yielded too.
    """
    for path in sorted(Path(folder).rglob(NAME)):
        try:
            sums = read_sums(path.parent)
        except InputError:
            yield path
            continue
        for name, digest in sums.items():
            file = path.parent / name
            if not file.is_file() or checksum(file) != digest:
                yield file


def _text(sums: Mapping[str, str]) -> str:
    lines = "".join(f"{sums[name]}  {name}\n" for name in sorted(sums))
    return lines + _END.format(count=len(sums), digest=hashlib.sha256(lines.encode()).hexdigest())


def _write(folder: Path, sums: Mapping[str, str]) -> None:
    write_text(Path(folder) / NAME, _text(sums))
