"""The stages that train policies by PPO; their models stand beside those of the other methods, in align/METHOD."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import torch

from exalign.methods.ppo import train_ppo
from exalign.models.heads import ActorCritic
from exalign.models.loading import load_reward_model
from exalign.models.model_settings import ModelSettings
from exalign.run.on_policy import on_policy_inputs, on_policy_needs, surroundings
from exalign.run.recipe import PPOStageSettings, Recipe
from exalign.run.runner import Run, Stage
from exalign.run.search import method_stages
from exalign.run.sources import (
    load_run_tokenizer,
    load_supervised,
    source_identity,
    supervised_settings,
)


def ppo_stages(recipe: Recipe) -> Iterator[Stage]:
    """A stage align/NAME for every entry of the recipe's ppo section, after its search where it has one."""
    for method, settings in recipe.ppo.items():
        needs = list(on_policy_needs(recipe))
        if settings.critic is None and _reward_model_can_start_a_critic(recipe):
            needs.append("reward")
        critic = None if settings.critic is None else source_identity(settings.critic.source)
        inputs = on_policy_inputs(recipe)
        yield from method_stages(recipe, method, tuple(dict.fromkeys(needs)), inputs, _ppo, critic)


def _ppo(run: Run, folder: Path, counts: Counter[str], settings: PPOStageSettings) -> None:
    tokenizer = load_run_tokenizer(run)
    torch.manual_seed(settings.seed)
    policy = load_supervised(run, tokenizer, trainable=True)
    critic = load_reward_model(_critic(run, settings), tokenizer)
    world = surroundings(run, tokenizer, counts)
    train_ppo(ActorCritic(policy, critic), tokenizer, world, settings, folder)


def _critic(run: Run, settings: PPOStageSettings) -> ModelSettings:
    if settings.critic is not None:
        return settings.critic
    started = supervised_settings(run)
    if not _reward_model_can_start_a_critic(run.recipe):
        return started
    return started.model_copy(update={"source": str(run.path("reward", "model")), "config": None})


def _reward_model_can_start_a_critic(recipe: Recipe) -> bool:
    """A critic reads the policy's tokens, as a reward model does that started from the supervised policy."""
    return recipe.reward is not None and recipe.reward.model is None
