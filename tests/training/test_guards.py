"""Steps that are not finite or do not fit: what is kept of them, when training stops, and how it goes on."""

from __future__ import annotations

import math
import resource
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from exalign.data.batching import Group
from exalign.errors import InputError
from exalign.methods.matching import Matching, train_matching, with_reference_logp
from exalign.methods.sft import SFT, MaximumLikelihood
from exalign.models.logprobs import PackedPolicy
from exalign.storage import read_json
from exalign.training.batches import EpochBatches
from exalign.training.guards import (
    KEEP_SKIPPED,
    NotFiniteError,
    add_recovery,
    next_recovery,
    recoveries,
    steps_not_taken,
)
from exalign.training.loop import train
from exalign.training.train_settings import TrainSettings
from training.launched import finish, run_out_of_memory, start
from training.tiny_world import (
    TIMINGS,
    assert_same_outcome,
    make_groups,
    make_policy,
    make_tokenizer,
    read_metrics,
    small_ppo_run,
)


@dataclass(frozen=True)
class PoisonedTask:
    """Squared weights; not finite, in value or only in gradient, where a batch holds a poisoned index."""

    batches: EpochBatches
    poisoned: frozenset[int]
    poison: str

    def weight(self, groups: list[Group]) -> float:
        return len(groups)

    def loss(self, model: nn.Module, groups: list[Group]) -> tuple[Tensor, dict[str, Tensor]]:
        loss = sum(parameter.square().sum() for parameter in model.parameters()) * len(groups)
        if any(group.index in self.poisoned for group in groups):
            parameter = next(model.parameters()).flatten()[0]
            # The square root at 0 has value 0 and an infinite derivative.
            loss = loss * math.nan if self.poison == "loss" else loss + (parameter - parameter.detach()).sqrt()
        return loss, {}  # type: ignore[return-value]


@pytest.mark.parametrize("poison", ["loss", "gradient"])
def test_step_that_is_not_finite_is_skipped_and_recorded(poison: str, tmp_path: Path) -> None:
    settings = TrainSettings(learning_rate=1e-3, batch_prompts=1, schedule="constant", warmup_fraction=0.0)
    batches = EpochBatches(make_groups(6), batch_prompts=1, epochs=1, seed=0)
    policies = []
    for poisoned in (frozenset({batches[2][0].index}), frozenset()):
        policies.append(make_policy())
        task = PoisonedTask(batches, poisoned, poison)
        train(task, PackedPolicy(policies[-1]), make_tokenizer(), settings, tmp_path / str(len(poisoned)), card="")
    rows, clean = read_metrics(tmp_path / "1"), read_metrics(tmp_path / "0")
    assert [row["skipped"] for row in rows] == [0, 0, 1, 0, 0, 0]
    assert rows[2]["grad_norm"] is None
    assert (rows[2]["loss"] is None) == (poison == "loss")
    # The batches do not matter to this loss, so the run lags the clean one by exactly the step that was not taken.
    assert [row["loss"] for row in rows[3:]] == [row["loss"] for row in clean[2:5]]
    assert all(bool(parameter.isfinite().all()) for parameter in policies[0].parameters())


def poisoned_run(folder: Path, count: int, poisoned: Sequence[int], poison: str = "loss", **changes: Any) -> None:
    """A step for each of `count` groups, of which those at the steps `poisoned` (from 1) are not finite."""
    settings = TrainSettings(**{"batch_prompts": 1, "checkpoint_every": 2} | changes)
    batches = EpochBatches(make_groups(count), batch_prompts=1, epochs=1, seed=0)
    rows = frozenset(batches[step - 1][0].index for step in poisoned)
    train(PoisonedTask(batches, rows, poison), PackedPolicy(make_policy()), make_tokenizer(), settings, folder, card="")


def kept(folder: Path) -> list[int]:
    return sorted(int(path.stem.removeprefix("step-")) for path in (folder / "skipped").iterdir())


def test_too_many_skipped_steps_in_a_row_stop_and_a_higher_limit_lets_the_run_go_on(tmp_path: Path) -> None:
    """Skipped: 3, then 6, 7, 8. Neither number of them alone, nor that of both together, but 3 in a row end it."""
    poisoned_run(tmp_path / "whole", 10, [3, 6, 7, 8])
    for _ in range(2):  # the same command comes to the same end
        with pytest.raises(NotFiniteError, match="stopped at step 8: loss or gradient was not finite 3 times in a row"):
            poisoned_run(tmp_path / "run", 10, [3, 6, 7, 8], max_skipped_in_a_row=3)
        assert [row["skipped"] for row in read_metrics(tmp_path / "run")] == [0, 0, 1, 0, 0, 1, 1, 1]
        # None among the skipped steps: 8 is due and is not there.
        assert sorted(path.name for path in (tmp_path / "run" / "checkpoints").iterdir()) == [
            "step-000002",
            "step-000004",
        ]
    poisoned_run(tmp_path / "run", 10, [3, 6, 7, 8], max_skipped_in_a_row=4)
    assert_same_outcome(tmp_path / "run", tmp_path / "whole")
    assert kept(tmp_path / "run") == [3, 6, 7, 8]
    assert not (tmp_path / "run" / "stopped.json").exists()


def test_only_so_many_batches_are_kept_and_it_is_said(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    count = KEEP_SKIPPED + 2
    with pytest.raises(NotFiniteError, match=f"No step was taken: .* in all {count} of them"):
        poisoned_run(tmp_path, count, range(1, count + 1), max_skipped_in_a_row=count + 1)
    assert not (tmp_path / "model").exists()
    assert steps_not_taken(tmp_path) == count
    assert kept(tmp_path) == list(range(1, KEEP_SKIPPED + 1))
    assert " ".join(capsys.readouterr().err.split()).count("is full, so its batch is not kept") == 2


def test_a_training_that_could_take_no_step_is_refused(tmp_path: Path) -> None:
    """Also where only the policy would stay as it is, because all steps are the critic's, or nothing is trained."""
    with pytest.raises(InputError, match="No step would be taken: there are 16, and the first 16 leave the policy"):
        small_ppo_run(tmp_path, critic_steps=16)
    policy = PackedPolicy(make_policy().requires_grad_(False))
    task = PoisonedTask(EpochBatches(make_groups(2), batch_prompts=1, epochs=1, seed=0), frozenset(), "loss")
    with pytest.raises(InputError, match="No weight of this model is trained"):
        train(task, policy, make_tokenizer(), TrainSettings(), tmp_path, card="")


def test_an_interruption_says_what_stands(tmp_path: Path) -> None:
    class Impatient(EpochBatches):
        def __getitem__(self, step: int) -> list[Group]:
            if step == 5:
                raise KeyboardInterrupt
            return super().__getitem__(step)

    def interrupted_run(checkpoint_every: int) -> None:
        settings = TrainSettings(batch_prompts=1, checkpoint_every=checkpoint_every)
        batches = Impatient(make_groups(8), batch_prompts=1, epochs=1, seed=0)
        task = PoisonedTask(batches, frozenset(), "loss")
        train(task, PackedPolicy(make_policy()), make_tokenizer(), settings, tmp_path / "exo", card="")

    for every, goes_on in ((100, "begins it again"), (2, "goes on after step 4, where its last checkpoint stands")):
        with pytest.raises(
            KeyboardInterrupt, match=f"^Interrupted: exo after step 5 of 8. The same command {goes_on}.$"
        ):
            interrupted_run(every)


def test_the_batch_of_a_skipped_step_is_kept_with_the_row_to_blame(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A reward of 1e38 is finite and 1e38 / β_r is not, so the others' log-targets are −∞ and that row's KL is ∞."""
    settings = Matching(learning_rate=1e-3, batch_prompts=4, beta_r=0.1)
    policy = make_policy()
    groups = with_reference_logp(policy, make_groups(8), settings, temperature=0.8)
    assert groups[5].rewards is not None
    rewards = groups[5].rewards.clone()
    rewards[1] = 1e38
    groups[5] = replace(groups[5], rewards=rewards)
    train_matching(policy, make_tokenizer(), groups, settings, tmp_path, temperature=0.8)
    (step,) = [row["step"] for row in read_metrics(tmp_path) if row["skipped"]]
    (path,) = (tmp_path / "skipped").iterdir()
    assert path.name == f"step-{step:06d}.json"
    batch = read_json(path)
    assert (batch["step"], batch["not_finite"], batch["loss"], len(batch["groups"])) == (step, "loss", None, 4)
    assert [group["row"] for group in batch["groups"] if not group["finite"]] == [5]
    found = next(group for group in batch["groups"] if group["row"] == 5)
    assert found["loss"] == "inf"
    assert found["prompt_ids"] == groups[5].prompt_ids.tolist()
    assert found["prompt"] == " ".join(f"w{i}" for i in found["prompt_ids"])
    assert [c["token_ids"] for c in found["completions"]] == [ids.tolist() for ids in groups[5].completion_ids]
    assert [c["reward"] for c in found["completions"]] == rewards.tolist()
    assert groups[5].reference_logp is not None
    assert [c["reference_logprob"] for c in found["completions"]] == groups[5].reference_logp.tolist()
    assert found["completions"][0]["text"].startswith(f"w{int(groups[5].completion_ids[0][0])} ")
    said = " ".join(capsys.readouterr().err.split())
    assert f"step {step} is not taken: its loss is not finite (that of row 5 is not); see {tmp_path}" in said


def test_where_every_loss_is_finite_the_gradient_is_to_blame(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    poisoned_run(tmp_path, 3, [2], "gradient")
    batch = read_json(tmp_path / "skipped" / "step-000002.json")
    assert batch["not_finite"] == "gradient"
    assert batch["loss"] == pytest.approx(batch["groups"][0]["loss"])
    assert "its gradient is not finite (the loss of every row is)" in " ".join(capsys.readouterr().err.split())


RATE, DECAY = 1e-2, 1.01e4
LOWER = RATE / 100  # each matrix times 1 − LOWER · DECAY = −0.01
UNSTABLE: dict[str, Any] = {
    "schedule": "constant",
    "warmup_fraction": 0.0,
    "checkpoint_every": 1,
    "max_skipped_in_a_row": 3,
}


class Stopped(BaseException):
    pass


class DyingBatches(EpochBatches):
    dies_after: int | None = None

    def __getitem__(self, step: int) -> list[Group]:
        if step == self.dies_after:
            raise Stopped
        return super().__getitem__(step)


def diverging_run(folder: Path, *, dies_after: int | None = None, **changes: Any) -> None:
    """Decay multiplies each matrix by 1 − RATE · DECAY = −100 in every step: soon all overflows.

    A smaller factor would come by a step at which some rows overflow and others do not, as rounding decides.
    """
    settings = SFT(**{"learning_rate": RATE, "weight_decay": DECAY, "batch_prompts": 2} | UNSTABLE | changes)
    batches = DyingBatches(make_groups(64), batch_prompts=2, epochs=1, seed=0)
    batches.dies_after = dies_after
    train(MaximumLikelihood(batches), PackedPolicy(make_policy()), make_tokenizer(), settings, folder, card="card\n")


def recover(folder: Path, settings: SFT) -> None:
    """As a run does with --recover."""
    entry = next_recovery(folder, settings.step_sizes())
    assert entry is not None
    add_recovery(folder, entry)


def stopped_run(folder: Path) -> int:
    """It diverges and stops; the step of its last good checkpoint."""
    with pytest.raises(NotFiniteError) as stop:
        diverging_run(folder)
    rows = read_metrics(folder)
    last = rows[-1]["step"]
    assert [row["skipped"] for row in rows] == [0] * (last - 3) + [1] * 3
    good = last - 4  # three were skipped, and the step before them made the weights that they failed on
    assert f"and --recover goes on after step {good}, the last good checkpoint" in str(stop.value)
    return good


def test_a_training_that_diverged_goes_on_from_its_last_good_checkpoint_with_a_lower_rate(tmp_path: Path) -> None:
    good = stopped_run(tmp_path)
    before = read_metrics(tmp_path, without=TIMINGS)
    lower, other = LOWER, LOWER / 2
    with pytest.raises(InputError, match="other settings or data"):
        diverging_run(tmp_path, learning_rate=lower)
    with pytest.raises(InputError, match="stopped with these very settings, and would again; lower learning_rate or"):
        recover(tmp_path, SFT(learning_rate=RATE))
    recover(tmp_path, SFT(learning_rate=lower))
    for change in ({"learning_rate": other}, {"learning_rate": lower, "weight_decay": 1.0}):
        with pytest.raises(InputError, match="other settings or data"):  # than those that were asked for
            diverging_run(tmp_path, **change)
    diverging_run(tmp_path, learning_rate=lower)
    rows = read_metrics(tmp_path, without=TIMINGS)
    assert rows[:good] == before[:good]
    assert [row["step"] for row in rows] == list(range(1, 33))
    assert not any(row["skipped"] for row in rows)
    # The first step from there has the weights and the batch that it had, so the same loss, and another rate.
    assert rows[good]["loss"] == before[good]["loss"]
    assert [row["learning_rate"] for row in rows] == [RATE] * good + [lower] * (32 - good)
    assert [(e["after_step"], e["were"], e["settings"]) for e in recoveries(tmp_path)] == [
        (good, {"learning_rate": RATE, "max_grad_norm": 1.0}, {"learning_rate": lower, "max_grad_norm": 1.0})
    ]
    told = f"Training went on after step {good} with learning_rate {lower} (was {RATE}), because loss or gradient"
    assert told in (tmp_path / "model" / "README.md").read_text()
    assert next_recovery(tmp_path, SFT(learning_rate=lower).step_sizes()) is None


def test_a_recovered_training_that_is_interrupted_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    lower = {"learning_rate": LOWER}
    good = stopped_run(tmp_path / "whole")
    recover(tmp_path / "whole", SFT(**lower))
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    diverging_run(tmp_path / "whole", **lower)
    for dies_after in (good, good + 3):  # before and after the first checkpoint of its own
        with pytest.raises(Stopped):
            diverging_run(tmp_path / "parts", dies_after=dies_after, **lower)
    diverging_run(tmp_path / "parts", **lower)
    assert_same_outcome(tmp_path / "parts", tmp_path / "whole")


def test_where_no_good_checkpoint_is_left_a_recovery_starts_over(tmp_path: Path) -> None:
    with pytest.raises(NotFiniteError, match="--recover starts over"):
        diverging_run(tmp_path / "run", checkpoint_every=100)
    recover(tmp_path / "run", SFT(learning_rate=LOWER))
    for name in ("run", "new"):
        diverging_run(tmp_path / name, learning_rate=LOWER, checkpoint_every=100)
    assert_same_outcome(tmp_path / "run", tmp_path / "new")
    assert recoveries(tmp_path / "run") == []


@dataclass(frozen=True)
class CrampedTask:
    """A random loss on memory that holds `room` tokens at a time: an accelerator's error where there are more.

    It is raised late in the backward pass, which goes from the last term to the first: the others have their gradient.
    """

    batches: EpochBatches
    room: int

    def weight(self, groups: Sequence[Group]) -> float:
        return len(groups)

    def loss(self, model: nn.Module, groups: Sequence[Group]) -> tuple[Tensor, dict[str, Tensor]]:
        terms = [(torch.randn_like(parameter) * parameter).sum() for parameter in model.parameters()]
        if sum(group.num_tokens for group in groups) > self.room:
            terms[0].register_hook(_run_out)
        return torch.stack(terms).sum() * len(groups), {}


def _run_out(gradient: Tensor) -> None:
    raise torch.OutOfMemoryError("Tried to allocate more than there is.")


def cramped_run(folder: Path, *, room: int, token_budget: int) -> None:
    settings = TrainSettings(learning_rate=1e-2, batch_prompts=6, token_budget=token_budget)
    task = CrampedTask(EpochBatches(make_groups(24), batch_prompts=6, epochs=1, seed=0), room)
    train(task, PackedPolicy(make_policy()), make_tokenizer(), settings, folder, card="")


def test_out_of_memory_halves_the_token_budget_and_the_step_is_the_same(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Groups have 11 to 33 tokens, six are a step: of the budgets 160, 80, 40 only the last keeps below 60 tokens.

    The random numbers of the step begin anew as well, so all is bit for bit what the budget 40 gives from the start.
    """
    cramped_run(tmp_path / "halved", room=60, token_budget=160)
    said = " ".join(capsys.readouterr().err.split())
    cramped_run(tmp_path / "small", room=10**6, token_budget=40)
    assert_same_outcome(tmp_path / "halved", tmp_path / "small")
    assert [row["token_budget"] for row in read_metrics(tmp_path / "halved")] == [40] * 4
    for now, before in ((80, 160), (40, 80)):
        assert said.count(f"do not fit in memory; from step 1 on token_budget is {now} instead of {before}") == 1
    assert said.count("do not fit in memory") == 2


def test_a_single_prompt_that_does_not_fit_is_one_sentence_and_checkpoints_stay(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"^Row \d+ alone, \d+ tokens with all its completions, does not fit"):
        cramped_run(tmp_path, room=10, token_budget=4096)
    assert not read_metrics(tmp_path)


def test_other_errors_of_a_step_are_not_taken_for_it(tmp_path: Path) -> None:
    class Broken(CrampedTask):
        def loss(self, model: nn.Module, groups: Sequence[Group]) -> tuple[Tensor, dict[str, Tensor]]:
            raise RuntimeError("CUDA error: an illegal memory access was encountered")

    task = Broken(EpochBatches(make_groups(2), batch_prompts=2, epochs=1, seed=0), 0)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        train(task, PackedPolicy(make_policy()), make_tokenizer(), TrainSettings(), tmp_path, card="")


@dataclass(frozen=True)
class LargeTask(CrampedTask):
    """The same loss, after each of its tokens took a MB."""

    def loss(self, model: nn.Module, groups: Sequence[Group]) -> tuple[Tensor, dict[str, Tensor]]:
        taken = torch.ones(sum(group.num_tokens for group in groups), 2**18)
        return super().loss(model, groups)[0] * taken[0, 0], {}


def limited_run(folder: Path) -> None:
    """In a process of its own: what it has now and 200 MB more is all that it gets."""
    torch.set_num_threads(1)
    cramped_run(folder / "before", room=10**6, token_budget=512)  # whatever libraries load is there now
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + 200 * 2**20,) * 2)
    settings = TrainSettings(learning_rate=1e-2, batch_prompts=24, token_budget=512)
    task = LargeTask(EpochBatches(make_groups(24), batch_prompts=24, epochs=1, seed=0), 10**6)
    train(task, PackedPolicy(make_policy()), make_tokenizer(), settings, folder / "limited", card="")


def test_the_processors_memory_runs_out_too(tmp_path: Path, workers: ForkServerContext) -> None:
    """A real allocation that fails: 512 tokens would take 512 MB; 128 fit for certain, 256 do not."""
    process = workers.Process(target=limited_run, args=(tmp_path,))
    process.start()
    process.join()
    assert process.exitcode == 0
    assert [row["token_budget"] for row in read_metrics(tmp_path / "limited")] == [128]


def test_out_of_memory_on_one_of_two_processes_ends_both_with_a_sentence(
    tmp_path: Path, workers: ForkServerContext
) -> None:
    codes = finish(start(workers, "ddp", run_out_of_memory, tmp_path), seconds=60)
    assert 2 in codes and -9 not in codes, "they waited for one another"
    printed = "".join((tmp_path / f"printed-{rank}").read_text() for rank in range(2))
    assert printed.count("error: Out of memory in step 1: ") == 1
    assert "give the same command with a token_budget below 512, or gradient_checkpointing" in printed
