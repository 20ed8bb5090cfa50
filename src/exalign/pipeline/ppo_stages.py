"""The stages that train policies by PPO; their models stand beside those of the other methods, in align/METHOD."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import torch

from exalign.models.actor_critic import ActorCritic
from exalign.models.loading import ModelSettings, load_reward_model
from exalign.pipeline.recipe import PPOStageSettings, Recipe
from exalign.pipeline.run import Run, Stage, TrainingStage
from exalign.pipeline.sources import (
    data_identity,
    load_run_tokenizer,
    load_scorer,
    load_supervised,
    model_identity,
    prompts_of,
    ready,
    scorer_identity,
    scorer_needs,
    seeded,
    source_identity,
    supervised_needs,
    supervised_settings,
)
from exalign.training.ppo import Surroundings, train_ppo


def ppo_stages(recipe: Recipe) -> Iterator[Stage]:
    """A stage align/NAME for every entry of the recipe's ppo section."""
    data, scorer = recipe.data, recipe.score.scorer
    sampling = [recipe.sample.model_dump(exclude={"batch_completions"}), data.max_prompt_tokens]
    base = [recipe.seed, recipe.temperature, model_identity(recipe), sampling]
    for method, settings in recipe.ppo.items():
        needs = [*supervised_needs(recipe), *scorer_needs(scorer)]
        if data.prompts is None:
            needs.append("preferences")
        if settings.critic is None and _reward_model_can_start_a_critic(recipe):
            needs.append("reward")
        critic = None if settings.critic is None else source_identity(settings.critic.source)
        inputs = [base, settings.model_dump(mode="json"), critic, scorer_identity(scorer), data_identity(data.prompts)]
        work = partial(_ppo, method=method)
        yield TrainingStage(f"align/{method}", tuple(dict.fromkeys(needs)), lambda inputs=inputs: inputs, work)  # type: ignore[misc]


def _ppo(run: Run, folder: Path, counts: Counter[str], *, method: str) -> None:
    recipe = run.recipe
    settings = seeded(recipe.ppo[method], recipe)
    tokenizer = load_run_tokenizer(run)
    torch.manual_seed(settings.seed)
    policy = load_supervised(run, tokenizer, trainable=True)
    critic = load_reward_model(_critic(run, settings), tokenizer)
    world = Surroundings(
        prompts=prompts_of(run, counts),
        sampling=recipe.sample.model_copy(update={"max_prompt_tokens": recipe.data.max_prompt_tokens}),
        scorer=load_scorer(recipe.score.scorer, run),
        reference=ready(load_supervised(run, tokenizer)),
        temperature=recipe.temperature,
        counts=counts,
    )
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
