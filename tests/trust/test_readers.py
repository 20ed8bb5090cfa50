"""Whatever bytes a file holds, a reader returns or says one sentence: `InputError`, and no other error, at once.

Small and random here; `make fuzz` searches longer, guided by coverage (docs/reliability.md). What that found is kept
below as cases of their own.
"""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from exalign.data.reading import MAX_ROW, DataSettings, read_source
from exalign.data.record import Completion, Record
from exalign.data.store import FORMAT_VERSION, Header, RecordWriter, read_header, read_records, write_records
from exalign.judging.askers import seconds_to_wait
from exalign.judging.comparisons import Comparison, read_comparisons, write_comparisons
from exalign.judging.exchanges import MAX_TOKENS, parse_completion, read_answers, token_count
from exalign.judging.instructions import read_verdict
from trust.shapes import grafted, sentence, some


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("readers")


def read_file(place: Path, name: str, content: bytes) -> str | None:
    (place / name).write_bytes(content)
    return sentence(lambda: list(read_source(DataSettings(source=str(place / name)), Counter())))


ROWS: list[dict[str, Any]] = [
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
]


def parquet(rows: list[Any]) -> bytes | None:
    """The rows with the types that Arrow finds; None where it finds none."""
    stream = io.BytesIO()
    try:
        pq.write_table(pa.Table.from_pylist(rows), stream)
    except (ValueError, TypeError, AttributeError, OverflowError, pa.ArrowException):
        return None
    return stream.getvalue()


@some
@given(st.sampled_from(ROWS).flatmap(lambda row: st.tuples(st.just(row), grafted(row), grafted(row))))
def test_rows_of_any_shape(place: Path, rows: tuple[Any, ...]) -> None:
    """One damaged row, and one behind a valid one, which has decided what the columns mean."""
    valid, row, other = rows
    read_file(place, "rows.jsonl", json.dumps(row).encode() + b"\n")
    read_file(place, "rows.jsonl", b"\n".join(json.dumps(one).encode() for one in (valid, row, other)))
    read_file(place, "rows.json", json.dumps([row], indent=1).encode())
    if (table := parquet([row])) is not None:
        read_file(place, "rows.parquet", table)


@some
@given(
    st.sampled_from(["d.jsonl", "d.json", "d.csv", "d.parquet", "d.jsonl.gz", "d.csv.gz"]),
    st.binary(max_size=40) | st.text('"{}[],:\n\r ab1\\', max_size=40).map(str.encode),
    st.booleans(),
)
def test_files_of_any_bytes(place: Path, name: str, content: bytes, packed: bool) -> None:
    read_file(place, name, gzip.compress(content) if packed else content)


NESTED = b"[" * 100_000 + b"]" * 100_000


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("a.jsonl", b'{"prompt": "a", "chosen": 5, "rejected": "c"}', "`chosen` must be"),
        ("a.jsonl", b'{"messages": [{"from": ["human"], "value": "a"}]}', "`messages.role` must be text"),
        ("a.jsonl", b'{"prompt": "a", "completions": ["b"], "rewards": [1' + b"0" * 400 + b"]}", "finite number"),
        ("a.jsonl", b'{"text": "a", "label": 1' + b"0" * 5000 + b"}", "thousands of digits"),
        ("a.json", b'[{"label": 1' + b"0" * 5000 + b"}]", "thousands of digits"),
        ("a.jsonl", b'{"text": ' + NESTED + b"}", "nested too deeply"),
        ("a.json", NESTED, "nested too deeply"),
        ("a.csv", b"prompt,completions\na," + NESTED, "`completions` must be a list"),
        ("a.csv", b"prompt,completions,rewards\na,\"[\"\"b\"\"]\",1" + b"0" * 5000, "`rewards` must be a list"),
        ("a.csv", b"x," * 5000 + b"y", "the first line must name the columns"),
        ("a.json", b" " * (1 << 20) + b"7", "expected an object"),
        ("a.parquet", b"PAR1" + b"\xff" * 60 + b"PAR1", "not readable as Parquet"),
        ("a.parquet", b"", "not readable as Parquet"),
    ],
    ids=range(13),
)  # fmt: skip
def test_what_broke_the_data_readers(place: Path, name: str, content: bytes, said: str) -> None:
    assert said in (read_file(place, name, content) or "")


def test_values_that_python_cannot_hold_are_named(place: Path) -> None:
    column = pa.StringArray.from_buffers(1, pa.py_buffer(b"\0\0\0\0\2\0\0\0"), pa.py_buffer(b"\xff\xfe"))
    far = pa.array([2**62], pa.timestamp("ms"))
    for table in (pa.table({"text": column}), pa.table({"text": ["a"], "when": far})):
        stream = io.BytesIO()
        pq.write_table(table, stream)
        said = read_file(place, "held.parquet", stream.getvalue())
        assert said is not None
        assert "not readable as Parquet" in said


def test_a_small_file_that_unpacks_to_a_huge_row_is_refused(place: Path) -> None:
    packer = zlib.compressobj(1, wbits=31)
    block = b"x" * (1 << 20)
    content = b"".join(packer.compress(block) for _ in range((MAX_ROW >> 20) + 1)) + packer.flush()
    assert len(content) < MAX_ROW // 100
    for name, where in (("bomb.jsonl.gz", "row"), ("bomb.csv.gz", "line")):
        assert f"{where} 1 has more than 256 MiB" in (read_file(place, name, content) or "")


@pytest.mark.parametrize("source", ["x" * 5000, "a\0b", "~nobody-of-this-name/x.jsonl", "x" * 300 + ".jsonl"])
def test_a_source_that_cannot_exist_is_one_sentence(source: str) -> None:
    assert sentence(lambda: list(read_source(DataSettings(source=source, limit=1), Counter()))) is not None


ROW = {
    "id": "0",
    "prompt": None,
    "messages": [{"role": "user", "content": "a", "more": '{"name": "b"}'}],
    "prompt_ids": [1],
    "completions": [asdict(Completion("b", (1,), "stop", -1.0, -1.5, 0.5))],
    "preferred": 0,
    "weight": 0.5,
    "tools": '[{"name": "c"}]',
    "columns": None,
    "parts": None,
}


def read_folder(folder: Path, shard: bytes | None, header: bytes | None) -> None:
    """Read everything of a folder of records, after replacing parts of it."""
    write_records(folder, [Record("0", "a", (Completion("b"),))], Header())
    if shard is not None:
        (folder / "part-000000.parquet").write_bytes(shard)
    if header is not None:
        (folder / "header.json").write_bytes(header)

    def read() -> None:
        for record in read_records(folder):
            assert record.preferred is None or record.completions[record.preferred].text is not None
        sum(read_header(folder).counts.values())
        RecordWriter(folder)

    sentence(read)


@some
@given(grafted(ROW), grafted(asdict(Header(model="m", counts={"a": 1}))))
def test_records_with_other_columns_or_header(place: Path, row: Any, header: Any) -> None:
    read_folder(place / "records", parquet([row]), None)
    read_folder(place / "records", None, json.dumps(header).encode())


@some
@given(st.lists(st.tuples(st.integers(0, 10**4), st.integers(1, 255)), min_size=1, max_size=8))
def test_records_with_damaged_bytes(place: Path, changes: list[tuple[int, int]]) -> None:
    write_records(place / "records", [Record("0", "a", (Completion("b", (1, 2)),))], Header())
    content = bytearray((place / "records" / "part-000000.parquet").read_bytes())
    for position, added in changes:
        content[position % len(content)] = (content[position % len(content)] + added) % 256
    read_folder(place / "records", bytes(content), None)


@pytest.mark.parametrize(
    "changed",
    [
        {"completions": None},
        {"completions": [None]},
        {"id": None},
        {"preferred": 7},
        {"preferred": -1},
        {"prompt": "both"},
        {"messages": None},
        {"messages": [None]},
        {"prompt_ids": [None]},
        {"messages": [{"role": "user", "content": "a", "more": "{"}]},
        {"messages": [{"role": "user", "content": "a", "more": "[1]"}]},
    ],
    ids=str,
)
def test_a_row_that_is_no_record_is_named(place: Path, changed: dict[str, Any]) -> None:
    folder = place / "named"
    write_records(folder, [], Header())
    table = pa.Table.from_pylist([ROW, {**ROW, **changed}])
    pq.write_table(table, folder / "part-000000.parquet")
    assert "row 2 is not a record" in (sentence(lambda: read_records(folder)) or "")


def test_a_column_whose_name_is_no_text_is_damage(place: Path) -> None:
    """Found by fuzzing: pyarrow names the columns when it opens the file."""
    write_records(place / "unnamed", [Record("0", "a", (Completion("b"),))], Header())
    shard = place / "unnamed" / "part-000000.parquet"
    shard.write_bytes(shard.read_bytes().replace(b"finish_reason", b"finish\xf9reason"))
    sentence(lambda: read_records(place / "unnamed"))
    assert RecordWriter(place / "unnamed").written == 0  # removed, to be made again


def test_a_header_with_wrong_types_is_damaged(place: Path) -> None:
    for wrong in ({"counts": [1]}, {"counts": {"a": "b"}}, {"temperature": "hot"}, {"version": 2}, []):
        values = {**asdict(Header()), **wrong} if isinstance(wrong, dict) else wrong
        write_records(place / "h", [], Header())
        (place / "h" / "header.json").write_text(json.dumps(values))
        assert sentence(lambda: read_header(place / "h")) is not None
    assert FORMAT_VERSION == 1


BODY: dict[str, Any] = {
    "choices": [{"message": {"content": "Verdict: A"}, "finish_reason": "stop"}],
    "usage": {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5},
}
EXCHANGE = {
    "version": 1,
    "key": "k",
    "outcome": "answered",
    "request": {},
    "response": "",
    "seconds": 1.0,
    "time": "now",
}


def read_exchange(place: Path, row: Any) -> tuple[str | None, int]:
    (place / "exchanges.jsonl").write_text(json.dumps(row) + "\n")
    found: dict[str, Any] = {}
    said = sentence(lambda: found.update(read_answers(place / "exchanges.jsonl")))
    for answer in found.values():
        assert read_verdict(answer.text) in ("left", "right", "tie", "unreadable")
    return said, len(found)


@some
@given(grafted(BODY))
def test_an_accepted_answer_can_be_read_ever_after(place: Path, body: Any) -> None:
    raw = json.dumps(body)
    read = read_exchange(place, {**EXCHANGE, "response": raw})
    assert read == ((None, 1) if parse_completion(raw) is not None else (read[0], 0))


@some
@given(grafted({**EXCHANGE, "response": json.dumps(BODY)}))
def test_stored_exchanges_of_any_shape(place: Path, row: Any) -> None:
    read_exchange(place, row)


def test_what_broke_the_readers_of_judgements(place: Path) -> None:
    complete = {**EXCHANGE, "response": json.dumps(BODY)}
    for seconds in (10**400, float("nan"), [1]):  # the first two found by fuzzing
        assert "is not an exchange" in (read_exchange(place, {**complete, "seconds": seconds})[0] or "")
    refusal = {"choices": [{"message": {"content": None, "refusal": ["no"]}}]}
    assert parse_completion(json.dumps(refusal)) is None
    assert token_count(10**400) is None
    assert token_count(MAX_TOKENS) == MAX_TOKENS
    assert parse_completion(json.dumps(BODY).replace("3", "9" * 5000)) is None
    for header in ("9" * 400, "Mon, 01 Jan 99999999999 00:00:00 GMT", "Mon, 1 Jan 2026 00:00:00 +" + "9" * 20, "nan"):
        assert seconds_to_wait({"retry-after": header}) is None
    (place / "c.jsonl").write_bytes(b'{"version": "\xff"}\n')
    assert "is not a comparison" in (sentence(lambda: read_comparisons(place / "c.jsonl")) or "")


def test_half_of_a_character_has_a_hash() -> None:
    """Found by fuzzing: a comparison whose text holds a lone surrogate could be read, and had no key."""
    halved = Comparison("0", "Hi", "exo", "sft", "a\ud800", "b", judge="j", verdict="first")
    assert len(halved.key) == 16
    assert halved.key == halved.swapped().key


COMPARED = Comparison("0", "Hi", "exo", "sft", "a", "b", judge="j", verdict="first", criteria={"safe": "tie"})


@some
@given(st.data())
def test_stored_comparisons_of_any_shape(place: Path, data: st.DataObject) -> None:
    write_comparisons(place / "valid.jsonl", [COMPARED])
    row = data.draw(grafted(json.loads((place / "valid.jsonl").read_text())))
    (place / "any.jsonl").write_text(json.dumps(row) + "\n")

    def read_and_write() -> None:
        found = read_comparisons(place / "any.jsonl")
        assert all(comparison.key for comparison in found)
        write_comparisons(place / "again.jsonl", found)
        assert read_comparisons(place / "again.jsonl") == found

    sentence(read_and_write)
