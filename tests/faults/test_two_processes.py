"""One run directory belongs to one process at a time, and to nobody once that process is gone."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

from faults.kills import begun
from faults.starts import ONE_THREAD, Starter
from faults.world import World


def test_the_second_process_is_told_by_which_one_the_run_is_held_and_leaves(
    starter: Starter, faulty_world: World, tmp_path: Path
) -> None:
    arguments = faulty_world.before("align", tmp_path / "run")
    starter.start(arguments, tmp_path / "log")
    assert begun(starter, tmp_path / "run", set()) is None
    os.kill(starter.pid, signal.SIGSTOP)  # it holds the run for as long as the second one takes to start
    environment = {**os.environ, **ONE_THREAD, "PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-m", "exalign", *arguments]
    second = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert second.returncode == 2
    (line,) = second.stderr.splitlines()
    assert f"in use by another exalign process (number {starter.pid})" in line
    killed = starter.kill()
    assert killed.killed
    again = starter.exalign(*arguments, log=tmp_path / "log")
    assert again.status == 0, again.printed
