"""The fields of a settings class as options of a command: declared once, described once."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from typing import Annotated, Any, get_origin

import typer
from pydantic import ValidationError
from pydantic_core import PydanticUndefined

from exalign.errors import InputError
from exalign.settings import Settings


def with_settings(kind: type[Settings]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command one `--option` for each field of `kind`, after its own parameters.

    The command takes them together as its parameter `settings`. A field that is a mapping is given as a JSON object; a
    value out of bounds is an `InputError` that names the option.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.name != "settings"]
        parameters = [*own, *(_option(name, field) for name, field in kind.model_fields.items())]

        def called(**values: Any) -> None:
            chosen = {name: values.pop(name) for name in kind.model_fields}
            command(**values, settings=_validated(kind, chosen))

        called.__name__, called.__doc__ = command.__name__, command.__doc__
        called.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
        called.__annotations__ = {p.name: p.annotation for p in parameters}
        return called

    return decorate


def _option(name: str, field: Any) -> inspect.Parameter:
    is_mapping = get_origin(field.annotation) is dict
    if field.default is PydanticUndefined and not is_mapping:
        raise TypeError(f"{name} needs a default to be an option")
    kind: Any = str if is_mapping else field.annotation
    annotation = Annotated[kind, typer.Option(help=field.description)]
    default = "{}" if is_mapping else field.default
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _validated(kind: type[Settings], values: dict[str, Any]) -> Settings:
    for name, field in kind.model_fields.items():
        if get_origin(field.annotation) is dict:
            try:
                values[name] = json.loads(values[name])
            except json.JSONDecodeError as error:
                raise InputError(f"{_spelled(name)} is not a JSON object ({error}).") from None
    try:
        return kind.model_validate(values)
    except ValidationError as error:
        problem = error.errors()[0]
        raise InputError(f"{_spelled(str(problem['loc'][0]))}: {problem['msg'].lower()}.") from None


def _spelled(name: str) -> str:
    return f"--{name.replace('_', '-')}"
