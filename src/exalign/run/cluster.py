"""A pool of workers on Ray Data: shards of records in, shards of records out. Ray is known in this file only.

Nothing but numbers of shards travels through Ray. A worker reads a shard from the source folder and writes what it
makes of it, atomically and under the same number, to the target folder; all machines see both. A shard that stands is
done, whoever did it, so a worker that dies costs the shard under way, a killed run no more than that for each worker,
and nothing is there twice.
"""

from __future__ import annotations

import logging
import os
import secrets
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch

from exalign import checksums
from exalign.data.record import Record
from exalign.data.store import iter_shard, num_rows, shard_path, shards_of, write_shard
from exalign.errors import InputError
from exalign.run.recipe import ClusterSettings

ShardWork = Callable[[Sequence[Record]], tuple[list[Record], Counter[str]]]
"""What a worker makes of the records of a shard: as many records, and what was counted."""

_OBJECT_STORE = 100_000_000
"""Bytes of shared memory of a cluster that is started here: it holds numbers of shards only."""
_BLOCKS = 16
"""Portions that each worker's share is divided into: the smaller they are, the more evenly the pool ends."""


def check_installed(settings: ClusterSettings) -> None:
    """Raise the `InputError` that names the extra where it is missing; Ray is imported, closed, before vLLM does so."""
    if find_spec("ray") is None:
        raise InputError('cluster needs Ray Data: pip install "exalign[ray]".')
    with _private() if settings.address is None else nullcontext():
        import ray  # noqa: F401


def map_shards(source: Path, target: Path, make: Callable[[], ShardWork], settings: ClusterSettings) -> None:
    """Fill `target` with what the pool makes of each shard of `source`; shards that stand whole are left as they are.

    `make` is called once in every worker, for what it holds: it and what it is bound to must be what Ray can send. An
    `InputError` in a worker is raised here; so is one where Ray is not installed, the cluster cannot be reached or is
    too small, or the workers of one shard died `tries` times.
    """
    source, target = source.resolve(), target.resolve()
    target.mkdir(parents=True, exist_ok=True)
    wanted = len(shards_of(source))
    _forget_damaged(target)
    left = _unfinished(source, target, wanted)
    if left:
        _sweep(target)
        with connected(settings) as ray:
            _carry_out(ray, left, (make, source, target, Path.cwd(), settings), settings)
        _sweep(target)
    missing = _unfinished(source, target, wanted)
    if missing:
        raise InputError(
            f"The workers wrote {wanted - len(missing)} of {wanted} shards to {target}: every machine of the cluster "
            "must see this folder under this name."
        )
    checksums.settle(target, {})


def _forget_damaged(target: Path) -> None:
    """Remove shards that are not what was written."""
    for shard in checksums.unvouched(target, shards_of(target)):
        warnings.warn(f"{shard} is damaged; it is made again.", stacklevel=3)
        shard.unlink()


def _unfinished(source: Path, target: Path, wanted: int) -> list[int]:
    """The shards that are absent, damaged, or not of as many records as they are made from."""
    rows = [num_rows(shard_path(source, n)) for n in range(wanted)]
    return [n for n in range(wanted) if rows[n] is None or num_rows(shard_path(target, n)) != rows[n]]


def _sweep(folder: Path) -> None:
    """Remove what workers left that died: shards under way, and how often each was begun."""
    for leftover in [*folder.glob(".part-*.tmp"), *folder.glob(".part-*.tries")]:
        leftover.unlink(missing_ok=True)


def _carry_out(ray: Any, numbers: list[int], given: tuple[Any, ...], settings: ClusterSettings) -> None:
    from ray.data import ActorPoolStrategy, DataContext, from_items

    DataContext.get_current().enable_progress_bars = False
    size = min(settings.workers, len(numbers))
    items = [{"shard": number} for number in numbers]
    rows = from_items(items, override_num_blocks=min(len(items), _BLOCKS * size)).map_batches(
        _Worker,
        fn_constructor_args=given,
        batch_size=1,
        compute=ActorPoolStrategy(size=size, max_tasks_in_flight_per_actor=1),
        num_cpus=settings.cpus_per_worker,
        num_gpus=_gpus(ray, settings),
    )
    for row in rows.iter_rows():
        if row["problem"]:
            raise InputError(row["problem"])


class _Worker:
    """A process of the pool. It loads what it holds with its first shard, where a problem can still be told."""

    def __init__(
        self, make: Callable[[], ShardWork], source: Path, target: Path, here: Path, settings: ClusterSettings
    ) -> None:
        self._make, self._source, self._target, self._here = make, source, target, here
        self._settings = settings
        self._work: ShardWork | None = None

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        """Carry out one shard; what comes back is its number and, where it could not be done, the sentence why."""
        number, problem = int(batch["shard"][0]), ""
        try:
            self._carry_out(number)
        except InputError as error:
            problem = str(error)
        return {"shard": [number], "problem": [problem]}

    def _carry_out(self, number: int) -> None:
        made, wanted = shard_path(self._target, number), num_rows(shard_path(self._source, number))
        if wanted is None:
            raise InputError(f"{self._source} does not hold shard {number} where a worker looked for it.")
        if num_rows(made) == wanted:  # by the worker that died before it could say so
            return
        tries = self._target / f".{made.stem}.tries"
        self._count(tries, made)
        if self._work is None:
            self._work = self._begin()
        records, counts = self._work(list(iter_shard(shard_path(self._source, number))))
        write_shard(made, records, counts)
        tries.unlink(missing_ok=True)

    def _count(self, tries: Path, made: Path) -> None:
        """Ray begins a dead worker's task again without end; a shard that kills whoever takes it is given up."""
        with tries.open("ab") as stream:
            stream.write(b".")
        if tries.stat().st_size > self._settings.tries:
            raise InputError(
                f"{made.name} was begun {self._settings.tries} times, and its worker died each time, perhaps for lack "
                "of memory; what was finished stays, and the same command continues."
            )

    def _begin(self) -> ShardWork:
        try:
            os.chdir(self._here)  # names of local data, models and functions are relative to it
        except OSError as error:
            raise InputError(f"A worker cannot enter {self._here} ({error.strerror}).") from None
        torch.set_num_threads(self._settings.cpus_per_worker)
        return self._make()


@contextmanager
def connected(settings: ClusterSettings) -> Iterator[Any]:
    """Ray, connected to the cluster of the settings; where this process is connected already, it stays so."""
    ours = settings.address is None
    with _private() if ours else nullcontext():  # before the import
        check_installed(settings)
        import ray
        import ray.data

        logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # what goes wrong is raised
        joined = ray.is_initialized()
        if not joined and ours:
            ray.init(
                address="local",  # whatever the environment says
                num_cpus=settings.workers * settings.cpus_per_worker,
                object_store_memory=_OBJECT_STORE,
                include_dashboard=False,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
        elif not joined:
            try:
                ray.init(address=settings.address, log_to_driver=False, logging_level=logging.ERROR)
            except (ConnectionError, ValueError, RuntimeError, OSError) as error:
                said = " ".join(str(error).split())[:200]
                raise InputError(f"cluster.address: {settings.address} is no Ray cluster to join ({said}).") from None
        try:
            _check_size(ray, settings)
            yield ray
        finally:
            if not joined:
                ray.shutdown()


@contextmanager
def _private() -> Iterator[None]:
    """Within the block a cluster that is started listens on the loopback interface, to who has this process's token.

    Whoever can speak to a cluster can run programs in it. Ray takes both from the environment when it is imported.
    """
    values = _closing()
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value


@cache
def _closing() -> dict[str, str]:
    if "ray" in sys.modules and not sys.modules["ray"].is_initialized():
        raise InputError(
            "Ray was imported before exalign could close the cluster that it starts to others; give cluster.address, "
            "or call ray.init() yourself."
        )
    return {
        "RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER": "0",
        "RAY_worker_niceness": "0",  # 15 otherwise: whatever else runs would come first
        "RAY_AUTH_MODE": "token",
        "RAY_AUTH_TOKEN": secrets.token_hex(32),
    }


def _gpus(ray: Any, settings: ClusterSettings) -> int:
    if settings.gpus_per_worker is not None:
        return settings.gpus_per_worker
    return 1 if ray.cluster_resources().get("GPU") else 0


def _check_size(ray: Any, settings: ClusterSettings) -> None:
    """A worker that has no place anywhere would be waited for without end."""
    there = ray.cluster_resources()
    for name, each in (("CPU", settings.cpus_per_worker), ("GPU", _gpus(ray, settings))):
        needed = settings.workers * each
        if needed > there.get(name, 0):
            raise InputError(
                f"cluster.workers = {settings.workers} needs {needed} {name}s, but the cluster has "
                f"{there.get(name, 0):g}."
            )
