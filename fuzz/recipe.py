"""Fuzzes the recipe parser: bytes as a file, and what follows a NUL byte as overrides of the demo's recipe."""

from __future__ import annotations

import tempfile
from pathlib import Path

import atheris

with atheris.instrument_imports(include=["yaml", "exalign.strict_yaml", "exalign.run", "exalign.settings"]):
    from exalign.run.demo import RECIPE
    from exalign.run.recipe import load_recipe
    from exalign.run.runner import dump_recipe
    from exalign.strict_yaml import dump_yaml, parse_yaml

from fuzz.contract import fuzz

FOLDER = Path(tempfile.mkdtemp(prefix="exalign-fuzz-"))
SNIPPETS = (
    b"a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n",
    b"name: x\nmodel: {config: &a {<<: *a}}\n",
    b"seed: !!int ''\n",
    b"seed: !!float ''\nname: !!timestamp x\n",
    b"seed: 1_000:59:59\ntemperature: .inf\n",
    b'name: "\\0\\ud800"\n',
    b"? [a]\n: b\n",
    b"x-a: !!set {a, b}\nb: !!omap [a: 1]\nc: !!binary aGk=\nd: 2001-01-01\n",
    b"\0align.exo-rw.beta_pi=0.5\0data.sft.source=[a, b]\0align.exo-rw=~",
)


def read(data: bytes) -> None:
    """Load; what loads must survive being written and read again."""
    file, *overrides = data.split(b"\0")
    path = RECIPE
    if file:
        path = FOLDER / "recipe.yaml"
        path.write_bytes(file)
    recipe = load_recipe(path, [override.decode("utf-8", "replace") for override in overrides])
    values = dump_recipe(recipe)
    assert parse_yaml(dump_yaml(values), "again") == values


if __name__ == "__main__":
    recipes = sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))
    fuzz("recipe", read, [*SNIPPETS, *(path.read_bytes() for path in recipes)])
