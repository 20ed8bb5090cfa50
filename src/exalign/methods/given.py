"""Policies that somebody else trained: nothing is trained here, they are evaluated beside others as they are."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, ClassVar, Literal

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

    betas: list[Annotated[float, Field(gt=0)]] | None = Field(
        None,
        description="the β of reward − β·KL, by the evaluation's reward, that each was trained for, where they are the "
        "ends of trainings of their own and not checkpoints along one",
    )

    def described(self) -> dict[str, Any]:
        own = {"settings": {"method": self.method, "policies": self.policies}}
        points = [{"value": beta, "beta": beta} for beta in self.betas or ()]
        return super().described() | own | ({"sweep": {"setting": "β", "points": points}} if points else {})

    @property
    def given(self) -> list[str]:
        return self.policies

    def problems(self) -> Iterator[str]:
        if self.betas is not None and len(self.betas) != len(self.policies):
            yield f"betas are {len(self.betas)} for {len(self.policies)} policies; give one for each"
        for name in sorted(self.model_fields_set - {"method", "policies", "betas"}):
            yield f"{name} has no effect on policies that were trained elsewhere"
