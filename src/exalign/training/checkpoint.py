"""What a resume needs: checkpoints that are complete or absent, and metrics without doubled steps.

A checkpoint is a folder `step-000123` with `state.pt` (tensors only, read with `weights_only=True`) and
`checkpoint.json`, which holds the hashes of `state.pt` and of the metrics so far. Nothing else is state: the learning
rate, the batches and the random numbers of a step are functions of (seed, step).
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, BinaryIO, TextIO

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)
from torch.optim import Optimizer

from exalign.errors import InputError
from exalign.storage import (
    atomic_path,
    fingerprint,
    fingerprint_path,
    read_sealed,
    remove_folder,
    write_sealed,
    write_text,
    writing,
)
from exalign.training.optimizer import whole_weights

KEEP = 2
"""Checkpoints kept: were the newest one damaged, the one before still serves."""
METRICS = "metrics.jsonl"
"""Lies beside the folder of checkpoints."""


@dataclass(frozen=True, slots=True)
class Position:
    """Where a run stands: steps done, steps skipped in a row just now, and the fingerprint of what it was made from.

    `settled` is the fingerprint of that part of it which a recovery may not change.
    """

    step: int
    skipped_in_a_row: int
    run: str
    settled: str = ""


def save_checkpoint(folder: Path, position: Position, model: nn.Module, optimizer: Optimizer, *, writes: bool) -> None:
    """Write `folder/step-NNNNNN` atomically and remove all but the last `KEEP`.

    Every process calls it, because sharded weights are gathered; the one with `writes` writes. Frozen weights, which
    come with the model that training starts from, are left out.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True, ignore_frozen_params=True)
    with whole_weights(optimizer):
        state = {
            "model": get_model_state_dict(model, options=options),
            "optimizer": get_optimizer_state_dict(model, optimizer, options=options),
        }
    if not writes:
        return
    with atomic_path(folder / f"step-{position.step:06d}") as temporary:
        temporary.mkdir(parents=True)
        with (temporary / "state.pt").open("wb") as stream:
            _save_tensors(state, stream)
        state_print = fingerprint_path(temporary / "state.pt")
        values = {**asdict(position), "state": state_print, "metrics": _metrics_print(folder, position.step)}
        write_sealed(temporary / "checkpoint.json", values)
    prune_checkpoints(folder, position.step, keep=KEEP)


def prune_checkpoints(folder: Path, step: int, *, keep: int) -> None:
    """Remove all checkpoints but the last `keep` of those up to `step`."""
    found = _checkpoints(folder)
    for other in found.keys() - [there for there in found if there <= step][-keep:]:
        remove_folder(found[other])


def last_checkpoint(folder: Path, *, before: int) -> int:
    """The step of the last checkpoint that stands before step `before`; 0 where there is none."""
    return max((step for step in _checkpoints(folder) if step < before), default=0)


def drop_checkpoints(folder: Path, *, after: int) -> None:
    """Remove the checkpoints after step `after`."""
    for step, path in _checkpoints(folder).items():
        if step > after:
            remove_folder(path)


def load_checkpoint(
    folder: Path,
    run: str,
    model: nn.Module,
    optimizer: Optimizer,
    *,
    settled: str = "",
    recovered_after: int = 0,
) -> Position:
    """Put the newest intact checkpoint into model and optimizer; `Position(0, 0, run, settled)` where there is none.

    A damaged checkpoint is passed over with a warning. One of another run (`run` differs) is an `InputError`, unless
    it stands at `recovered_after` or before and only what a recovery may change differs; so are metrics that are not
    those of the checkpoint.
    """
    for step, path in reversed(_checkpoints(folder).items()):
        try:
            position, metrics = _position(path, step)
            recovered = position.settled == settled != "" and position.step <= recovered_after
            state = _read_tensors(path / "state.pt") if position.run == run or recovered else None
        except (InputError, OSError) as error:
            last = last_checkpoint(folder, before=step)
            before = f"continues from step-{last:06d}" if last else "begins anew"
            said = str(error) if isinstance(error, InputError) else f"{path} cannot be read."
            warnings.warn(f"{path} is damaged; training {before}. ({said})", stacklevel=2)
            continue
        if state is None:
            raise InputError(
                f"{folder.parent} holds a run made with other settings or data; delete it or choose another folder."
            )
        if metrics not in (None, _metrics_print(folder, step)):
            raise InputError(
                f"{folder.parent / METRICS} is damaged: up to step {step} it is not what was written; restore it, or "
                f"delete {folder} to train anew."
            )
        _put(state, model, optimizer, path)
        return replace(position, run=run, settled=settled)
    return Position(0, 0, run, settled)


def _put(state: dict[str, Any], model: nn.Module, optimizer: Optimizer, path: Path) -> None:
    """Put weights and optimizer state in their places."""
    options = StateDictOptions(full_state_dict=True, ignore_frozen_params=True, strict=False)
    try:
        with whole_weights(optimizer):
            set_model_state_dict(model, state["model"], options=options)
            set_optimizer_state_dict(model, optimizer, state["optimizer"], options=options)
    except torch.OutOfMemoryError:
        raise
    except Exception as error:  # torch raises many kinds where names or shapes are others
        raise InputError(f"{path} does not fit the model ({type(error).__name__}); delete it to train anew.") from error
    for group in optimizer.param_groups:  # which torch returns as a list, so that the next checkpoint had other bytes
        group["betas"] = tuple(group["betas"])
    _forget_states_without_steps(model, optimizer, known=set(state["optimizer"]["state"]))


def _position(path: Path, step: int) -> tuple[Position, str | None]:
    """What `checkpoint.json` says, and its hash of the metrics; `InputError` where it or `state.pt` is damaged."""
    values = read_sealed(path / "checkpoint.json")
    found: list[Any] = [*map(values.get, ("step", "skipped_in_a_row", "run")), values.get("settled", "")]
    # A truth value is no number.
    if [*map(type, found)] != [int, int, str, str] or found[0] != step or found[1] < 0:
        raise InputError(f"{path / 'checkpoint.json'} is damaged.")
    if values.get("state") != fingerprint_path(path / "state.pt"):
        raise InputError(f"{path / 'state.pt'} is damaged.")
    return Position(*found), values.get("metrics")


def _metrics_print(checkpoints: Path, step: int) -> str:
    """A hash of the rows up to `step` in the metrics beside the folder of checkpoints."""
    return fingerprint("".join(rows_up_to(checkpoints.parent / METRICS, step)))


def _read_tensors(path: Path) -> dict[str, Any]:
    """The tensors of a checkpoint. `weights_only` builds tensors and plain containers and calls nothing else: a file
    that asks for more (a pickle can name any function) is an `InputError`, and what it asks for does not happen."""
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        if isinstance(state["model"], dict) and isinstance(state["optimizer"]["state"], dict):
            return state
    except Exception as error:  # the unpickler raises whatever a damaged file leads it to
        raise InputError(f"{path} cannot be read ({type(error).__name__}).") from None
    raise InputError(f"{path} holds no state of a training.")


def _forget_states_without_steps(model: nn.Module, optimizer: Optimizer, *, known: set[str]) -> None:
    """Loading gives every weight a state as after a first step; one that had not moved yet had none, and gets none."""
    names: dict[nn.Parameter, set[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(parameter, set()).add(name.removeprefix("module."))
    for parameter in set(names) & set(optimizer.state):
        if not names[parameter] & known:
            del optimizer.state[parameter]


class MetricsLog:
    """A file with one JSON row per step. Opening it keeps the rows up to `step`: later ones are about to come again.

    With `writes=False` it does nothing, for all processes but one. A disk that is full raises an `InputError`.
    """

    def __init__(self, path: Path, *, step: int, writes: bool) -> None:
        self.path = path
        self._stream: TextIO | None = None
        if writes:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_text(path, "".join(rows_up_to(path, step)))
            self._stream = path.open("a", encoding="utf-8")

    def append(self, row: dict[str, Any]) -> None:
        """Write one row through to the operating system, where a kill of this process cannot lose it."""
        if self._stream is not None:
            with writing(self.path):
                self._stream.write(json.dumps(row, allow_nan=False) + "\n")
                self._stream.flush()

    def sync(self) -> None:
        """Write the rows through to the disk; before a checkpoint that counts on them."""
        if self._stream is not None:
            with writing(self.path):
                os.fsync(self._stream.fileno())

    def __enter__(self) -> MetricsLog:
        return self

    def __exit__(self, *exception: object) -> None:
        if self._stream is not None:
            self._stream.close()


def rows_up_to(path: Path, step: float) -> Iterator[str]:
    """The lines of the file whose step is at most `step`; what a kill left of a last one is dropped."""
    if not path.exists():
        return
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        try:
            if json.loads(line)["step"] > step:
                return
        except (ValueError, KeyError, TypeError, RecursionError):
            return
        yield line + "\n"


def _save_tensors(state: dict[str, Any], stream: BinaryIO) -> None:
    try:
        torch.save(state, stream)
    except RuntimeError as error:
        # torch hides a full disk, and Ctrl-C, behind an error of its own; the cause is what callers can act on.
        if isinstance(error.__context__, OSError | KeyboardInterrupt):
            raise error.__context__ from error
        raise


def _checkpoints(folder: Path) -> dict[int, Path]:
    """By their steps, in order."""
    found = {int(path.name[5:]): path for path in folder.glob("step-*") if path.name[5:].isdigit()}
    return dict(sorted(found.items()))
