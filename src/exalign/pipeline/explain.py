"""Every setting of the recipe, printed with its type, default and meaning."""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel
from pydantic_core import PydanticUndefined
from rich.console import Console
from rich.syntax import Syntax
from rich.text import Text

from exalign.pipeline.messages import unwrap_optional
from exalign.pipeline.recipe import Recipe, dump_recipe
from exalign.strict_yaml import dump_yaml


@dataclass(frozen=True)
class Explained:
    """One setting: its dotted name, type, default (`required` where there is none) and meaning."""

    name: str
    type: str
    default: str
    meaning: str


def explain(model: type[BaseModel], prefix: str = "") -> Iterator[Explained]:
    """Every setting below `model`, depth first; settings under a name of the user's own have `NAME` in theirs."""
    for name, field in model.model_fields.items():
        dotted = f"{prefix}{name}"
        inner = unwrap_optional(field.annotation)
        yield Explained(dotted, type_name(field.annotation), _default(field), field.description or "")
        while typing.get_origin(inner) is dict:
            inner, dotted = typing.get_args(inner)[1], f"{dotted}.NAME"
        if _is_settings(inner):
            yield from explain(inner, f"{dotted}.")


def type_name(annotation: Any) -> str:
    """A type as a person reads it: `number or none`, `one of "a", "b"`."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        return " or ".join(type_name(argument) for argument in arguments)
    if origin is typing.Literal:
        return "one of " + ", ".join(str(argument) for argument in arguments)
    if origin is typing.Annotated:
        return type_name(arguments[0])
    if origin is dict:
        return "mapping" if not _is_settings(arguments[1]) else "mapping of sections"
    if origin in (list, tuple):
        return "list of " + type_name(arguments[0])
    if _is_settings(annotation):
        return "section"
    names = {str: "text", int: "integer", float: "number", bool: "true or false", type(None): "none"}
    return names.get(annotation, getattr(annotation, "__name__", str(annotation)))


def print_settings(model: type[BaseModel], console: Console) -> None:
    """Print every setting; sections in bold."""
    for setting in explain(model):
        section = setting.type.startswith(("section", "mapping of"))
        style = "bold cyan" if section else "cyan"
        default = f" = {setting.default}" if setting.default not in ("", "required") else f" {setting.default}"
        console.print(Text.assemble((setting.name, style), (f" {setting.type}{default}", "dim")), soft_wrap=True)
        console.print(Text(f"    {setting.meaning}"))


def print_recipe(recipe: Recipe, console: Console) -> None:
    """Print the resolved recipe, every default written out, as YAML that can be used again."""
    text = dump_yaml(dump_recipe(recipe))
    console.print(
        Syntax(text, "yaml", background_color="default") if console.is_terminal else Text(text), soft_wrap=True
    )


def _is_settings(annotation: Any) -> bool:
    return isinstance(annotation, type) and issubclass(annotation, BaseModel)


def _default(field: Any) -> str:
    if field.is_required():
        return "required"
    value = field.default
    if value is PydanticUndefined:
        return ""  # a section: its own settings have their defaults
    if isinstance(value, bool) or value is None:
        return "none" if value is None else str(value).lower()
    return str(value)
