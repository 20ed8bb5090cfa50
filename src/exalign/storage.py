"""Files that are either complete or absent, and fingerprints of content."""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from exalign.errors import InputError

_SYSTEM_ERROR = re.compile(r"\(os error (\d+)\)")


def whole_characters(text: str) -> str:
    """The text with U+FFFD for each lone surrogate, which JSON can spell but UTF-8 cannot."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")


@contextmanager
def atomic_path(path: Path) -> Iterator[Path]:
    """Yield a temporary sibling of `path`; on success it is synced and takes the name `path`, else it is removed.

    Works for a file or a folder that the caller creates at the yielded name. An existing folder at `path`
    is replaced. A full disk raises `InputError`; whatever stood at `path` before stays readable.
    """
    path = Path(path)
    if not path.name:
        raise InputError(f"{path} is a folder, and what is written needs a name of its own; give one.")
    temporary = path.with_name(f".{path.name}.{os.getpid()}.tmp")
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        _remove(temporary)
        try:
            yield temporary
            for file in [p for p in temporary.rglob("*") if p.is_file()] if temporary.is_dir() else [temporary]:
                _sync(file)
            aside = _set_aside(path) if temporary.is_dir() and path.exists() else None
            try:
                os.replace(temporary, path)
            except BaseException:
                if aside is not None:
                    os.replace(aside, path)
                raise
            _sync(path.parent)
            if aside is not None:
                _remove(aside)
        finally:
            with suppress(OSError):
                _remove(temporary)


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Around what writes `path`: a disk that is full or may not be written is an `InputError` that names both."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        # Libraries in Rust (safetensors, tokenizers) end the sentence of theirs with the system's error.
        number = error.errno if isinstance(error, OSError) else next(iter(_SYSTEM_ERROR.findall(str(error))), None)
        if number is None and not isinstance(error, OSError):
            raise
        said = str(error) if number is None else os.strerror(int(number))
        if number is not None and int(number) == errno.ENOSPC:
            place = next(folder for folder in path.absolute().parents if folder.exists())
            said += f" ({shutil.disk_usage(place).free / 2**20:,.1f} MiB free on the disk of {place})"
        raise InputError(f"Cannot write {path}: {said}. What was finished before is intact.") from error


def write_text(path: Path, text: str) -> None:
    """Write `text` to `path` as UTF-8, atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: Path, value: Any) -> None:
    """Write `value` as readable JSON, atomically; NaN and infinity are refused (`ValueError`)."""
    write_text(path, json_text(value))


def json_text(value: Any) -> str:
    """Readable JSON; NaN and infinity are refused (`ValueError`)."""
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n"


def write_sealed(path: Path, values: dict[str, Any]) -> None:
    """`write_json` for named values, with a hash of them under `seal`."""
    plain = json.loads(json_text(values))  # as it will be read: tuples are lists, every key is a text
    write_json(path, {"sealed": True, **plain, "seal": fingerprint(plain)})


def read_sealed(path: Path) -> dict[str, Any]:
    """The named values that `write_sealed` wrote; `InputError` where they are others.

    A file that has neither of its names is not checked; a damaged one lacks one of them at most.
    """
    values = read_object(path)
    announced, seal = values.pop("sealed", None), values.pop("seal", None)
    if (announced, seal) != (None, None) and (announced is not True or seal != fingerprint(values)):
        raise InputError(f"{path} is damaged: its values are not those that were written; restore or delete it.")
    return values


def read_json(path: Path) -> Any:
    """Read a JSON file that exalign wrote; a missing or damaged one is an `InputError` that names it.

    A number that is not finite is damage, since none is ever written.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
        return json.loads(text, parse_constant=finite, parse_float=finite)
    except FileNotFoundError:
        raise InputError(f"{path} does not exist.") from None
    except (OSError, ValueError, RecursionError) as error:
        raise InputError(f"{path} is not valid JSON ({error}); delete it and run the stage again.") from None


def read_object(path: Path) -> dict[str, Any]:
    """The same for a file that holds named values."""
    values = read_json(path)
    if not isinstance(values, dict):
        raise InputError(f"{path} is damaged: it holds no named values; delete it and run the stage again.")
    return values


def exists(path: Path) -> bool:
    """Whether something stands at `path`; nothing can where the name is too long or the folder may not be read."""
    try:
        return path.exists()
    except (OSError, ValueError):
        return False


def is_lfs_pointer(file: Path) -> bool:
    """Whether Git LFS did not fetch a file, and this stands in its place."""
    start = b"version https://git-lfs"
    with file.open("rb") as stream:
        return stream.read(len(start)) == start


def fingerprint(value: Any) -> str:
    """A short content hash (16 hex digits) of a JSON-serialisable value, independent of key order."""
    text = json.dumps(value, sort_keys=True, ensure_ascii=False, separators=(",", ":"), default=str)
    # JSON can spell half of a character, which is no UTF-8 and has a hash all the same.
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()[:16]


def fingerprint_path(path: Path) -> str:
    """The same of a file, or of every file of a folder with its relative name."""
    path = Path(path)
    digest = hashlib.sha256()
    files = sorted(p for p in path.rglob("*") if p.is_file()) if path.is_dir() else [path]
    for file in files:
        digest.update(str(file.relative_to(path)).encode() + b"\0")
        with file.open("rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()[:16]


def finite(text: str) -> float:
    """A number as JSON spells it, for `json.loads`; `ValueError` where it is NaN, infinite, or rounds to that."""
    value = float(text)
    if not math.isfinite(value):
        raise ValueError(f"the number {text[:40]} is not finite")
    return value


def link_folder(source: Path, target: Path) -> None:
    """Second names for files, none of which is ever written in place; copies where there are no links."""

    def link(source: str, target: str) -> None:
        try:
            os.link(source, target)
        except OSError:
            shutil.copyfile(source, target)

    with atomic_path(target) as temporary:
        shutil.copytree(source, temporary, copy_function=link)


def remove_folder(path: Path) -> None:
    """Remove a folder so that under its name it is whole or absent, also where a kill comes in the middle."""
    _remove(_set_aside(path))


def _set_aside(path: Path) -> Path:
    aside = path.with_name(f".{path.name}.{os.getpid()}.old.tmp")  # a name that is taken for a leftover
    _remove(aside)  # one of an earlier process of this number
    os.replace(path, aside)
    return aside


def remove_leftovers(folder: Path) -> None:
    """Remove what killed processes had under way in a folder: the hidden siblings of `atomic_path`."""
    for leftover in list(folder.rglob(".*.tmp")):
        _remove(leftover)  # one may lie inside another that is gone by now


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
