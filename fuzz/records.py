"""Fuzzes the reader of our own records: a folder whose shard or header is damaged, or holds other columns."""

from __future__ import annotations

import json
import tempfile
from dataclasses import asdict
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["exalign.data", "exalign.storage"]):
    from exalign.data.record import Completion, Record
    from exalign.data.store import Header, RecordWriter, read_header, read_records, write_records

from fuzz.contract import fuzz
from fuzz.grafting import choices, grafted
from fuzz.readers import parquet

FOLDER = Path(tempfile.mkdtemp(prefix="exalign-fuzz-")) / "records"
COMPLETION = {"text": "b", "token_ids": [1], "finish_reason": "stop", "logprob": -1.0, "reference_logprob": -1.0}
ROW = {"id": "0", "prompt": "a", "messages": None, "prompt_ids": [1], "preferred": 0}
ROW["completions"] = [{**COMPLETION, "reward": 1.0}]
CHAT = {**ROW, "prompt": None, "messages": [{"role": "user", "content": "a"}]}


def write_valid() -> bytes:
    """A folder of two records; the bytes of its shard."""
    records = [
        Record("0", "a", (Completion("b", (1, 2), "stop", -1.0, -1.5, 0.5), Completion("c")), (1,), 1),
        Record("1", ({"role": "user", "content": "a"},)),
    ]
    write_records(FOLDER, records, Header(model="m", temperature=1.0, counts={"cut": 1}))
    return (FOLDER / "part-000000.parquet").read_bytes()


VALID = write_valid()


def read(data: bytes) -> None:
    """The first byte says what is damaged: the shard, a few of its bytes, its columns, or the header."""
    if not data:
        return
    shard, kind, rest = FOLDER / "part-000000.parquet", data[0] % 6, data[1:]
    header = json.dumps(asdict(Header())).encode()
    content: bytes | None = VALID
    if kind == 0:
        content = rest
    elif kind == 1:
        content = patched(VALID, rest)
    elif kind == 2:
        content = parquet(rest)
    elif kind == 3:
        header = rest
    elif kind == 4:
        content = parquet(grafted(CHAT if rest[:1] < b"\x80" else ROW, rest))
    else:
        header = grafted(asdict(Header(model="m", counts={"a": 1})), rest)
    if content is None:
        return
    shard.write_bytes(content)
    (FOLDER / "header.json").write_bytes(header)
    for record in read_records(FOLDER):
        assert isinstance(record.id, str)
        assert record.preferred is None or record.completions[record.preferred].text is not None
        assert all(isinstance(completion.text, str) for completion in record.completions)
    sum(read_header(FOLDER).counts.values())
    RecordWriter(FOLDER)


def patched(content: bytes, changes: bytes) -> bytes:
    """`content` with bytes replaced: each change is a position (two bytes) and what to add there."""
    damaged = bytearray(content)
    for at in range(0, len(changes) - 2, 3):
        position = int.from_bytes(changes[at : at + 2], "big") % len(damaged)
        damaged[position] = (damaged[position] + changes[at + 2]) % 256
    return bytes(damaged)


def seeds() -> list[bytes]:
    """A valid input of each kind."""
    lines = [b"\2" + json.dumps(row).encode() for row in (ROW, CHAT, {**ROW, "prompt": None}, {**ROW, "preferred": 7})]
    header = json.dumps({**asdict(Header(model="m", counts={"a": 1})), "temperature": 1.0}).encode()
    return [b"\0" + VALID, b"\1\0\4\1\2\7\1", *lines, b"\3" + header, *choices(4), *choices(5)]


if __name__ == "__main__":
    fuzz("records", read, seeds())
