"""Where a model comes from, and what of it is trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from exalign.errors import InputError
from exalign.settings import CONTENT, Settings, Source


class LoraSettings(Settings):
    """Low-rank adapters: only they (and a new scalar head) are trained; `save_model` merges them into plain weights."""

    rank: int = Field(16, gt=0, description="Rank of each adapter: more rank, more trained weights.")
    alpha: float = Field(32.0, gt=0, description="The adapters' product is scaled by alpha / rank.")
    targets: tuple[str, ...] | None = Field(
        None, strict=False, description="Module names that get adapters; none given: every linear layer of the body."
    )


class ModelSettings(Settings):
    """Where a model comes from: exactly one of `source` and `config`."""

    source: Source | None = Field(
        None, description="Folder or hub name of a transformers model.", json_schema_extra=CONTENT
    )
    config: dict[str, Any] | None = Field(
        None, description="A transformers config with model_type: random weights, trained from scratch."
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="Type of the weights in memory.")
    lora: LoraSettings | None = Field(None, description="Train low-rank adapters instead of all weights.")
    trust_remote_code: bool = Field(False, description="Run Python code that comes with the model; off for safety.")


def adapter_base(path: Path) -> str | None:
    """The model that a LoRA adapter was trained on, as its adapter_config.json says; None where there is none."""
    if not path.is_file():
        return None
    try:
        return str(json.loads(path.read_text(encoding="utf-8"))["base_model_name_or_path"])
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} does not name the model that the adapter was trained on.") from error
