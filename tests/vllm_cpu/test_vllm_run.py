"""Whole runs that draw with vLLM: every purpose, on-policy, a pool, and what is killed in the middle."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from exalign.data.record import Record
from exalign.data.store import Header, read_header, read_records, shard_path, write_records
from exalign.rollout import vllm
from exalign.rollout.rollout import Numerics, with_logprobs
from exalign.run.carry_out import run_recipe
from exalign.run.cluster import ShardWork, _for_workers, _sampling, map_shards
from exalign.run.materials import frozen_policy, offline_sampling, run_tokenizer
from exalign.run.recipe import ClusterSettings, Recipe, make_recipe
from exalign.run.runner import Run
from exalign.run.stages import plan
from exalign.run.view import View
from exalign.storage import read_json

Make = Callable[..., Recipe]
PROMPTS = 256 + 40


@pytest.fixture(scope="module")
def make(policy: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Make:
    """Makes a recipe that draws with vLLM for everything it draws for, two shards of prompts."""
    folder = tmp_path_factory.mktemp("policy")
    policy.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    for name, number in (("many", PROMPTS), ("few", 24)):
        rows = [json.dumps({"prompt": f"A film that is {i}: and a"}) + "\n" for i in range(number)]
        (folder / f"{name}.jsonl").write_text("".join(rows))

    def recipe(prompts: str = "many", **changes: Any) -> Recipe:
        values = {
            "name": "engine",
            "model": {"source": str(folder)},
            "data": {
                "prompts": {"source": str(folder / f"{prompts}.jsonl")},
                "evaluation": {"source": str(folder / "few.jsonl")},
                "max_prompt_tokens": 60,
            },
            "sample": {"num_completions": 3, "max_new_tokens": 20, "engine": "vllm", "vllm": {"cache_gib": 0.25}},
            "score": {"scorer": {"function": "exalign.data.synthetic:reward"}},
            "align": {"exo": {"learning_rate": 1e-3, "batch_prompts": 12}},
            "evaluate": {"prompts": 8, "samples": 2, "pool_prompts": 4, "pool_samples": 8},
        }
        return make_recipe({**values, **changes})

    return recipe


def assert_same(found: Path, expected: Path) -> None:
    headers = [read_header(folder) for folder in (found, expected)]
    for header in headers:
        header.counts.pop("logprobs_checked")  # once by every process that drew
    assert headers[0] == headers[1]
    for one, other in zip(read_records(found), read_records(expected), strict=True):
        assert one.id == other.id
        for c, d in zip(one.completions, other.completions, strict=True):
            assert (c.token_ids, c.text, c.finish_reason) == (d.token_ids, d.text, d.finish_reason)
            assert c.logprob == pytest.approx(d.logprob, abs=1e-4)


def test_methods_draw_with_it_on_policy_and_evaluation_and_pool_do(make: Make, tmp_path: Path) -> None:
    """EXO and RLOO take six steps, each on samples of the weights of then; their log q is the training path's."""
    own = {"learning_rate": 1e-3, "batch_prompts": 4, "epochs": 1, "fresh_every": 1}
    recipe = make("few", align={"exo": own, "rloo": {"method": "rloo", **own}})
    run = run_recipe(recipe, folder=tmp_path)
    assert not vllm._running
    drawn = ["evaluation/sft/samples", "evaluation/pool"]
    drawn += [str(path.relative_to(tmp_path)) for path in tmp_path.glob("evaluation/*/step-*/samples")]
    assert len(drawn) > 3
    for place in drawn:
        header = read_header(tmp_path / place)
        assert header.sampler == "vllm" and not header.counts.get("logprobs_that_differ")
        assert header.counts["logprobs_checked"] >= 8
    stages = {stage.name: stage for stage in plan(recipe)}
    for name in ("exo", "rloo"):
        counts = read_json(tmp_path / "align" / name / "done.json")["counts"]
        assert counts["completions"] == 24 * 3
        assert counts["logprobs_checked"] == 6 * 4 * 3 and "logprobs_that_differ" not in +Counter(counts)
        rows = [json.loads(line) for line in (tmp_path / "align" / name / "metrics.jsonl").read_text().splitlines()]
        assert len(rows) == 6 and all(0 < row["logprob_gap"] < 1e-4 for row in rows)
        assert all(row["kl_to_sampled"] == 0 for row in rows)
        # The steps moved the policy: what was drawn from the last weights is not what the first give.
        view = run.view(stages[f"evaluation/drawn/{name}"])
        known = read_records(max((tmp_path / "evaluation" / name).glob("step-*")) / "samples")
        policy = frozen_policy(view, tmp_path / "align" / name / "model", run_tokenizer(view))
        evaluated = with_logprobs(known, policy, "reference_logprob", Numerics(1.0))
        gaps = [abs(c.logprob - c.reference_logprob) for record in evaluated for c in record.completions]
        moved = [abs(c.logprob - c.reference_logprob) for record in known for c in record.completions]
        assert max(gaps) < 1e-3 < 0.1 < max(moved)


@pytest.fixture(scope="module")
def alone(make: Make, tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, Path]:
    """Given samples and own ones, by one process."""
    exo = {"learning_rate": 1e-3, "batch_prompts": 8}
    recipe, folder = make("few", align={"exo": exo, "own": {**exo, "fresh_every": 1}}), tmp_path_factory.mktemp("alone")
    run_recipe(recipe, "align", folder=folder)
    return recipe, folder


@pytest.mark.parametrize("layout", ["ddp", "fsdp2"])
def test_each_of_several_processes_draws_its_share_with_an_engine_of_its_own(
    layout: str, alone: tuple[Recipe, Path], tmp_path: Path
) -> None:
    recipe, folder = alone
    path, run = tmp_path / "recipe.yaml", tmp_path / "run"
    path.write_text(recipe.model_dump_json(exclude_none=True))
    config = Path(__file__).parents[2] / "configs" / "accelerate" / f"{layout}-2cpu.yaml"
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config), "-m", "exalign"]
    ended = subprocess.run([*launch, "align", str(path), "--run", str(run)], capture_output=True, text=True)
    assert ended.returncode == 0, ended.stdout + ended.stderr
    assert_same(run / "rollouts" / "records", folder / "rollouts" / "records")
    for name in ("exo", "own"):
        found, expected = (
            [json.loads(line) for line in (place / "align" / name / "metrics.jsonl").read_text().splitlines()]
            for place in (run, folder)
        )
        for one, other in zip(found, expected, strict=True):
            for number in ("loss", "kl", "reward_correlation"):
                assert one[number] == pytest.approx(other[number], rel=1e-3, abs=1e-4)
    counts = read_json(run / "align" / "own" / "done.json")["counts"]
    assert counts["logprobs_checked"] == 3 * 8 * 3 and "logprobs_that_differ" not in +Counter(counts)


@pytest.fixture(scope="module")
def plain(make: Make, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Rollouts of a run that nothing disturbs."""
    folder = tmp_path_factory.mktemp("plain")
    run_recipe(make(), "rollouts", folder=folder)
    return folder


def test_a_run_killed_in_the_middle_continues_and_leaves_no_engine(make: Make, plain: Path, tmp_path: Path) -> None:
    path, folder = tmp_path / "recipe.yaml", tmp_path / "run"
    path.write_text(make().model_dump_json(exclude_none=True))  # JSON is YAML
    command = [sys.executable, "-m", "exalign", "sample", str(path), "--run", str(folder)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True) as process:
        while not shard_path(folder / "rollouts" / "records", 0).exists():
            assert process.poll() is None, process.stdout and process.stdout.read()
            time.sleep(0.01)
        engines = psutil.Process(process.pid).children(recursive=True)
        process.kill()
    assert engines
    assert not psutil.wait_procs(engines, timeout=60)[1]
    assert not shard_path(folder / "rollouts" / "records", 1).exists()
    run_recipe(make(), "rollouts", folder=folder)
    assert_same(folder / "rollouts" / "records", plain / "rollouts" / "records")


def rollouts_of(recipe: Recipe, folder: Path) -> View:
    stage = next(stage for stage in plan(recipe) if stage.name == "rollouts")
    return Run(recipe, folder, Console(quiet=True)).view(stage)


def suicidal(view: View, marks: Path) -> ShardWork:
    """The work of a pool's worker, which is killed once in the middle of the second shard."""
    work = _sampling(view, offline_sampling(view, 3), "rollouts")

    def killed(records: Sequence[Record]) -> tuple[list[Record], Counter[str]]:
        if records[0].id.endswith(":257") and not marks.exists():
            marks.touch()
            work(records[:10])
            os.kill(os.getpid(), signal.SIGKILL)
        return work(records)

    return killed


def test_a_pool_whose_worker_is_killed_draws_the_same(make: Make, plain: Path, tmp_path: Path) -> None:
    pytest.importorskip("ray")
    view = _for_workers(rollouts_of(make(cluster={"workers": 1}), plain))
    source, target, marks = tmp_path / "prompts", tmp_path / "records", tmp_path / "killed"
    records = [Record(record.id, record.prompt) for record in read_records(plain / "rollouts" / "records")]
    write_records(source, records, Header())
    map_shards(source, target, partial(suicidal, view, marks), ClusterSettings(workers=1))
    assert marks.exists()
    drawn = (target / "header.json", plain / "rollouts" / "records" / "header.json")
    drawn[0].write_bytes(drawn[1].read_bytes())
    assert_same(target, plain / "rollouts" / "records")
