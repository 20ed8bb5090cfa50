"""The record file: what goes in comes out, and what was finished survives a kill, a full disk and a damaged shard."""

import math
import os
import signal
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path

import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from exalign.data.record import Completion, Record
from exalign.data.store import Header, RecordWriter, iter_records, read_header, read_records, shards_of, write_records
from exalign.errors import InputError

ids = st.lists(st.integers(0, 2**31 - 1), max_size=4).map(tuple)
numbers = st.floats(allow_nan=False, allow_infinity=False)
completions = st.builds(
    Completion,
    text=st.text(),
    token_ids=st.none() | ids,
    finish_reason=st.sampled_from(["stop", "length", None]),
    logprob=st.none() | numbers,
    reference_logprob=st.none() | numbers,
    reward=st.none() | numbers,
    parts=st.none() | st.dictionaries(st.text(), numbers, min_size=1),
)
said = st.fixed_dictionaries(
    {"role": st.text(), "content": st.text()},
    optional={"name": st.text(min_size=1), "tool_calls": st.just([{"function": {"name": "f", "arguments": {"x": 1}}}])},
)
messages = st.lists(said, max_size=3).map(tuple)
unordered = st.builds(
    Record,
    id=st.text(),
    prompt=st.text() | messages,
    completions=st.lists(completions, max_size=3).map(tuple),
    prompt_ids=st.none() | ids,
    weight=st.none() | numbers,
    tools=st.none() | st.just('[{"name": "f"}]'),
    columns=st.none() | st.dictionaries(st.text(), st.integers() | st.text() | st.lists(numbers), min_size=1),
)
records = st.builds(
    lambda record, index: replace(record, preferred=index) if index < len(record.completions) else record,
    unordered,
    st.integers(0, 3),
)


@settings(max_examples=40)
@given(st.lists(records, max_size=5), st.integers(1, 3))
def test_records_come_back_exactly_as_they_were_written(written, shard_size):
    with tempfile.TemporaryDirectory() as folder:
        header = Header(model="m", temperature=0.8, seed=3, counts={"pairs_equal": 2})
        write_records(Path(folder) / "records", written, header, shard_size=shard_size)
        assert read_records(Path(folder) / "records") == written
        assert read_header(Path(folder) / "records") == header


def some_records(number):
    return [Record(str(i), f"prompt {i}", (Completion(f"text {i}", reward=float(i)),)) for i in range(number)]


def test_shards_are_ordinary_parquet_for_datasets(tmp_path):
    import datasets

    write_records(tmp_path / "records", some_records(5), Header(), shard_size=2)
    loaded = datasets.load_dataset(
        "parquet", data_files=str(tmp_path / "records/*.parquet"), split="train", cache_dir=str(tmp_path / "cache")
    )
    assert loaded["prompt"][:] == [f"prompt {i}" for i in range(5)]
    assert loaded[4]["completions"][0]["reward"] == 4.0


def test_rewards_are_known_only_when_every_completion_has_one():
    record = Record("1", "p", (Completion("a"), Completion("b")))
    assert record.rewards is None
    assert record.with_rewards([1, 2]).rewards == [1.0, 2.0]
    assert replace(record, completions=(Completion("a", reward=1.0), Completion("b"))).rewards is None
    with pytest.raises(ValueError):
        record.with_rewards([1.0])


def test_a_writer_continues_after_the_finished_shards(tmp_path):
    everything = some_records(10)
    with RecordWriter(tmp_path, shard_size=3) as writer:
        for record in everything[:6]:
            writer.write(record)
    with RecordWriter(tmp_path, shard_size=3) as writer:
        assert writer.written == 6
        for record in everything[writer.written :]:
            writer.write(record)
        writer.close(Header())
    assert read_records(tmp_path) == everything


@pytest.mark.parametrize("damage", [Path.unlink, lambda shard: shard.write_bytes(b"PAR1 not really")])
def test_shards_behind_a_missing_or_damaged_one_are_written_again(tmp_path, damage):
    everything = some_records(8)
    write_records(tmp_path / "records", everything, Header(), shard_size=2)
    damage(tmp_path / "records/part-000001.parquet")
    with RecordWriter(tmp_path / "records", shard_size=2) as writer:
        assert writer.written == 2
        for record in everything[writer.written :]:
            writer.write(record)
    assert read_records(tmp_path / "records") == everything


def test_a_damaged_shard_is_named(tmp_path):
    write_records(tmp_path / "records", some_records(4), Header(), shard_size=2)
    (tmp_path / "records/part-000001.parquet").write_bytes(b"no")
    stream = iter_records(tmp_path / "records")
    assert [next(stream).id, next(stream).id] == ["0", "1"]
    with pytest.raises(InputError, match=r"part-000001\.parquet"):
        next(stream)


def test_a_folder_without_records_or_with_another_version_is_refused(tmp_path):
    with pytest.raises(InputError, match="holds no records"):
        read_records(tmp_path)
    (tmp_path / "header.json").write_text('{"version": 99}')
    with pytest.raises(InputError, match="99"):
        read_header(tmp_path)
    assert read_records(tmp_path) == []


WRITER = """
import sys
from pathlib import Path
from exalign.data.record import Completion, Record
from exalign.data.store import RecordWriter
writer = RecordWriter(Path(sys.argv[1]), shard_size=4)
for i in range(10**9):
    writer.write(Record(str(i), "prompt", (Completion("text"),)))
    if i % 4 == 3:
        print(i, flush=True)
"""


def test_a_killed_writer_leaves_its_finished_shards_readable(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    for line in process.stdout:
        if int(line) >= 11:
            break
    process.send_signal(signal.SIGKILL)
    process.stdout.close()
    assert process.wait() == -signal.SIGKILL
    survivors = [record.id for record in iter_records(tmp_path)]
    assert len(survivors) >= 12
    assert survivors == [str(i) for i in range(len(survivors))]
    assert RecordWriter(tmp_path, shard_size=4).written == len(survivors)


FULL_DISK = """
import resource, signal, sys
from pathlib import Path
from exalign.data.record import Completion, Record
from exalign.data.store import RecordWriter
from exalign.errors import InputError
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))
writer = RecordWriter(Path(sys.argv[1]), shard_size=1)
writer.write(Record("0", "small"))
try:
    writer.write(Record("1", "".join(chr(0x4E00 + i) for i in range(20_000))))
except InputError as error:
    print(error)
"""


def test_no_room_for_a_shard_is_an_input_error_and_keeps_the_others(tmp_path):
    done = subprocess.run([sys.executable, "-c", FULL_DISK, str(tmp_path)], capture_output=True, text=True, check=True)
    assert "part-000001.parquet" in done.stdout
    assert [record.id for record in iter_records(tmp_path)] == ["0"]
    assert not [name for name in os.listdir(tmp_path) if name.endswith(".tmp")]


def test_token_ids_and_log_probabilities_keep_their_full_precision(tmp_path):
    record = Record("a", "p", (Completion("t", (2**31 - 1,), "stop", -math.pi, -1e-300, math.e),), (0,), 0)
    write_records(tmp_path / "records", [record], Header())
    assert read_records(tmp_path / "records") == [record]
    assert pq.read_schema(tmp_path / "records/part-000000.parquet").names[0] == "id"


def test_records_are_streamed_from_any_number_on_and_shards_before_it_are_not_read(tmp_path: Path) -> None:
    records = [Record(str(number), "Hi", (Completion("there"),)) for number in range(5)]
    write_records(tmp_path / "records", records, Header(), shard_size=2)
    for start in range(7):
        assert list(iter_records(tmp_path / "records", start)) == records[start:]
    shards_of(tmp_path / "records")[0].write_bytes(b"damaged")
    with pytest.raises(InputError, match=r"part-000000\.parquet"):
        list(iter_records(tmp_path / "records", 1))
