"""`exalign plan`: the command, whose options for what is assumed are the fields of `Assumptions`."""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import ValidationError
from rich.console import Console

from exalign.errors import InputError
from exalign.run.budget.assumptions import Assumptions


def plan(
    recipe: Annotated[Path, typer.Argument(help="A recipe, for example recipes/imdb.yaml.")],
    overrides: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings to change: align.exo-rw.epochs=2")
    ] = None,
    gpu: Annotated[str, typer.Option(help="A100-40, A100-80, H100, H200, L40S, RTX-4090, or cpu.")] = "H100",
    count: Annotated[int, typer.Option(min=1, help="Devices.")] = 1,
    as_json: Annotated[bool, typer.Option("--json", help="Print values as JSON: seconds, bytes, operations.")] = False,
    **assumed: Any,
) -> None:
    """Work out what a recipe would cost before it is run: memory, tokens, operations, hours, and whether it fits."""
    from exalign.run.recipe import load_recipe

    loaded, taken = load_recipe(recipe, overrides or ()), _assumptions(assumed)

    from exalign.run.budget.devices import Machine, find_device
    from exalign.run.budget.stages import budget_of
    from exalign.run.budget.table import as_values, print_budget

    machine = Machine(find_device(gpu, taken), count, taken)
    _quiet_libraries()
    budget = budget_of(loaded, machine)
    if as_json:
        typer.echo(json.dumps(as_values(budget), indent=1))
    else:
        print_budget(budget, Console())


def _assumptions(given: dict[str, Any]) -> Assumptions:
    try:
        return Assumptions(**given)
    except ValidationError as error:
        first = error.errors()[0]
        option = "--" + str(first["loc"][0]).replace("_", "-")
        raise InputError(f"{option}: {first['msg'][:1].lower()}{first['msg'][1:]}, not {first['input']}.") from None


def _quiet_libraries() -> None:
    import transformers

    transformers.logging.set_verbosity_error()


def _with_options_of_assumptions(command: Any) -> Any:
    """The command with one option for each field of `Assumptions` in the place of its `**assumed`."""
    signature = inspect.signature(command, eval_str=True)
    options = [
        inspect.Parameter(
            name,
            inspect.Parameter.KEYWORD_ONLY,
            default=field.default,
            annotation=Annotated[field.annotation, typer.Option(help=field.description)],
        )
        for name, field in Assumptions.model_fields.items()
    ]
    fixed = [parameter for parameter in signature.parameters.values() if parameter.name != "assumed"]
    command.__signature__ = signature.replace(parameters=[*fixed, *options])
    command.__annotations__ = {parameter.name: parameter.annotation for parameter in [*fixed, *options]}
    return command


plan = _with_options_of_assumptions(plan)
