"""Align language models with human preferences, exactly and efficiently, and prove what was achieved.

After `exalign demo`, which writes the data of this recipe:

>>> from exalign import load_recipe, run_recipe                                    # doctest: +SKIP
>>> recipe = load_recipe("recipes/demo.yaml", ["align.exo-rw.beta_pi=0.2"])        # doctest: +SKIP
>>> run = run_recipe(recipe, folder="runs/other")                                  # doctest: +SKIP
"""

from __future__ import annotations

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from exalign.run.begin import align, evidence
    from exalign.run.carry_out import run_recipe
    from exalign.run.recipe import Recipe, load_recipe, make_recipe
    from exalign.run.runner import Run

# Before any library that asks: no usage data to a hub or anyone else, and no request to a service that converts
# pickled weights.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

__version__ = "0.1.0"
__all__ = ["Recipe", "Run", "align", "evidence", "load_recipe", "make_recipe", "run_recipe"]

_HOMES = {
    "Recipe": "recipe",
    "align": "begin",
    "evidence": "begin",
    "Run": "runner",
    "load_recipe": "recipe",
    "make_recipe": "recipe",
    "run_recipe": "carry_out",
}


def __getattr__(name: str) -> Any:
    # Loaded when first asked for: `import exalign.report` must not cost the seconds that torch takes.
    if name in _HOMES:
        return getattr(import_module(f"exalign.run.{_HOMES[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
