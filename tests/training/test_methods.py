"""Every method on the offline world: it raises the oracle's reward of fresh samples on prompts it was not trained on.

The margin comes from the seeds: the gain's lower 95 % bound over independent trainings must be above 0.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import t as student
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from exalign.data.batching import Group, group_of
from exalign.data.reading import DataSettings, read_source
from exalign.data.record import Record, pairs_from_rewards
from exalign.data.synthetic import write_world
from exalign.data.tokenization import TokenLimits, tokenize_records
from exalign.evaluation.pool import expected_best
from exalign.methods.grpo import GRPO
from exalign.methods.matching import DIVERGENCES, Matching, train_matching, with_reference_logp
from exalign.methods.method import Material, Method
from exalign.methods.ppo import PPO, train_ppo
from exalign.methods.rloo import RLOO
from exalign.methods.sft import SFT, train_sft
from exalign.models.heads import ActorCritic
from exalign.models.loading import load_policy, load_reward_model, load_tokenizer
from exalign.models.model_settings import ModelSettings
from exalign.rollout.sampler import GroupedSampler
from exalign.rollout.scorers import FunctionScorer
from exalign.rollout.settings import SampleSettings

SEEDS = range(3)
MORE_SEEDS = range(4)
"""Of the large tests."""
CONFIG = {"model_type": "gpt2", "n_layer": 1, "n_embd": 48, "n_head": 2, "n_positions": 96}
SAMPLING = SampleSettings(num_completions=4, max_new_tokens=48, max_prompt_tokens=24, batch_completions=256)
STEPS: dict[str, Any] = {"learning_rate": 1e-3, "batch_prompts": 16, "epochs": 2}
OFFLINE = [f"{divergence} to {target}" for divergence in sorted(DIVERGENCES) for target in ("reward", "preference")]
LARGE = {name for name in OFFLINE if name not in ("reverse_kl to reward", "forward_kl to preference")}
LARGE |= {"EXO-rw on-policy", "DPO-rw on-policy", "EXO-pref on own pairs", "DPO-pref on own pairs", "GSPO"}
"""Near kin of the others, whose losses, gradients and golden traces have tests of their own."""

OWN: dict[str, tuple[type[Method], dict[str, Any]]] = {
    "EXO-rw in rounds": (Matching, {"fresh_every": 3, "beta_pi": 0.3, "beta_r": 0.3}),
    "EXO-rw on-policy": (Matching, {"fresh_every": 1, "beta_r": 0.3}),
    "DPO-rw on-policy": (Matching, {"fresh_every": 1, "beta_r": 0.3, "divergence": "forward_kl"}),
    "EXO-pref on own pairs": (Matching, {"fresh_every": 2, "target": "preference", "epsilon": 0.05, "epochs": 4}),
    "DPO-pref on own pairs": (
        Matching,
        {"fresh_every": 2, "target": "preference", "epsilon": 0.05, "epochs": 4, "divergence": "forward_kl"},
    ),
    "RLOO": (RLOO, {}),
    "GRPO": (GRPO, {"fresh_every": 2, "passes": 2}),
    "GSPO": (GRPO, {"ratio": "sequence", "clip": 3e-2}),
}


@dataclass(frozen=True, eq=False)
class World:
    supervised: Path
    tokenizer: PreTrainedTokenizerBase
    prompts: list[Record]
    more_prompts: list[Record]
    held_out: list[Record]

    def policy(self) -> PreTrainedModel:
        return load_policy(ModelSettings(source=str(self.supervised)), self.tokenizer)

    def samples(self, policy: PreTrainedModel, prompts: list[Record], seed: int) -> list[Record]:
        """Fresh samples with the oracle's rewards."""
        sampler = GroupedSampler(policy.eval(), self.tokenizer, SAMPLING, temperature=1.0, seed=seed)
        drawn = list(sampler.sample(prompts))
        return [record.with_rewards(row) for record, row in zip(drawn, self.scorer.score(drawn), strict=True)]

    @cache  # noqa: B019 - one world per module
    def supervised_samples(self, of: str, seed: int) -> list[Record]:
        """Of π_sft, the same for every method."""
        return self.samples(self.policy(), getattr(self, of), seed)

    @property
    def scorer(self) -> FunctionScorer:
        return FunctionScorer("exalign.data.synthetic:reward")


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> World:
    folder = tmp_path_factory.mktemp("offline")
    write_world(folder, num_sft=1500, num_prompts=256, num_test=64)
    tokenizer = load_tokenizer(str(folder / "tokenizer"))

    def records(name: str) -> list[Record]:
        return list(read_source(DataSettings(source=str(folder / name)), Counter()))

    groups = list(
        tokenize_records(
            records("sft.jsonl"),
            tokenizer,
            limits=TokenLimits(max_prompt_tokens=24, max_completion_tokens=56),
            counts=Counter(),
        )
    )
    torch.manual_seed(0)
    model = load_policy(ModelSettings(config=CONFIG), tokenizer)
    settings = SFT(learning_rate=5e-3, batch_prompts=32, epochs=3)
    path = train_sft(model, tokenizer, groups, settings, folder / "sft")
    bare = [Record(record.id, record.prompt) for record in records("test.jsonl")]
    prompts = records("prompts.jsonl")
    return World(path, tokenizer, prompts[:64], prompts, bare)


def aligned_offline(world: World, method: str, seed: int, folder: Path) -> PreTrainedModel:
    """On samples of π_sft: with their rewards, or with the order of each two, which says less: of more prompts."""
    divergence, target = method.split(" to ")
    how: dict[str, Any] = {"divergence": divergence, "target": target}
    settings = Matching(**STEPS, **how, beta_pi=0.5, beta_r=0.3, epsilon=0.05, seed=seed)
    policy = world.policy()
    drawn = world.supervised_samples("prompts" if target == "reward" else "more_prompts", seed)
    if target == "preference":
        drawn = list(pairs_from_rewards(drawn, Counter()))
    groups: list[Group] = [group_of(record, index) for index, record in enumerate(drawn)]
    groups = with_reference_logp(policy, groups, settings, temperature=1.0)
    train_matching(policy, world.tokenizer, groups, settings, folder, temperature=1.0)
    return policy


def aligned_on_policy(world: World, method: str, seed: int, folder: Path) -> PreTrainedModel:
    policy = world.policy()
    material = Material(
        policy,
        world.tokenizer,
        temperature=1.0,
        prompts=world.prompts,
        sampling=SAMPLING,
        scorer=world.scorer,
        reference=world.policy().eval(),
    )
    if method in OWN:
        kind, settings = OWN[method]
        kind(**(STEPS | settings), seed=seed).train(material, folder)
        return policy
    torch.manual_seed(seed)
    critic = load_reward_model(ModelSettings(source=str(world.supervised)), world.tokenizer)
    ppo = PPO(**STEPS, critic_learning_rate=5e-3, rollout_prompts=32, passes=2, critic_steps=2, seed=seed)
    train_ppo(ActorCritic(policy, critic), material, ppo, folder)
    return policy


def lower_bound(values: list[float]) -> float:
    """Of the mean over the seeds, 95 %, two-sided (Student's t)."""
    spread = np.std(values, ddof=1) / np.sqrt(len(values))
    return float(np.mean(values) - student.ppf(0.975, len(values) - 1) * spread)


def mean_reward(records: list[Record]) -> float:
    return float(np.mean([record.rewards for record in records]))


@pytest.mark.parametrize(
    "method",
    [pytest.param(name, marks=[pytest.mark.large] * (name in LARGE)) for name in (*OFFLINE, *OWN, "ppo")],
)
def test_every_method_raises_the_oracles_reward_of_fresh_samples(method: str, world: World, tmp_path: Path) -> None:
    gains = []
    for seed in MORE_SEEDS if method in LARGE else SEEDS:
        align = aligned_offline if method in OFFLINE else aligned_on_policy
        before = mean_reward(world.supervised_samples("held_out", 100 + seed))
        policy = align(world, method, seed, tmp_path / str(seed))
        gains.append(mean_reward(world.samples(policy, world.held_out, 200 + seed)) - before)
    assert lower_bound(gains) > 0, f"{method}: gains {gains}"


def test_the_best_of_n_has_more_reward_the_larger_n(world: World) -> None:
    for fewer, more in ((1, 2), (2, 4)):
        gains = []
        for seed in SEEDS:
            rewards = [record.rewards or [] for record in world.supervised_samples("held_out", 100 + seed)]
            gains.append(float(np.mean([expected_best(row, more) - expected_best(row, fewer) for row in rewards])))
        assert lower_bound(gains) > 0
