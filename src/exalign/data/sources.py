"""Where rows come from: local JSONL, JSON, CSV and Parquet files, folders of them, and hub data sets.

Everything here yields `SourceRow`: a mapping of columns to values that knows the file and the row it came from.
Local files are read by our own thin readers, row by row, because a message about a bad row must name it; the hub and
folders saved by `datasets` go through that library. What the columns mean is the business of `formats`.
"""

from __future__ import annotations

import difflib
import random
import re
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from pydantic import Field

from exalign.data.tables import DATA_SUFFIXES, data_suffix, read_file
from exalign.errors import InputError
from exalign.settings import Settings
from exalign.storage import exists

_SPLIT_WORDS = {
    "train": "train",
    "test": "test",
    "validation": "validation",
    "valid": "validation",
    "dev": "validation",
}
_HUB_NAME = re.compile(r"[\w.-]{1,96}(/[\w.-]{1,96})?")


class DataSettings(Settings):
    """Which rows to read, and from where."""

    source: str = Field(
        description="A JSONL, JSON, CSV or Parquet file (.gz allowed), a folder of them, a folder of our records, "
        "or the name of a data set on the Hugging Face hub."
    )
    name: str | None = Field(None, description="The configuration of a hub data set that has several.")
    split: str | None = Field(
        None, description="The split: of a hub data set (default `train`), or of a folder whose file names carry one."
    )
    columns: dict[str, str] = Field(
        default_factory=dict,
        description="Renames columns, ours to theirs, e.g. {prompt: question, completion: answer}.",
    )
    prompt_tokens: int | None = Field(
        None, gt=0, description="For rows of plain `text`: its first n tokens are the prompt, the rest the completion."
    )
    skip: int = Field(0, ge=0, description="Rows left out at the start (after shuffling).")
    limit: int | None = Field(None, gt=0, description="At most this many rows are read (after `skip`).")
    shuffle_seed: int | None = Field(
        None, ge=0, description="Shuffles all rows with this seed before `skip` and `limit`; none keeps their order."
    )
    streaming: bool = Field(
        False, description="Reads a hub data set row by row over the network instead of downloading it first."
    )


@dataclass(frozen=True, slots=True)
class SourceRow:
    """One row: its columns, and where it stands (`number` counts from 1; in a text file it is the line)."""

    where: str
    number: int
    id: str
    values: dict[str, Any]

    def problem(self, text: str) -> InputError:
        """The error that names the file and this row."""
        return InputError(f"{self.where}, row {self.number}: {text}")


def local_path(settings: DataSettings) -> Path | None:
    """The file or folder that `source` names, or None where it is the name of a hub data set.

    What looks like a path and does not exist is an `InputError` that names the nearest existing one.
    """
    path = _expanded(settings.source)
    if exists(path):
        return path
    parent_exists = path.parent != Path(".") and exists(path.parent) and path.parent.is_dir()
    looks_local = settings.source.startswith((".", "/", "~")) or data_suffix(path) is not None
    if looks_local or parent_exists or not _HUB_NAME.fullmatch(settings.source):
        raise InputError(f"There is no file or folder {str(path)[:300]}{_nearest(path)}.")
    return None


def _expanded(source: str) -> Path:
    with suppress(RuntimeError):  # nobody is called so
        return Path(source).expanduser()
    return Path(source)


def read_rows(settings: DataSettings, counts: Counter[str]) -> Iterator[SourceRow]:
    """The rows of the source in their order (or shuffled), after `skip` and `limit`; `counts["rows"]` counts them.

    Nothing holds the whole source in memory unless it is shuffled. Settings that cannot take effect on this
    source, absent or unreadable files and malformed rows are `InputError`s.
    """
    path = local_path(settings)
    _check_settings(settings, path)
    rows = _hub_rows(settings) if path is None else _local_rows(path, settings, counts)
    if settings.shuffle_seed is not None:
        rows = _shuffled(rows, settings.shuffle_seed)
    return _counted(islice(rows, settings.skip, _stop(settings)), settings.columns, counts)


def _shuffled(rows: Iterable[SourceRow], seed: int) -> Iterator[SourceRow]:
    everything = list(rows)
    random.Random(seed).shuffle(everything)
    yield from everything


def _stop(settings: DataSettings) -> int | None:
    return None if settings.limit is None else settings.skip + settings.limit


def _counted(rows: Iterable[SourceRow], columns: dict[str, str], counts: Counter[str]) -> Iterator[SourceRow]:
    for row in rows:
        counts["rows"] += 1
        yield _renamed(row, columns) if columns else row


def _renamed(row: SourceRow, columns: dict[str, str]) -> SourceRow:
    values = {key: value for key, value in row.values.items() if key not in columns.values()}
    for ours, theirs in columns.items():
        if theirs not in row.values:
            raise row.problem(f"`columns` asks for a column {theirs!r}, but it has {', '.join(map(repr, row.values))}.")
        values[ours] = row.values[theirs]
    return SourceRow(row.where, row.number, row.id, values)


def _check_settings(settings: DataSettings, path: Path | None) -> None:
    if settings.streaming and settings.shuffle_seed is not None:
        raise InputError("`shuffle_seed` needs all rows at once: turn `streaming` off, or leave the order as it is.")
    if path is not None and settings.name is not None:
        raise InputError(f"`name` applies to hub data sets only, but {path} is local.")
    if path is not None and path.is_file() and settings.split is not None:
        raise InputError(f"`split` applies to folders and hub data sets, but {path} is one file.")


def _local_rows(path: Path, settings: DataSettings, counts: Counter[str]) -> Iterator[SourceRow]:
    if path.is_file():
        yield from _file_rows(path, path.name, settings, counts)
    elif (path / "dataset_dict.json").exists() or (path / "state.json").exists():
        yield from _saved_rows(path, settings)
    else:
        for file in _split_files(path, settings.split):
            yield from _file_rows(file, file.relative_to(path).as_posix(), settings, counts)


def _file_rows(path: Path, label: str, settings: DataSettings, counts: Counter[str]) -> Iterator[SourceRow]:
    for number, values in read_file(path, streaming=settings.streaming, counts=counts):
        yield SourceRow(str(path), number, f"{label}:{number}", values)


def _split_files(folder: Path, split: str | None) -> list[Path]:
    """The data files below a folder, of one split. Splits are words of the file names, as on the hub."""
    try:
        files = sorted(
            file
            for file in folder.rglob("*")
            if data_suffix(file) is not None
            and file.is_file()
            and not any(part.startswith(".") for part in file.relative_to(folder).parts)
            and file.name not in ("dataset_info.json", "dataset_infos.json", "header.json")
        )
    except OSError as error:
        raise InputError(f"The folder {folder} cannot be read ({error}).") from None
    if not files:
        raise InputError(f"The folder {folder} holds no data files ({', '.join(DATA_SUFFIXES)}).")
    splits = {file: _split_of(file.relative_to(folder)) for file in files}
    found = sorted({name for name in splits.values() if name})
    if split is not None:
        wanted = _SPLIT_WORDS.get(split, split)
        matching = [file for file in files if splits[file] == wanted or data_stem(file) == split]
        if not matching:
            names = ", ".join(found or sorted({data_stem(file) for file in files}))
            raise InputError(f"The folder {folder} has no split {split!r}; found {names}.")
        return matching
    if len(found) > 1:
        raise InputError(f"The folder {folder} has several splits ({', '.join(found)}): name one in `split`.")
    return files


def data_stem(file: Path) -> str:
    """The file's name without its data suffix: `train.jsonl.gz` → `train`."""
    return file.name[: -len(data_suffix(file) or "")] if data_suffix(file) else file.name


def _split_of(relative: Path) -> str | None:
    words = re.split(r"[^a-z]+", relative.as_posix().lower())
    return next((_SPLIT_WORDS[word] for word in words if word in _SPLIT_WORDS), None)


def _saved_rows(folder: Path, settings: DataSettings) -> Iterator[SourceRow]:
    """A folder written by `Dataset.save_to_disk`, memory-mapped."""
    import datasets

    try:
        data = datasets.load_from_disk(str(folder))
    except Exception as error:  # a damaged folder brings up errors of several libraries
        raise InputError(f"The folder {folder} cannot be read by datasets ({_first_line(error)}).") from None
    if isinstance(data, datasets.DatasetDict):
        split = next(iter(data)) if settings.split is None and len(data) == 1 else settings.split
        if split not in data:
            raise InputError(f"The folder {folder} has the splits {', '.join(data)}: name one of them in `split`.")
        data = data[split]
    elif settings.split is not None:
        raise InputError(f"`split` cannot take effect: the folder {folder} holds a single split.")
    for number, values in enumerate(data, start=1):
        yield SourceRow(str(folder), number, f"{folder.name}:{number}", dict(values))


def _hub_rows(settings: DataSettings) -> Iterator[SourceRow]:
    import datasets

    split = settings.split or "train"
    where = f"{settings.source} ({split})"
    try:
        data = datasets.load_dataset(settings.source, settings.name, split=split, streaming=settings.streaming)
        for number, values in enumerate(data, start=1):
            yield SourceRow(where, number, f"{split}:{number}", dict(values))
    except (GeneratorExit, InputError):
        raise
    except Exception as error:  # the hub client raises errors of several HTTP libraries
        near = _nearest(_expanded(settings.source))
        raise InputError(
            f"{settings.source!r} is no local file{near}, and reading it from the Hugging Face hub failed: "
            f"{_first_line(error)}"
        ) from None


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _nearest(path: Path) -> str:
    """`; did you mean …?` with the closest name in the nearest folder that exists, or nothing."""
    folder = path.parent
    wanted = path.name
    while not exists(folder) and folder != folder.parent:
        folder, wanted = folder.parent, folder.name
    if not folder.is_dir() or len(wanted) > 255:
        return ""
    names = difflib.get_close_matches(wanted, [entry.name for entry in folder.iterdir()], n=1, cutoff=0.5)
    return f"; did you mean {folder / names[0]}" if names else ""
