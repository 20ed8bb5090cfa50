"""Policies that somebody else trained: nothing is trained here, they are evaluated beside others as they are."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, ClassVar, Literal

from pydantic import Field

from exalign.methods.method import Method, TrainsOn
from exalign.settings import CONTENT, Source


class Given(Method):
    """A policy that was trained elsewhere, evaluated as it is."""

    trains_on: ClassVar[TrainsOn] = "nothing"
    label: ClassVar[str] = "trained elsewhere"
    method: Literal["given"] = Field("given", description="policies that were trained elsewhere")
    policies: list[Source] = Field(
        min_length=1,
        description="folders or hub names, LoRA adapters too, in the order in which they were trained",
        json_schema_extra=CONTENT,
    )

    def described(self) -> dict[str, Any]:
        return super().described() | {"settings": {"method": self.method, "policies": self.policies}}

    @property
    def given(self) -> list[str]:
        return self.policies

    def problems(self) -> Iterator[str]:
        for name in sorted(self.model_fields_set - {"method", "policies"}):
            yield f"{name} has no effect on policies that were trained elsewhere"
