"""Every number of docs/performance.md: `python -m benchmarks.all FOLDER`, then `python -m benchmarks.tables FOLDER`.

Each benchmark runs in its own process and leaves FOLDER/NAME.json; what is there already is not run again, so a run
that ran out of its minutes is continued by the same command. Times want a machine that does nothing else and two cores
finish them in about 40 minutes; `--only memory`, which comes last and takes ten more, needs no quiet.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path

STEP_PROMPTS = {2: 8, 4: 6, 8: 4}
"""Fewer prompts where each has more completions: the slow peers then fit into the window too."""

MEMORY_CELLS = (("tldr", 2), ("tldr", 4), ("tldr", 8), ("hh", 2), ("imdb", 2), ("imdb", 8))


def plan() -> dict[str, list[str]]:
    """Arguments of every benchmark by the name of its result, the most important first."""
    tasks: dict[str, list[str]] = {}
    for shape in ("tldr", "hh", "imdb"):
        for k, prompts in STEP_PROMPTS.items():
            names = "exalign,trl-best,trl-completions,official,exalign-bf16"
            if (shape, k) == ("tldr", 2):
                names += ",trl-defaults"  # TRL itself has pairs only, and one cell shows how its defaults compare
            tasks[f"step-{shape}-{k}"] = ["step", "--shape", shape, "--k", str(k), "--prompts", str(prompts)]
            tasks[f"step-{shape}-{k}"] += ["--contenders", names, "--rounds", "5", "--seconds-each", "15"]
    for k in (4, 8):
        tasks[f"sample-tldr-{k}"] = ["sample", "--k", str(k), "--rounds", "3", "--seconds-each", "20"]
        tasks[f"sample-tldr-{k}"] += ["--contenders", "exalign,generate" + (",continuous" if k == 4 else "")]
    for k in (4, 8):
        tasks[f"score-tldr-{k}"] = ["score", "--k", str(k), "--rounds", "3", "--seconds-each", "10"]
    tasks["on_policy-hh-4"] = ["on_policy", "--shape", "hh", "--k", "4", "--steps", "2", "--rounds", "1"]
    tasks["sweep"] = ["sweep", "--rounds", "3"]
    for shape, k in (("tldr", 4), ("imdb", 4)):
        tasks[f"profile-{shape}-{k}"] = ["profile", "--shape", shape, "--k", str(k), "--prompts", "8"]
    for shape, k in MEMORY_CELLS:
        tasks[f"memory-{shape}-{k}"] = ["memory", "--shape", shape, "--k", str(k)]
        if (shape, k) != MEMORY_CELLS[0]:  # every way in one cell, the two that matter to the floor in the others
            tasks[f"memory-{shape}-{k}"] += ["--contenders", "exalign,trl-completions,trl-completions:4"]
    return tasks


def run(folder: Path, *, minutes: float, threads: int, only: tuple[str, ...]) -> list[str]:
    """Run what is missing until the minutes are over; return the names that were not run."""
    folder.mkdir(parents=True, exist_ok=True)
    deadline, left = time.monotonic() + 60 * minutes, []
    for name, arguments in plan().items():
        target = folder / f"{name}.json"
        if target.exists() or (only and not name.startswith(only)):
            continue
        remaining = deadline - time.monotonic()
        started = time.monotonic()
        result = None
        if remaining > 0:
            result = _result([*arguments, "--threads", str(threads), "--json"], remaining)
        if result is None:
            left.append(name)
            continue
        target.write_text(json.dumps(result, indent=1), encoding="utf-8")
        print(f"{name}: {time.monotonic() - started:.0f} s", flush=True)
    return left


def _result(arguments: list[str], seconds: float) -> dict[str, object] | None:
    """The JSON of one benchmark; None where it did not finish in time. A failure ends everything with its message."""
    command = [sys.executable, "-m", f"benchmarks.{arguments[0]}", *arguments[1:]]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return None
    if done.returncode:
        sys.exit(f"{' '.join(arguments)} failed:\n{done.stderr[-2000:]}")
    found: dict[str, object] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("folder", type=Path, help="where the results go")
    parser.add_argument("--minutes", type=float, default=25, help="no benchmark runs on after as many")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="CPU threads of torch")
    parser.add_argument("--only", default="", help="names or beginnings of names, separated by commas")
    given = parser.parse_args()
    only = tuple(name for name in given.only.split(",") if name)
    left = run(given.folder, minutes=given.minutes, threads=given.threads, only=only)
    if left:
        sys.exit(f"Not run, for want of time; the same command goes on with them: {', '.join(left)}")


if __name__ == "__main__":
    main()
