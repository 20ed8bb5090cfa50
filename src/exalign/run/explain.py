"""Every setting of the recipe, printed with its type, default and meaning."""

from __future__ import annotations

import builtins
import textwrap
import types
import typing
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from pydantic import BaseModel
from pydantic_core import PydanticUndefined
from rich.console import Console
from rich.syntax import Syntax
from rich.text import Text

from exalign.errors import InputError, nearest
from exalign.methods.method import Method, available, method_class
from exalign.run.familiar import LOSSES, SETTINGS
from exalign.run.recipe import Recipe, dump_recipe, is_settings, unwrap_optional
from exalign.strict_yaml import dump_yaml


@dataclass(frozen=True)
class Explained:
    """One setting: its dotted name, type, default (`required` where there is none) and meaning."""

    name: str
    type: str
    default: str
    meaning: str
    owner: builtins.type[BaseModel]
    """The class that defines it, whose settings may stand in several places."""


def explain(model: type[BaseModel], prefix: str = "") -> Iterator[Explained]:
    """Every setting below `model`, depth first; settings under a name of the user's own have `NAME` in theirs."""
    for name, field in model.model_fields.items():
        dotted = f"{prefix}{name}"
        inner = unwrap_optional(field.annotation)
        owner = next(c for c in model.__mro__ if name in vars(c).get("__annotations__", {}))
        yield Explained(dotted, type_name(field.annotation), _default(field), field.description or "", owner)
        while typing.get_origin(inner) is dict:
            inner, dotted = typing.get_args(inner)[1], f"{dotted}.NAME"
        if typing.get_origin(inner) in (list, tuple):  # of sections, whose settings are those of each
            inner = typing.get_args(inner)[0]
        if is_settings(inner):
            yield from explain(inner, f"{dotted}.")
        elif _is_method(inner):  # what all methods have, then each its own
            yield from explain(Method, f"{dotted}.")
            for method in available():
                for setting in explain(method_class(method), f"{dotted}."):
                    if setting.name.removeprefix(f"{dotted}.").split(".")[0] not in Method.model_fields:
                        yield replace(setting, meaning=f"{method}: {setting.meaning}")


def recipe_schema() -> dict[str, Any]:
    """The JSON schema of recipes, by which an editor completes and checks settings; methods by their `method`."""
    schema = Recipe.model_json_schema()
    kinds = []
    for name in available():
        own = method_class(name).model_json_schema()
        schema["$defs"] |= own.pop("$defs", {})
        own["properties"]["method"] = {"const": name, "default": "matching"}
        own["required"] = [*own.get("required", []), *(["method"] if name != "matching" else [])]
        kinds.append(own)
    outside = {"properties": {"method": {"type": "string", "pattern": ":"}}, "required": ["method"]}
    schema["properties"]["align"]["additionalProperties"] = {"anyOf": [*kinds, outside, {"type": "null"}]}
    return schema | {"patternProperties": {"^x-": {}}}


def type_name(annotation: Any) -> str:
    """A type as a person reads it: `number or null`, `one of "a", "b"`."""
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin in (typing.Union, types.UnionType):
        each = [type_name(argument) for argument in arguments]
        return (", or " if any(" or " in name for name in each) else " or ").join(each)
    if origin is typing.Literal:
        return "one of " + ", ".join(str(argument) for argument in arguments)
    if origin is typing.Annotated:
        return type_name(arguments[0])
    if origin is dict:
        sections = is_settings(arguments[1]) or _is_method(arguments[1])
        return "mapping of sections" if sections else "mapping"
    if origin in (list, tuple):
        item = type_name(arguments[0])
        return f"list of ({item})" if " or " in item else f"list of {item}"
    if is_settings(annotation):
        return "section"
    names = {str: "text", int: "integer", float: "number", bool: "true or false", type(None): "null"}
    return names.get(annotation, getattr(annotation, "__name__", str(annotation)))


LEAST = """\
name: first
model: {source: HuggingFaceTB/SmolLM2-135M-Instruct}
data: {preferences: {source: pairs.jsonl}}
align:
  exo: {target: preference}
"""
"""A whole recipe: the rest has defaults."""


def print_settings(console: Console, below: str | None = None) -> None:
    """Print every setting of a recipe, or those of one section (`align`, `data.sft`); sections in bold.

    Settings that several sections share are printed in the first of them. Before them stands the least recipe, behind
    them what other trainers call the settings. `InputError` where `below` is none of them.
    """
    settings = known = list(explain(Recipe))
    if below is not None:
        settings = [each for each in known if f"{each.name}.".startswith(f"{below}.")]
        settings = settings or [each for each in known if each.name.rpartition(".")[2] == below]
        if not settings:
            near = nearest(below, (each.name for each in known), "`exalign recipe --explain` prints all there are.")
            raise InputError(f"{below} is no setting of a recipe; {near}")
    else:
        console.print(Text(f"A whole recipe; what it does not say has a default:\n\n{LEAST}"), soft_wrap=True)
    for setting in _once(settings):
        section = setting.type.startswith(("section", "mapping of"))
        style = "bold cyan" if section else "cyan"
        default = f" = {setting.default}" if setting.default not in ("", "required") else f" {setting.default}"
        console.print(Text.assemble((setting.name, style), (f" {setting.type}{default}", "dim")), soft_wrap=True)
        meaning = textwrap.fill(setting.meaning, console.width, initial_indent="    ", subsequent_indent="    ")
        console.print(Text(meaning), soft_wrap=True)
    if below is not None:
        return
    for title, table in (("Names of other trainers, and what they are here", SETTINGS), ("Their losses", LOSSES)):
        console.print(Text(f"\n{title}", style="bold"))
        for theirs, here in table.items():
            console.print(Text.assemble((", ".join(theirs.split()), "cyan"), f": {here}"), soft_wrap=True)


def _once(settings: Sequence[Explained]) -> Iterator[Explained]:
    """The settings, those that several sections share only in the first one, and a line in the others that says so."""
    first: dict[type[BaseModel], str] = {}
    told: list[tuple[str, str]] = []
    for setting in settings:
        section = setting.name.rpartition(".")[0]
        place = first.setdefault(setting.owner, section)
        if place == section:
            yield setting
        elif not any(f"{section}.".startswith(f"{one}.") and f"{place}.".startswith(f"{as_}.") for one, as_ in told):
            told.append((section, place))
            names = [s.name for s in settings if s.owner is setting.owner and s.name.rpartition(".")[0] == place]
            meaning = f"as above: {names[0]} to {names[-1]}"
            yield replace(setting, name=f"{section}.…", type="", default="", meaning=meaning)


def print_recipe(recipe: Recipe, console: Console) -> None:
    """Print the resolved recipe, every default written out, as YAML that can be used again."""
    text = dump_yaml(dump_recipe(recipe))
    console.print(
        Syntax(text, "yaml", background_color="default") if console.is_terminal else Text(text), soft_wrap=True
    )


def _is_method(annotation: Any) -> bool:
    return typing.get_origin(annotation) is typing.Annotated and typing.get_args(annotation)[0] is Method


def _default(field: Any) -> str:
    if field.is_required():
        return "required"
    value = field.default
    if value is PydanticUndefined:
        return ""  # a section: its own settings have their defaults
    if value is None:
        return "null"
    if isinstance(value, tuple):
        return str(list(value))
    return str(value).lower() if isinstance(value, bool) else str(value)
