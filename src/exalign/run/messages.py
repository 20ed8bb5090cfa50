"""One clear sentence for whatever a recipe gets wrong."""

from __future__ import annotations

import difflib
import types
import typing
from typing import Any

from pydantic import BaseModel, ValidationError


def nearest(name: str, candidates: list[str]) -> str:
    """Name the nearest candidate, or list them all."""
    close = difflib.get_close_matches(name, candidates, n=1, cutoff=0.5)
    return f"did you mean {close[0]}?" if close else f"there are: {', '.join(sorted(candidates))}."


def explain_validation_error(error: ValidationError, model: type[BaseModel]) -> str:
    """The first problem of a pydantic error as a sentence with the dotted setting, then how many more there are."""
    problems = sorted(error.errors(), key=lambda problem: problem["type"] != "extra_forbidden")
    first = _sentence(problems[0], model)
    return first + (f" ({len(problems) - 1} more problems)" if len(problems) > 1 else "")


def _sentence(problem: Any, model: type[BaseModel]) -> str:
    location = [str(part) for part in problem["loc"]]
    where = ".".join(location) or "recipe"
    if problem["type"] == "extra_forbidden":
        owner = settings_at(model, location[:-1])
        return f"{where} is not a setting; {nearest(location[-1], list(owner.model_fields) if owner else [])}"
    if problem["type"] == "missing":
        return f"{where} is missing; it has no default."
    if problem["type"] == "value_error":
        return f"{'' if where == 'recipe' else where + ': '}{problem['ctx']['error']}."
    shown = repr(problem["input"])
    text = problem["msg"][:1].lower() + problem["msg"][1:]
    return f"{where}: {text}, not {shown if len(shown) < 60 else shown[:57] + '…'}."


def settings_at(model: type[BaseModel], location: list[str]) -> type[BaseModel] | None:
    """The settings class that stands at a dotted location below `model`, through optional and mapped fields."""
    current: Any = model
    for part in location:
        if isinstance(current, type) and issubclass(current, BaseModel):
            field = current.model_fields.get(part)
            current = field.annotation if field else None
        elif typing.get_origin(current) is dict:
            current = typing.get_args(current)[1]
        current = unwrap_optional(current)
    return current if isinstance(current, type) and issubclass(current, BaseModel) else None


def unwrap_optional(annotation: Any) -> Any:
    """`X | None` → `X`; everything else as it is."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        rest = [arg for arg in typing.get_args(annotation) if arg is not type(None)]
        return rest[0] if len(rest) == 1 else annotation
    return annotation
