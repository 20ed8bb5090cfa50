"""What the ecosystem writes becomes records; what is wrong with a row is said with its file and number."""

import csv
import gzip
import io
import json
import subprocess
import sys
import tracemalloc
from collections import Counter

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from exalign.data.formats import read_source, record_of
from exalign.data.record import Completion, Record
from exalign.data.sources import DataSettings, SourceRow
from exalign.data.store import Header, write_records
from exalign.errors import InputError

USER = {"role": "user", "content": "Hi"}
HELLO, HEY = ({"role": "assistant", "content": text} for text in ("Hello!", "Hey."))
DIALOGUE = "\n\nHuman: Hi\n\nAssistant:"


def read(source, counts=None, **settings):
    return list(read_source(DataSettings(source=str(source), **settings), Counter() if counts is None else counts))


def convert(values, counts=None):
    return record_of(SourceRow("file", 3, "file:3", values), Counter() if counts is None else counts)


SHAPES = [
    ({"prompt": "p", "completion": " c"}, "p", [" c"], None),
    ({"prompt": [USER], "completion": [HELLO]}, (USER,), ["Hello!"], None),
    ({"messages": [USER, HELLO]}, (USER,), ["Hello!"], None),
    ({"messages": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello!"}]}, (USER,), ["Hello!"], None),
    ({"messages": [HELLO, USER]}, (HELLO, USER), [], None),
    ({"prompt": "p", "chosen": "a", "rejected": "b"}, "p", ["a", "b"], 0),
    ({"prompt": [USER], "chosen": [HELLO], "rejected": [HEY]}, (USER,), ["Hello!", "Hey."], 0),
    ({"chosen": [USER, HELLO], "rejected": [USER, HEY]}, (USER,), ["Hello!", "Hey."], 0),
    ({"prompt": "Hi", "chosen": [USER, HELLO], "rejected": [USER, HEY]}, (USER,), ["Hello!", "Hey."], 0),
    ({"chosen": DIALOGUE + " Hello!", "rejected": DIALOGUE + " Hey."}, DIALOGUE, [" Hello!", " Hey."], 0),
    ({"prompt": None, "chosen": DIALOGUE + " a", "rejected": DIALOGUE + " b"}, DIALOGUE, [" a", " b"], 0),
    ({"prompt": "p", "completions": ["a", "", "a"]}, "p", ["a", "", "a"], None),
    ({"prompt": "p", "other": 1}, "p", [], None),
    ({"text": "t"}, "", ["t"], None),
]


@pytest.mark.parametrize(("values", "prompt", "texts", "preferred"), SHAPES)
def test_each_shape_becomes_its_record(values, prompt, texts, preferred):
    record = convert(values)
    assert record == Record("file:3", prompt, tuple(Completion(text) for text in texts), preferred=preferred)


def test_rewards_and_labels_become_rewards():
    assert convert({"prompt": "p", "completions": ["a", "b"], "rewards": [1, -0.5]}).rewards == [1.0, -0.5]
    assert convert({"text": "t", "label": 1}).rewards == [1.0]
    assert convert({"text": "t", "label": "0"}).rewards == [0.0]
    counts = Counter()
    assert convert({"text": "t", "label": -1}, counts).rewards is None
    assert counts == {"labels_left_out": 1}


DROPPED = [
    ({"prompt": "p", "chosen": "a", "rejected": "a "}, "pairs_equal"),
    ({"prompt": "p", "chosen": "a", "rejected": " \n"}, "pairs_with_empty_side"),
    ({"chosen": DIALOGUE, "rejected": DIALOGUE + " Hey."}, "pairs_with_empty_side"),
    ({"chosen": DIALOGUE + " a", "rejected": "\n\nHuman: Ho\n\nAssistant: a"}, "pairs_without_common_prompt"),
    (
        {
            "chosen": DIALOGUE + " a\n\nHuman: x\n\nAssistant: c",
            "rejected": DIALOGUE + " b\n\nHuman: y\n\nAssistant: d",
        },
        "pairs_without_common_prompt",
    ),
    ({"chosen": [USER, HELLO], "rejected": [{**USER, "content": "Ho"}, HELLO]}, "pairs_without_common_prompt"),
    ({"prompt": "p", "completion": ""}, "empty_completions"),
    ({"text": "  "}, "empty_completions"),
]


@pytest.mark.parametrize(("values", "name"), DROPPED)
def test_rows_that_say_nothing_are_dropped_and_counted(values, name):
    counts = Counter()
    assert convert(values, counts) is None
    assert counts == {name: 1}


WRONG = [
    ({"question": "q", "answer": "a"}, "'question', 'answer'.*prompt\\+completion"),
    ({}, "none"),
    ({"prompt": "p", "chosen": "a"}, "'chosen'"),
    ({"prompt": None}, "`prompt`.*missing"),
    ({"prompt": "p", "completion": None}, "`completion`.*missing"),
    ({"prompt": 7, "completion": "c"}, "`prompt`.*7"),
    ({"prompt": "p", "chosen": None, "rejected": "b"}, "`chosen`.*missing"),
    ({"chosen": "plain", "rejected": "texts"}, "Assistant:"),
    ({"prompt": "p", "completions": []}, "empty"),
    ({"prompt": "p", "completions": "a"}, "must be a list"),
    ({"prompt": "p", "completions": ["a", None]}, r"completions\[1\]"),
    ({"prompt": "p", "completions": ["a"], "rewards": [1, 2]}, "1 completions but 2 rewards"),
    ({"prompt": "p", "completions": ["a", "b"], "rewards": [1.0, float("nan")]}, "reward 2.*nan"),
    ({"prompt": "p", "completions": ["a"], "rewards": [float("inf")]}, "inf"),
    ({"prompt": "p", "completions": ["a"], "rewards": [None]}, "None"),
    ({"prompt": "p", "completions": ["a"], "rewards": [True]}, "True"),
    ({"prompt": [], "completion": "c"}, "`prompt`"),
    ({"prompt": [{"role": "user", "content": None}], "completion": "c"}, "content"),
    ({"prompt": [USER], "completion": [USER]}, "assistant"),
    ({"messages": "Hi"}, "`messages`"),
    ({"messages": ["Hi"]}, "role"),
]


@pytest.mark.parametrize(("values", "message"), WRONG)
def test_a_wrong_row_is_named_with_what_is_wrong(values, message):
    with pytest.raises(InputError, match=f"^file, row 3: .*{message}"):
        convert(values)


@given(st.text(), st.text(alphabet=st.characters(categories=["Cs", "Lu"]), min_size=1))
def test_any_text_is_kept_and_only_lone_surrogates_are_replaced(prompt, completion):
    counts = Counter()
    record = convert({"prompt": prompt, "completion": completion}, counts)
    assert record.prompt == prompt
    record.completions[0].text.encode("utf-8")
    try:
        completion.encode("utf-8")
    except UnicodeEncodeError:
        assert counts["lone_surrogates_replaced"] == 1
    else:
        assert record.completions[0].text == completion


@given(st.text(), st.text(), st.text())
def test_an_implicit_prompt_and_its_sides_rebuild_the_dialogues(past, left, right):
    chosen, rejected = (f"\n\nHuman: {past}\n\nAssistant:{side}" for side in (left, right))
    record = convert({"chosen": chosen, "rejected": rejected})
    if record is not None:
        assert [record.prompt + c.text for c in record.completions] == [chosen, rejected]
        assert record.prompt.endswith("\n\nAssistant:")


def test_other_keys_of_messages_are_counted():
    counts = Counter()
    convert({"messages": [{**USER, "name": "Ann"}, HELLO]}, counts)
    assert counts == {"messages_with_other_keys": 1}


# --- files ---

ROWS = [{"prompt": f"p{i}", "completion": f"line one\nline two, {i} “ü”"} for i in range(5)]


def as_csv(rows):
    stream = io.StringIO()
    writer = csv.DictWriter(stream, fieldnames=rows[0])
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue().encode()


def as_parquet(rows):
    stream = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), stream)
    return stream.getvalue()


def as_lines(rows):
    return "\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode()


FILES = {
    "data.jsonl": as_lines(ROWS),
    "data.JSONL": b"\xef\xbb\xbf" + as_lines(ROWS) + b"\r\n",
    "data.jsonl.gz": gzip.compress(as_lines(ROWS)),
    "lines.json": as_lines(ROWS),
    "array.json": json.dumps(ROWS, indent=1).encode(),
    "array.json.gz": gzip.compress(json.dumps(ROWS).encode()),
    "data.csv": as_csv(ROWS),
    "bom.csv": b"\xef\xbb\xbf" + as_csv(ROWS),
    "data.csv.gz": gzip.compress(as_csv(ROWS)),
    "data.parquet": as_parquet(ROWS),
}


@pytest.mark.parametrize("name", FILES)
def test_every_file_type_gives_the_same_records(tmp_path, name):
    (tmp_path / name).write_bytes(FILES[name])
    counts = Counter()
    records = read(tmp_path / name, counts)
    assert [(r.prompt, r.completions[0].text) for r in records] == [(r["prompt"], r["completion"]) for r in ROWS]
    assert [r.id for r in records] == [f"{name}:{i}" for i in range(1, 6)]
    assert counts == {"rows": 5, "records": 5}


def test_lists_in_csv_cells_are_json(tmp_path):
    (tmp_path / "d.csv").write_bytes(as_csv([{"prompt": "p", "completions": '["a", "b"]', "rewards": "[1, 2.5]"}]))
    assert read(tmp_path / "d.csv")[0].rewards == [1.0, 2.5]


BROKEN = {
    "bad.jsonl": (b'{"prompt": "p"}\n\n{"prompt": \n', "row 3: not valid JSON"),
    "list.jsonl": (b'{"prompt": "p"}\n["p"]\n', "row 2: expected an object"),
    "utf8.jsonl": (b'{"prompt": "p"}\n{"prompt": "\xff"}\n', "row 2: not valid UTF-8"),
    "deep.jsonl": (b'{"prompt": ' + b"[" * 200_000 + b"\n", "row 1: "),
    "cut.jsonl.gz": (gzip.compress(as_lines(ROWS * 500))[:-40], "stopped after row"),
    "not.jsonl.gz": (b"plain", "stopped after row 0"),
    "array.json": (b'[{"prompt": "p"},\n{"prompt" "q"}]', "line 2: not valid JSON"),
    "numbers.json": (b"[1, 2]", "row 1: expected an object"),
    "cells.csv": (b"prompt,completion\na,b\nc\n", "row 2: 1 cells"),
    "twice.csv": (b"prompt,prompt\na,b\n", "first line must name the columns"),
    "quote.csv": (b'prompt,completion\na,"b', "row 1: not valid CSV"),
    "utf8.csv": (b"prompt,completion\na,b\nc,\xff\n", "row 2: not valid UTF-8"),
    "bad.parquet": (b"PAR1 not really", "Parquet"),
    "data.txt": (b"hello", "must end in"),
    "null.jsonl": (b'{"prompt": "p", "completions": ["a"], "rewards": [NaN]}\n', "row 1: reward 1"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_named_with_its_row(tmp_path, name):
    data, message = BROKEN[name]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError) as error:
        read(tmp_path / name)
    assert name in str(error.value)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_file_names_the_nearest(tmp_path, write_jsonl):
    path = write_jsonl(ROWS, "train.jsonl")
    for wrong in (tmp_path / "tarin.jsonl", tmp_path / "train.json"):
        with pytest.raises(InputError, match=f"did you mean {path}"):
            read_source(DataSettings(source=str(wrong)), Counter())
    with pytest.raises(InputError, match=f"did you mean {tmp_path}"):
        read_source(DataSettings(source=f"{tmp_path}x/train.jsonl"), Counter())


def test_splits_of_a_folder(tmp_path, write_jsonl):
    write_jsonl(ROWS[:1], "sft_train.jsonl")
    write_jsonl(ROWS[1:3], "test-00000-of-00001.jsonl.gz")
    (tmp_path / "README.md").write_text("not data")
    assert [r.prompt for r in read(tmp_path, split="train")] == ["p0"]
    assert [r.id for r in read(tmp_path, split="test")] == [f"test-00000-of-00001.jsonl.gz:{i}" for i in (1, 2)]
    assert len(read(tmp_path, split="sft_train")) == 1
    with pytest.raises(InputError, match=r"several splits \(test, train\)"):
        read(tmp_path)
    with pytest.raises(InputError, match="no split 'dev'; found test, train"):
        read(tmp_path, split="dev")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no data files"):
        read(tmp_path / "empty")


def test_a_folder_saved_by_datasets(tmp_path):
    import datasets

    data = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict({"train": data, "test": data.select([4])}).save_to_disk(tmp_path / "saved")
    assert [r.prompt for r in read(tmp_path / "saved", split="test")] == ["p4"]
    assert len(read(tmp_path / "saved" / "train")) == 5
    with pytest.raises(InputError, match="train, test"):
        read(tmp_path / "saved")


def test_windows_are_disjoint_and_shuffling_keeps_ids(write_jsonl):
    path = write_jsonl([{"prompt": f"p{i}"} for i in range(20)])
    plain = read(path)
    assert read(path, skip=3, limit=5) == plain[3:8]
    shuffled = read(path, shuffle_seed=1)
    assert shuffled != plain
    assert sorted(shuffled, key=lambda r: int(r.prompt[1:])) == plain
    assert read(path, shuffle_seed=1, skip=0, limit=12) + read(path, shuffle_seed=1, skip=12) == shuffled
    assert read(path, shuffle_seed=2) != shuffled


def test_columns_are_renamed(write_jsonl):
    path = write_jsonl([{"question": "q", "answer": "a", "prompt": "unused"}])
    (record,) = read(path, columns={"prompt": "question", "completion": "answer"})
    assert (record.prompt, record.completions[0].text) == ("q", "a")
    with pytest.raises(InputError, match=r"row 1: `columns` asks for a column 'anwser'.*'question'"):
        read(path, columns={"completion": "anwser"})


def test_settings_that_cannot_take_effect_are_errors(tmp_path, write_jsonl):
    path = write_jsonl(ROWS)
    (tmp_path / "array.json").write_bytes(FILES["array.json"])
    write_records(tmp_path / "records", [Record("1", "p")], Header())
    for source, settings, message in [
        (path, {"name": "x"}, "`name`"),
        (path, {"split": "train"}, "`split`"),
        (path, {"prompt_tokens": 3}, "`prompt_tokens`"),
        (path, {"streaming": True, "shuffle_seed": 1}, "`shuffle_seed`"),
        (tmp_path / "records", {"split": "train"}, "`split`"),
        (tmp_path / "records", {"columns": {"prompt": "x"}}, "`columns`"),
    ]:
        with pytest.raises(InputError, match=message):  # before anything is read
            read_source(DataSettings(source=str(source), **settings), Counter())
    with pytest.raises(InputError, match="cannot be streamed"):
        read(tmp_path / "array.json", streaming=True)


def test_only_plain_texts_are_split_by_tokens(write_jsonl, tokenizer):
    path = write_jsonl([{"text": "This comedy was good."}, {"prompt": "p", "completion": "c"}])
    rows = read_source(DataSettings(source=str(path), prompt_tokens=2), Counter(), tokenizer)
    assert len(next(rows).prompt_ids) == 2
    with pytest.raises(InputError, match="row 2: `prompt_tokens`"):
        next(rows)


def test_our_own_records_come_back_whole_or_not_at_all(tmp_path):
    records = [Record(str(i), "p", (Completion("c", (1, 2), "length", -1.0, -2.0, 0.5),), (3,), 0) for i in range(3)]
    write_records(tmp_path / "records", records, Header(), shard_size=2)
    assert read(tmp_path / "records") == records
    assert read(tmp_path / "records", skip=1, limit=1) == records[1:2]
    (tmp_path / "records/header.json").unlink()
    with pytest.raises(InputError, match="not finished"):
        read(tmp_path / "records")


def test_a_file_is_never_held_in_memory(write_jsonl):
    path = write_jsonl([{"prompt": "x" * 10_000} for _ in range(2_000)])
    tracemalloc.start()
    number = sum(1 for _ in read_source(DataSettings(source=str(path), streaming=True), Counter()))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert number == 2_000
    assert peak < path.stat().st_size / 10


HUB = """
from collections import Counter
from exalign.data.sources import DataSettings, read_rows
from exalign.errors import InputError
for streaming in (False, True):
    try:
        next(read_rows(DataSettings(source="somebody/some-data", streaming=streaming), Counter()))
    except InputError as error:
        print(error)
"""


def test_an_unreachable_hub_is_one_sentence(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", HUB],
        env={"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PATH": "", "PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
    )
    lines = done.stdout.splitlines()
    assert len(lines) == 2
    assert all("'somebody/some-data' is no local file" in line and "hub failed" in line for line in lines)
