"""What stands between a step and its two faults, a loss or gradient that is not finite and memory that runs out.

A step that is not finite is not taken. Its batch is kept in the training's folder, in `skipped/step-NNNNNN.json`: each
group with its row, texts, token ids, rewards, log-probabilities and its own loss, computed alone and without gradient
under the weights of that step. A group whose own loss is not finite is to blame; where there is none, the gradient is.

How a training that stopped goes on: everything in a step is a function of (seed, step), so it would come to the same
end under the same settings. What helps is a lower learning rate or clipping, `Settings.step_sizes`. Skipped steps move
no weight: all of them failed on the weights that the last step before them made. The last good checkpoint is one from
before that step, when a loss was still finite.

`stopped.json` says where and why a training stopped. `add_recovery` enters it in `recoveries.json`, which lists every
recovery with the settings before and after. A model that was recovered is not that of its final settings alone, and
this list is what tells them apart.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from exalign.data.batching import Group
from exalign.errors import InputError
from exalign.models.memory import TooLargeError
from exalign.processes import gathered, several
from exalign.storage import read_json, read_object, write_json
from exalign.training.checkpoint import METRICS, drop_checkpoints, rows_up_to
from exalign.training.train_settings import TrainSettings

KEEP_SKIPPED = 20
"""Batches of skipped steps that are kept. What a sick run skips is much of the same; `metrics.jsonl` counts it all."""


class NotFiniteError(InputError):
    """Loss or gradient was not finite for so many steps in a row that training was stopped."""


def smaller_budget(error: TooLargeError, token_budget: int, *, step: int, saved_at: int) -> int:
    """The token budget with which step `step` (from 1) is begun again; an `InputError` where nothing is left to divide.

    So it is with several processes: those that have room wait in a collective operation for the one that has none, and
    it cannot take back what they did.
    """
    if several():
        raise InputError(
            f"Out of memory in step {step}: {error}. Several processes cannot begin a step again; give the same "
            f"command with a token_budget below {token_budget}, or gradient_checkpointing, and it goes on after step "
            f"{saved_at}."
        )
    return error.smaller(token_budget)


def keep_skipped(
    folder: Path,
    row: dict[str, Any],
    groups: Sequence[Group],
    loss_of: Callable[[Group], Tensor],
    tokenizer: PreTrainedTokenizerBase,
    *,
    writes: bool,
) -> str:
    """Write the batch of a skipped step, whose metrics are `row`, to `folder`; return the sentence that says so.

    Every process calls it and computes every group, because sharded weights are gathered for it; the one with `writes`
    writes. At most `KEEP_SKIPPED` batches are kept: no more are computed then, and the sentence says that too.
    """
    path = folder / f"step-{row['step']:06d}.json"
    room = path.exists() or len(list(folder.glob("step-*.json"))) < KEEP_SKIPPED
    what = "loss" if row["loss"] is None else "gradient"
    said = f"step {row['step']} is not taken: its {what} is not finite"
    if not gathered(room)[0]:
        return f"{said}; {folder} is full, so its batch is not kept"
    with torch.no_grad():
        losses = [float(loss_of(group)) for group in groups]
    kept = {name: row[name] for name in ("step", "loss", "grad_norm", "learning_rate")} | {"not_finite": what}
    described = [_described(group, loss, tokenizer) for group, loss in zip(groups, losses, strict=True)]
    if writes:
        write_json(path, kept | {"groups": described})
    rows = [str(group.index) for group, loss in zip(groups, losses, strict=True) if not math.isfinite(loss)]
    more = f" and {len(rows) - 8} more" if len(rows) > 8 else ""
    blamed = f"that of row {', '.join(rows[:8])}{more} is not" if rows else "the loss of every row is"
    return f"{said} ({blamed}); see {path}"


def not_finite(step: int, in_a_row: int, skipped: Path, *, last_good: int, all_steps: bool) -> NotFiniteError:
    """The error that ends a training after step `step` (from 1), with the command that recovers it; `all_steps` where
    there was no other step, so that the weights are those that it began with.
    """
    if all_steps:
        return NotFiniteError(
            f"No step was taken: loss or gradient was not finite in all {in_a_row} of them; the batches are in "
            f"{skipped}. Look there whether rows are to blame; where none is, the weights that training starts from "
            "are not finite, or learning_rate or max_grad_norm has to be lowered (then pass --recover)."
        )
    goes_on = (
        f"--recover goes on after step {last_good}, the last good checkpoint" if last_good else "--recover starts over"
    )
    if re.fullmatch(r"at-\d+", skipped.parent.name):  # of a sweep, whose trainings differ in nothing but its setting
        goes_on = "--redo trains the sweep anew"
    return NotFiniteError(
        f"Training stopped at step {step}: loss or gradient was not finite {in_a_row} times in a row; the batches are "
        f"in {skipped}. The same command with a lower learning_rate or max_grad_norm and {goes_on}; where rows are to "
        "blame, it goes on with a higher max_skipped_in_a_row."
    )


def interrupted(folder: Path, step: int, num_steps: int, *, saved_at: int) -> KeyboardInterrupt:
    """Ctrl-C after step `step` (from 1), with the sentence that says what stands; what is printed is that alone."""
    stands = f"goes on after step {saved_at}, where its last checkpoint stands" if saved_at else "begins it again"
    return KeyboardInterrupt(f"Interrupted: {folder.name} after step {step} of {num_steps}. The same command {stands}.")


def steps_not_taken(folder: Path) -> int:
    """How many steps of the training in `folder` were skipped, because loss or gradient was not finite."""
    return sum(row.get("skipped") == 1 for row in map(json.loads, rows_up_to(folder / METRICS, math.inf)))


def _described(group: Group, loss: float, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    values = {
        "reward": group.rewards,
        "reference_logprob": group.reference_logp,
        "proposal_logprob": group.proposal_logp,
    }
    return {
        "row": group.index,
        "loss": _json_number(loss),
        "finite": math.isfinite(loss),
        "prompt": tokenizer.decode(group.prompt_ids),
        "prompt_ids": group.prompt_ids.tolist(),
        "preferred": group.preferred,
        "completions": [
            {"text": tokenizer.decode(ids), "token_ids": ids.tolist()}
            | {name: _json_number(float(known[place])) for name, known in values.items() if known is not None}
            for place, ids in enumerate(group.completion_ids)
        ],
    }


def _json_number(value: float) -> float | str:
    """The number, or its name where JSON has none: nan, inf, -inf."""
    return value if math.isfinite(value) else str(value)


def record_stop(folder: Path, reason: str, settings: TrainSettings, *, after_step: int) -> None:
    """Write `stopped.json`."""
    values = {"after_step": after_step, "reason": reason, "settings": settings.step_sizes()}
    write_json(folder / "stopped.json", values)


def forget_stop(folder: Path) -> None:
    """Remove `stopped.json`: the training goes on, and may stop elsewhere."""
    (folder / "stopped.json").unlink(missing_ok=True)


def recoveries(folder: Path) -> list[dict[str, Any]]:
    """What was recovered, in order: `after_step`, `reason`, the `settings` from there on and those that `were`."""
    path = folder / "recoveries.json"
    found = read_json(path) if path.exists() else []
    if not isinstance(found, list) or not all(_is_recovery(entry) for entry in found):
        raise InputError(f"{path} is damaged: it is no list of recoveries.")
    return found


def next_recovery(folder: Path, now: Mapping[str, Any]) -> dict[str, Any] | None:
    """What recovery with these `step_sizes` would add; None where none stopped. `InputError` where nothing differs."""
    path = folder / "stopped.json"
    if not path.exists():
        return None
    stopped = read_object(path)
    entry = {name: stopped.get(name) for name in ("after_step", "reason")}
    entry |= {"were": stopped.get("settings"), "settings": dict(now)}
    if not _is_recovery(entry):
        raise InputError(f"{path} is damaged; delete it and run the stage again.")
    if entry["settings"] == entry["were"]:
        raise InputError(f"{folder} stopped with these very settings, and would again; lower {' or '.join(now)}.")
    return entry


def add_recovery(folder: Path, entry: dict[str, Any]) -> None:
    """Write the entry into `recoveries.json` and drop later checkpoints; the training, as it goes on, forgets the stop.

    Where no checkpoint is left, nothing is left of the settings before, and there is nothing to tell.
    """
    if entry["after_step"]:
        write_json(folder / "recoveries.json", extended(recoveries(folder), entry))
    drop_checkpoints(folder / "checkpoints", after=entry["after_step"])


def extended(before: list[dict[str, Any]], entry: dict[str, Any]) -> list[dict[str, Any]]:
    """The list with the entry as its last, once, however often a process that does so is killed."""
    return before if before[-1:] == [entry] else [*before, entry]


def recovered_after(folder: Path, settings: TrainSettings) -> int:
    """Up to which step a checkpoint may have been made with other `step_sizes` than these; 0: none may."""
    last = recoveries(folder)[-1:]
    return max((entry["after_step"] for entry in last if entry["settings"] == settings.step_sizes()), default=0)


def with_recoveries(card: str, folder: Path) -> str:
    """A model card that tells of every recovery: after which step training went on, and with what."""
    sentences = []
    for entry in recoveries(folder):
        now, before = entry["settings"], entry["were"]
        changes = [f"{name} {now[name]} (was {before.get(name)})" for name in now if now[name] != before.get(name)]
        sentences.append(
            f"Training went on after step {entry['after_step']} with {', '.join(changes)}, because loss or gradient "
            "had not been finite.\n"
        )
    return "\n".join([card, *sentences])


def _is_recovery(entry: Any) -> bool:
    if not isinstance(entry, dict) or type(entry.get("after_step")) is not int or entry["after_step"] < 0:
        return False
    return isinstance(entry.get("were"), dict) and isinstance(entry.get("settings"), dict)
