"""Out of memory: told from other errors, and met with smaller micro-batches.

Whole groups are computed together up to a token budget, which changes memory and speed and no result beyond rounding.
So where a micro-batch does not fit, the budget is halved and the work is done again; only a group that does not even
fit alone ends it.
"""

from __future__ import annotations

import gc
import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

import torch

from exalign.data.batching import Group, microbatches
from exalign.device import device
from exalign.errors import InputError, first_line

Result = TypeVar("Result")
_log = logging.getLogger(__name__)


class TooLargeError(Exception):
    """A micro-batch of so many groups and tokens did not fit in memory. While it lives, its traceback holds memory."""

    def __init__(self, groups: Sequence[Group]) -> None:
        super().__init__(f"{sum(group.num_tokens for group in groups):,} tokens at once do not fit in memory")
        self.rows = [group.index for group in groups]
        self.tokens = sum(group.num_tokens for group in groups)

    def smaller(self, token_budget: int) -> int:
        """The budget halved, until this micro-batch is divided; an `InputError` where it is a single group.

        >>> one = torch.ones(300)
        >>> TooLargeError([Group(7, one, (one,)), Group(8, one, (one,))]).smaller(4096)
        1024
        """
        if len(self.rows) == 1:
            raise InputError(
                f"Row {self.rows[0]} alone, {self.tokens:,} tokens with all its completions, does not fit in memory; "
                "set gradient_checkpointing where it is trained on, train with LoRA, or cut texts shorter."
            )
        while token_budget >= self.tokens:
            token_budget //= 2
        return token_budget


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed: on an accelerator, or on a CPU whose process has a limit (`ulimit -v`).

    The CPU's allocator has no class of errors of its own. Without a limit the system ends the process instead.
    """
    cpu = isinstance(error, RuntimeError) and "DefaultCPUAllocator: can't allocate memory" in str(error)
    return cpu or isinstance(error, torch.OutOfMemoryError)


@contextmanager
def fitting(groups: Sequence[Group]) -> Iterator[None]:
    """Around computing these groups: `TooLargeError` where memory runs out."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        raise TooLargeError(groups) from None


@contextmanager
def room_for(what: str) -> Iterator[None]:
    """Around what cannot be done in smaller parts, named `what`: an `InputError` where memory runs out."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        why = ". ".join(first_line(error).split(". ")[:2])[:200].rstrip(".")
        raise InputError(
            f"{what}: memory ran out ({why}). What is finished stays. Less is taken with model.lora, a model's "
            "or a scorer's dtype: bfloat16, or a smaller model; exalign plan RECIPE says what each stage takes."
        ) from None


def release_memory() -> None:
    """Give back what caches hold; after the error is gone, whose traceback holds tensors."""
    gc.collect()
    if device().type != "cpu":
        getattr(torch, device().type).empty_cache()


def computed(
    work: Callable[[Sequence[Group]], Result], groups: Sequence[Group], *, token_budget: int
) -> Iterator[tuple[list[Group], Result]]:
    """`work(part)` for micro-batches of up to `token_budget` tokens, smaller ones after one that did not fit."""
    waiting = microbatches(groups, token_budget=token_budget)
    while waiting:
        try:
            with fitting(waiting[0]):
                result = work(waiting[0])
        except TooLargeError as error:
            token_budget = error.smaller(token_budget)
            _log.warning("%s; it goes on with at most %s.", error, f"{token_budget:,}")
        else:
            yield waiting.pop(0), result
            continue
        release_memory()
        waiting = microbatches([group for part in waiting for group in part], token_budget=token_budget)
