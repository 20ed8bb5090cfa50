"""The demo: the packaged recipe on a synthetic world that is written into the run's own directory."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from exalign.data.synthetic import write_world
from exalign.run.recipe import Recipe, load_recipe

RECIPE = Path(__file__).with_name("demo.yaml")


def demo_recipe(folder: Path, overrides: Iterable[str] = ()) -> Recipe:
    """The demo's recipe with its data below `folder`/world, which is written first unless it stands there."""
    world = Path(folder) / "world"
    places = {
        "tokenizer.source": "tokenizer",
        "data.sft.source": "sft.jsonl",
        "data.prompts.source": "prompts.jsonl",
        "data.evaluation.source": "test.jsonl",
    }
    recipe = load_recipe(RECIPE, [*(f"{key}={world / name}" for key, name in places.items()), *overrides])
    if not (world / "tokenizer").is_dir():  # written last
        write_world(world, seed=recipe.seed)
    return recipe
