"""A small run with a search for EXO and PPO. Imported by tests and workers, which may be killed anywhere in it."""

from __future__ import annotations

from pathlib import Path

import torch

from exalign.run.carry_out import run_recipe
from exalign.run.demo import RECIPE
from exalign.run.recipe import Recipe, load_recipe
from run.conftest import ALIGN, tiny_overrides

ALONE = [
    "reward=null",
    "preferences=null",
    "score.scorer={function: exalign.data.synthetic:reward}",
    f"align={{exo-rw: {ALIGN}target: reward}}}}",
    "evaluate.pool_prompts=0",
]
PPO = (
    "align.ppo={method: ppo, learning_rate: 1e-3, critic_learning_rate: 1e-3, batch_prompts: 8, rollout_prompts: 16, "
    "passes: 1, save_policies: 2, checkpoint_every: 1}"
)
SEARCH = [
    PPO,
    "search={trials: 3, kl: 50, prompts: 4}",
    "search.methods.exo-rw={learning_rate: {low: 1e-4, high: 1e-2, log: true}, epochs: {choices: [1, 2]}}",
    "search.methods.ppo={critic_learning_rate: {low: 1e-4, high: 1e-2, log: true}, passes: {low: 1, high: 2}}",
]


def searched_recipe(world: Path, *overrides: str) -> Recipe:
    return load_recipe(RECIPE, tiny_overrides(world, *ALONE, *SEARCH, *overrides))


def searched_run(world: Path, folder: Path, *targets: str) -> None:
    torch.set_num_threads(1)
    run_recipe(searched_recipe(world), *targets, folder=folder)
