"""Where a model comes from, and what of it is trained."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from exalign.errors import InputError
from exalign.settings import CONTENT, Settings, Source
from exalign.storage import exists


class LoraSettings(Settings):
    """Low-rank adapters: only they (and a new scalar head) are trained."""

    rank: int = Field(16, gt=0, description="Rank of each adapter: more rank, more trained weights.")
    alpha: float = Field(32.0, gt=0, description="The adapters' product is scaled by alpha / rank.")
    targets: tuple[str, ...] | None = Field(
        None,
        strict=False,
        min_length=1,
        description="Module names that get adapters; none given: every linear layer of the body.",
    )
    dora: bool = Field(False, description="DoRA: each column's length is trained apart from its direction.")
    save: Literal["merged", "adapter"] = Field(
        "merged",
        description="What a policy of the alignment is saved as: a whole model, or the adapter alone, which names its "
        "base. Every other model is saved whole.",
    )


class ModelSettings(Settings):
    """Where a model comes from: exactly one of `source` and `config`."""

    source: Source | None = Field(
        None,
        description="Folder or hub name of a transformers model, or of a PEFT adapter, which is merged into its base.",
        json_schema_extra=CONTENT,
    )
    config: dict[str, Any] | None = Field(
        None, description="A transformers config with model_type: random weights, trained from scratch."
    )
    dtype: Literal["float32", "bfloat16", "float16"] = Field("float32", description="Type of the weights in memory.")
    lora: LoraSettings | None = Field(None, description="Train low-rank adapters instead of all weights.")
    trust_remote_code: bool = Field(False, description="Run Python code that comes with the model; off for safety.")

    @property
    def saves_adapter(self) -> bool:
        """Whether a policy of these settings is saved as an adapter alone."""
        return self.lora is not None and self.lora.save == "adapter"

    def saved_whole(self) -> ModelSettings:
        """These settings for a model that is saved with all its weights."""
        return self.model_copy(update={"lora": self.lora and self.lora.model_copy(update={"save": "merged"})})


def adapter_base(folder: Path) -> str | None:
    """The model that a folder's adapter was trained on; None where there is no adapter, or a whole model beside it.

    Some trainers write the base's config.json beside an adapter that stands alone.
    """
    path = folder / "adapter_config.json"
    if not exists(path):
        return None
    weights = [*folder.glob("model*.safetensors*"), *folder.glob("pytorch_model*")]
    alone = not weights and any(folder.glob("adapter_model*"))
    if exists(folder / "config.json") and not alone:
        return None
    try:
        base = json.loads(path.read_text(encoding="utf-8"))["base_model_name_or_path"]
        if not isinstance(base, str):
            raise TypeError
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        raise InputError(f"{path} does not name the model that the adapter was trained on.") from error
    return base
