"""What vouches for files is itself damaged: any bit, any end."""

from __future__ import annotations

import shutil
import subprocess
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
    content = path.read_bytes()
    for place in range(len(content)):
        for bit in range(8):
            changed = bytearray(content)
            changed[place] ^= 1 << bit
            path.write_bytes(changed)
            with pytest.raises(InputError):
                read_sealed(path)


def test_checksums_that_lost_their_end_are_noticed(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).write_text(name)
    write_sums(tmp_path)
    assert sorted(read_sums(tmp_path)) == ["a", "b"] and not list(damaged_files(tmp_path))
    content = (tmp_path / NAME).read_bytes()
    for end in range(len(content)):
        (tmp_path / NAME).write_bytes(content[:end])
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
