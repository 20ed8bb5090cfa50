"""Rows of local files, one at a time, with exact row numbers: JSON lines, JSON arrays, CSV and Parquet."""

from __future__ import annotations

import csv
import gzip
import json
import zlib
from collections import Counter
from collections.abc import Iterator
from itertools import count
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.parquet as pq

from exalign.errors import InputError

DATA_SUFFIXES = (".jsonl", ".json", ".csv", ".parquet")
"""What can be read; all but Parquet also with `.gz` behind."""

Rows = Iterator[tuple[int, dict[str, Any]]]
ByteStream = BinaryIO | gzip.GzipFile
MAX_ROW = 1 << 28
"""Bytes of one row: a small compressed file can unpack to a line that fills the memory."""
MAX_ARRAY = 1 << 31
"""Bytes of a JSON array, which is in memory as a whole."""


def data_suffix(path: Path) -> str | None:
    """The suffix of a data file, `.gz` included, or None.

    >>> data_suffix(Path("a/train.JSONL.gz")), data_suffix(Path("README.md"))
    ('.jsonl.gz', None)
    """
    name = path.name.lower()
    suffixes = [*DATA_SUFFIXES, *(suffix + ".gz" for suffix in DATA_SUFFIXES if suffix != ".parquet")]
    return next((suffix for suffix in suffixes if name.endswith(suffix)), None)


def read_file(path: Path, *, streaming: bool, counts: Counter[str]) -> Rows:
    """(row number, columns) of each row of a data file, read as it is asked for.

    Row numbers count from 1 and are line numbers in JSON lines, and record numbers (the header not counted) in CSV.
    A `.json` file may hold an array of objects, which is loaded whole (an `InputError` when `streaming`), or
    JSON lines. Anything malformed is an `InputError` that names the file and the row.
    """
    suffix = data_suffix(path)
    if suffix is None:
        raise InputError(f"{path} is not a data file: its name must end in one of {', '.join(DATA_SUFFIXES)} (or .gz).")
    kind = suffix.removesuffix(".gz")
    if kind == ".parquet":
        yield from _parquet_rows(path)
        return
    row = 0
    try:
        with gzip.open(path, "rb") if suffix.endswith(".gz") else path.open("rb") as stream:
            rows = _csv_rows(path, stream) if kind == ".csv" else _json_rows(path, stream, streaming, counts)
            for row, values in rows:
                yield row, values
    except (EOFError, zlib.error, OSError) as error:
        raise InputError(f"{path}: reading stopped after row {row} ({error or type(error).__name__}).") from None


def _json_rows(path: Path, stream: ByteStream, streaming: bool, counts: Counter[str]) -> Rows:
    first = _first_character(stream)
    stream.seek(0)
    if first != b"[":
        return _json_lines(path, stream, counts)
    if streaming:
        raise InputError(f"{path} is one JSON array, which cannot be streamed: write one object per line (JSON lines).")
    return _json_array(path, stream)


def _first_character(stream: ByteStream) -> bytes:
    while block := stream.read(1 << 16):
        if rest := block.lstrip(b" \t\r\n\v\f\xef\xbb\xbf"):
            return rest[:1]
    return b""


def _json_lines(path: Path, stream: ByteStream, counts: Counter[str]) -> Rows:
    for number, line in enumerate(_lines(path, stream), start=1):
        if line.isspace():
            counts["blank_lines"] += 1
            continue
        yield number, _object(_parse(path, number, line), path, number)


def _json_array(path: Path, stream: ByteStream) -> Rows:
    try:
        content = stream.read(MAX_ARRAY + 1)
        if len(content) > MAX_ARRAY:
            raise InputError(
                f"{path} is a JSON array above {MAX_ARRAY >> 30} GiB: write one object per line (JSON lines)."
            )
        values = json.loads(content.decode("utf-8-sig"))
    except json.JSONDecodeError as error:
        raise InputError(f"{path}, line {error.lineno}: not valid JSON ({error.msg}).") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}: not valid UTF-8 at byte {error.start}.") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}: not valid JSON ({_unreadable(error)}).") from None
    for number, value in enumerate(values, start=1):
        yield number, _object(value, path, number)


def _parse(path: Path, number: int, line: bytes) -> Any:
    try:
        return json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
    except json.JSONDecodeError as error:
        raise InputError(f"{path}, row {number}: not valid JSON ({error.msg} at character {error.pos + 1}).") from None
    except UnicodeDecodeError as error:
        raise InputError(f"{path}, row {number}: not valid UTF-8 at byte {error.start + 1} of the line.") from None
    except (ValueError, RecursionError) as error:
        raise InputError(f"{path}, row {number}: not valid JSON ({_unreadable(error)}).") from None


def _unreadable(error: Exception) -> str:
    return "nested too deeply" if isinstance(error, RecursionError) else "a number has thousands of digits"


def _lines(path: Path, stream: ByteStream) -> Iterator[bytes]:
    for number in count(1):
        line = stream.readline(MAX_ROW + 1)
        if not line:
            return
        if len(line) > MAX_ROW:
            raise InputError(f"{path}, row {number} has more than {MAX_ROW >> 20} MiB.")
        yield line


def _object(value: Any, path: Path, number: int) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise InputError(f"{path}, row {number}: expected an object with named columns, found {type(value).__name__}.")
    return value


def _csv_rows(path: Path, stream: ByteStream) -> Rows:
    csv.field_size_limit(MAX_ROW)  # the default refuses long texts
    number = 0
    lines = (line.decode("utf-8-sig" if i == 0 else "utf-8") for i, line in enumerate(_lines(path, stream)))
    try:
        reader = csv.reader(lines, strict=True)
        header = next(reader, None)
        if not header or len(set(header)) < len(header):
            raise InputError(f"{path}: the first line must name the columns, each once; found {header!s:.200}.")
        for number, cells in enumerate((cells for cells in reader if cells), start=1):
            if len(cells) != len(header):
                raise InputError(f"{path}, row {number}: {len(cells)} cells, but the header names {len(header)}.")
            yield number, dict(zip(header, cells, strict=True))
    except csv.Error as error:
        raise InputError(f"{path}, row {number + 1}: not valid CSV ({error}).") from None
    except UnicodeDecodeError:
        raise InputError(f"{path}, row {number + 1}: not valid UTF-8.") from None


def _parquet_rows(path: Path) -> Rows:
    number = 0
    try:
        with pq.ParquetFile(path) as file:
            for batch in file.iter_batches(batch_size=256):
                for values in batch.to_pylist():
                    number += 1
                    yield number, values
    # Values that Python cannot hold (text that is not UTF-8, a date beyond the year 9999) are not errors of Arrow.
    except (pa.ArrowException, OSError, ValueError, OverflowError) as error:
        raise InputError(
            f"{path}: not readable as Parquet after row {number} ({' '.join(str(error).split())[:200]})."
        ) from None
