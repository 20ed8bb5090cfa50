"""What vouches for files is itself damaged: any bit, any end."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from exalign.checksums import (
    NAME,
    begun,
    check_file,
    damaged_files,
    is_unchanged,
    read_sums,
    settle,
    stamp,
    unvouched,
    vouched_path,
    write_sums,
)
from exalign.errors import InputError
from exalign.storage import read_sealed, write_sealed


def test_any_changed_bit_of_a_sealed_file_is_noticed(tmp_path: Path) -> None:
    """Also one in the name of the seal, which would otherwise pass for a file that never had one."""
    path, values = tmp_path / "done.json", {"fingerprint": "ab", "counts": {"rows": 3}, "seconds": 1.5}
    write_sealed(path, values)
    assert read_sealed(path) == values
    for changed in _changed_in_a_bit(path.read_bytes()):
        path.write_bytes(changed)
        with pytest.raises(InputError):
            read_sealed(path)


def _changed_in_a_bit(content: bytes) -> Iterator[bytes]:
    for place in range(len(content)):
        for bit in range(8):
            yield content[:place] + bytes([content[place] ^ 1 << bit]) + content[place + 1 :]


def test_checksums_that_lost_their_end_or_changed_in_a_bit_are_noticed(tmp_path: Path) -> None:
    """Also in the name of a file, which would otherwise be one that nothing vouches for."""
    for name in ("part-000000.parquet", "header.json"):
        (tmp_path / name).write_text(name)
    write_sums(tmp_path)
    assert sorted(read_sums(tmp_path)) == ["header.json", "part-000000.parquet"]
    assert not list(damaged_files(tmp_path))
    content = (tmp_path / NAME).read_bytes()
    ends = [content[:end] for end in range(len(content))]
    for damaged in [*ends, *_changed_in_a_bit(content)]:
        (tmp_path / NAME).write_bytes(damaged)
        with pytest.raises(InputError):
            read_sums(tmp_path)


def test_a_folder_under_way_vouches_for_each_of_its_files(tmp_path: Path) -> None:
    """What is torn or changed in a bit costs that shard at most, and never vouches for another content."""
    names = [f"part-{number:06d}.parquet" for number in range(3)]
    for name in names:
        with vouched_path(tmp_path / name) as temporary:
            temporary.write_text(name)
    files = [tmp_path / name for name in names]
    assert sorted(begun(tmp_path)) == names
    assert not list(unvouched(tmp_path, files))
    second = tmp_path / f".{names[1]}.begun"
    content, written = second.read_bytes(), begun(tmp_path)[names[1]]
    files[1].write_text("x" * written.size)
    for place in range(len(content)):
        second.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        assert list(unvouched(tmp_path, files)) == [files[1]]
        second.write_bytes(content[:place])
        assert list(unvouched(tmp_path, files)) == [files[1]]
    with vouched_path(files[1]) as temporary:
        temporary.write_text("again")
    assert not list(unvouched(tmp_path, files))


def test_settling_a_folder_is_as_writing_it_at_once(tmp_path: Path) -> None:
    """Also where something vouches for a shard that a kill kept from its place."""
    for name in "abc":
        with vouched_path(tmp_path / name) as temporary:
            temporary.write_text(name)
    (tmp_path / "c").unlink()
    settle(tmp_path, {})
    settled = (tmp_path / NAME).read_text()
    assert sorted(path.name for path in tmp_path.iterdir()) == [NAME, "a", "b"]
    write_sums(tmp_path)
    assert (tmp_path / NAME).read_text() == settled


def test_a_file_with_its_size_and_time_is_not_read(tmp_path: Path) -> None:
    path = tmp_path / "a"
    path.write_text("abc")
    written = stamp(path)
    path.write_text("abd")
    assert not is_unchanged(path, written)
    os.utime(path, ns=(0, written.time))
    assert is_unchanged(path, written)  # what `verify` and whoever reads it as input are for
    os.utime(path, ns=(0, 0))
    assert not is_unchanged(path, written)
    path.write_text("abc")
    assert is_unchanged(path, written)
    path.unlink()
    assert not is_unchanged(path, written)


def test_a_file_that_nothing_vouches_for_is_not_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a").write_text("a")
    monkeypatch.setattr("exalign.checksums.checksum", lambda path: pytest.fail(f"{path} was read"))
    check_file(tmp_path / "a")


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="this system has no sha256sum")
def test_sha256sum_reads_them(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("a")
    write_sums(tmp_path)
    command = ["sha256sum", "--check", "--strict", NAME]
    assert subprocess.run(command, cwd=tmp_path, capture_output=True, check=False).returncode == 0
    (tmp_path / "a").write_text("b")
    assert subprocess.run(command, cwd=tmp_path, capture_output=True, check=False).returncode == 1
