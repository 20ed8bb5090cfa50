"""Python that a recipe names as `module:name`: reward functions and methods of one's own."""

from __future__ import annotations

import ast
import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from types import ModuleType

from exalign.errors import InputError, first_line


@contextmanager
def from_here() -> Iterator[Path]:
    """Modules are looked for in the working directory first, while open."""
    here = Path.cwd()
    sys.path.insert(0, str(here))
    try:
        yield here
    finally:
        sys.path.remove(str(here))


def own_module(name: str, what: str) -> ModuleType:
    """The module, looked for in the working directory first; one that cannot be imported is an `InputError`.

    `what` is how its sentence begins.
    """
    with from_here() as here:
        try:
            return importlib.import_module(name)
        except (Exception, SystemExit) as error:  # whatever the file does when it is imported
            said = first_line(error)[:200]
            kind = "" if isinstance(error, ImportError) else f"{type(error).__name__}: "
            raise InputError(f"{what} cannot be imported from {here}: {kind}{said}.") from error


def own_files(name: str) -> list[Path]:
    """The file of a module, looked for as by `own_module`, and those of the working directory that it imports, with
    what these import in turn; none where there is no such file.
    """
    with from_here() as here:
        try:
            found = find_spec(name)
        except (ImportError, ValueError, AttributeError):
            return []
    if found is None or not found.has_location or found.origin is None:
        return []
    files = [Path(found.origin)]
    for file in files:  # which grow
        if file.suffix == ".py" and file.is_relative_to(here) and "site-packages" not in file.parts:
            files += [one for one in dict.fromkeys(_imported(file, here)) if one not in files]
    return files


def _imported(file: Path, here: Path) -> Iterator[Path]:
    """The files below `here` that the imports of one name, the packages that they stand in among them."""
    try:
        tree = ast.parse(file.read_bytes())
    except SyntaxError:
        return
    package = file.parent.relative_to(here).parts
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            named = [tuple(alias.name.split(".")) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) + 1 - node.level] if node.level else ()
            base += tuple(node.module.split(".")) if node.module else ()
            named = [(*base, alias.name) for alias in node.names]
        else:
            continue
        for parts in named:
            places = (here.joinpath(*parts[:depth]) for depth in range(1, len(parts) + 1))
            yield from (f for place in places for f in (Path(f"{place}.py"), place / "__init__.py") if f.is_file())
