"""The processes of one run under `accelerate launch` or torchrun: the first leads, the others join it where all work.

What the leader says travels through the launcher's key-value store, so that a process which waits for hours neither
keeps its device busy nor runs into the time limit of a collective operation.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

from exalign.device import device, is_on
from exalign.errors import InputError

if TYPE_CHECKING:
    from torch.distributed import Store

Item = TypeVar("Item")

ALONE = timedelta(days=60)
"""How long the others wait for the leader, which prepares data and writes reports alone."""
TOGETHER = timedelta(hours=2)
"""How long a process waits in a collective operation, for example while the leader writes a model."""

_messages = itertools.count()


def several() -> bool:
    """Whether a launcher started other processes than this one."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1


def processes() -> int:
    """How many work together; 1 for one that has not met others."""
    import torch.distributed as dist

    return dist.get_world_size() if dist.is_initialized() else 1


def leads() -> bool:
    """Whether this is the process that prints, writes and carries out what needs one process only."""
    return not several() or int(os.environ.get("RANK", "0")) == 0


def shards() -> bool:
    """Whether the launcher's configuration asks for sharded weights (FSDP)."""
    return is_on("ACCELERATE_USE_FSDP")


def join() -> None:
    """Meet the other processes and take this process's own device; once, and nothing where it is alone.

    A launcher's configuration for what is not supported is an `InputError`.
    """
    for name in ("DeepSpeed", "Megatron-LM"):
        if is_on(f"ACCELERATE_USE_{name.upper().replace('-', '_')}"):
            raise InputError(
                f"Training under {name} is not supported; use FSDP2 (configs/accelerate/8gpu-fsdp2.yaml), which "
                "divides weights, gradients and optimizer states among the processes."
            )
    if several():
        from accelerate import PartialState

        PartialState(cpu=device().type == "cpu", timeout=TOGETHER)


@contextmanager
def leading() -> Iterator[None]:
    """Around the leader's work: when it ends or fails, the others hear of it."""
    try:
        join()
        yield
    except BaseException as error:
        _is_first_to_fail()  # before the others hear of it, so that the reason is given here
        _say({"failed": str(error) or type(error).__name__})
        raise
    _say({"done": True})
    _wait()


def call(name: str) -> None:
    """By the leader: ask the others to carry out what is called `name` with it."""
    _say({"name": name})


def calls() -> Iterator[str]:
    """By the others: the names that the leader calls, until it is done; where it failed, an `InputError` says so."""
    join()
    while True:
        key = _next_key()
        store = _store()
        store.wait([key], ALONE)
        message: dict[str, Any] = json.loads(store.get(key))
        if "failed" in message:
            raise InputError(message["failed"])
        if "done" in message:
            _wait()
            return
        yield message["name"]


@contextmanager
def failing() -> Iterator[bool]:
    """Around saying why this process ends: whether it is the one to say so, because no other failed before it.

    What the others could say would only follow from that. They wait until it is said, since the launcher ends all
    processes as soon as one has ended.
    """
    first = _is_first_to_fail()
    with suppress(RuntimeError):
        if not first:
            _store().wait(["said"], timedelta(seconds=10))
    try:
        yield first
    finally:
        with suppress(RuntimeError):
            if first and several():
                _store().set("said", "yes")


@cache
def _is_first_to_fail() -> bool:
    if not several():
        return True
    try:
        return _store().add("failures", 1) == 1
    except RuntimeError:  # the store went away with whatever failed first, or never was
        return leads()


def share_of(items: Sequence[Item]) -> Sequence[Item]:
    """This process's share: every R-th of the items."""
    import torch.distributed as dist

    return items[dist.get_rank() :: dist.get_world_size()] if dist.is_initialized() else items


def gathered(value: Item) -> list[Item]:
    """The values of all processes, in their order; every process calls it."""
    import torch.distributed as dist

    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def collected(value: Item) -> list[Item]:
    """The values of all processes, in their order, for the first one; none for the others. Every process calls it."""
    import torch.distributed as dist

    if not dist.is_initialized():
        return [value]
    values: list[Any] = [None] * dist.get_world_size() if leads() else []
    dist.gather_object(value, values if leads() else None)
    return values


def in_order(shares: Sequence[Sequence[Item]]) -> list[Item]:
    """What `share_of` divided, put together again.

    >>> in_order([["a", "c"], ["b"]])
    ['a', 'b', 'c']
    """
    longest = max(map(len, shares), default=0)
    return [share[place] for place in range(longest) for share in shares if place < len(share)]


def _say(message: dict[str, Any]) -> None:
    if several():
        with suppress(RuntimeError):  # where nobody is left to hear it
            _store().set(_next_key(), json.dumps(message))


def _wait() -> None:
    if several():
        from accelerate import PartialState

        PartialState().wait_for_everyone()


def _next_key() -> str:
    """Every process counts the leader's messages, so that each is read once."""
    return f"message {next(_messages)}"


@cache
def _store() -> Store:
    """A client of the store where the launcher's processes meet."""
    from torch.distributed import PrefixStore, TCPStore

    host, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    client = TCPStore(host, port, is_master=False, timeout=timedelta(seconds=10), wait_for_workers=False)
    return PrefixStore(f"exalign {os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}", client)
