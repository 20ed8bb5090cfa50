"""A run that was killed, or whose checkpoint was damaged, ends bit for bit as one that was not."""

from __future__ import annotations

import io
import json
import random
import resource
import shutil
import signal
import time
from contextlib import nullcontext
from dataclasses import dataclass
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from exalign.data.batching import Group
from exalign.errors import InputError
from exalign.models.logprobs import PackedPolicy
from exalign.training.batches import EpochBatches
from exalign.training.checkpoint import MetricsLog, Position, _save_tensors, load_checkpoint, save_checkpoint
from exalign.training.loop import train
from exalign.training.train_settings import TrainSettings
from training.tiny_world import (
    assert_same_outcome,
    make_groups,
    make_policy,
    make_tokenizer,
    read_metrics,
    small_align_run,
)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed") / "align"
    small_align_run(folder)
    return folder


def rows_in(folder: Path) -> int:
    log = folder / "metrics.jsonl"
    return log.read_text().count("\n") if log.exists() else 0


def test_killed_at_random_moments_and_restarted_ends_the_same(
    undisturbed: Path, tmp_path: Path, workers: ForkServerContext
) -> None:
    folder = tmp_path / "align"
    moments = random.Random()
    killed_after = []
    for rows in [0, *sorted(moments.sample(range(1, 11), 4))]:
        process = workers.Process(target=small_align_run, args=(folder,))
        process.start()
        while process.is_alive() and (not folder.exists() or rows_in(folder) < rows):
            time.sleep(0.001)
        time.sleep(moments.uniform(0.0, 0.02))
        process.kill()
        process.join()
        if process.exitcode == -signal.SIGKILL:
            killed_after.append(rows_in(folder))
    small_align_run(folder)
    assert len(killed_after) >= 2, "no kill hit the run: nothing was tested"
    assert_same_outcome(folder, undisturbed)


@pytest.mark.parametrize("damage", ["truncated", "flipped", "no description", "no tensors"])
def test_damaged_newest_checkpoint_falls_back_to_the_one_before(damage: str, tmp_path: Path) -> None:
    noisy_run(tmp_path / "whole")
    folder = tmp_path / "parts"
    noisy_run(folder, dies_after=4)
    newest = folder / "checkpoints" / "step-000004"
    assert sorted(path.name for path in newest.parent.iterdir()) == ["step-000003", "step-000004"]
    state = newest / "state.pt"
    content = bytearray(state.read_bytes())
    if damage == "truncated":
        state.write_bytes(content[: len(content) // 2])
    elif damage == "flipped":
        content[len(content) // 2] ^= 1
        state.write_bytes(content)
    elif damage == "no description":
        (newest / "checkpoint.json").write_text("{")
    else:
        state.unlink()
    with pytest.warns(UserWarning, match="step-000004 is damaged"):
        noisy_run(folder)
    assert_same_outcome(folder, tmp_path / "whole")


def test_a_finished_run_started_again_only_restores_its_model(undisturbed: Path, tmp_path: Path) -> None:
    folder = tmp_path / "align"
    shutil.copytree(undisturbed, folder)
    policy = small_align_run(folder)
    assert_same_outcome(folder, undisturbed)
    saved = load_file(folder / "model" / "model.safetensors")
    assert all(torch.equal(tensor, policy.state_dict()[name]) for name, tensor in saved.items())


@dataclass(frozen=True)
class NoisyTask:
    """Its loss is random: only random numbers that depend on (seed, step) alone survive an interruption."""

    batches: EpochBatches

    def weight(self, groups: object) -> float:
        return 1.0

    def loss(self, model: nn.Module, groups: object) -> tuple[Tensor, dict[str, Tensor]]:
        loss = sum((torch.randn_like(parameter) * parameter).sum() for parameter in model.parameters())
        return loss, {}  # type: ignore[return-value]


class Stopped(BaseException):
    pass


class DyingBatches(EpochBatches):
    dies_after: int | None = None

    def __getitem__(self, step: int) -> list[Group]:
        if step == self.dies_after:
            raise Stopped
        return super().__getitem__(step)


def noisy_run(
    folder: Path,
    *,
    dies_after: int | None = None,
    seed: int = 0,
    token_budget: int = 512,
    dtype: torch.dtype = torch.float32,
) -> None:
    """Six steps; with `dies_after` it is left after so many."""
    settings = TrainSettings(
        learning_rate=1e-2, batch_prompts=4, checkpoint_every=1, seed=seed, token_budget=token_budget
    )
    batches = DyingBatches(make_groups(24), batch_prompts=4, epochs=1, seed=seed)
    batches.dies_after = dies_after
    with pytest.raises(Stopped) if dies_after is not None else nullcontext():
        train(
            NoisyTask(batches), PackedPolicy(make_policy().to(dtype)), make_tokenizer(), settings, folder, card="noise"
        )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_randomness_of_a_step_survives_an_interruption(dtype: torch.dtype, tmp_path: Path) -> None:
    """And what a weight of 16 bits lacks of a whole one."""
    noisy_run(tmp_path / "whole", dtype=dtype)
    noisy_run(tmp_path / "parts", dies_after=2, dtype=dtype)
    torch.manual_seed(999)
    noisy_run(tmp_path / "parts", dtype=dtype)
    assert_same_outcome(tmp_path / "parts", tmp_path / "whole")


def test_another_run_in_the_folder_is_refused_but_settings_of_speed_may_change(tmp_path: Path) -> None:
    noisy_run(tmp_path / "run", dies_after=2)
    with pytest.raises(InputError, match="other settings or data"):
        noisy_run(tmp_path / "run", seed=1)
    noisy_run(tmp_path / "run", token_budget=64)
    assert len(read_metrics(tmp_path / "run")) == 6


def test_batches_of_other_content_have_another_fingerprint() -> None:
    def print_of(count: int, **values: int) -> str:
        return EpochBatches(make_groups(count, **values), batch_prompts=4, epochs=1, seed=0).fingerprint

    assert print_of(6) == print_of(6)
    assert len({print_of(6), print_of(5), print_of(6, seed=1), print_of(6, num_completions=2)}) == 4


def test_metrics_log_keeps_rows_up_to_the_step_and_drops_a_torn_one(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": step}) + "\n" for step in (1, 2, 3)) + '{"step": 4, "lo')
    with MetricsLog(path, step=2, writes=True) as log:
        log.append({"step": 3, "loss": 0.5})
    assert [json.loads(line) for line in path.read_text().splitlines()] == [
        {"step": 1},
        {"step": 2},
        {"step": 3, "loss": 0.5},
    ]
    with MetricsLog(path, step=9, writes=False) as log:
        log.append({"step": 10})
    assert len(path.read_text().splitlines()) == 3


def test_full_disk_is_one_sentence_and_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    model = nn.Linear(64, 64)
    optimizer = torch.optim.AdamW(model.parameters())
    save_checkpoint(tmp_path, Position(1, 0, "run"), model, optimizer, writes=True)
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    ignored = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))
    try:
        with pytest.raises(InputError, match="Cannot write"):
            save_checkpoint(tmp_path, Position(2, 0, "run"), model, optimizer, writes=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, ignored)
    assert [path.name for path in tmp_path.iterdir()] == ["step-000001"]
    nn.init.zeros_(model.weight)
    assert load_checkpoint(tmp_path, "run", model, optimizer) == Position(1, 0, "run")
    assert all(torch.equal(tensor, weights[name]) for name, tensor in model.state_dict().items())


@pytest.mark.parametrize("nth", range(1, 6))
def test_ctrl_c_while_a_checkpoint_is_written_is_ctrl_c(nth: int) -> None:
    class Interrupted(io.BytesIO):
        written = 0

        def write(self, part: Any) -> int:
            self.written += 1
            if self.written == nth:
                raise KeyboardInterrupt
            return super().write(part)

    with pytest.raises(KeyboardInterrupt):
        _save_tensors({"weight": torch.zeros(64, 64)}, Interrupted())
