"""Align language models with human preferences, exactly and efficiently, and prove what was achieved."""

from __future__ import annotations

import os
from typing import Any

# Before any library that asks: no usage data to a hub or anyone else, and no request to a service that converts
# pickled weights.
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("DISABLE_SAFETENSORS_CONVERSION", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

__version__ = "0.1.0"
__all__ = ["Recipe", "Run", "load_recipe", "make_recipe", "run_recipe"]


def __getattr__(name: str) -> Any:
    # Loaded when first asked for: `import exalign.report` must not cost the seconds that torch takes.
    if name in __all__:
        from exalign import pipeline

        return getattr(pipeline, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
