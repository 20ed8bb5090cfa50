"""The fields of a settings class as options of a command: declared once, described once."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from typing import Annotated, Any, TypeVar, get_origin

import typer
from pydantic import ValidationError
from pydantic_core import PydanticUndefined

from exalign.errors import InputError
from exalign.settings import Settings

S = TypeVar("S", bound=Settings)


def with_settings(settings: type[Settings]) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Give a command one `--option` for each field of `settings`, after its own parameters.

    The command takes them as its last parameter, `**options`, and `read_settings` makes the settings of them. A field
    that is a mapping is given as a JSON object.
    """

    def decorate(command: Callable[..., None]) -> Callable[..., None]:
        own = inspect.signature(command, eval_str=True)
        parameters = [p for p in own.parameters.values() if p.kind is not inspect.Parameter.VAR_KEYWORD]
        for name, field in settings.model_fields.items():
            is_mapping = get_origin(field.annotation) is dict
            if field.default is PydanticUndefined and not is_mapping:
                raise TypeError(f"{settings.__name__}.{name} needs a default to be an option")
            default = "{}" if is_mapping else field.default
            kind = str if is_mapping else field.annotation
            annotation = Annotated[kind, typer.Option(help=field.description)]  # type: ignore[valid-type]
            parameters.append(
                inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
            )
        command.__signature__ = own.replace(parameters=parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {p.name: p.annotation for p in parameters}
        return command

    return decorate


def read_settings(settings: type[S], options: dict[str, Any]) -> S:
    """The settings that a command's options give; a value out of bounds is an `InputError` that names the option."""
    values = dict(options)
    for name, field in settings.model_fields.items():
        if get_origin(field.annotation) is dict and isinstance(values.get(name), str):
            try:
                values[name] = json.loads(values[name])
            except json.JSONDecodeError as error:
                raise InputError(f"{_option(name)} is not a JSON object ({error}).") from None
    try:
        return settings.model_validate(values)
    except ValidationError as error:
        problem = error.errors()[0]
        raise InputError(f"{_option(str(problem['loc'][0]))}: {problem['msg'].lower()}.") from None


def _option(name: str) -> str:
    return f"--{name.replace('_', '-')}"
