"""What a stage sees of a recipe and of a run, and the key that this makes.

A stage declares the settings that its work reads and the stages whose folders it needs. Its work gets a `View` of
these and of nothing else, and what the view holds is the key: so a stage can read nothing that its key leaves out.
A setting that changes no result is marked so on its field (`settings.NO_RESULT`), and every key leaves it out by the
mark; the name of data, a model or a function is marked too, and stands in the key with the content that it names.
"""

from __future__ import annotations

import hashlib
import os
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, cast

from rich.console import Console

from exalign.checksums import checksum
from exalign.errors import InputError
from exalign.models.model_settings import adapter_base
from exalign.rollout.own_modules import own_files
from exalign.run.recipe import Recipe
from exalign.settings import CONTENT, FUNCTION, NO_RESULT, Settings
from exalign.storage import exists, fingerprint, read_sealed, write_sealed


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
    trains: bool = False
    """All processes train, where there are several; the first one prints and writes."""
    shared: bool = False
    """Each of several processes draws, scores or reads its share, and the first one writes."""
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


def sections_of(path: str) -> list[str]:
    """The sections that a dotted setting lies in.

    >>> sections_of("data.sft.source")
    ['data', 'data.sft']
    """
    parts = path.split(".")
    return [".".join(parts[:length]) for length in range(1, len(parts))]


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
        if declared := {*sections_of(path), path}.intersection(reads):
            self._view.read.update(declared)
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
            digest.update(os.fsencode(f"{file.relative_to(path)}\0{self._of_file(file)}\0"))
        if (base := adapter_base(path)) is not None:
            digest.update(f"{base}\0{self.of(base)}".encode())
        return digest.hexdigest()[:16]

    def of_function(self, name: str) -> str | None:
        """The hash of the file that holds `module:function`, with the files beside it that it imports; None where there
        is none.
        """
        found = [self._of_file(file) for file in own_files(name.partition(":")[0])]
        return found[0] if len(found) == 1 else fingerprint(sorted(found)) if found else None

    def _of_file(self, file: Path) -> str:
        stat, key = file.stat(), str(file.absolute()).encode(errors="backslashreplace").decode()
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


Marks = Collection[Mapping[str, Any]]


def key(recipe: Recipe, reads: Collection[str], contents: Contents, left_out: Marks = (NO_RESULT,)) -> dict[str, Any]:
    """What the settings named in `reads` are, less those with a mark that is left out."""
    found = {path: _setting(*_place(recipe, path), contents, left_out) for path in sorted(set(reads))}
    return {path: value for path, value in found.items() if value not in (None, {})}


def _setting(section: Any, name: str, contents: Contents, left_out: Marks) -> Any:
    """A setting of a section as JSON, with the content that it names; None where it is not set or left out."""
    value = _inner(section, name)
    mark = type(section).model_fields[name].json_schema_extra if isinstance(section, Settings) else None
    if value is None or mark in left_out:
        return None
    if mark == CONTENT:
        return [value, contents.of(value)] if isinstance(value, str) else [[one, contents.of(one)] for one in value]
    if mark == FUNCTION and ":" in value:
        return [value, contents.of_function(value)]
    return _as_json(value, contents, left_out)


def _as_json(value: Any, contents: Contents, left_out: Marks) -> Any:
    if isinstance(value, Settings):
        found = {name: _setting(value, name, contents, left_out) for name in type(value).model_fields}
        return {name: inner for name, inner in found.items() if inner is not None}
    if isinstance(value, Mapping):
        return {name: _as_json(inner, contents, left_out) for name, inner in value.items()}
    return [_as_json(inner, contents, left_out) for inner in value] if isinstance(value, list | tuple) else value


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
