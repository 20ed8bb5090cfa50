"""From a recipe to a directory with everything it asks for.

>>> from exalign.pipeline import load_recipe, run_recipe                                  # doctest: +SKIP
>>> run = run_recipe(load_recipe("recipes/demo.yaml", ["align.exo-rw.beta_pi=0.2"]))      # doctest: +SKIP
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from exalign.pipeline.carry_out import run_recipe
    from exalign.pipeline.recipe import Recipe, load_recipe, make_recipe
    from exalign.pipeline.run import Run

__all__ = ["Recipe", "Run", "load_recipe", "make_recipe", "run_recipe"]

_HOMES = {
    "Recipe": "recipe",
    "Run": "run",
    "load_recipe": "recipe",
    "make_recipe": "recipe",
    "run_recipe": "carry_out",
}


def __getattr__(name: str) -> Any:
    # Loaded when first asked for: one module of this package must not cost the seconds that all of them take.
    if name in _HOMES:
        return getattr(import_module(f"exalign.pipeline.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
