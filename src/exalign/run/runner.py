"""A recipe carried out in a directory: which stages stand, which are to do, and what each was made from.

A stage is a folder. While it works it holds `started.json`, when it is complete `done.json`, both with the
fingerprint of its key (`view`) and of the stages that it needs.

In a stage that trains, two kinds of settings are told apart from the rest: those without effect on its result are in no
key, so they may change at any time; those that say how far a step goes may change where it stopped because a loss was
not finite, if `recover` asks for it. What a recovery changed is part of what the stage was made from, so no later stage
takes it for one that was made in one go.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from rich.console import Console
from rich.text import Text

from exalign.data.tokenization import pin_date
from exalign.device import choose_threads, device, device_memory, keep_memory
from exalign.errors import InputError
from exalign.evaluation.run_folder import RunFolder
from exalign.models.memory import room_for
from exalign.processes import call, leads
from exalign.redaction import redact_values
from exalign.rollout.vllm import engine_of, keep_engine
from exalign.run.recipe import Recipe, dump_recipe
from exalign.run.stage_files import MARKERS, check_complete, check_inputs, forget_damaged_records, stage_checksums
from exalign.run.view import Contents, Stage, View, key, step_sizes
from exalign.settings import NO_RESULT, STEP_SIZE
from exalign.storage import (
    fingerprint,
    read_object,
    read_sealed,
    remove_leftovers,
    write_json,
    write_sealed,
    write_text,
    writing,
)
from exalign.strict_yaml import dump_yaml
from exalign.terminal import shown
from exalign.training.guards import add_recovery, extended, next_recovery, recoveries, steps_not_taken

_SECTIONS = ("sft", "oracle", "reward", "search", "align")
"""Of a recipe, and what their stages are called."""


@dataclass(frozen=True, slots=True)
class MadeFrom:
    """`values` are what started.json and done.json hold of it: the `fingerprint` that later stages depend on, and for
    those that train what is left of it when it stops; `found` is what they held before, if anything. `recovery` is one
    that is about to begin."""

    values: dict[str, Any]
    key: dict[str, Any]
    found: dict[str, Any]
    recovery: dict[str, Any] | None = None
    recoverable: bool = False

    @property
    def fingerprint(self) -> str:
        return str(self.values["fingerprint"])

    @property
    def differs(self) -> bool:
        """Whether something else was found."""
        return bool(self.found) and self.found["fingerprint"] != self.fingerprint


@dataclass
class Run:
    """A recipe and the directory where it is carried out: `runs/NAME`, unless another is given.

    With `redo`, stages that were made from something else are made again instead of refused; with `recover`, a training
    that stopped goes on from its last good checkpoint with the settings as they are now (see `training.guards`).
    """

    recipe: Recipe
    folder: Path = None  # type: ignore[assignment]
    console: Console = field(default_factory=Console)
    redo: bool = False
    recover: bool = False

    def __post_init__(self) -> None:
        self.folder = Path("runs") / self.recipe.name if self.folder is None else Path(self.folder).expanduser()
        if not leads():
            self.console = Console(quiet=True)

    def path(self, *parts: str) -> Path:
        """A place in the run's directory."""
        return self.folder.joinpath(*parts)

    def view(self, stage: Stage, key: dict[str, Any] | None = None) -> View:
        """What the work of a stage gets."""
        return View(stage, self.recipe, self.folder, self.console, key=key or {})

    def carry_out(self, stages: Sequence[Stage], targets: Sequence[str] = ()) -> None:
        """Carry out the stages that `targets` name (all by default), and whatever they need.

        A target is a stage or a folder of stages (`align` means every method). Complete stages are skipped,
        interrupted ones continue; a stage that was made from something else is an `InputError` before any work.
        """
        wanted = select(stages, targets)
        self.console.print(shown(f"run: {self.folder}", "dim"), soft_wrap=True)
        with self._locked():
            contents = Contents(self.path("inputs.json"))
            made: dict[str, MadeFrom] = {}
            for stage in wanted:
                needs = [made[name].fingerprint for name in stage.needs]
                made[stage.name] = self._made_from(stage, needs, contents)
            self._check(wanted, made)
            contents.remember()
            before = recorded(self.folder)  # threads and sizes decide how sums are rounded
            keep_memory(before.get("memory"))
            keep_engine(before.get("engine"))
            if (sentence := choose_threads(self.recipe.threads or before.get("threads"))) is not None:
                self.console.print(shown(f"  {sentence}", "dim"), soft_wrap=True)
            write_text(self.path("recipe.yaml"), dump_yaml(dump_recipe(self.recipe)))
            begun = before.get("begun", datetime.now().isoformat(timespec="seconds"))
            write_json(self.path("environment.json"), {"begun": begun, **environment()})
            pin_to_run(self.folder)
            for stage in wanted:
                self._carry_out(stage, made[stage.name])

    def _made_from(self, stage: Stage, needs: list[str], contents: Contents) -> MadeFrom:
        """What a stage is made from; in one that trains, what was found of it where that is the same result."""
        found, folder = self._found(stage), self.path(stage.name)
        own = key(self.recipe, stage.reads, contents)
        whole = fingerprint([stage.name, own, needs])
        if not stage.trains:
            return MadeFrom({"fingerprint": whole, "key": redact_values(own)}, own, found)
        before, sizes = recoveries(folder), step_sizes(self.recipe, stage.reads)
        settled = key(self.recipe, stage.reads, contents, left_out=(NO_RESULT, STEP_SIZE))
        values = {"settled": fingerprint([stage.name, settled, needs]), "key": redact_values(own)}
        entry = next_recovery(folder, sizes) if self.recover else None
        if found.get("fingerprint") in (whole, _recovered(whole, before)):
            return MadeFrom({"fingerprint": found["fingerprint"], **values}, own, found)
        same = found.get("settled") == values["settled"]
        if same and entry is not None:
            after = extended(before, entry) if entry["after_step"] else before  # else it starts over
            recovered = {"fingerprint": _recovered(whole, after), **values}
            return MadeFrom(recovered, own, found, recovery=entry)
        recoverable = same and (folder / "stopped.json").exists()
        return MadeFrom({"fingerprint": whole, **values}, own, found, recoverable=recoverable)

    def _check(self, stages: list[Stage], made: dict[str, MadeFrom]) -> None:
        """Refuse, before any work, a directory whose stages were made from something else."""
        for stage in stages:
            now = made[stage.name]
            if stage.always or not now.differs or now.recovery or self.redo:
                continue
            third = "; --recover goes on with it from its last good checkpoint" if now.recoverable else ""
            third += " (what was tried on the same models and data is not tried again)" if stage.stays else ""
            raise InputError(
                f"{self.folder}: the stage {stage.name} was made by another recipe "
                f"({self._difference(stage, stages, made)}). "
                f"Choose another directory with --run DIR, or pass --redo to make again what differs{third}."
            )

    def _found(self, stage: Stage) -> dict[str, Any]:
        """What the stage in the directory says that it was made from; nothing where there is none, or it made nothing.

        One that is damaged is an `InputError`, unless it may be made again: then that is said, and it is of nothing.
        """
        begun = self.path(stage.name, "started.json")
        if begun.exists() and [*begun.parent.iterdir()] == [begun]:
            return {}
        try:
            for path in (self.path(stage.name, name) for name in MARKERS):
                if path.exists():
                    values = read_sealed(path)
                    check_complete(stage.name, path.parent, values.get("files") or {})
                    return {"fingerprint": None, **values}
        except InputError as error:
            if not (self.redo or stage.always):
                raise
            self.console.print(shown(f"! {error}", "yellow"), soft_wrap=True)
            return {"fingerprint": None}
        return {}

    def _difference(self, stage: Stage, stages: list[Stage], made: Mapping[str, MadeFrom]) -> str:
        """What changed of what the stage, and those that it needs, were made from."""
        before, now = dict[str, Any](), dict[str, Any]()
        for one in with_needs({stage.name}, stages):
            before |= flatten(made[one.name].found.get("key") or {})
            now |= flatten(made[one.name].values["key"])
        if not before or before == now:  # of other stages, which the recipe has no more
            before, now = flatten(RunFolder(self.folder).recipe_values()), flatten(dump_recipe(self.recipe))
        changed = [name for name in sorted({*before, *now}) if before.get(name) != now.get(name)]
        if not changed:
            return "the content of its data or of a model it starts from changed"
        shown = [_change(name, before.get(name), now.get(name)) for name in changed[:3]]
        return "; ".join(shown) + (f"; {len(changed) - 3} more" if len(changed) > 3 else "")

    def _carry_out(self, stage: Stage, made: MadeFrom) -> None:
        folder, view, found = self.path(stage.name), self.view(stage, made.key), bool(made.found)
        if made.recovery:
            add_recovery(folder, made.recovery)
        elif made.differs or (found and stage.always):
            remove_stage(folder, stays=stage.stays)
            found = False
        if found and (folder / "done.json").exists():
            (folder / "started.json").unlink(missing_ok=True)  # a kill may have come between the two
            self.console.print(shown(f"· {stage.name}: done before, skipped", "dim"))
            return
        for name in stage.needs:
            check_inputs(name, self.path(name))
        self.console.print(shown(f"▸ {stage.name}", "bold").append(" (continues)" if found else "", style="not bold"))
        seconds_before = worked_before(folder) if found else 0.0
        folder.mkdir(parents=True, exist_ok=True)
        remove_leftovers(folder)  # the lock says that no other process is at work here
        for damaged in forget_damaged_records(folder):
            self.console.print(shown(f"! {damaged} is damaged; it is made again.", "yellow"), soft_wrap=True)
        write_sealed(folder / "started.json", {**made.values, "seconds": round(seconds_before, 2)})
        start = time.monotonic()
        if stage.trains or stage.shared:
            call(stage.name)
        with room_for(stage.name):
            stage.work(view)
        seconds = seconds_before + time.monotonic() - start
        if stage.trains:
            trained = [folder, *sorted(folder.glob("at-*"))]  # of a sweep
            more = {"recoveries": len(recoveries(folder)), "steps_not_taken": sum(map(steps_not_taken, trained))}
            view.counts.update({name: value for name, value in more.items() if value})
        done = {**made.values, "seconds": round(seconds, 2), "counts": dict(view.counts)}
        write_sealed(folder / "done.json", {**done, "files": stage_checksums(folder)})
        (folder / "started.json").unlink()
        listed = "".join(f" · {value:,} {name.replace('_', ' ')}" for name, value in view.counts.items() if value)
        line = Text.assemble(("✓", "green"), f" {stage.name} ", shown(f"{_duration(seconds)}{listed}", "dim"))
        self.console.print(line, soft_wrap=True)

    @contextmanager
    def _locked(self) -> Iterator[None]:
        """Hold the directory; the lock is the operating system's, so it goes with the process, however that ends."""
        with writing(self.folder):
            self.folder.mkdir(parents=True, exist_ok=True)
            holder = self.path(".holder")
            try:
                lock = FileLock(self.path(".lock"), timeout=0).acquire()
            except Timeout:
                number = holder.read_text().strip() if holder.exists() else ""
                raise InputError(
                    f"{self.folder} is in use by another exalign process{f' (number {number})' if number else ''}; "
                    "wait for it or choose --run DIR."
                ) from None
        with lock:
            with writing(self.folder):
                holder.write_text(f"{os.getpid()}\n")
            yield


def recorded(folder: Path) -> dict[str, Any]:
    """What a run began with, where it did."""
    path = folder / "environment.json"
    return read_object(path) if path.exists() else {}


def pin_to_run(folder: Path) -> None:
    """Let chat templates that write the date write that of the run's beginning, in this process."""
    begun = recorded(folder).get("begun")
    pin_date(None if begun is None else datetime.fromisoformat(str(begun)))


def select(stages: Sequence[Stage], targets: Sequence[str]) -> list[Stage]:
    """The stages that the targets name (all by default), with what they need."""
    names = [stage.name for stage in stages]
    wanted: set[str] = set()
    for target in targets or names:
        named = {name for name in names if name == target or name.startswith(f"{target}/")}
        if not named:
            kinds = dict.fromkeys(name.partition("/")[0] for name in names)
            needs = f"; a section {target} would make one" if target in _SECTIONS else ""
            raise InputError(f"This recipe has no stage {target!r}{needs}; it has {', '.join(kinds)}.")
        wanted |= named
    return with_needs(wanted, stages)


def with_needs(names: set[str], stages: Sequence[Stage]) -> list[Stage]:
    """The stages of these names and those that they need, in the run's order."""
    wanted = set(names)
    for stage in reversed(stages):
        wanted.update(stage.needs if stage.name in wanted else ())
    return [stage for stage in stages if stage.name in wanted]


def worked_before(folder: Path) -> float:
    """Seconds that an interrupted stage worked: up to the last file it wrote."""
    started = folder / "started.json"
    last = max(path.stat().st_mtime for path in folder.rglob("*") if path.is_file())
    before = read_sealed(started).get("seconds")
    return (before if isinstance(before, int | float) else 0.0) + last - started.stat().st_mtime


def remove_stage(folder: Path, *, stays: Sequence[str]) -> None:
    """Delete what a stage wrote, but not what `stays`, nor other stages below it, as evaluation/pairs/METHOD.

    What it was made from goes last: where a kill comes in the middle, the rest is not taken for a new beginning.
    """
    for path in sorted(folder.iterdir(), key=lambda path: path.name in MARKERS):
        if any(path.match(pattern) for pattern in stays):
            continue
        if path.is_file():
            path.unlink()
        elif not any(any(path.rglob(marker)) for marker in MARKERS):
            shutil.rmtree(path)


def flatten(values: Any, prefix: str = "") -> dict[str, Any]:
    """Nested mappings as one level of dotted keys."""
    if not isinstance(values, dict):
        return {prefix: values}
    parts = (flatten(below, f"{prefix}.{name}" if prefix else str(name)) for name, below in values.items())
    return {key: value for part in parts for key, value in part.items()}


def environment() -> dict[str, Any]:
    """Versions and hardware that a result depends on; no names of users, hosts or folders."""
    import torch

    packages = {}
    for name in ("exalign", "torch", "transformers", "accelerate", "datasets", "peft", "tokenizers", "numpy"):
        try:
            packages[name] = version(name)
        except PackageNotFoundError:
            packages[name] = "not installed"
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    return {
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "packages": packages,
        "threads": torch.get_num_threads(),
        "memory": device_memory(device()),
        "engine": engine_of("auto", device()),
        "accelerators": devices,
    }


def _change(name: str, before: Any, now: Any) -> str:
    """What became of a setting; of one that names content, a list of name and checksum, perhaps the content alone."""

    def told(value: Any) -> Any:
        if isinstance(value, list) and len(value) == 2 and re.fullmatch("None|[0-9a-f]{16,}", str(value[1])):
            return value[0]
        return [told(one) for one in value] if isinstance(value, list) else value

    if told(before) == told(now):
        return f"the content of {told(now)} changed"
    return f"{name} was {told(before)}, is {told(now)}"


def _recovered(whole: str, entries: list[dict[str, Any]]) -> str:
    return fingerprint({"whole": whole, "recoveries": entries}) if entries else whole


def _duration(seconds: float) -> str:
    return f"{seconds:.1f} s" if seconds < 100 else f"{seconds / 60:.1f} min"
