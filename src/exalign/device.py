"""Where a run computes: the accelerator that this machine can use, or the CPU and how many of its threads."""

from __future__ import annotations

import logging
import os
import time
import warnings
from functools import cache
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from torch import Tensor

_log = logging.getLogger(__name__)

_SIDES, _PRODUCTS, _ROUNDS = (192, 256, 1024), 6, 5  # rows × inner × columns of a trial product: some 10 ms a round
_ALIGNED = 16  # bytes: what vectorised loads ask of the beginning of a tensor
_kept: dict[str, int | None] = {}
_WORTHWHILE = 0.85  # of the seconds that torch's own number of threads takes; less is noise


@cache
def device() -> torch.device:
    """The accelerator, where torch was built for one and its driver works, else the CPU.

    Said once where there is none although torch was built for one. ACCELERATE_USE_CPU asks for the CPU. So does Apple's
    GPU (MPS): it has no float64, in which tokens are drawn and probabilities summed, and no kernel of FlexAttention.
    """
    import torch

    cpu, built = torch.device("cpu"), torch.accelerator.current_accelerator()
    if built is None or is_on("ACCELERATE_USE_CPU"):
        return cpu
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        usable = torch.accelerator.current_accelerator(check_available=True)
    if usable is None:
        reason = f" ({str(said[0].message).splitlines()[0].rstrip('.')})" if said else ""
        _log.warning("There is no usable GPU driver%s; running on the CPU.", reason)
    elif usable.type == "mps":
        os.environ["ACCELERATE_USE_CPU"] = "true"  # for Accelerate, which would choose it
        _log.warning("Apple's GPU (MPS) has no float64, which sampling needs; running on the CPU.")
        return cpu
    return usable or cpu


def is_on(name: str) -> bool:
    """Whether this variable of the environment says yes, as Accelerate reads it."""
    return os.environ.get(name, "").lower() in ("y", "yes", "t", "true", "on", "1")


def to_device(target: torch.device, *tensors: Tensor) -> list[Tensor]:
    """CPU tensors on `target`, in one copy for all of them; on a CPU they are themselves.

    A copy costs a launch, and one from ordinary memory makes the host wait; to CUDA they go from pinned memory.
    """
    import torch

    if target.type == "cpu":
        return list(tensors)
    ends, total = [], 0
    for tensor in tensors:
        total += -(-tensor.nbytes // _ALIGNED) * _ALIGNED
        ends.append(total)
    packed = torch.empty(total, dtype=torch.uint8, pin_memory=target.type == "cuda")
    spans = [slice(end, end + tensor.nbytes) for end, tensor in zip([0, *ends], tensors, strict=False)]
    for span, tensor in zip(spans, tensors, strict=True):
        packed[span].view(tensor.dtype).copy_(tensor.flatten())
    there = packed.to(target, non_blocking=True)
    return [there[span].view(tensor.dtype).view(tensor.shape) for span, tensor in zip(spans, tensors, strict=True)]


def device_memory(target: torch.device) -> int | None:
    """Bytes of an accelerator's memory, from which sizes follow; None for a CPU, and where its driver does not say.

    In a run that goes on they are those of the device it began on: see `keep_memory`.
    """
    import torch

    if target.type == "cpu":
        return None
    properties = getattr(getattr(torch, target.type), "get_device_properties", None)
    return None if properties is None else _kept.get("memory") or int(properties(target).total_memory)


def keep_memory(number: int | None) -> None:
    """Let sizes follow from so many bytes in this process, whatever the device has; None: from what it has."""
    _kept["memory"] = number


def wait(target: torch.device) -> None:
    """Until all that was asked of `target` is done; a CPU is never behind."""
    import torch

    if target.type != "cpu":
        getattr(torch, target.type).synchronize()


def choose_threads(wanted: int | None = None) -> str | None:
    """Set the number of CPU threads for this process; what to say about it, None where it is torch's own number.

    `wanted`: the number that a setting asks for, or that a run began with (sums in another number of threads may round
    differently, so a run that goes on bit for bit needs the same). Without it OMP_NUM_THREADS or MKL_NUM_THREADS decide
    where they are set, and else the fastest in small products now: threads that wait for each other on processors that
    other work keeps busy can make many slower than one. On an accelerator torch's own number stays.
    """
    import torch

    own = torch.get_num_threads()
    if wanted is not None:
        torch.set_num_threads(wanted)
        return None if wanted == own else f"{_threads(wanted)} of the CPU, as was asked."
    if own == 1 or {"OMP_NUM_THREADS", "MKL_NUM_THREADS"} & set(os.environ) or device().type != "cpu":
        return None
    seconds = _seconds_by_threads(own)
    best = min(seconds, key=seconds.__getitem__)
    if seconds[best] > _WORTHWHILE * seconds[own]:
        best = own
    torch.set_num_threads(best)
    if best == own:
        return None
    return f"{_threads(best)} of the CPU: {seconds[own] / seconds[best]:.1f} times as fast now as {_threads(own)}."


def _threads(number: int) -> str:
    return f"{number} thread{'s' if number > 1 else ''}"


def _seconds_by_threads(most: int) -> dict[int, float]:
    """Best seconds of a few small products with 1, 2, 4, … and `most` threads, in turns."""
    import torch

    numbers = sorted({min(2**power, most) for power in range(most.bit_length() + 1)})
    rows, inner, columns = _SIDES
    left, right = torch.ones(rows, inner), torch.ones(inner, columns)
    best = dict.fromkeys(numbers, float("inf"))
    for round_ in range(_ROUNDS + 1):  # the first starts the threads
        for threads in numbers:
            torch.set_num_threads(threads)
            started = time.perf_counter()
            for _ in range(_PRODUCTS):
                torch.softmax(left @ right, dim=1)
            if round_:
                best[threads] = min(best[threads], time.perf_counter() - started)
    return best
