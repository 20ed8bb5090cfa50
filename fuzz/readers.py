"""Fuzzes the data readers: the first byte says which kind of file the others are, and whether they are packed first."""

from __future__ import annotations

import gzip
import io
import json
import tempfile
from collections import Counter
from pathlib import Path

import atheris
import pyarrow as pa
import pyarrow.parquet as pq

with atheris.instrument_imports(include=["exalign.data"]):
    from exalign.data.reading import DataSettings, read_source

from fuzz.contract import fuzz
from fuzz.grafting import choices, grafted

FOLDER = Path(tempfile.mkdtemp(prefix="exalign-fuzz-"))
FILES = (".jsonl", ".json", ".csv", ".parquet", ".jsonl.gz", ".json.gz", ".csv.gz")  # their order is in the corpus
KINDS = (*FILES, "rows", "grafted.jsonl", "grafted.parquet")
ROWS = (
    {"prompt": "a", "chosen": "b", "rejected": "c"},
    {"chosen": "\n\nHuman: a\n\nAssistant: b", "rejected": "\n\nHuman: a\n\nAssistant: c"},
    {"prompt": "a", "completions": ["b", "c"], "rewards": [1, 2.5]},
    {"prompt": [{"role": "user", "content": "a"}], "completion": [{"role": "assistant", "content": "b"}]},
    {"messages": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]},
    {"text": "a", "label": 1},
    {"prompt": "a", "completions": ["b", "c"], "preferred": 1, "weight": 0.5},
    {"prompt": "a", "completions": ["b", "c"], "ranks": [1, 2], "system": "d"},
    {
        "conversations": [{"role": "user", "content": "a"}],
        "chosen": {"role": "assistant", "content": "b"},
        "rejected": "c",
    },
    {"messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}], "tools": [{"name": "f"}]},
    {"messages": '[{"role": "user", "content": "a"}, {"role": "assistant", "tool_calls": [{"name": "f"}]}]'},
    {"prompt": {"text": "a", "role": "prompter", "replies": [{"text": "b", "role": "assistant", "rank": 0}]}},
)


def read(data: bytes) -> None:
    """Read every row of the file. `rows` makes a valid Parquet file of whatever JSON rows stand there."""
    if not data:
        return
    kind, content = KINDS[data[0] % len(KINDS)], data[1:]
    if kind.startswith("grafted") and content:
        content = grafted(ROWS[content[0] % len(ROWS)], content[1:])
        kind = "rows" if kind.endswith("parquet") else ".jsonl"
    if kind == "rows":
        kind, packed = ".parquet", parquet(content)
        if packed is None:
            return
        content = packed
    elif kind.endswith(".gz") and data[0] < 128:  # else the packed file itself is damaged
        content = gzip.compress(content, 1)
    path = FOLDER / f"data{kind}"
    path.write_bytes(content)
    counts: Counter[str] = Counter()
    records = list(read_source(DataSettings(source=str(path)), counts))
    assert counts["records"] == len(records)


def parquet(content: bytes) -> bytes | None:
    """The rows of JSON lines as a Parquet file with the types that Arrow finds; None where it finds none."""
    try:
        rows = [json.loads(line) for line in content.splitlines()]
        table = pa.Table.from_pylist(rows)
        stream = io.BytesIO()
        pq.write_table(table, stream)
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError, pa.ArrowException):
        return None
    return stream.getvalue()


def seeds() -> list[bytes]:
    """Every shape of row in every kind of file."""
    found = []
    for row in ROWS:
        lines = json.dumps(row).encode() + b"\n"
        table = ",".join(row).encode() + b"\n" + ",".join(f'"{value}"' for value in row.values()).encode() + b"\n"
        content = {".jsonl": lines, ".json": b"[" + lines + b"]", ".csv": table, "rows": lines}
        content[".parquet"] = parquet(lines) or b""
        for number, kind in enumerate((*FILES, "rows")):
            found.append(bytes([number]) + content[kind.removesuffix(".gz")])
    packed = gzip.compress(json.dumps(ROWS[0]).encode())
    return [*found, *choices(8), *choices(9), bytes([134]) + packed]


if __name__ == "__main__":
    fuzz("readers", read, seeds())
