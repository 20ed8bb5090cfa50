"""The fields of a settings class as options of a command: declared once, described once."""

from __future__ import annotations

import inspect
import json
from collections.abc import Callable
from typing import Annotated, Any, get_origin

import typer
from pydantic import ValidationError

from exalign.errors import InputError
from exalign.settings import Settings
from exalign.storage import finite


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
    kind: Any = str if is_mapping else field.annotation
    default = "{}" if is_mapping else field.default
    annotation = Annotated[kind, typer.Option(help=field.description)]
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)


def _validated(kind: type[Settings], values: dict[str, Any]) -> Settings:
    name = ""
    try:
        for name, field in kind.model_fields.items():
            if get_origin(field.annotation) is dict:
                values[name] = json.loads(values[name], parse_constant=finite, parse_float=finite)
        return kind.model_validate(values)
    except ValidationError as error:
        name, said = str(error.errors()[0]["loc"][0]), error.errors()[0]["msg"].lower()
    except (ValueError, RecursionError) as error:
        said = f"not a JSON object ({error})"
    raise InputError(f"--{name.replace('_', '-')}: {said}.")
