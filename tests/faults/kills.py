"""SIGKILL at random moments of a stage, and again while it continues, until it ends; then every file is compared."""

from __future__ import annotations

import os
import random
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path

from faults.outcome import differing
from faults.starts import Ended, Starter
from faults.world import World

MOST_KILLS_OF_A_RUN = 6
"""A run is then left to end: with a kill in every attempt it might never."""


@dataclass
class Kills:
    """What happened to one stage. A kill hits where a stage was under way (its `started.json` stood) when it came."""

    stage: str
    runs: int = 0
    moments: int = 0
    hits: int = 0
    in_a_write: int = 0
    """Hits that left something half written under its temporary name."""
    restarts: int = 0
    changed: list[str] = field(default_factory=list)
    """Artefacts that are lost, new or different, of all runs."""
    failures: list[str] = field(default_factory=list)
    """What a restart printed that did not go through."""
    seconds: float = 0.0


def kill_stage(starter: Starter, world: World, stage: str, place: Path, *, hits: int, rng: random.Random) -> Kills:
    """Kill `stage` until `hits` kills have hit it at work; each of its runs goes on to the end and is compared.

    Moments are uniform over the time that the stage takes when nothing disturbs it, from where it begins.
    """
    done, started = Kills(stage), time.monotonic()
    place.mkdir(parents=True, exist_ok=True)
    expected = place / "undisturbed"
    seconds = world.after(stage, expected)
    while done.hits < hits and not done.failures:
        folder = place / "killed"
        _run_with_kills(starter, world.before(stage, folder), folder, done, hits=hits, moment=seconds, rng=rng)
        done.changed += differing(folder, expected)
    done.seconds = time.monotonic() - started
    return done


def _run_with_kills(
    starter: Starter,
    arguments: Sequence[object],
    folder: Path,
    done: Kills,
    *,
    hits: int,
    moment: float,
    rng: random.Random,
) -> None:
    log = folder.with_name("log")
    log.unlink(missing_ok=True)
    done.runs += 1
    for kill in range(MOST_KILLS_OF_A_RUN + 1):
        before = _marks(folder)
        starter.start(arguments, log)
        done.restarts += kill > 0
        if kill == MOST_KILLS_OF_A_RUN or done.hits >= hits:
            ended = starter.wait()
        else:
            done.moments += 1
            ended = begun(starter, folder, before) or starter.wait(rng.uniform(0, moment)) or starter.kill()
        assert ended is not None
        if not ended.killed:
            break
        done.hits += bool(_marks(folder))
        done.in_a_write += any(folder.rglob(".*.tmp"))
    if ended.status:
        done.failures.append(ended.printed[-2000:])


def begun(starter: Starter, folder: Path, before: set[tuple[str, int]]) -> Ended | None:
    """Wait until the process under way has begun a stage; how it ended, if it did so before."""
    while _marks(folder) <= before:
        ended = starter.wait(0.002)
        if ended is not None:
            return ended
    return None


def _marks(folder: Path) -> set[tuple[str, int]]:
    """Which stages are under way, and since when: every process writes `started.json` anew."""
    found = set()
    for place, _, files in os.walk(folder):  # which passes over folders that are gone meanwhile
        if "started.json" in files:
            with suppress(FileNotFoundError):  # its stage has ended meanwhile
                found.add((place, Path(place, "started.json").stat().st_mtime_ns))
    return found
