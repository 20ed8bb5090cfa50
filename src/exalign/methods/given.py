"""Policies that somebody else trained: nothing is trained here, they are evaluated beside others as they are."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal

from pydantic import Field

from exalign.methods.method import Material, Method, TrainsOn
from exalign.processes import leads
from exalign.settings import CONTENT, Source
from exalign.storage import write_json


class Given(Method):
    """A policy that was trained elsewhere, evaluated as it is."""

    method: Literal["given"] = Field("given", description="policies that were trained elsewhere")
    policies: list[Source] = Field(
        min_length=1,
        description="folders or hub names, LoRA adapters too, in the order in which they were trained",
        json_schema_extra=CONTENT,
    )

    @property
    def trains_on(self) -> TrainsOn:
        return "nothing"

    @property
    def label(self) -> str:
        return "trained elsewhere"

    def described(self) -> dict[str, Any]:
        return super().described() | {"settings": {"method": self.method, "policies": self.policies}}

    @property
    def given(self) -> list[str]:
        return self.policies

    def problems(self) -> Iterator[str]:
        for name in sorted(self.model_fields_set - {"method", "policies"}):
            yield f"{name} has no effect on policies that were trained elsewhere"

    def train(self, material: Material, folder: Path) -> Path:
        """Say in `folder` where the policies are, as if each had been saved after one step more.

        One that has other tokens than π_sft reads and writes in its own, and has no KL to it.
        """
        from exalign.models.loading import load_tokenizer

        tokens = material.tokenizer.get_vocab()
        for step, source in enumerate(self.policies, start=1):
            named = {"source": source, "own_tokens": load_tokenizer(source).get_vocab() != tokens}
            for place in (folder / "policies" / f"step-{step:06d}", folder / "model") if leads() else ():
                place.mkdir(parents=True, exist_ok=True)
                write_json(place / "source.json", named)
        return folder / "model"
