"""A pool of workers on Ray Data that samples and scores where a recipe has a `cluster`. Ray is known here only.

The records are those that the stages write without one: the same shards of the same prompts, drawn with the same
numbers. One shard is in memory at a time, here and in each worker.

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
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cache, partial
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from exalign import checksums
from exalign.data.record import Record
from exalign.data.store import (
    Header,
    RecordWriter,
    counted_in,
    iter_shard,
    num_rows,
    read_header,
    shard_path,
    shards_of,
    write_header,
    write_shard,
)
from exalign.errors import InputError
from exalign.rollout.rollout import Numerics, open_sampler, rollout
from exalign.rollout.scorers import scored
from exalign.rollout.settings import SampleSettings
from exalign.run.materials import (
    SHARD,
    Scoring,
    iter_prompts,
    purpose_seed,
    run_tokenizer,
    samples_header,
    supervised,
)
from exalign.run.recipe import ClusterSettings
from exalign.run.runner import pin_to_run
from exalign.run.view import View
from exalign.storage import remove_folder, remove_leftovers

ShardWork = Callable[[Sequence[Record]], tuple[list[Record], Counter[str]]]
"""What a worker makes of the records of a shard: as many records, and what was counted."""

_OBJECT_STORE = 100_000_000
"""Bytes of shared memory of a cluster that is started here: it holds numbers of shards only."""
_BLOCKS = 16
"""Portions that each worker's share is divided into: the smaller they are, the more evenly the pool ends."""


def sample_by_workers(view: View, settings: SampleSettings, *, folder: Path, purpose: str) -> None:
    """Write samples of π_sft to `folder`, continuing what stands there, and count what was read and drawn."""
    prompts = folder.with_name("prompts")
    _write_prompts(view, prompts)
    work = partial(_sampling, _for_workers(view), settings, purpose)
    header = samples_header(view, settings, purpose, view.recipe.temperature)
    view.counts.update(_filled(view, prompts, folder, work, header))
    remove_folder(prompts)


def score_by_workers(view: View, scorer: Scoring, source: Path, target: Path) -> Counter[str]:
    """Write the records of `source` with the scorer's rewards to `target`, continuing what stands there.

    Returns what the scorer cut.
    """
    return _filled(view, source, target, partial(_scoring, _for_workers(view), scorer), read_header(source))


def _filled(view: View, source: Path, target: Path, make: Callable[[], ShardWork], header: Header) -> Counter[str]:
    assert view.recipe.cluster is not None
    map_shards(source, target, make, view.recipe.cluster)
    counted = counted_in(target)
    write_header(target, header.with_counts(counted))
    return counted


def _for_workers(view: View) -> View:
    """The view as it can be sent to another process, which may stand in another folder."""
    return replace(view, run=view.run.resolve(), console=None, counts=Counter())  # type: ignore[arg-type]


def _in_worker(view: View) -> View:
    """That view where it arrived, in a process whose chat templates are to write the run's date too."""
    pin_to_run(view.run)
    return replace(view, console=Console(quiet=True))


def _write_prompts(view: View, folder: Path) -> None:
    """The prompts as shards for the workers, read as a stream; once per stage."""
    if not (folder / "header.json").exists():
        found: Counter[str] = Counter()
        with RecordWriter(folder, shard_size=SHARD) as writer:
            for record in islice(iter_prompts(view, found), writer.written, None):
                writer.write(record)
            writer.close(Header(counts=dict(found)))
    view.counts.update(read_header(folder).counts)


def _sampling(view: View, settings: SampleSettings, purpose: str) -> ShardWork:
    """What a worker holds to sample: the model with its sampler."""
    view = _in_worker(view)
    recipe, tokenizer = view.recipe, run_tokenizer(view)
    model, seed = supervised(view, tokenizer), purpose_seed(view, purpose)
    sampler = open_sampler(model, tokenizer, settings, temperature=recipe.temperature, seed=seed)

    def work(records: Sequence[Record]) -> tuple[list[Record], Counter[str]]:
        counts: Counter[str] = Counter()
        return rollout(records, sampler, counts, Numerics(recipe.temperature)), counts

    return work


def _scoring(view: View, scorer: Scoring) -> ShardWork:
    """What a worker holds to score: the scorer."""
    loaded = scorer.load(_in_worker(view))

    def work(records: Sequence[Record]) -> tuple[list[Record], Counter[str]]:
        cut: Counter[str] = Counter()
        return scored(loaded, records, cut), cut

    return work


def check_installed(settings: ClusterSettings) -> None:
    """Raise the `InputError` that names the extra where it is missing; Ray is imported, closed, before vLLM does so."""
    if find_spec("ray") is None:
        raise InputError('cluster needs Ray Data: pip install "exalign[ray]".')
    if settings.address is None:
        _close()
    import ray  # noqa: F401


def map_shards(source: Path, target: Path, make: Callable[[], ShardWork], settings: ClusterSettings) -> None:
    """Fill `target` with what the pool makes of each shard of `source`; shards that stand whole are left as they are.

    `make` is called once in every worker, for what it holds: it and what it is bound to must be what Ray can send. An
    `InputError` in a worker is raised here; so is one where Ray is not installed, the cluster cannot be reached or is
    too small, or the workers of one shard died `tries` times.
    """
    source, target = source.resolve(), target.resolve()
    target.mkdir(parents=True, exist_ok=True)
    for shard in checksums.unvouched(target, shards_of(target)):
        warnings.warn(f"{shard} is damaged; it is made again.", stacklevel=2)
        shard.unlink()
    if left := _unfinished(source, target):
        remove_leftovers(target)  # of a run that was killed: how often each shard was begun
        with connected(settings) as ray:
            _carry_out(ray, left, (make, source, target, Path.cwd(), settings), settings)
        remove_leftovers(target)
    if missing := _unfinished(source, target):
        raise InputError(
            f"The workers did not write {len(missing)} of {len(shards_of(source))} shards to {target}: every machine "
            "of the cluster must see this folder under this name."
        )
    checksums.settle(target, {})


def _unfinished(source: Path, target: Path) -> list[int]:
    """The shards that are absent, damaged, or not of as many records as they are made from."""
    rows = [num_rows(shard) for shard in shards_of(source)]
    return [n for n, wanted in enumerate(rows) if wanted is None or num_rows(shard_path(target, n)) != wanted]


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


@dataclass
class _Worker:
    """A process of the pool. It loads what it holds with its first shard, where a problem can still be told."""

    make: Callable[[], ShardWork]
    source: Path
    target: Path
    here: Path
    settings: ClusterSettings
    work: ShardWork | None = None

    def __call__(self, batch: dict[str, Any]) -> dict[str, list[Any]]:
        """Carry out one shard; what comes back is its number and, where it could not be done, the sentence why."""
        number, problem = int(batch["shard"][0]), ""
        try:
            self._carry_out(number)
        except InputError as error:
            problem = str(error)
        return {"shard": [number], "problem": [problem]}

    def _carry_out(self, number: int) -> None:
        made, wanted = shard_path(self.target, number), num_rows(shard_path(self.source, number))
        if wanted is None:
            raise InputError(f"{self.source} does not hold shard {number} where a worker looked for it.")
        if num_rows(made) == wanted:  # by the worker that died before it could say so
            return
        # Ray begins a dead worker's task again without end; a shard that kills whoever takes it is given up.
        tries = self.target / f".{made.stem}.tries.tmp"
        with tries.open("ab") as stream:
            stream.write(b".")
        if tries.stat().st_size > self.settings.tries:
            raise InputError(
                f"{made.name} was begun {self.settings.tries} times, and its worker died each time, perhaps for lack "
                "of memory; what was finished stays, and the same command continues."
            )
        if self.work is None:
            try:
                os.chdir(self.here)  # names of local data, models and functions are relative to it
            except OSError as error:
                raise InputError(f"A worker cannot enter {self.here} ({error.strerror}).") from None
            torch.set_num_threads(self.settings.cpus_per_worker)
            self.work = self.make()
        records, counts = self.work(list(iter_shard(shard_path(self.source, number))))
        write_shard(made, records, counts)


@contextmanager
def connected(settings: ClusterSettings) -> Iterator[Any]:
    """Ray, connected to the cluster of the settings; where this process is connected already, it stays so."""
    check_installed(settings)
    import ray
    import ray.data

    logging.getLogger("ray.data").setLevel(logging.CRITICAL)  # what goes wrong is raised
    joined = ray.is_initialized()
    if not joined and settings.address is None:
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


@cache
def _close() -> None:
    """Let a cluster that is started here listen on the loopback interface alone, to who has this process's token.

    Whoever can speak to a cluster can run programs in it. Ray takes both from the environment when it is imported.
    """
    if "ray" in sys.modules and not sys.modules["ray"].is_initialized():
        raise InputError(
            "Ray was imported before exalign could close the cluster that it starts to others; give cluster.address, "
            "or call ray.init() yourself."
        )
    os.environ |= {
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
