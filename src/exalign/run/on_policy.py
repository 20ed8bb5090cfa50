"""What methods need that sample while they train, PPO and alignment in rounds; and the stages of the latter."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedTokenizerBase

from exalign.methods.ppo import Surroundings
from exalign.methods.rounds import train_rounds
from exalign.run.recipe import Recipe
from exalign.run.runner import Run, Stage
from exalign.run.search import method_stages
from exalign.run.sources import (
    data_identity,
    load_run_tokenizer,
    load_scorer,
    load_supervised,
    model_identity,
    prompts_of,
    ready,
    scorer_identity,
    scorer_needs,
    supervised_needs,
)
from exalign.training.settings import AlignSettings


def rounds_stages(recipe: Recipe) -> Iterator[Stage]:
    """A stage align/NAME for every method of the align section with several rounds, after its search if it has one."""
    for method, settings in recipe.align.items():
        if settings.rounds > 1:
            yield from method_stages(recipe, method, on_policy_needs(recipe), on_policy_inputs(recipe), _rounds)


def on_policy_needs(recipe: Recipe) -> tuple[str, ...]:
    """The stages before sampling and scoring: those of π_sft, of the scorer, and of the prompts."""
    prompts = () if recipe.data.prompts is not None else ("preferences",)
    return tuple(dict.fromkeys((*supervised_needs(recipe), *scorer_needs(recipe.score.scorer), *prompts)))


def on_policy_inputs(recipe: Recipe) -> list[Any]:
    """What the samples and their rewards depend on, besides the policy."""
    sampling = [recipe.sample.model_dump(exclude={"batch_completions"}), recipe.data.max_prompt_tokens]
    base = [recipe.seed, recipe.temperature, model_identity(recipe), sampling]
    return [base, scorer_identity(recipe.score.scorer), data_identity(recipe.data.prompts)]


def surroundings(run: Run, tokenizer: PreTrainedTokenizerBase, counts: Counter[str]) -> Surroundings:
    """The run's prompts, how they are sampled and scored, and π_sft."""
    recipe = run.recipe
    return Surroundings(
        prompts=prompts_of(run, counts),
        sampling=recipe.sample.model_copy(update={"max_prompt_tokens": recipe.data.max_prompt_tokens}),
        scorer=load_scorer(recipe.score.scorer, run),
        reference=ready(load_supervised(run, tokenizer)),
        temperature=recipe.temperature,
        counts=counts,
    )


def _rounds(run: Run, folder: Path, counts: Counter[str], settings: AlignSettings) -> None:
    tokenizer = load_run_tokenizer(run)
    torch.manual_seed(settings.seed)
    model = load_supervised(run, tokenizer, trainable=True)
    train_rounds(model, tokenizer, surroundings(run, tokenizer, counts), settings, folder)
