"""Folders of records: Parquet shards, `header.json` and SHA256SUMS beside them, each written atomically.

`datasets.load_dataset("parquet")` reads the shards.
"""

from __future__ import annotations

import hashlib
import json
import re
import warnings
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from pydantic import TypeAdapter, ValidationError

from exalign import checksums
from exalign.data.record import Completion, Record
from exalign.errors import InputError
from exalign.storage import atomic_path, json_text, read_object, write_text

FORMAT_VERSION = 1


@dataclass(frozen=True, slots=True)
class Header:
    """Where a file of records came from; None where it does not apply. `counts` says what was dropped or cut."""

    model: str | None = None
    tokenizer: str | None = None
    temperature: float | None = None
    seed: int | None = None
    sampler: str | None = None
    fingerprint: str | None = None
    counts: dict[str, int] = field(default_factory=dict)
    version: int = FORMAT_VERSION

    def with_counts(self, more: Counter[str]) -> Header:
        total = Counter(self.counts)
        total.update(more)
        return replace(self, counts=dict(total))


_COMPLETION = pa.struct(
    [
        ("text", pa.string()),
        ("token_ids", pa.list_(pa.int32())),
        ("finish_reason", pa.string()),
        ("logprob", pa.float64()),
        ("reference_logprob", pa.float64()),
        ("reward", pa.float64()),
    ]
)
_MESSAGE = pa.struct([("role", pa.string()), ("content", pa.string()), ("more", pa.string())])
"""`more` is the rest of a message as a JSON object."""
SCHEMA = pa.schema(
    [
        ("id", pa.string()),
        ("prompt", pa.string()),
        ("messages", pa.list_(_MESSAGE)),
        ("prompt_ids", pa.list_(pa.int32())),
        ("completions", pa.list_(_COMPLETION)),
        ("preferred", pa.int32()),
        ("weight", pa.float64()),
        ("tools", pa.string()),
        ("columns", pa.string()),
        ("parts", pa.string()),
    ]
)
_COUNTS = b"exalign.counts"
_COUNTS_TYPE = TypeAdapter(dict[str, int])
_HEADER = TypeAdapter(Header)
_SHARD_NAME = re.compile(r"part-(\d{6})\.parquet")


class RecordWriter:
    """Writes records shard by shard, each atomically: a kill loses at most the shard under way.

    Opening a folder that already has shards continues after them: `written` says how many records stand there, so that
    a stage can skip what is done, and `counts` sums what was counted while they were made. A damaged shard and those
    behind it, or behind a missing one, are removed with a warning, as what is written next takes their place. `close`
    writes the header, which marks the folder as complete.

    >>> import tempfile
    >>> folder = Path(tempfile.mkdtemp()) / "rollouts"
    >>> with RecordWriter(folder, shard_size=2) as writer:
    ...     for i in range(3):
    ...         writer.write(Record(id=str(i), prompt="Hi", completions=(Completion("there"),)))
    ...     writer.close(Header(model="gpt2"))
    >>> len(read_records(folder)), read_header(folder).model, len(list(folder.glob("*.parquet")))
    (3, 'gpt2', 2)
    """

    def __init__(self, folder: Path, *, shard_size: int = 256) -> None:
        self.folder = Path(folder)
        self.shard_size = shard_size
        self.written = 0
        self.counts: Counter[str] = Counter()
        self._next_shard = 0
        self._pending: list[Record] = []
        self._continue_after_finished_shards()

    def _continue_after_finished_shards(self) -> None:
        shards = shards_of(self.folder)
        damaged = next(checksums.unvouched(self.folder, shards), None)
        for place, shard in enumerate(shards):
            rows = num_rows(shard) if shard == shard_path(self.folder, place) and shard != damaged else None
            if rows is None:
                break
            self.written += rows
            self.counts.update(shard_counts(shard))
            self._next_shard += 1
        if removed := shards[self._next_shard :]:
            what = "is damaged" if removed[0] == shard_path(self.folder, self._next_shard) else "has no shard before it"
            behind = f" and the {len(removed) - 1} shards behind it are" if len(removed) > 1 else " is"
            warnings.warn(f"{removed[0]} {what}; it{behind} made again.", stacklevel=3)
            for shard in removed:
                shard.unlink()

    def write(self, record: Record) -> None:
        """Add one record; a full shard goes to disk."""
        self._pending.append(record)
        if len(self._pending) >= self.shard_size:
            self.flush()

    def flush(self) -> None:
        if self._pending:
            records, self._pending = self._pending, []
            self.write_shard(records, Counter())

    def write_shard(self, records: Sequence[Record], counts: Counter[str]) -> None:
        """Write these records as a shard of their own, and with them what was counted while they were made."""
        self.flush()
        write_shard(shard_path(self.folder, self._next_shard), records, counts)
        self.written += len(records)
        self.counts.update(counts)
        self._next_shard += 1

    def close(self, header: Header) -> None:
        """Write what is pending and the header: the folder is complete."""
        self.flush()
        write_header(self.folder, header)

    def __enter__(self) -> RecordWriter:
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        # Interrupted work leaves whole shards only, so that a resumed file equals an undisturbed one byte for byte.
        if kind is None:
            self.flush()


def write_records(folder: Path, records: Iterable[Record], header: Header, *, shard_size: int = 256) -> None:
    """Write a whole file of records at once, replacing what stood there."""
    with atomic_path(Path(folder)) as temporary, RecordWriter(temporary, shard_size=shard_size) as writer:
        for record in records:
            writer.write(record)
        writer.close(header)


def iter_records(folder: Path, start: int = 0) -> Iterator[Record]:
    """Stream the records of a folder from a number on, in the order they were written, a shard in memory at a time."""
    shards, complete = shards_of(Path(folder)), (Path(folder) / "header.json").exists()
    if not shards and not complete:
        raise InputError(f"{folder} holds no records (expected part-000000.parquet and header.json).")
    sums = checksums.read_sums(Path(folder))
    lost = {name for name in sums if _SHARD_NAME.fullmatch(name)} - {shard.name for shard in shards}
    if complete and lost:
        raise InputError(f"{Path(folder) / min(lost)} is missing; restore it, or delete the folder and make it again.")
    for shard in shards:
        rows = num_rows(shard) if start else None
        if rows is None or rows > start:  # a damaged shard is read, which says so
            yield from islice(iter_shard(shard), start, None)
        start = max(start - (rows or 0), 0)


def iter_shard(shard: Path) -> Iterator[Record]:
    """The records of one shard; a damaged one is an `InputError` that names it."""
    with reading(shard):
        table = pq.read_table(shard)
        table.validate(full=True)
        rows = table.select(SCHEMA.names).cast(SCHEMA).to_pylist()
    for number, row in enumerate(rows, start=1):
        try:
            yield _from_row(row)
        except (ValueError, TypeError, RecursionError):  # a part is missing or is no JSON
            said = f"{shard}, row {number} is not a record; delete the file and run the stage again."
            raise InputError(said) from None


@contextmanager
def reading(shard: Path) -> Iterator[None]:
    """Around what reads a shard: a damaged one is an `InputError` that names it."""
    checksums.check_file(shard)
    try:
        yield
    except (pa.ArrowException, OSError, ValueError, LookupError, TypeError) as error:
        said = " ".join(str(error).split())[:200]
        raise InputError(f"{shard} cannot be read ({said}); delete it and run the stage again.") from None


def read_records(folder: Path) -> list[Record]:
    return list(iter_records(folder))


def read_header(folder: Path) -> Header:
    """The header of a complete folder of records; an absent one or another version is an `InputError`."""
    path = Path(folder) / "header.json"
    values = read_object(path)
    checksums.check_file(path)
    if values.get("version") != FORMAT_VERSION:
        found = str(values.get("version"))[:40]
        raise InputError(f"{folder} has record format {found}; this exalign reads {FORMAT_VERSION}.")
    try:
        return _HEADER.validate_python(values)
    except ValidationError as error:
        where = ".".join(map(str, error.errors()[0]["loc"]))[:100]
        raise InputError(f"{path} is damaged at {where}; delete it and run the stage again.") from None


def write_shard(shard: Path, records: Sequence[Record], counts: Counter[str]) -> None:
    """Write records as one shard, atomically, and with them what was counted while they were made.

    Several processes may write shards of one folder at once.
    """
    schema = SCHEMA.with_metadata({_COUNTS: json.dumps(counts)})
    with checksums.vouched_path(shard) as temporary:
        pq.write_table(pa.Table.from_pylist([_to_row(record) for record in records], schema=schema), temporary)


def write_header(folder: Path, header: Header) -> None:
    """Write the header, which marks a folder of records as complete."""
    folder.mkdir(parents=True, exist_ok=True)
    text = json_text(asdict(header))
    checksums.settle(folder, {"header.json": hashlib.sha256(text.encode()).hexdigest()})
    write_text(folder / "header.json", text)


def shards_of(folder: Path) -> list[Path]:
    """The shards of a folder in their order, whole or not."""
    return sorted(path for path in folder.glob("part-*.parquet") if _SHARD_NAME.fullmatch(path.name))


def shard_path(folder: Path, number: int) -> Path:
    """Where the shard `number`, counted from 0, of a folder stands."""
    return folder / f"part-{number:06d}.parquet"


def shard_counts(shard: Path) -> Counter[str]:
    metadata = pq.read_schema(shard).metadata or {}
    try:
        return Counter(_COUNTS_TYPE.validate_json(metadata.get(_COUNTS, b"{}")))
    except ValidationError:
        raise InputError(f"{shard} has damaged counts; delete it and run the stage again.") from None


def counted_in(folder: Path) -> Counter[str]:
    return sum((shard_counts(shard) for shard in shards_of(folder)), Counter())


def num_rows(shard: Path) -> int | None:
    """None if the shard is damaged or absent."""
    try:
        with pq.ParquetFile(shard) as file:
            return int(file.metadata.num_rows)
    except (pa.ArrowException, OSError, ValueError):  # a column's name may be no text any more
        return None


def _to_row(record: Record) -> dict[str, Any]:
    said: dict[str, Any] = {"prompt": record.prompt, "messages": None}
    if not isinstance(record.prompt, str):
        said = {"prompt": None, "messages": [_message_row(**message) for message in record.prompt]}
    parts = [completion.parts for completion in record.completions]
    return {
        **{name: getattr(record, name) for name in ("id", "prompt_ids", "preferred", "weight", "tools")},
        **said,
        "completions": [{name: getattr(c, name) for name in Completion.__slots__} for c in record.completions],
        "columns": None if record.columns is None else json.dumps(record.columns, default=str),
        "parts": json.dumps(parts) if any(parts) else None,
    }


def _message_row(role: str, content: str, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, "more": json.dumps(more) if more else None}


def _from_row(row: dict[str, Any]) -> Record:
    said, found, parts = row.pop("messages"), row.pop("completions"), row.pop("parts")
    each = [None] * len(found) if parts is None else json.loads(parts)
    completions = tuple(
        Completion(**{**values, "token_ids": _ids(values["token_ids"])}, parts=own)
        for values, own in zip(found, each, strict=True)
    )
    if row["id"] is None or None in [c.text for c in completions] or (row["prompt"] is None) == (said is None):
        raise ValueError("a part is missing")
    if row["preferred"] is not None and not 0 <= row["preferred"] < len(completions):
        raise ValueError("nothing is preferred")
    row["prompt"] = row["prompt"] if said is None else tuple(_message(message) for message in said)
    row["prompt_ids"] = _ids(row["prompt_ids"])
    row["columns"] = None if row["columns"] is None else dict(json.loads(row["columns"]))
    return Record(completions=completions, **row)


def _ids(values: list[int] | None) -> tuple[int, ...] | None:
    if values is not None and None in values:
        raise ValueError("an id is missing")
    return None if values is None else tuple(values)


def _message(row: dict[str, Any]) -> dict[str, Any]:
    if row["role"] is None or row["content"] is None:
        raise ValueError("a message has no role or content")
    more = {} if row["more"] is None else json.loads(row["more"])
    return {**more, "role": row["role"], "content": row["content"]}
