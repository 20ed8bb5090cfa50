"""Align language models with human preferences, exactly and efficiently, and prove what was achieved."""

from __future__ import annotations

from typing import Any

__version__ = "0.1.0"
__all__ = ["Recipe", "Run", "load_recipe", "make_recipe", "run_recipe"]


def __getattr__(name: str) -> Any:
    # Loaded when first asked for: `import exalign.report` must not cost the seconds that torch takes.
    if name in __all__:
        from exalign import pipeline

        return getattr(pipeline, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
