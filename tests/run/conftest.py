from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from exalign.data.synthetic import write_world
from exalign.run.demo import RECIPE
from exalign.run.recipe import Recipe, load_recipe

TINY = [
    "model.config={model_type: gpt2, n_layer: 1, n_embd: 16, n_head: 2, n_positions: 96}",
    "sft={learning_rate: 3e-3, epochs: 1, batch_prompts: 16, checkpoint_every: 2}",
    "reward={learning_rate: 1e-3, epochs: 1, batch_prompts: 16, checkpoint_every: 2}",
    "sample={num_completions: 3, max_new_tokens: 8}",
    "evaluate.prompts=8",
    "evaluate.samples=2",
    "evaluate.pool_prompts=4",
    "evaluate.pool_samples=8",
]
ALIGN = "{learning_rate: 1e-3, batch_prompts: 8, save_policies: 2, checkpoint_every: 1, beta_pi: 0.5, "


@pytest.fixture(scope="session")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("world")
    write_world(folder, num_sft=64, num_prompts=24, num_test=12)
    return folder


@pytest.fixture
def tiny(world: Path) -> Any:
    """Makes the demo's recipe small enough for seconds."""

    def make(*overrides: str) -> Recipe:
        return load_recipe(RECIPE, tiny_overrides(world, *overrides))

    return make


def tiny_overrides(world: Path, *more: str) -> list[str]:
    return [
        f"tokenizer.source={world}/tokenizer",
        f"data.sft.source={world}/sft.jsonl",
        f"data.prompts.source={world}/prompts.jsonl",
        f"data.evaluation.source={world}/test.jsonl",
        *TINY,
        f"align={{exo-rw: {ALIGN}target: reward}}, dpo-pref: {ALIGN}divergence: forward_kl, target: preference}}}}",
        *more,
    ]
