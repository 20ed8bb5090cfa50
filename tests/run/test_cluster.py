"""Workers on a real local Ray cluster: the plain records, whoever is killed, and one shard in memory at a time."""

from __future__ import annotations

import gc
import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from exalign.data.record import Record
from exalign.data.store import (
    Header,
    iter_shard,
    num_rows,
    read_header,
    read_records,
    shard_path,
    shards_of,
    write_records,
    write_shard,
)
from exalign.data.tokenization import pin_date, render_chat
from exalign.errors import InputError
from exalign.run.cluster import ShardWork, _for_workers, _sampling, _scoring, connected, map_shards
from exalign.run.materials import offline_sampling, scoring
from exalign.run.recipe import ClusterSettings, Recipe, make_recipe
from exalign.run.runner import Run
from exalign.run.stages import plan
from exalign.run.view import Contents, View, key
from exalign.storage import write_json

# Looked for, not imported: what closes a cluster to others is read with the first import.
pytestmark = pytest.mark.skipif(find_spec("ray") is None, reason='Ray is not installed: pip install "exalign[ray]"')

ONE, TWO = ClusterSettings(workers=1), ClusterSettings(workers=2)
PROMPTS = 256 * 2 + 30


@pytest.fixture(scope="module")
def policy(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny policy with its tokenizer, as a folder."""
    folder = tmp_path_factory.mktemp("policy")
    tokenizer = AutoTokenizer.from_pretrained(world / "tokenizer")
    torch.manual_seed(0)
    size = {"n_layer": 1, "n_embd": 16, "n_head": 2, "n_positions": 64, "vocab_size": len(tokenizer)}
    ends = {"bos_token_id": tokenizer.eos_token_id, "eos_token_id": tokenizer.eos_token_id}
    AutoModelForCausalLM.from_config(AutoConfig.for_model("gpt2", **size, **ends)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def make(policy: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Recipe]:
    """Makes a recipe that samples 2 shards of prompts and 30 prompts more, and scores them by a function."""
    prompts = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    prompts.write_text("".join(json.dumps({"prompt": f"Film {i}: a"}) + "\n" for i in range(PROMPTS)))

    def recipe(**changes: Any) -> Recipe:
        values = {
            "name": "pool",
            "model": {"source": str(policy)},
            "data": {"prompts": {"source": str(prompts)}, "evaluation": {"source": str(prompts)}},
            "sample": {"num_completions": 3, "max_new_tokens": 6, "top_p": 0.9},
            "score": {"scorer": {"function": "exalign.data.synthetic:reward"}},
            "align": {"exo": {}},
        }
        values["data"]["max_prompt_tokens"] = 16
        return make_recipe({**values, **changes})

    return recipe


@pytest.fixture(scope="module")
def plain(make: Callable[..., Recipe], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The run of one process without a cluster."""
    folder = tmp_path_factory.mktemp("plain")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    Run(make(), folder).carry_out(plan(make()), ["scored"])
    torch.set_num_threads(threads)
    return folder


@pytest.fixture(scope="module")
def ray() -> Iterator[Any]:
    """One cluster on this machine for the whole module, started as a stage starts its own."""
    with connected(TWO) as ray:
        yield ray


def assert_same(found: Path, expected: Path) -> None:
    """The same shards of the same records: ids exactly, log-probabilities up to the order of sums."""
    assert [shard.name for shard in shards_of(found)] == [shard.name for shard in shards_of(expected)]
    assert read_header(found) == read_header(expected)
    for one, other in zip(read_records(found), read_records(expected), strict=True):
        assert (one.id, one.prompt, one.prompt_ids) == (other.id, other.prompt, other.prompt_ids)
        for c, d in zip(one.completions, other.completions, strict=True):
            assert (c.text, c.token_ids, c.finish_reason, c.reward) == (d.text, d.token_ids, d.finish_reason, d.reward)
            assert c.logprob == pytest.approx(d.logprob, abs=1e-4)
    leftovers = [path.name for path in found.iterdir() if path.name.startswith(".")]
    assert leftovers == []


def test_a_cluster_that_was_started_here_is_reached_from_here_only(ray: Any) -> None:
    import psutil

    listening = [
        connection.laddr.ip.removeprefix("::ffff:")
        for process in psutil.Process().children(recursive=True)
        for connection in process.net_connections(kind="inet")
        if connection.status == psutil.CONN_LISTEN
    ]
    assert listening and set(listening) == {"127.0.0.1"}


def test_the_stages_write_what_one_process_writes(
    ray: Any, make: Callable[..., Recipe], plain: Path, tmp_path: Path
) -> None:
    recipe = make(cluster={"workers": 1})
    Run(recipe, tmp_path).carry_out(plan(recipe), ["scored"])
    for stage in ("rollouts", "scored"):
        assert_same(tmp_path / stage / "records", plain / stage / "records")
        done = [json.loads((folder / stage / "done.json").read_text()) for folder in (tmp_path, plain)]
        assert done[0]["fingerprint"] == done[1]["fingerprint"]
        assert done[0]["counts"] == done[1]["counts"]
    assert not (tmp_path / "rollouts" / "prompts").exists()


def test_workers_that_sample_and_that_score_write_the_date_of_the_run(
    make: Callable[..., Recipe], policy: Path, tmp_path: Path
) -> None:
    tokenizer = AutoTokenizer.from_pretrained(policy)
    tokenizer.chat_template = "{{ strftime_now('%d %B %Y') }}"
    write_json(tmp_path / "environment.json", {"begun": "2001-02-03T04:05:06"})
    view, scorer = _for_workers(rollouts_of(make(cluster={}), tmp_path)), scoring(make())
    assert scorer is not None
    scored = _for_workers(rollouts_of(make(cluster={}), tmp_path, "scored"))
    for begin in (partial(sampling, view), partial(_scoring, scored, scorer)):
        pin_date(None)
        begin()
        assert render_chat(tokenizer, [{"role": "user", "content": "Hi"}]) == "03 February 2001"
    pin_date(None)


def rollout_prompts(plain: Path, folder: Path) -> Path:
    """The prompts of the plain run as shards, as the stage writes them for its workers."""
    records = [Record(record.id, record.prompt) for record in read_records(plain / "rollouts" / "records")]
    write_records(folder, records, Header())
    return folder


def rollouts_of(recipe: Recipe, folder: Path, name: str = "rollouts") -> View:
    """What the stage that samples gets, or another."""
    stage = next(stage for stage in plan(recipe) if stage.name == name)
    return Run(recipe, folder, Console(quiet=True)).view(stage)


def sampling(view: View) -> ShardWork:
    return _sampling(view, offline_sampling(view, 3), "rollouts")


def suicidal(begin: Callable[[], ShardWork], marks: Path, times: int) -> ShardWork:
    """The same work, whose process is killed in the middle of the second shard, `times` times; every shard is noted."""
    work = begin()

    def killed(records: Sequence[Record]) -> tuple[list[Record], Counter[str]]:
        if records[0].id.endswith(f":{256 + 1}") and len(list(marks.glob("kill-*"))) < times:
            (marks / f"kill-{time.time_ns()}").touch()
            work(records[:100])
            os.kill(os.getpid(), signal.SIGKILL)
        (marks / f"done-{records[0].id}-{os.getpid()}-{time.time_ns()}").touch()
        return work(records)

    return killed


def test_a_worker_killed_in_the_middle_of_a_shard_loses_and_doubles_nothing(
    ray: Any, make: Callable[..., Recipe], plain: Path, tmp_path: Path
) -> None:
    source, target, marks = rollout_prompts(plain, tmp_path / "prompts"), tmp_path / "records", tmp_path / "marks"
    marks.mkdir()
    view = _for_workers(rollouts_of(make(cluster={"workers": 2}), plain))
    map_shards(source, target, partial(suicidal, partial(sampling, view), marks, 1), TWO)
    assert len(list(marks.glob("kill-*"))) == 1
    assert Counter(path.name.split("-")[1] for path in marks.glob("done-*")) == Counter(
        next(iter_shard(shard)).id for shard in shards_of(source)
    )
    shutil.copy(plain / "rollouts" / "records" / "header.json", target)
    assert_same(target, plain / "rollouts" / "records")


@pytest.mark.large
def test_a_shard_whose_workers_die_is_given_up_after_the_tries(ray: Any, plain: Path, tmp_path: Path) -> None:
    source, target, marks = rollout_prompts(plain, tmp_path / "prompts"), tmp_path / "records", tmp_path / "marks"
    marks.mkdir()
    with pytest.raises(InputError, match=r"part-000001.parquet was begun 2 times, and its worker died"):
        map_shards(source, target, partial(suicidal, _echo, marks, 100), ClusterSettings(workers=1, tries=2))
    assert len(list(marks.glob("kill-*"))) == 2
    assert {num_rows(shard) for shard in shards_of(target)} <= {256, 30}


def test_damaged_shards_are_made_again_alone_and_a_problem_in_a_worker_is_one_sentence_here(
    ray: Any, plain: Path, tmp_path: Path
) -> None:
    source, target, seen = rollout_prompts(plain, tmp_path / "prompts"), tmp_path / "records", tmp_path / "seen"
    for number, shard in enumerate(shards_of(source)):
        write_shard(shard_path(target, number), list(iter_shard(shard)), Counter())
    whole, damaged, last = ((shard, shard.stat().st_mtime_ns) for shard in shards_of(target))
    map_shards(source, target, _refusing, ONE)  # where all shards stand, no worker is started
    for shard, _ in (damaged, last):
        shard.write_bytes(shard.read_bytes()[:-20])
    with pytest.raises(InputError, match=r"^Thirty rows are too few\.$"):
        map_shards(source, target, partial(_threads, seen), ClusterSettings(workers=1, cpus_per_worker=2))
    assert shards_of(target) == [whole[0], damaged[0]] and num_rows(damaged[0]) == 256
    assert [shard.stat().st_mtime_ns == before for shard, before in (whole, damaged)] == [True, False]
    assert seen.read_text() == f"2 {Path.cwd()}"  # the worker had its threads, and this process's working directory


def _threads(seen: Path) -> ShardWork:
    seen.write_text(f"{torch.get_num_threads()} {Path.cwd()}")

    def work(records: Sequence[Record]) -> tuple[list[Record], Counter[str]]:
        if len(records) == 30:
            raise InputError("Thirty rows are too few.")
        return list(records), Counter()

    return work


def _echo() -> ShardWork:
    return lambda records: (list(records), Counter())


def _refusing() -> ShardWork:
    raise InputError("The model of this worker cannot be read.")


def test_a_pool_that_has_no_place_is_refused(ray: Any, plain: Path, tmp_path: Path) -> None:
    source = rollout_prompts(plain, tmp_path / "prompts")
    for settings, said in (
        (ClusterSettings(workers=3), r"cluster.workers = 3 needs 3 CPUs, but the cluster has 2"),
        (ClusterSettings(workers=1, cpus_per_worker=3), r"cluster.workers = 1 needs 3 CPUs"),
        (ClusterSettings(workers=1, gpus_per_worker=2), r"needs 2 GPUs, but the cluster has 0"),
    ):
        with pytest.raises(InputError, match=said):
            map_shards(source, tmp_path / "records", _echo, settings)


def test_another_engine_makes_the_samples_again_and_workers_and_memory_do_not(
    make: Callable[..., Recipe], tmp_path: Path
) -> None:
    def key_with(cluster: dict[str, Any] | None = None, **sample: Any) -> Any:
        drawn = {"num_completions": 3, "max_new_tokens": 6, "top_p": 0.9}
        recipe = make(cluster=cluster, sample={**drawn, **sample})
        return key(recipe, rollouts_of(recipe, tmp_path).stage.reads, Contents(tmp_path / "inputs.json"))

    own, other = key_with(), key_with(engine="vllm")
    assert own == key_with({"workers": 8, "cpus_per_worker": 2, "tries": 1}) != other
    assert other == key_with({}, engine="vllm", vllm={"cache_gib": 9, "gpus": 2, "logprob_limit": 0.1})


def command(recipe: Recipe, folder: Path, home: Path) -> list[str]:
    path = home / "recipe.yaml"
    path.write_text(recipe.model_dump_json(exclude_none=True))  # JSON is YAML
    return [sys.executable, "-m", "exalign", "sample", str(path), "--run", str(folder)]


@pytest.mark.large
def test_a_run_killed_in_the_middle_continues_with_the_missing_shards(
    ray: Any, make: Callable[..., Recipe], plain: Path, tmp_path: Path
) -> None:
    """The whole program, with a cluster of its own, killed by SIGKILL; continued by workers that are here already."""
    slow = make().sample.model_copy(update={"batch_completions": 1}).model_dump()
    recipe, folder = make(cluster={"workers": 2}, sample=slow), tmp_path / "run"
    records = folder / "rollouts" / "records"
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    with subprocess.Popen(command(recipe, folder, tmp_path), env=environment, stdout=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 120
        while not list(records.glob("part-*")):
            assert process.poll() is None and time.monotonic() < deadline
            time.sleep(0.01)
        process.kill()
    before = {shard: shard.stat().st_mtime_ns for shard in shards_of(records)}
    assert 0 < len(before) < 3 and not (records / "header.json").exists()
    fewer = make(cluster={"workers": 1}, sample=slow)  # which is the same run all the same
    Run(fewer, folder).carry_out(plan(fewer), ["rollouts"])
    assert {shard: shard.stat().st_mtime_ns for shard in before} == before
    expected = [[c.token_ids for c in record.completions] for record in read_records(plain / "rollouts" / "records")]
    assert [[c.token_ids for c in record.completions] for record in read_records(records)] == expected
    assert read_header(records).counts == read_header(plain / "rollouts" / "records").counts


@pytest.mark.large
def test_a_running_cluster_is_joined_by_its_address_with_its_token_and_by_nobody_without(
    ray: Any, make: Callable[..., Recipe], plain: Path, tmp_path: Path
) -> None:
    address = ray.get_runtime_context().gcs_address
    assert address.startswith("127.0.0.1:")
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    without = {name: value for name, value in environment.items() if not name.startswith("RAY_AUTH")}
    recipe = make(cluster={"workers": 1, "address": address})
    refused = command(recipe, tmp_path / "refused", tmp_path)
    with subprocess.Popen(refused, env=without, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        joined = command(recipe, tmp_path / "run", tmp_path)
        subprocess.run(joined, env=environment, check=True, capture_output=True)
        said, _ = process.communicate(timeout=120)
    assert process.returncode != 0 and f"{address} is no Ray cluster to join" in " ".join(said.split())
    assert_same(tmp_path / "run" / "rollouts" / "records", plain / "rollouts" / "records")


def peak(pid: int | str) -> int:
    """The most resident memory that a process has had, in MiB."""
    with suppress(OSError, StopIteration):
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
        return int(next(line for line in lines if line.startswith("VmHWM")).split()[1]) >> 10
    return 0


def peaks(recipe: Recipe, folder: Path) -> tuple[int, int]:
    """The peaks of this process and of the largest worker while the stage `rollouts` is carried out, in MiB."""
    import psutil

    found, finished = [0], threading.Event()

    def watch() -> None:
        while not finished.wait(0.05):
            for process in psutil.Process().children(recursive=True):
                with suppress(psutil.Error):
                    if process.name().startswith("ray::MapWorker"):
                        found.append(peak(process.pid))

    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    watcher = threading.Thread(target=watch)
    watcher.start()
    Run(recipe, folder).carry_out(plan(recipe), ["rollouts"])
    finished.set()
    watcher.join()
    return peak("self"), max(found)


@pytest.mark.large
@pytest.mark.skipif(not os.access("/proc/self/clear_refs", os.W_OK), reason="this system does not tell peaks of memory")
def test_memory_does_not_grow_with_the_file_of_prompts(ray: Any, make: Callable[..., Recipe], tmp_path: Path) -> None:
    """3 MB of prompts and 30 MB: what held the file would need at least 27 MB more."""
    found = []
    for number in (300, 3000):
        path = tmp_path / f"{number}.jsonl"
        with path.open("w") as stream:
            for i in range(number):
                stream.write(json.dumps({"prompt": f"{i} " + "a film " * 1430}) + "\n")
        source = {"source": str(path)}
        recipe = make(
            cluster={"workers": 1},
            data={"prompts": source, "evaluation": source, "max_prompt_tokens": 8},
            sample={"num_completions": 2, "max_new_tokens": 1},
        )
        found.append(peaks(recipe, tmp_path / str(number)))
        assert (
            sum(num_rows(shard) or 0 for shard in shards_of(tmp_path / str(number) / "rollouts" / "records")) == number
        )
    (small_here, small_worker), (large_here, large_worker) = found
    assert min(small_here, small_worker) > 100
    assert large_here - small_here < 20 and large_worker - small_worker < 20, found
