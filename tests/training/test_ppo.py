"""PPO: what it does to a policy, what its log says, and that it starts again where it was."""

from __future__ import annotations

import json
import random
import signal
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from multiprocessing.context import ForkServerContext
from pathlib import Path
from statistics import pstdev
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import nn

from exalign.data.record import Record
from exalign.errors import InputError
from exalign.methods.on_policy import plan_of
from exalign.methods.ppo import PPO, PPOTask
from exalign.models.model_settings import LoraSettings, ModelSettings
from exalign.rollout.sampler import GroupedSampler
from exalign.rollout.settings import SampleSettings
from exalign.training.batches import RolloutBatches, RolloutPlan
from training.tiny_world import (
    CONFIG,
    GoodWords,
    assert_same_outcome,
    by_formula,
    make_actor_critic,
    make_material,
    make_policy,
    make_prompts,
    make_tokenizer,
    read_metrics,
    run_ppo,
    small_ppo_run,
)

GOLDEN = Path(__file__).with_name("golden_ppo.json")


def rewards_of_fresh_samples(policy: Any) -> torch.Tensor:
    """32 samples for each of 16 prompts, `[16]` means over the samples of a prompt."""
    sampler = GroupedSampler(
        policy,
        make_tokenizer(),
        SampleSettings(num_completions=32, max_new_tokens=8, max_prompt_tokens=8, batch_completions=512),
        temperature=0.8,
        seed=99,
    )
    return torch.tensor(GoodWords().score(list(sampler.sample(make_prompts(16))))).mean(dim=1)


@pytest.mark.parametrize("seed", [0, 1])
def test_the_reward_of_fresh_samples_rises_by_more_than_chance(seed: int, tmp_path: Path) -> None:
    """Five standard errors of the difference, paired by prompt, and at least half of what it was at the start."""
    module = make_actor_critic()
    before = rewards_of_fresh_samples(module.model)
    settings = PPO(
        learning_rate=3e-3,
        critic_learning_rate=1e-2,
        rollout_prompts=16,
        batch_prompts=8,
        passes=2,
        epochs=8,
        critic_steps=4,
        seed=seed,
    )
    run_ppo(module, settings, tmp_path, count=16)
    gain = rewards_of_fresh_samples(module.model) - before
    assert float(gain.mean()) > 5 * float(gain.std()) / len(gain) ** 0.5
    assert float(gain.mean()) > 0.5 * float(before.mean())
    rows = read_metrics(tmp_path)
    assert rows[-1]["kl"] > 0
    assert rows[-1]["reward"] > rows[0]["reward"]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_before_the_policy_moves_every_ratio_is_one(precision: str, tmp_path: Path) -> None:
    """Over a whole rollout the loss is then minus the mean of whitened advantages, which is 0; so is the KL."""
    settings = PPO(rollout_prompts=8, batch_prompts=8, precision=precision, token_budget=10**6)
    counts = run_ppo(make_actor_critic(), settings, tmp_path).counts
    row = read_metrics(tmp_path)[0]
    assert row["policy_loss"] == pytest.approx(0, abs=1e-6)
    assert row["kl"] == pytest.approx(0, abs=1e-5)
    assert row["clip_fraction"] == 0
    assert row["loss"] == pytest.approx(row["value_loss"], abs=1e-6)
    assert counts["completions"] == 8 * 4
    assert row["completion_tokens"] == pytest.approx(counts["completion_tokens"] / 32)


def test_metrics_of_a_rollout_by_hand() -> None:
    """With λ = 1 the returns are the rewards to come less β times the log-ratios to come, whatever the critic."""
    module = make_actor_critic()
    world = make_material(module.model)
    with torch.no_grad():
        for parameter in module.model.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    settings = PPO(rollout_prompts=8, batch_prompts=8, beta=0.5, lam=1.0, token_budget=20, value_clip=100.0)
    task = PPOTask(module, world, settings)
    groups = task.batches[0]
    total, count, log_ratio, square, rewards = 0.0, 0, 0.0, 0.0, []
    with torch.no_grad():
        for group in groups:
            for ids in group.completion_ids:
                path = torch.cat([group.prompt_ids, ids])[None]
                start = len(group.prompt_ids) - 1

                def logp(model: nn.Module, path: torch.Tensor = path, start: int = start) -> torch.Tensor:
                    logits = model(input_ids=path).logits[0, :-1] / world.temperature
                    return logits.log_softmax(-1).gather(1, path[0, 1:, None])[start:, 0]

                ratios = logp(module.model) - logp(world.reference)
                reward = ids.tolist().count(5) / 8
                hidden = module.critic.base_model(input_ids=path).last_hidden_state
                values = module.critic.score(hidden)[0, start:-1, 0]
                returns = reward - 0.5 * ratios.flip(0).cumsum(0).flip(0)
                square += float((values - returns).square().sum()) / 2
                rewards.append(reward)
                total, count, log_ratio = total + reward, count + len(ids), log_ratio + float(ratios.sum())
    loss, metrics = task.loss(module, groups)
    weight = task.weight(groups)
    assert weight == count
    assert task.numbers["reward"] == pytest.approx(total / 32, rel=1e-5)
    assert task.numbers["kl"] == pytest.approx(log_ratio / 32, rel=1e-4)
    assert task.numbers["value_clip"] == pytest.approx(100 * pstdev(rewards), rel=1e-5)
    assert float(metrics["value_loss"]) == pytest.approx(square, rel=1e-4)
    assert float(loss.detach()) == pytest.approx(float(metrics["policy_loss"] + metrics["value_loss"]), rel=1e-6)


def test_a_row_of_weight_0_is_not_trained_on() -> None:
    """Of a rollout of eight, four of which weigh nothing, the sums are those of the other four alone."""
    module = make_actor_critic()
    task = PPOTask(module, make_material(module.model), PPO(rollout_prompts=8, batch_prompts=8))
    groups = task.batches[0]
    halved = [replace(group, weight=float(place < 4)) for place, group in enumerate(groups)]
    (loss, seen), (expected, told) = task.loss(module, halved), task.loss(module, groups[:4])
    assert task.weight(halved) == task.weight(groups[:4])
    assert float(loss.detach()) == pytest.approx(float(expected.detach()), rel=1e-5)
    assert {n: float(v) for n, v in seen.items()} == pytest.approx({n: float(v) for n, v in told.items()}, rel=1e-5)


def test_the_micro_batch_split_changes_nothing(tmp_path: Path) -> None:
    rows = {}
    for token_budget in (1, 10**6):
        small_ppo_run(tmp_path / str(token_budget), token_budget=token_budget, learning_rate=1e-3)
        rows[token_budget] = read_metrics(tmp_path / str(token_budget))[:8]
    for row, other in zip(*rows.values(), strict=True):
        for name in ("loss", "value_loss", "policy_loss", "grad_norm", "reward", "kl"):
            assert row[name] == pytest.approx(other[name], rel=1e-3, abs=1e-5)


def test_while_the_critic_is_alone_the_policy_keeps_every_bit(tmp_path: Path) -> None:
    small_ppo_run(tmp_path / "whole", save_policies=16, weight_decay=0.1)
    first = min((tmp_path / "whole" / "policies").iterdir())
    assert first.name == "step-000007"  # none while it stands
    rows = read_metrics(tmp_path / "whole")
    assert rows[5]["loss"] == rows[5]["value_loss"] and rows[6]["loss"] != rows[6]["value_loss"]
    start, module = make_actor_critic(), make_actor_critic()
    settings = PPO(
        learning_rate=1e-2, critic_learning_rate=2e-2, critic_steps=15, weight_decay=0.1, rollout_prompts=4,
        batch_prompts=2, passes=2, epochs=2,
    )  # fmt: skip
    with pytest.raises(Stopped):  # after twelve steps
        run_ppo(module, settings, tmp_path / "alone", scorer=DyingScorer(3))
    before = start.model.state_dict()
    assert all(torch.equal(tensor, before[name]) for name, tensor in module.model.state_dict().items())
    moved = load_file(first / "model.safetensors")
    assert not all(torch.equal(tensor, before[name]) for name, tensor in moved.items())
    critic = start.critic.state_dict()
    assert not any(torch.equal(p, critic[name]) for name, p in module.critic.named_parameters() if p.ndim > 1)


def test_only_adapters_and_the_critic_are_trained_under_lora(tmp_path: Path) -> None:
    module = make_actor_critic(settings=ModelSettings(config=CONFIG, lora=LoraSettings(rank=2)))
    before = {name: parameter.clone() for name, parameter in module.model.named_parameters()}
    settings = PPO(learning_rate=1e-2, rollout_prompts=8, batch_prompts=4, gradient_checkpointing=True)
    run_ppo(module, settings, tmp_path)
    changed = {name for name, parameter in module.model.named_parameters() if not torch.equal(parameter, before[name])}
    assert changed == {name for name, parameter in module.model.named_parameters() if parameter.requires_grad}


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("undisturbed") / "ppo"
    small_ppo_run(folder)
    return folder


@pytest.mark.parametrize(
    "change",
    [
        {"critic_learning_rate": 1e-3},
        {"critic_steps": 7},
        {"beta": 1.0},
        {"target_kl": 0.01},
        {"gamma": 0.5},
        {"lam": 0.2},
        {"clip": 0.01},
        {"value_clip": 0.01},
        {"rollout_prompts": 8},
        {"passes": 1},
        {"seed": 1},
    ],
    ids=lambda change: next(iter(change)),
)
def test_every_setting_acts(change: dict[str, object], undisturbed: Path, tmp_path: Path) -> None:
    small_ppo_run(tmp_path, save_policies=1, **change)
    weights, others = (load_file(folder / "model" / "model.safetensors") for folder in (tmp_path, undisturbed))
    assert not torch.equal(weights["transformer.wte.weight"], others["transformer.wte.weight"])


def test_killed_at_random_moments_and_restarted_ends_the_same(
    undisturbed: Path, tmp_path: Path, workers: ForkServerContext
) -> None:
    folder = tmp_path / "ppo"
    log, moments, hits = folder / "metrics.jsonl", random.Random(), 0
    for rows in sorted(moments.sample(range(1, 15), 3)):
        process = workers.Process(target=small_ppo_run, args=(folder,))
        process.start()
        while process.is_alive() and (not log.exists() or log.read_text().count("\n") < rows):
            time.sleep(0.001)
        time.sleep(moments.uniform(0.0, 0.02))
        process.kill()
        process.join()
        hits += process.exitcode == -signal.SIGKILL
    small_ppo_run(folder)
    assert hits >= 1, "no kill hit the run: nothing was tested"
    assert_same_outcome(folder, undisturbed)


class Stopped(BaseException):
    pass


@dataclass
class DyingScorer:
    """Dies when it is called for the `calls`-th time (from 0)."""

    calls: int

    def score(self, records: Sequence[Record]) -> list[list[float]]:
        self.calls -= 1
        if self.calls < 0:
            raise Stopped
        return GoodWords().score(records)


@pytest.mark.parametrize("rollouts", [1, 3])
def test_a_rollout_is_drawn_again_from_the_weights_it_was_drawn_from(
    rollouts: int, undisturbed: Path, tmp_path: Path
) -> None:
    """Interrupted while the critic is alone, and after the policy has moved: checkpoints stand between rollouts."""
    settings = PPO(
        learning_rate=1e-2, critic_learning_rate=2e-2, critic_steps=6, value_clip=0.05, rollout_prompts=4,
        batch_prompts=2, passes=2, epochs=2, checkpoint_every=3, save_policies=4,
    )  # fmt: skip
    folder = tmp_path / "ppo"
    with pytest.raises(Stopped):
        run_ppo(make_actor_critic(), settings, folder, scorer=DyingScorer(rollouts))
    assert (folder / "checkpoints" / f"step-{4 * rollouts:06d}").is_dir()
    torch.manual_seed(5)
    small_ppo_run(folder)
    assert_same_outcome(folder, undisturbed)


def test_an_adapted_coefficient_survives_an_interruption_bit_for_bit(tmp_path: Path) -> None:
    """Four rollouts; the policy first moves in the second, so β changes after the third."""
    target = {"target_kl": 0.01, "kl_rate": 2.0}
    small_ppo_run(tmp_path / "undisturbed", **target)
    rows = read_metrics(tmp_path / "undisturbed")
    by_rollout = [rows[step]["beta"] for step in (0, 4, 8, 12)]
    assert by_rollout[:3] == pytest.approx([0.1] * 3)
    error = min(max(rows[8]["kl"] / 0.01 - 1, -0.2), 0.2)
    assert error != 0 and by_rollout[3] == pytest.approx(0.1 * (1 + 2.0 * error))
    settings = PPO(
        learning_rate=1e-2, critic_learning_rate=2e-2, critic_steps=6, value_clip=0.05, rollout_prompts=4,
        batch_prompts=2, passes=2, epochs=2, checkpoint_every=3, save_policies=4, **target,
    )  # fmt: skip
    folder = tmp_path / "ppo"
    with pytest.raises(Stopped):
        run_ppo(make_actor_critic(), settings, folder, scorer=DyingScorer(3))
    small_ppo_run(folder, **target)
    assert_same_outcome(folder, tmp_path / "undisturbed")


def test_the_kl_ends_nearer_the_target_than_under_a_fixed_coefficient(tmp_path: Path) -> None:
    """From a β that lets the policy go much too far, and further still in the 22 rollouts that β has more to swing in;
    the mean over the last 8, as it swings a little then too."""
    target, distance = 1.0, {}
    adapted: dict[str, Any] = {"target_kl": target, "kl_rate": 0.5}
    for name, changes in (("fixed", {"epochs": 22}), ("adapted", {"epochs": 44, **adapted})):
        settings = PPO(
            learning_rate=2e-3, critic_learning_rate=1e-2, schedule="constant", beta=0.05, rollout_prompts=16,
            batch_prompts=8, passes=1, **changes,
        )  # fmt: skip
        run_ppo(make_actor_critic(), settings, tmp_path / name, count=16)
        kls = [row["kl"] for row in read_metrics(tmp_path / name)[::2]]
        assert len(kls) == settings.epochs
        distance[name] = abs(sum(kls[-8:]) / 8 - target)
    assert distance["adapted"] < distance["fixed"] / 4


def test_a_finished_run_started_again_restores_policy_and_critic(undisturbed: Path) -> None:
    again, other = small_ppo_run(undisturbed), small_ppo_run(undisturbed)
    saved = load_file(undisturbed / "model" / "model.safetensors")
    assert all(torch.equal(tensor, again.model.state_dict()[name]) for name, tensor in saved.items())
    assert all(torch.equal(p, q) for p, q in zip(again.critic.parameters(), other.critic.parameters(), strict=True))


def test_every_prompt_is_sampled_once_per_epoch_and_trained_on_once_per_pass() -> None:
    plan = RolloutPlan(rollout_prompts=6, batch_prompts=4, passes=3, epochs=2, seed=1)
    seen: Counter[tuple[int, int]] = Counter()
    drawn: list[str] = []

    def draw(records: list[Record], number: int) -> list[Any]:
        drawn.extend(record.id for record in records)
        return [(number, index) for index in range(len(records))]

    batches = RolloutBatches(make_prompts(7), plan, draw)
    for step in range(len(batches)):
        batch = batches[step]
        assert 1 <= len(batch) <= 4
        seen.update(batch)  # type: ignore[arg-type]
    assert sorted(drawn) == sorted(f"{i}@{epoch}" for i in range(7) for epoch in range(2))
    assert set(seen.values()) == {3} and len(seen) == 14
    assert len(batches) == 3 * (2 + 2 + 1)
    with pytest.raises(IndexError):
        batches[len(batches)]
    assert batches.fingerprint == RolloutBatches(make_prompts(7), plan, draw).fingerprint
    assert batches.fingerprint != RolloutBatches(make_prompts(6), plan, draw).fingerprint
    assert batches.fingerprint != RolloutBatches(make_prompts(7), plan, draw, sampled_how="else").fingerprint


def test_checkpoints_are_placed_between_rollouts() -> None:
    plan = plan_of(PPO(rollout_prompts=5, batch_prompts=2, passes=2))
    assert plan.steps_per_rollout == 6
    assert [plan.whole_rollouts(steps) for steps in (1, 6, 7)] == [6, 6, 12]


def test_what_cannot_work_is_refused(tmp_path: Path) -> None:
    def run(**changes: Any) -> None:
        run_ppo(make_actor_critic(), PPO(), tmp_path / "run", **changes)

    with pytest.raises(InputError, match="remove sample"):
        run(sampling=SampleSettings(top_p=0.9))
    with pytest.raises(InputError, match="no prompt was left"):
        run(prompts=[])
    assert not (tmp_path / "run").exists()


def test_golden_trace(tmp_path: Path) -> None:
    """A refactor reproduces these losses. To change them on purpose, write the new ones here and say why."""
    module, reference = make_actor_critic(), make_policy().eval()
    for part in (module.model, module.critic, reference):
        by_formula(part)
    settings = PPO(
        learning_rate=1e-3, critic_learning_rate=2e-3, rollout_prompts=4, batch_prompts=2, passes=2, critic_steps=2
    )
    run_ppo(module, settings, tmp_path, reference=reference)
    rows, expected = read_metrics(tmp_path), json.loads(GOLDEN.read_text())
    for name in ("loss", "reward", "kl", "grad_norm"):
        assert [row[name] for row in rows] == pytest.approx(expected[name], rel=1e-6, abs=1e-7)
