"""The recipes that come with exalign, and the demo: one of them on a synthetic world that is written into its run."""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import takewhile
from pathlib import Path

from exalign.data.synthetic import write_world
from exalign.errors import InputError, nearest
from exalign.run.recipe import RECIPES, Recipe, load_recipe
from exalign.storage import read_json, write_json, write_text

RECIPE = RECIPES / "demo.yaml"


def recipes() -> dict[str, str]:
    """The recipes that come with exalign, each with what its first comment says of it."""
    found = {}
    for path in sorted(RECIPES.glob("*.yaml"), key=lambda path: path.stem):
        lines = path.read_text(encoding="utf-8").splitlines()
        comment = " ".join(line[1:].strip() for line in takewhile(lambda line: line.startswith("#"), lines))
        found[path.stem] = re.split(r"(?<=[.:]) ", comment)[0].rstrip(".:")
    return found


def copy_recipe(name: str, target: Path | None = None) -> Path:
    """Write a recipe that comes with exalign to `target`, NAME.yaml by default, overwriting nothing."""
    source, there = RECIPES / f"{name.removesuffix('.yaml')}.yaml", recipes()
    if source.parent != RECIPES or source.stem not in there:
        raise InputError(f"There is no recipe {name[:100]!r}; {nearest(name, there)}")
    target = target or Path(source.name)
    if target.exists():
        raise InputError(f"{target} is there already; name another file.")
    write_text(target, source.read_text(encoding="utf-8"))
    return target


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
    seed = world / "seed.json"  # written last
    if not seed.is_file() or read_json(seed) != recipe.seed:
        seed.unlink(missing_ok=True)  # of another world, which is none any more once a file of it is replaced
        write_world(world, seed=recipe.seed)
        write_json(seed, recipe.seed)
    return recipe
