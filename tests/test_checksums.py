"""What vouches for files is itself damaged: any bit, any end."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from exalign.checksums import NAME, damaged_files, read_sums, write_sums
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


@pytest.mark.skipif(shutil.which("sha256sum") is None, reason="this system has no sha256sum")
def test_sha256sum_reads_them(tmp_path: Path) -> None:
    (tmp_path / "a").write_text("a")
    write_sums(tmp_path)
    command = ["sha256sum", "--check", "--strict", NAME]
    assert subprocess.run(command, cwd=tmp_path, capture_output=True, check=False).returncode == 0
    (tmp_path / "a").write_text("b")
    assert subprocess.run(command, cwd=tmp_path, capture_output=True, check=False).returncode == 1
