"""A disk that is full or may not be written: one sentence, nothing damaged, and the same command goes on later."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from faults.outcome import differing
from faults.starts import Starter
from faults.world import World

PAGE = 4096
"""Bytes that a small disk is divided into."""


@pytest.fixture
def disk(starter: Starter, tmp_path: Path) -> Iterator[Path]:
    """A folder where the processes of `starter`, and they alone, see a disk of their own."""
    if not starter.isolated:
        pytest.skip("this system does not permit mounting in a namespace (unshare --user --mount)")
    folder = tmp_path / "disk"
    folder.mkdir()
    starter.command("mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", folder)
    yield folder
    starter.command("umount", folder)


@pytest.mark.parametrize("stage", ["SFT", "score"])
def test_a_full_disk(stage: str, starter: Starter, faulty_world: World, disk: Path, tmp_path: Path) -> None:
    """Again and again there is a little more space, until the stage ends: it fails at many places on the way."""
    command, *_ = faulty_world.before(stage, tmp_path / "run")
    size = sum(-(-path.stat().st_size // PAGE) * 4 for path in (tmp_path / "run").rglob("*") if path.is_file())
    starter.command("mount", "-o", f"remount,size={size}k", disk)
    starter.command("cp", "-r", tmp_path / "run", disk / "run")
    more, arguments, sentences = 48 if stage == "SFT" else 12, [command, faulty_world.recipe, "--run", disk / "run"], []
    while True:
        ended = starter.exalign(*arguments, log=tmp_path / "log")
        if ended.status == 0:
            break
        sentences.append(ended.sentence)
        assert f"Cannot write {disk}/run/" in ended.sentence
        assert "No space left on device" in ended.sentence
        assert "free" in ended.sentence
        size += more
        starter.command("mount", "-o", f"remount,size={size}k", disk)
    assert len(set(sentences)) >= 2, sentences
    starter.command("cp", "-r", disk / "run", tmp_path / "after")
    faulty_world.after(stage, tmp_path / "undisturbed")
    assert differing(tmp_path / "after", tmp_path / "undisturbed") == []


def test_a_directory_that_may_not_be_written(starter: Starter, faulty_world: World, disk: Path, tmp_path: Path) -> None:
    command, *_ = faulty_world.before("score", tmp_path / "run")
    starter.command("mount", "-o", "remount,size=32m", disk)
    starter.command("cp", "-r", tmp_path / "run", disk / "run")
    starter.command("mount", "-o", "remount,ro", disk)
    for name in "run", "new":
        ended = starter.exalign(command, faulty_world.recipe, "--run", disk / name, log=tmp_path / "log")
        assert f"Cannot write {disk}/{name}" in ended.sentence
        assert "Read-only file system" in ended.sentence
    starter.command("mount", "-o", "remount,rw", disk)
    again = starter.exalign(command, faulty_world.recipe, "--run", disk / "run", log=tmp_path / "log")
    assert again.status == 0, again.printed
