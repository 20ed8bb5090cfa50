"""The strict base of every settings class: frozen, no unknown keys, no silent conversion of a wrong type.

Each part of the house defines its settings beside the code that reads them; `run/recipe.py` assembles them into the
recipe. Every field carries a default (unless it must be given) and a one-line description, and where it is none of
the usual kind that changes a result, a mark that says so, once.
"""

from __future__ import annotations

import os.path
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, WrapValidator

NO_RESULT: dict[str, Any] = {"effect": "none"}
"""Marks a setting of memory, speed, bookkeeping, or when to give up: it changes no result, so no key holds it."""
STEP_SIZE: dict[str, Any] = {"effect": "step"}
"""Marks a setting of how far a step goes: a training that stopped may go on with another (`training.guards`)."""
CONTENT: dict[str, Any] = {"effect": "content"}
"""Marks the name of data, a model or a tokenizer: what stands under it decides the result as well as the name."""
FUNCTION: dict[str, Any] = {"effect": "function"}
"""Marks the name of a function as module:function, whose file decides the result as well as the name."""

Source = Annotated[str, Field(min_length=1), AfterValidator(os.path.expanduser)]
"""A path or a hub's name in a setting. A `~` in front is the user's home: expanded here, and nowhere else."""


def _or_auto(value: Any, check: Any) -> Any:
    """One sentence where a union has one for each of its members."""
    try:
        return check(value)
    except ValidationError as error:
        known = [problem["msg"] for problem in error.errors() if problem["type"] != "literal_error"]
        raise ValueError(f"{known[0][:1].lower()}{known[0][1:]}, or auto, not {value!r}") from None


Auto = Literal["auto"]
"""What follows from the model and the device (`models.sizes`)."""
Size = Annotated[Annotated[int, Field(ge=1)] | Auto, WrapValidator(_or_auto)]
Choice = Annotated[bool | Auto, WrapValidator(_or_auto)]


class Settings(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    @classmethod
    def marked(cls, mark: dict[str, Any]) -> set[str]:
        """The names of the fields with this mark."""
        return {name for name, field in cls.model_fields.items() if field.json_schema_extra == mark}

    def deciding(self) -> dict[str, Any]:
        """What of it decides a result, as JSON."""
        return self.model_dump(mode="json", exclude=self.marked(NO_RESULT))

    def step_sizes(self) -> dict[str, Any]:
        """How far a step goes, not what it is made from: what the recovery of a training may change."""
        return {name: getattr(self, name) for name in sorted(self.marked(STEP_SIZE))}
