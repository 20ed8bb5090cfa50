"""What stands between a step and its two faults: a loss or gradient that is not finite, and memory that runs out.

A step that is not finite is not taken. Its batch is kept in the training's folder, in `skipped/step-NNNNNN.json`: each
group with its row, texts, token ids, rewards, log-probabilities and its own loss, computed alone and without gradient
under the weights of that step. A group whose own loss is not finite is to blame; where there is none, the gradient is.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from exalign.data.batching import Group
from exalign.errors import InputError
from exalign.models.memory import TooLargeError
from exalign.processes import gathered, number
from exalign.storage import write_json

KEEP_SKIPPED = 20
"""Batches of skipped steps that are kept. What a sick run skips is much of the same; `metrics.jsonl` counts it all."""


class NotFiniteError(InputError):
    """Loss or gradient was not finite for so many steps in a row that training was stopped."""


def smaller_budget(error: TooLargeError, token_budget: int, *, step: int, saved_at: int) -> int:
    """The token budget with which step `step` (from 1) is begun again; an `InputError` where nothing is left to divide.

    So it is with several processes: those that have room wait in a collective operation for the one that has none, and
    it cannot take back what they did.
    """
    if number() > 1:
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


def not_finite(step: int, in_a_row: int, skipped: Path, *, last_good: int) -> NotFiniteError:
    """The error that ends a training after step `step` (from 1), with the command that recovers it."""
    goes_on = f"goes on after step {last_good}, the last good checkpoint" if last_good else "starts over"
    return NotFiniteError(
        f"Training stopped at step {step}: loss or gradient was not finite {in_a_row} times in a row; the batches are "
        f"in {skipped}. The same command with a lower learning_rate or max_grad_norm and --recover {goes_on}; where "
        "rows are to blame, it goes on with a higher max_skipped_in_a_row."
    )


def _described(group: Group, loss: float, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    names = {"reward": "rewards", "reference_logprob": "reference_logp", "proposal_logprob": "proposal_logp"}
    values = {name: getattr(group, field) for name, field in names.items()}
    completions: list[dict[str, Any]] = [
        {"text": tokenizer.decode(ids), "token_ids": ids.tolist(), **_numbers(values, place)}
        for place, ids in enumerate(group.completion_ids)
    ]
    prompt = {"prompt": tokenizer.decode(group.prompt_ids), "prompt_ids": group.prompt_ids.tolist()}
    own = {"row": group.index, "loss": _json_number(loss), "finite": math.isfinite(loss)}
    return own | prompt | {"preferred": group.preferred, "completions": completions}


def _numbers(values: dict[str, Tensor | None], place: int) -> dict[str, float | str]:
    return {name: _json_number(float(tensor[place])) for name, tensor in values.items() if tensor is not None}


def _json_number(value: float) -> float | str:
    """The number, or its name where JSON has none: nan, inf, -inf."""
    return value if math.isfinite(value) else str(value)
