"""What a stage is made from, and whether one that stands in the directory of a run was made from the same.

A stage is the same if everything it depends on is. In one that trains, two kinds of settings are told apart from the
rest: those without effect on its result may change while it is interrupted or after it is done; those that say how far
a step goes may change where it stopped because a loss was not finite, if `recover` asks for it. What a recovery changed
is part of what the stage was made from, so no later stage takes it for one that was made in one go.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from exalign.storage import fingerprint
from exalign.training.guards import extended, next_recovery, recoveries
from exalign.training.settings import ADJUSTABLE, WITHOUT_EFFECT_ON_RESULTS


@dataclass(frozen=True, slots=True)
class MadeFrom:
    """`values` are what started.json and done.json hold of it: the `fingerprint` that later stages depend on, and for
    those that train what is left of it when it stops. `recovery` is one that is about to begin."""

    values: dict[str, Any]
    recovery: dict[str, Any] | None = None
    recoverable: bool = False

    @property
    def fingerprint(self) -> str:
        return str(self.values["fingerprint"])


def made_from(depends: Mapping[str, Any]) -> MadeFrom:
    """What a stage that does not train is made from."""
    return MadeFrom({"fingerprint": _whole(depends)})


def trained_from(
    depends: Mapping[str, Any], found: Mapping[str, Any], folder: Path, *, recover: bool = False
) -> MadeFrom:
    """The same of a stage that trains in `folder`; where what was `found` of it there stands for the same result, that.

    With `recover`, a stage that stopped goes on with other settings; an `InputError` where none of them differs.
    """
    whole, before = _whole(depends), recoveries(folder)
    settled = fingerprint(without(depends, {*ADJUSTABLE, *WITHOUT_EFFECT_ON_RESULTS}))
    step_settings = dict(_named(depends, ADJUSTABLE))
    values = {"settled": settled, "step_settings": step_settings}
    entry = next_recovery(folder, step_settings) if recover else None
    before_print = found.get("fingerprint")
    if before_print in (whole, _recovered(whole, before)):
        return MadeFrom({"fingerprint": before_print, **values})
    same = found.get("settled") == settled
    if same and found.get("step_settings") == step_settings:
        return MadeFrom({"fingerprint": before_print, **values})
    if same and entry is not None and entry["after_step"]:
        return MadeFrom({"fingerprint": _recovered(whole, extended(before, entry)), **values}, recovery=entry)
    return MadeFrom({"fingerprint": whole, **values}, recoverable=same and (folder / "stopped.json").exists())


def without(values: Any, names: Collection[str]) -> Any:
    """JSON values less what stands under these names, at any depth.

    >>> without([{"a": 1, "b": {"a": 2, "c": 3}}], {"a"})
    [{'b': {'c': 3}}]
    """
    if isinstance(values, Mapping):
        return {name: without(value, names) for name, value in values.items() if name not in names}
    return [without(value, names) for value in values] if isinstance(values, list | tuple) else values


def _whole(depends: Mapping[str, Any]) -> str:
    # When to give up was not always a setting; runs from before it stay what they are.
    return fingerprint(without(depends, {"max_skipped_in_a_row"}))


def _recovered(whole: str, entries: list[dict[str, Any]]) -> str:
    return fingerprint({"whole": whole, "recoveries": entries}) if entries else whole


def _named(values: Any, names: Collection[str]) -> Iterator[tuple[str, Any]]:
    if isinstance(values, Mapping):
        for name, value in values.items():
            if name in names:
                yield name, value
            yield from _named(value, names)
    elif isinstance(values, list | tuple):
        for value in values:
            yield from _named(value, names)
