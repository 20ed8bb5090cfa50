"""Two processes under DeepSpeed's ZeRO give the run of one, though each keeps half of the optimizer only."""

from __future__ import annotations

import json
from multiprocessing.context import ForkServerContext
from pathlib import Path

import pytest
import torch

from exalign.errors import InputError
from exalign.models.logprobs import PackedPolicy
from exalign.training.accelerator import make_accelerator, zero_wanted
from exalign.training.optimizer import adamw
from training.launched import TRAININGS, ZERO2, finish, run_trainings, start
from training.test_processes import assert_continues, assert_same_run
from training.tiny_world import make_policy, read_metrics

pytest.importorskip("deepspeed", reason="DeepSpeed is not installed: pip install 'exalign[deepspeed]'")

NAMES = [name for name in TRAININGS if name not in ("ppo", "ppo-odd")]  # there the critic is alone at first
WHAT_RUNS = {"zero1": ["sft", "align-bf16", "poisoned-loss"], "zero2": NAMES}
CASES = [(layout, name) for layout, names in WHAT_RUNS.items() for name in names]


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("one")
    threads = torch.get_num_threads()
    run_trainings(folder, NAMES, token_budget=512)
    torch.set_num_threads(threads)
    return folder


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory, workers: ForkServerContext) -> dict[str, Path]:
    """The trainings of a layout one after the other in the same two processes, as stages of a run are."""
    folders = {}
    for layout, names in WHAT_RUNS.items():
        folders[layout] = tmp_path_factory.mktemp(layout)
        assert finish(start(workers, layout, run_trainings, folders[layout], names)) == [0, 0]
    return folders


@pytest.mark.parametrize(("layout", "name"), CASES)
def test_two_processes_give_the_run_of_one(layout: str, name: str, one: Path, several: dict[str, Path]) -> None:
    """Losses, norms and weights: groups with and without decay, two learning rates, gradients that are scaled down."""
    loose = {"rel": 2e-2, "abs_": 1e-3} if name == "align-bf16" else {}
    assert_same_run(several[layout] / name, one / name, **loose)


def test_a_step_that_is_not_finite_on_one_process_is_skipped_on_all(several: dict[str, Path]) -> None:
    """Also where only its loss is not, and DeepSpeed saw nothing wrong."""
    for layout, name in [(layout, name) for layout, name in CASES if name.startswith("poisoned")]:
        assert [row["skipped"] for row in read_metrics(several[layout] / name)] == [0, 1, 0]


def count_parts(folder: Path) -> None:
    """Beside the numbers of the weights, how many of them this process updates."""
    torch.set_num_threads(1)
    module = PackedPolicy(make_policy())
    accelerator = make_accelerator(folder, precision="fp32", trackers=(), some_left_out=False)
    plain = adamw(module, betas=(0.9, 0.95), weight_decay=0.1, device=accelerator.device)
    _, optimizer = accelerator.prepare(module, plain)
    held = sum(part.numel() for group in optimizer.param_groups for part in group["params"])
    numbers = [held, sum(weight.numel() for weight in module.parameters())]
    (folder / f"{accelerator.process_index}.json").write_text(json.dumps(numbers))


def test_each_process_updates_half_of_the_weights(tmp_path: Path, workers: ForkServerContext) -> None:
    """Half of each group, up to the padding of its last part."""
    assert finish(start(workers, "zero2", count_parts, tmp_path)) == [0, 0]
    (held, whole), (other_held, _) = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert held == other_held
    assert whole / 2 <= held < 0.51 * whole


@pytest.mark.parametrize("first", ["two", "one"])
def test_a_killed_run_continues_on_another_number_of_processes(
    first: str, one: Path, tmp_path: Path, workers: ForkServerContext
) -> None:
    """The divided state is gathered into a checkpoint, and a checkpoint divided, moments and count of steps."""
    assert_continues(workers, "zero2", first, tmp_path)
    assert_same_run(tmp_path / "align", one / "align")


def test_what_cannot_be_had_is_refused_in_one_sentence(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    assert zero_wanted() is None
    for name, value in ZERO2.items():
        monkeypatch.setenv(name, value)
    assert zero_wanted() is None  # alone
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert zero_wanted() == 2
    with pytest.raises(InputError, match="set critic_steps to 0, or train under FSDP2"):
        make_accelerator(tmp_path, precision="fp32", trackers=(), some_left_out=True)
    for name, value, sentence in [
        ("ZERO_STAGE", "3", "set it to 1 or 2, or shard the weights with FSDP2"),
        ("OFFLOAD_OPTIMIZER_DEVICE", "cpu", "^offload_optimizer_device is not supported"),
        ("OFFLOAD_PARAM_DEVICE", "nvme", "^offload_param_device is not supported"),
        ("CONFIG_FILE", "zero.json", "^deepspeed_config_file is not supported"),
    ]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(f"ACCELERATE_DEEPSPEED_{name}", value)
            with pytest.raises(InputError, match=sentence):
                zero_wanted()
