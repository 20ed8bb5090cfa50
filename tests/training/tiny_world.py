"""A world of a few words: random tiny models and groups whose rewards count one word. Imported by tests and workers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import PreTrainedTokenizerFast

from exalign.data.batching import Group
from exalign.data.record import Record
from exalign.methods.matching import Matching, train_matching, with_reference_logp
from exalign.methods.method import Material
from exalign.methods.ppo import PPO, train_ppo
from exalign.models.heads import ActorCritic
from exalign.models.loading import load_policy, load_reward_model
from exalign.models.model_settings import ModelSettings
from exalign.rollout.settings import SampleSettings

EOS = 0
GOOD_WORD = 5
VOCABULARY = 12
SIZES: dict[str, Any] = {"n_layer": 2, "n_embd": 16, "n_head": 2, "n_positions": 32}
# The dropout is asked for and must not happen.
CONFIG: dict[str, Any] = {"model_type": "gpt2", **SIZES, "attn_pdrop": 0.1, "resid_pdrop": 0.1, "embd_pdrop": 0.1}


def make_tokenizer() -> PreTrainedTokenizerFast:
    words = ["<eos>", "<unk>", *(f"w{i}" for i in range(2, VOCABULARY))]
    core = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<eos>", unk_token="<unk>", pad_token="<eos>")


def make_policy(seed: int = 0, *, settings: ModelSettings | None = None) -> nn.Module:
    torch.manual_seed(seed)
    return load_policy(settings or ModelSettings(config=CONFIG), make_tokenizer())


def by_formula(model: nn.Module) -> nn.Module:
    """Float64 weights that no library's initialisation decides: waves of height 0.1 along each tensor, norms around 1.

    Golden traces start from them: in float32 some steps of Adam make the rounding of another machine visible.
    """
    model.double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            wave = torch.sin(torch.arange(parameter.numel(), dtype=torch.float64) * 12.9898).view(parameter.shape) / 10
            parameter.copy_(1 + wave if "ln" in name and name.endswith("weight") else wave)
    return model


def make_groups(count: int, *, num_completions: int = 4, seed: int = 0) -> list[Group]:
    """Ragged prompts and completions of random words; the reward of a completion is the share of the good word."""
    generator = torch.Generator().manual_seed(seed)

    def words(low: int, high: int) -> torch.Tensor:
        length = int(torch.randint(low, high, (), generator=generator))
        return torch.randint(2, VOCABULARY, (length,), generator=generator)

    groups = []
    for index in range(count):
        k = num_completions - (index % 2 if num_completions > 2 else 0)  # ragged K
        completions = tuple(torch.cat([words(2, 7), torch.tensor([EOS])]) for _ in range(k))
        rewards = torch.stack([(ids == GOOD_WORD).float().mean() for ids in completions])
        rewards = rewards + 0.01 * torch.arange(k)  # no ties
        groups.append(Group(index, words(2, 6), completions, rewards, preferred=int(rewards.argmax())))
    return groups


def read_metrics(folder: Path, *, without: tuple[str, ...] = ()) -> list[dict[str, Any]]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name not in without} for row in rows]


TIMINGS = ("seconds", "drawing_seconds", "scoring_seconds", "tokens_per_second", "token_budget")
"""What the clock and the memory decide."""


def small_align_run(folder: Path, *, token_budget: int = 512) -> nn.Module:
    """Twelve steps of EXO from a fixed start, with checkpoints at odd places. A worker may be killed anywhere in it."""
    torch.set_num_threads(1)
    settings = Matching(
        learning_rate=1e-3,
        batch_prompts=3,
        epochs=4,
        warmup_fraction=0.2,
        checkpoint_every=2,
        save_policies=3,
        token_budget=token_budget,
    )
    policy = make_policy()
    groups = with_reference_logp(policy, make_groups(8), settings, temperature=0.8)
    train_matching(policy, make_tokenizer(), groups, settings, folder, temperature=0.8)
    return policy


class GoodWords:
    """Rewards a completion by the share of the good word among its tokens and its longest length, 8."""

    def score(self, records: Sequence[Record]) -> list[list[float]]:
        return [[(c.token_ids or ()).count(GOOD_WORD) / 8 for c in record.completions] for record in records]


def make_prompts(count: int) -> list[Record]:
    generator = torch.Generator().manual_seed(0)
    words = torch.randint(2, VOCABULARY, (count, 3), generator=generator).tolist()
    return [Record(str(i), " ".join(f"w{word}" for word in row)) for i, row in enumerate(words)]


def make_actor_critic(*, settings: ModelSettings | None = None) -> ActorCritic:
    policy = make_policy(settings=settings)
    return ActorCritic(policy, load_reward_model(ModelSettings(config=CONFIG), make_tokenizer()))


def make_material(policy: Any, *, count: int = 8, **changes: Any) -> Material:
    """With the policy of `make_policy()` as reference, prompts of three words, four completions each."""
    found = Material(
        policy,
        make_tokenizer(),
        temperature=0.8,
        prompts=make_prompts(count),
        sampling=SampleSettings(num_completions=4, max_new_tokens=8, max_prompt_tokens=8, engine="exalign"),
        scorer=GoodWords(),
        reference=make_policy().eval(),  # type: ignore[arg-type]  # a model is a module
    )
    return replace(found, **changes)


def small_ppo_run(folder: Path, **changes: Any) -> ActorCritic:
    """Four rollouts of four steps, in the first six of which the critic is alone. A worker may be killed in it."""
    torch.set_num_threads(1)
    chosen = {"learning_rate": 1e-2, "critic_learning_rate": 2e-2, "critic_steps": 6, "value_clip": 0.05}
    chosen |= {"rollout_prompts": 4, "batch_prompts": 2, "passes": 2, "epochs": 2, "checkpoint_every": 3}
    module = make_actor_critic()
    settings = PPO(**({"save_policies": 4} | chosen | changes))
    run_ppo(module, settings, folder)
    return module


def run_ppo(module: ActorCritic, settings: PPO, folder: Path, **changes: Any) -> Material:
    """What it was trained with, by then with its counts."""
    material = make_material(module.model, **changes)
    train_ppo(module, material, settings, folder)
    return material


def outcome(folder: Path) -> tuple[dict[str, dict[str, Tensor]], list[dict[str, Any]]]:
    """Every weight that a run wrote, and its metrics without the clock."""
    models = sorted([folder / "model", *(folder / "policies").iterdir()])
    weights = {path.name: load_file(path / "model.safetensors") for path in models}
    return weights, read_metrics(folder, without=TIMINGS)


def assert_same_outcome(folder: Path, other: Path) -> None:
    (weights, metrics), (other_weights, other_metrics) = outcome(folder), outcome(other)
    assert metrics == other_metrics
    assert weights.keys() == other_weights.keys()
    for name, tensors in weights.items():
        assert tensors.keys() == other_weights[name].keys()
        assert all(torch.equal(tensor, other_weights[name][key]) for key, tensor in tensors.items())


def small_fresh_run(folder: Path, **changes: Any) -> nn.Module:
    """Two rollouts of four prompts, each seen twice in steps of two. A worker may be killed in it."""
    torch.set_num_threads(1)
    chosen: dict[str, Any] = {"learning_rate": 1e-2, "batch_prompts": 2, "fresh_every": 4, "passes": 2}
    settings = Matching(**(chosen | {"beta_pi": 0.5, "checkpoint_every": 3, "save_policies": 8} | changes))
    policy: Any = make_policy()
    settings.train(make_material(policy), folder)
    return policy
