"""A recipe on several processes: the first leads, all train, each line is printed once, and one sentence ends it."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from multiprocessing.context import ForkServerContext
from pathlib import Path

import pytest
import torch
import yaml
from accelerate.commands.config.config_args import load_config_from_file
from accelerate.commands.launch import launch_command_parser
from safetensors.torch import load_file

from exalign.data.store import read_header, read_records, shards_of
from exalign.data.synthetic import write_world
from exalign.run import materials
from exalign.run.carry_out import run_recipe
from exalign.run.demo import RECIPE
from exalign.run.recipe import load_recipe
from exalign.storage import read_sealed
from run.conftest import tiny_overrides
from training.launched import finish, run_command, run_in_small_shards, start

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
CONFIGS = Path(__file__).parents[2] / "configs" / "accelerate"
PPO = (
    "align.ppo={method: ppo, learning_rate: 1e-3, critic_learning_rate: 1e-3, batch_prompts: 8, rollout_prompts: 16, "
    "passes: 1}"
)
SHARD = 5
SHARED = ("rollouts", "scored", "preferences", "reference")
MODELS = ["sft", "reward", "align/exo-rw", "align/dpo-pref", "align/ppo"]


@pytest.fixture(scope="module")
def arguments(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """A recipe that takes seconds, with whatever trains."""
    world = tmp_path_factory.mktemp("world")
    write_world(world, num_sft=64, num_prompts=24, num_test=12)
    return [str(RECIPE), *tiny_overrides(world, PPO)]


@pytest.fixture(scope="module")
def one(arguments: list[str], tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("one")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(materials, "SHARD", SHARD)
        run_recipe(load_recipe(arguments[0], arguments[1:]), folder=folder)
    torch.set_num_threads(threads)
    return folder


def assert_same_models(folder: Path, other: Path, names: list[str]) -> None:
    for name in names:
        weights, expected = (load_file(place / name / "model" / "model.safetensors") for place in (folder, other))
        assert weights.keys() == expected.keys()
        for key, tensor in expected.items():
            torch.testing.assert_close(weights[key], tensor, rtol=1e-3, atol=2e-5)


def assert_same_records(folder: Path, other: Path) -> None:
    """Drawn, scored and read by several or by one; methods draw from weights that rounding tells apart."""
    for header in other.rglob("header.json"):
        name, records = header.parent.relative_to(other), read_records(header.parent)
        shared = read_records(folder / name)
        assert read_header(folder / name).counts.keys() == read_header(header.parent).counts.keys()
        assert [record.id for record in shared] == [record.id for record in records]
        assert len(shards_of(folder / name)) == len(shards_of(header.parent))
        if name.parts[0] in SHARED or name.as_posix().startswith(("evaluation/sft", "evaluation/pool")):
            assert read_header(folder / name) == read_header(header.parent)
            for one, two in zip(records, shared, strict=True):
                assert one.as_texts() == replace(two, completions=one.completions).as_texts()
                for mine, yours in zip(one.completions, two.completions, strict=True):
                    assert (mine.token_ids, mine.finish_reason) == (yours.token_ids, yours.finish_reason)
                    for value in ("logprob", "reference_logprob", "reward"):
                        numbers = [getattr(each, value) for each in (mine, yours)]
                        assert numbers == [None, None] or numbers[0] == pytest.approx(numbers[1], rel=1e-3, abs=1e-3)


@pytest.mark.parametrize("layout", ["ddp", "fsdp2"])
def test_a_run_on_two_processes_is_that_of_one_and_prints_each_line_once(
    layout: str, arguments: list[str], one: Path, tmp_path: Path, workers: ForkServerContext
) -> None:
    command = ["run", *arguments, "--run", str(tmp_path / "run")]
    assert finish(start(workers, layout, run_in_small_shards, tmp_path, command, SHARD)) == [0, 0]
    assert_same_models(tmp_path / "run", one, MODELS)
    assert_same_records(tmp_path / "run", one)
    assert not (tmp_path / "printed-1").read_text()
    printed = (tmp_path / "printed-0").read_text()
    for path in (tmp_path / "run").rglob("done.json"):
        stage = path.parent.relative_to(tmp_path / "run").as_posix()
        assert printed.count(f"▸ {stage}\n") == printed.count(f"✓ {stage} ") == 1
    assert {path.parent.relative_to(one) for path in one.rglob("done.json")} == {
        path.parent.relative_to(tmp_path / "run") for path in (tmp_path / "run").rglob("done.json")
    }
    again = start(workers, layout, run_command, tmp_path, command)
    assert finish(again) == [0, 0]
    assert (tmp_path / "printed-0").read_text().count("done before, skipped") == printed.count("✓ ") - 1  # the report


@pytest.mark.parametrize("layout", ["ddp", "fsdp2"])
def test_a_search_by_two_is_that_of_one_whose_best_trial_two_take_over(
    layout: str, arguments: list[str], tmp_path: Path, workers: ForkServerContext
) -> None:
    search = [
        "align.ppo=null",
        "search={trials: 2, kl: 9, prompts: 4}",
        "search.methods.exo-rw={beta_r: {choices: [0.1, 1]}}",
    ]
    one, two, searched = (tmp_path / name for name in ("one", "two", "searched"))
    run_recipe(load_recipe(arguments[0], [*arguments[1:], *search]), "search", folder=one)
    shutil.copytree(one, two)
    run_recipe(load_recipe(arguments[0], [*arguments[1:], *search]), "align/exo-rw", folder=one)
    command = ["align", *arguments, *search, "--run", str(two)]
    assert finish(start(workers, layout, run_command, tmp_path, command)) == [0, 0]
    assert (tmp_path / "printed-0").read_text().count("the weights are those of trial") == 1
    assert not (tmp_path / "printed-1").read_text()
    assert_same_models(two, one, ["align/exo-rw"])
    assert (two / "align/exo-rw/metrics.jsonl").read_bytes() == (one / "align/exo-rw/metrics.jsonl").read_bytes()
    command = ["align", *arguments, *search, "--run", str(searched)]  # the search too
    assert finish(start(workers, layout, run_command, tmp_path, command)) == [0, 0]
    assert not (tmp_path / "printed-1").read_text()
    found, expected = (read_sealed(run / "search/exo-rw/trials.json") for run in (searched, one))
    assert found["folders"] == expected["folders"]
    for trial, other in zip(found["trials"], expected["trials"], strict=True):
        assert trial["settings"] == other["settings"]
        assert (trial["value"], trial["kl"]) == pytest.approx((other["value"], other["kl"]), rel=1e-2, abs=1e-3)
    assert_same_models(searched, one, ["align/exo-rw"])


@pytest.mark.parametrize(
    ("change", "sentence"),
    [
        ("data.sft.source=/nowhere/sft.jsonl", "/nowhere/sft.jsonl"),  # found before any stage, by the leader
        ("sft.trackers=[wanb]", "'wanb' is not installed"),  # found by all, in a stage that trains
        ("sft.unknown=1", "sft.unknown"),  # found by all, before they meet
    ],
    ids=["leader", "all", "recipe"],
)
def test_what_fails_is_said_once_and_ends_all(
    change: str, sentence: str, arguments: list[str], tmp_path: Path, workers: ForkServerContext
) -> None:
    command = ["align", *arguments, change, "--run", str(tmp_path / "run")]
    assert finish(start(workers, "ddp", run_command, tmp_path, command)) == [2, 2]
    printed = [(tmp_path / f"printed-{rank}").read_text() for rank in range(2)]
    lines = [line for text in printed for line in text.splitlines() if not line.startswith(("▸", "run: "))]
    assert len(lines) == 1, printed
    assert lines[0].startswith("error: ") and sentence in lines[0]


def test_what_fails_in_one_process_while_the_other_waits_for_its_share_is_said_once(
    arguments: list[str], tmp_path: Path, workers: ForkServerContext
) -> None:
    scorer = "score.scorer={function: 'training.launched:refuse_in_the_second'}"
    command = ["align", *arguments, scorer, "--run", str(tmp_path / "run")]
    codes = finish(start(workers, "ddp", run_command, tmp_path, command))
    assert codes[1] == 2 and codes[0]
    waiting, failing = ((tmp_path / f"printed-{rank}").read_text() for rank in range(2))
    assert waiting.endswith("▸ scored\n") and "rror" not in waiting
    assert failing.startswith("error: training.launched:refuse_in_the_second") and failing.count("\n") == 1


def test_a_plain_run_prints_no_warning_of_any_library(arguments: list[str], tmp_path: Path) -> None:
    """Everything that trains, saves, samples and scores, with LoRA: beside what exalign says there is nothing."""
    command = [sys.executable, "-m", "exalign", "align", *arguments, "model.lora={rank: 2}", "--run", str(tmp_path)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=True)
    said = [line for line in done.stderr.splitlines() if not re.match(r"[\w-]+: step \d+/\d+ ", line)]
    assert said == []


def test_a_model_and_data_are_aligned_by_two_processes_that_say_all_once(
    one: Path, tmp_path: Path, workers: ForkServerContext
) -> None:
    rows = [{"prompt": f"Film {n} was", "chosen": " great.", "rejected": " bad."} for n in range(24)]
    (tmp_path / "pairs.jsonl").write_text("".join(f"{json.dumps(row)}\n" for row in rows))
    command = ["align", str(one / "sft" / "model"), str(tmp_path / "pairs.jsonl"), "--out", str(tmp_path / "out")]
    assert finish(start(workers, "ddp", run_command, tmp_path, command)) == [0, 0]
    assert not (tmp_path / "printed-1").read_text()
    assert (tmp_path / "printed-0").read_text().count("• recipe: ") == 1
    assert (tmp_path / "out" / "report" / "index.html").is_file()


def test_a_run_from_python_is_as_quiet_and_leaves_transformers_as_it_was(arguments: list[str], tmp_path: Path) -> None:
    code = (
        "import sys\nfrom transformers.utils import logging\nfrom exalign import load_recipe, run_recipe\n"
        "before = logging.get_verbosity(), logging.is_progress_bar_enabled()\n"
        "run_recipe(load_recipe(sys.argv[1], sys.argv[2:-1]), 'align/exo-rw', folder=sys.argv[-1])\n"
        "assert before == (logging.get_verbosity(), logging.is_progress_bar_enabled()) and before[1]"
    )
    command = [sys.executable, "-c", code, *arguments, str(tmp_path)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=True)
    assert [line for line in done.stderr.splitlines() if not re.match(r"[\w-]+: step \d+/\d+ ", line)] == []


def test_accelerate_launches_a_configuration_for_cpus(arguments: list[str], one: Path, tmp_path: Path) -> None:
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(CONFIGS / "fsdp2-2cpu.yaml")]
    command = [*launch, "-m", "exalign", "sft", *arguments, "--run", str(tmp_path)]
    done = subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stderr
    assert_same_models(tmp_path, one, ["sft"])
    assert done.stdout.count("▸ sft\n") == done.stdout.count("✓ sft ") == 1


@pytest.mark.parametrize("path", sorted(CONFIGS.glob("*.yaml")), ids=lambda path: path.stem)
def test_every_configuration_is_one_that_accelerate_reads(path: Path) -> None:
    """It refuses unknown keys at the top; inside the parts it takes any, so those are compared with its options."""
    config = load_config_from_file(str(path))
    assert config.num_processes % config.num_machines == 0
    assert path.stem.startswith(f"{config.num_processes}gpu") or path.stem.endswith(f"-{config.num_processes}cpu")
    options = {action.dest for action in launch_command_parser()._actions}
    assert set(config.fsdp_config) <= options and not config.deepspeed_config
    assert ("fsdp2" in path.stem) == (config.fsdp_config.get("fsdp_version") == 2)
    assert yaml.safe_load(path.read_text())["mixed_precision"] == "no"
