"""What a stage sees of a recipe and of a run, and the key that this makes.

A stage declares the settings that its work reads and the stages whose folders it needs. Its work gets a `View` of
these and of nothing else, and what the view holds is the key: so a stage can read nothing that its key leaves out.
A setting that changes no result is marked so on its field (`settings.NO_RESULT`), and every key leaves it out by the
mark; the name of data, a model or a function is marked too, and stands in the key with the content that it names.
"""

from __future__ import annotations

import hashlib
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, cast

from rich.console import Console

from exalign.checksums import checksum
from exalign.errors import InputError
from exalign.models.model_settings import adapter_base
from exalign.rollout.own_modules import from_here
from exalign.run.recipe import Recipe
from exalign.settings import CONTENT, FUNCTION, NO_RESULT, STEP_SIZE, Settings
from exalign.storage import exists, read_sealed, write_sealed


class ReadPastViewError(AssertionError):
    """A stage reads what its key does not cover: a mistake in the stage, not in a recipe."""


@dataclass(frozen=True)
class Stage:
    """One step of a run: `work(view)` fills the view's folder."""

    name: str
    reads: tuple[str, ...]
    """Dotted settings of the recipe that the work reads; a section means all of it."""
    needs: tuple[str, ...]
    """Stages whose folders the work reads."""
    work: Callable[[View], None]
    always: bool = False
    """Cheap stages that are made anew each time, from whatever the run holds."""
    together: bool = False
    """Where there are several processes all of them work; the first one prints and writes, and does the rest alone."""
    stays: tuple[str, ...] = ()
    """What of the folder stays when the stage is made again, as patterns: the work itself sees whether it serves."""


@dataclass(frozen=True)
class View:
    """What the work of a stage gets: the settings and folders that it declared, its own folder, and where to count."""

    stage: Stage
    whole: Recipe = field(repr=False)
    run: Path = field(repr=False)
    console: Console = field(default_factory=Console, repr=False)
    counts: Counter[str] = field(default_factory=Counter)
    read: set[str] = field(default_factory=set, repr=False)
    """The declared settings that were read so far."""
    key: Mapping[str, Any] = field(default_factory=dict, repr=False)
    """What the settings are, as `key` gives it."""

    @property
    def recipe(self) -> Recipe:
        """The recipe; a setting that the stage did not declare is a `ReadPastViewError`."""
        return cast(Recipe, _Part(self.whole, "", self))

    @property
    def folder(self) -> Path:
        """The stage's own folder."""
        return self.run / self.stage.name

    def path(self, stage: str, *parts: str) -> Path:
        """A place in the folder of a stage that this one needs; of another it is a `ReadPastViewError`."""
        if stage not in (*self.stage.needs, self.stage.name):
            raise ReadPastViewError(f"the stage {self.stage.name} reads {stage}, which it does not need")
        return self.run.joinpath(stage, *parts)

    def has(self, stage: str) -> bool:
        """Whether the stage needs this one: what it takes something from depends on that."""
        return stage in self.stage.needs


class _Part:
    """A recipe or a section of it, of which a view shows some settings."""

    def __init__(self, whole: Any, prefix: str, view: View) -> None:
        self._whole, self._prefix, self._view = whole, prefix, view

    def __getattr__(self, name: str) -> Any:
        return self._shown(name, getattr(self._whole, name))

    def __getitem__(self, name: str) -> Any:
        return self._shown(name, self._whole[name])

    def _shown(self, name: str, value: Any) -> Any:
        path, reads = f"{self._prefix}{name}", self._view.stage.reads
        parts = path.split(".")
        above = {".".join(parts[:length]) for length in range(1, len(parts) + 1)} & set(reads)
        if above:
            self._view.read.update(above)
            return value
        if any(other.startswith(f"{path}.") for other in reads):
            return None if value is None else _Part(value, f"{path}.", self._view)
        raise ReadPastViewError(f"the stage {self._view.stage.name} reads {path}, which its key does not hold")


class Contents:
    """What stands under the names of data, models and functions, as hashes, each file read once.

    `known` is a file of the run that remembers them by size and time of change, so that a start which changes nothing
    reads no data.
    """

    def __init__(self, known: Path) -> None:
        self._path = known
        try:
            self._known = read_sealed(known) if known.exists() else {}
        except InputError:
            self._known = {}  # they are computed again
        self._found: dict[str, Any] = {}

    def of(self, name: str) -> str | None:
        """The hash of a local file or folder, of an adapter with its base; None where the name is a hub's."""
        path = Path(name)
        if not exists(path):
            return None
        files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
        digest = hashlib.sha256()
        for file in files:
            digest.update(f"{file.relative_to(path)}\0{self._of_file(file)}\0".encode())
        if (base := adapter_base(path)) is not None:
            digest.update(f"{base}\0{self.of(base)}".encode())
        return digest.hexdigest()[:16]

    def of_function(self, name: str) -> str | None:
        """The hash of the file that holds `module:function`; None where there is none."""
        try:
            with from_here():
                found = find_spec(name.partition(":")[0])
        except (ImportError, ValueError, AttributeError):
            return None
        return self._of_file(Path(found.origin)) if found and found.has_location and found.origin else None

    def _of_file(self, file: Path) -> str:
        stat, key = file.stat(), str(file.absolute())
        before = self._found.get(key) or self._known.get(key)
        if before is None or before[:2] != [stat.st_size, stat.st_mtime_ns]:
            before = [stat.st_size, stat.st_mtime_ns, checksum(file)]
        self._found[key] = before
        return str(before[2])

    def remember(self) -> None:
        """Write what was found; of a file that changed within the last seconds it could be another by now."""
        settled = self._known | {k: v for k, v in self._found.items() if v[1] < (time.time() - 5) * 1e9}
        if settled != self._known:
            write_sealed(self._path, settled)


def key(recipe: Recipe, reads: Collection[str], contents: Contents, *, with_steps: bool = True) -> dict[str, Any]:
    """What the settings named in `reads` are, less those marked as of no result; `with_steps`: those of a step's size
    too.
    """
    left_out = [NO_RESULT] if with_steps else [NO_RESULT, STEP_SIZE]
    found = {}
    for path in sorted(set(reads)):
        section, name = _place(recipe, path)
        if isinstance(section, Settings):  # its field may be marked
            found[path] = identity(section, contents, left_out, only=name).get(name)
        elif section is not None:
            found[path] = identity(section[name], contents, left_out)
    return {path: value for path, value in found.items() if value not in (None, {})}


def identity(
    value: Any, contents: Contents, left_out: Collection[Mapping[str, Any]] = (NO_RESULT,), only: str | None = None
) -> Any:
    """A setting as JSON: of a section what is set and decides a result; with the content that names stand for."""
    within = partial(identity, contents=contents, left_out=left_out)
    if isinstance(value, Settings):
        found = {}
        for name, info in type(value).model_fields.items():
            mark, inner = info.json_schema_extra, getattr(value, name)
            if inner is None or mark in left_out or only not in (None, name):
                continue
            if mark == CONTENT:
                named = [[one, contents.of(one)] for one in ([inner] if isinstance(inner, str) else inner)]
                found[name] = named[0] if isinstance(inner, str) else named
            elif mark == FUNCTION:
                found[name] = [inner, contents.of_function(inner)]
            else:
                found[name] = within(inner)
        return found
    if isinstance(value, Mapping):
        return {name: within(inner) for name, inner in value.items()}
    return [within(inner) for inner in value] if isinstance(value, list | tuple) else value


def step_sizes(recipe: Recipe, reads: Collection[str]) -> dict[str, Any]:
    """The settings of a step's size among those that are read."""
    values = (_inner(*_place(recipe, path)) for path in reads)
    sections = (value for value in values if isinstance(value, Settings))
    return {name: value for section in sections for name, value in section.step_sizes().items()}


def _place(recipe: Recipe, path: str) -> tuple[Any, str]:
    """The section that a dotted setting stands in, None where the recipe has none, and its name there."""
    section: Any = recipe
    name, _, rest = path.partition(".")
    while rest:
        section = _inner(section, name)
        name, _, rest = (rest, "", "") if isinstance(section, Mapping) else rest.partition(".")  # names may have dots
    return section, name


def _inner(section: Any, name: str) -> Any:
    if section is None:
        return None
    return section.get(name) if isinstance(section, Mapping) else getattr(section, name)
