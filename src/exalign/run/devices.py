"""What a plan is reckoned for: devices by their public specifications, and what is assumed of data and devices.

Rates are dense (no structured sparsity) and with accumulation in float32. `fp32` is the rate without TF32, because
torch multiplies float32 matrices exactly unless it is told otherwise.
"""

from __future__ import annotations

import os
from dataclasses import dataclass

from pydantic import Field

from exalign.errors import InputError
from exalign.run.recipe import nearest
from exalign.settings import Settings


class Assumptions(Settings):
    """Lengths and sizes that the recipe does not know, and how much of a device's limits is reached.

    Lengths are means. Memory is reserved for the recipe's maxima, time is spent on the means.
    """

    prompt_tokens: int | None = Field(
        None, gt=0, description="mean tokens of a prompt; default: data.*.prompt_tokens, else half of max_prompt_tokens"
    )
    completion_tokens: int | None = Field(
        None, gt=0, description="mean tokens of a completion; default: half of the longest that is allowed"
    )
    prompts: int | None = Field(
        None, gt=0, description="rows of every data set but data.evaluation; default: counted, or the published size"
    )
    training_share: float = Field(
        0.4, gt=0, le=1, description="share of the device's peak that necessary work reaches in training and scoring"
    )
    sampling_share: float = Field(
        0.1, gt=0, le=1, description="the same in sampling, whose steps are small; exalign bench measures both"
    )
    memory_share: float = Field(
        0.9, gt=0, le=1, description="share of the memory that tensors may take; the rest is context and fragments"
    )
    gflops: float | None = Field(None, gt=0, description="cpu only: peak GFLOP/s of matrix products (exalign bench)")
    memory: float | None = Field(None, gt=0, description="cpu only: GB of memory; default: this machine's")


@dataclass(frozen=True, slots=True)
class Device:
    """`memory` in bytes, `bf16` and `fp32` in operations/s of matrix products."""

    name: str
    memory: float
    bf16: float
    fp32: float
    specification: str


def _gpu(name: str, gigabytes: float, bf16: float, fp32: float, source: str) -> Device:
    """Memory in GB, rates in TFLOP/s."""
    return Device(name, gigabytes * 1e9, bf16 * 1e12, fp32 * 1e12, source)


GPUS = {
    gpu.name: gpu
    for gpu in (
        _gpu("A100-40", 40, 312, 19.5, "NVIDIA A100 datasheet, SXM4 40 GB"),
        _gpu("A100-80", 80, 312, 19.5, "NVIDIA A100 datasheet, SXM4 80 GB"),
        _gpu("H100", 80, 989, 67, "NVIDIA H100 datasheet, SXM5 80 GB (1,979 with sparsity, halved)"),
        _gpu("H200", 141, 989, 67, "NVIDIA H200 datasheet, SXM5 141 GB (1,979 with sparsity, halved)"),
        _gpu("L40S", 48, 362, 91.6, "NVIDIA L40S datasheet"),
        _gpu("RTX-4090", 24, 165.2, 82.6, "NVIDIA Ada GPU architecture whitepaper, RTX 4090"),
    )
}


def find_device(name: str, assumed: Assumptions) -> Device:
    """The device of this name, in any case and with spaces or underscores for dashes.

    `cpu` takes its rate from `assumed.gflops`. An unknown name, a cpu without a rate, or a cpu's numbers given for
    another device, is an `InputError`.
    """
    wanted = name.strip().replace(" ", "-").replace("_", "-").lower()
    if wanted == "cpu":
        return _cpu(assumed)
    for field in ("gflops", "memory"):
        if getattr(assumed, field) != Assumptions.model_fields[field].default:
            raise InputError(f"--{field} is that of a cpu, and {name} has its own; remove it, or give --gpu cpu.")
    for gpu in GPUS.values():
        if gpu.name.lower() == wanted:
            return gpu
    known = {candidate.lower(): candidate for candidate in (*GPUS, "cpu")}
    said = nearest(wanted, list(known))
    for low, proper in known.items():
        said = said.replace(f"{low}?", f"{proper}?") if said.startswith("did you mean") else said.replace(low, proper)
    raise InputError(f"--gpu {name} is not a device whose specification is known; {said}")


def _cpu(assumed: Assumptions) -> Device:
    if assumed.gflops is None:
        raise InputError(
            "--gpu cpu needs --gflops, the peak of its matrix products; `exalign bench MODEL` measures it."
        )
    memory = assumed.memory * 1e9 if assumed.memory else float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    rate = assumed.gflops * 1e9
    return Device("cpu", memory, rate, rate, "--gflops, --memory")


@dataclass(frozen=True, slots=True)
class Machine:
    """`count` equal devices, and what is assumed about them."""

    device: Device
    count: int
    assumed: Assumptions

    @property
    def usable(self) -> float:
        """Bytes of one device that tensors may take."""
        return self.device.memory * self.assumed.memory_share

    @property
    def sizing(self) -> float | None:
        """Bytes that sizes left to choose follow from; None for a CPU (`models.sizes`)."""
        return None if self.device.name == "cpu" else self.device.memory

    def rate(self, precision: str, *, sampling: bool = False) -> float:
        """Operations per second of necessary work that a device is assumed to do in `fp32` or `bf16`."""
        share = self.assumed.sampling_share if sampling else self.assumed.training_share
        return (self.device.bf16 if precision == "bf16" else self.device.fp32) * share
