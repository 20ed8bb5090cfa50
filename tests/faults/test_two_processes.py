"""One run directory belongs to one process at a time, and to nobody once that process is gone."""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from exalign.cli import main
from faults.kills import begun
from faults.starts import Starter
from faults.world import World


def test_the_second_process_is_told_by_which_one_the_run_is_held_and_leaves(
    starter: Starter, faulty_world: World, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """The second one is this process."""
    arguments = faulty_world.before("align", tmp_path / "run")
    starter.start(arguments, tmp_path / "log")
    assert begun(starter, tmp_path / "run", set()) is None
    os.kill(starter.pid, signal.SIGSTOP)  # it holds the run for as long as the second one takes to start
    with pytest.raises(SystemExit) as left:
        main(arguments)
    assert left.value.code == 2
    (line,) = capfd.readouterr().err.splitlines()
    assert f"in use by another exalign process (number {starter.pid})" in line
    killed = starter.kill()
    assert killed.killed
    again = starter.exalign(*arguments, log=tmp_path / "log")
    assert again.status == 0, again.printed
