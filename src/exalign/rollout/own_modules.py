"""Python that a recipe names as `module:name`: reward functions and methods of one's own."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterator
from contextlib import contextmanager
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
