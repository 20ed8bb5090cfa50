"""Interleaved measurement: every contender once per round, in turning order: a drift of the machine hits all."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field

import psutil

from exalign.device import device, wait


@dataclass
class Times:
    """Seconds of one contender. `first` was the warm-up, whose numbers were compared; it counts only if alone."""

    first: float
    later: list[float] = field(default_factory=list)

    @property
    def counted(self) -> list[float]:
        return self.later or [self.first]

    @property
    def median(self) -> float:
        return statistics.median(self.counted)

    def summary(self) -> dict[str, float | int]:
        return {
            "seconds": self.median,
            "n": len(self.counted),
            "fastest": min(self.counted),
            "slowest": max(self.counted),
            "warm": int(bool(self.later)),
        }


def count_cpu_seconds() -> None:
    """From here on seconds are those that this process and its children computed, for a machine with other work too.

    They are those of the wall on an idle machine where one thread computes at a time; a process that waits busily, as
    vLLM's do, counts as computing.
    """
    own = psutil.Process()

    def seconds() -> float:
        total = time.process_time()
        for child in own.children(recursive=True):
            with suppress(psutil.Error):
                total += sum(child.cpu_times()[:2])
        return total

    time.perf_counter = seconds


def timed(work: Callable[[], object]) -> float:
    wait(device())
    started = time.perf_counter()
    work()
    wait(device())
    return time.perf_counter() - started


def fastest_of(candidates: Mapping[int, Callable[[], object]]) -> int:
    """The candidate that takes least: tried in the order given until one is slower than the one before.

    Each is run once; the only one is not run at all.
    """
    names = list(candidates)
    if len(names) == 1:
        return names[0]
    best, least = names[0], timed(candidates[names[0]])
    for name in names[1:]:
        seconds = timed(candidates[name])
        if seconds >= least:
            break
        best, least = name, seconds
    return best


def interleave(
    work: Mapping[str, Callable[[], object]], first: Mapping[str, float], *, rounds: int, seconds_each: float
) -> dict[str, Times]:
    """Up to `rounds` more passes of each, as long as its passes so far took less than `seconds_each` in all.

    `first` holds the seconds of each contender's first pass, which was made by the caller.
    """
    times = {name: Times(first[name]) for name in work}
    names = list(work)
    for turn in range(rounds):
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            entry = times[name]
            if entry.first + sum(entry.later) < seconds_each:
                entry.later.append(timed(work[name]))
    return times
