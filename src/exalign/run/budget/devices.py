"""Devices by their public specifications: memory, bandwidth, and the peak rate of dense matrix products.

Rates are dense (no structured sparsity) and with accumulation in float32. `fp32` is the rate without TF32, because
torch multiplies float32 matrices exactly unless it is told otherwise.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Literal

from exalign.errors import InputError
from exalign.run.budget.assumptions import Assumptions
from exalign.run.recipe import nearest

NODE = 8
"""Devices that the link connects; beyond them the network does."""


@dataclass(frozen=True, slots=True)
class Device:
    """`memory` in bytes; `bandwidth`, `link` in bytes/s; `bf16`, `fp32` in operations/s. `link` is one direction."""

    name: str
    memory: float
    bandwidth: float
    bf16: float
    fp32: float
    link: float
    specification: str

    def peak(self, precision: Literal["fp32", "bf16"]) -> float:
        """Operations per second of matrix products in this precision."""
        return self.bf16 if precision == "bf16" else self.fp32


def _gpu(name: str, gigabytes: float, bandwidth: float, rates: tuple[float, float], link: float, source: str) -> Device:
    """Memory in GB, bandwidth and link in GB/s, rates (bf16, fp32) in TFLOP/s."""
    return Device(name, gigabytes * 1e9, bandwidth * 1e9, rates[0] * 1e12, rates[1] * 1e12, link * 1e9, source)


GPUS = {
    gpu.name: gpu
    for gpu in (
        _gpu("A100-40", 40, 1555, (312, 19.5), 300, "NVIDIA A100 datasheet, SXM4 40 GB"),
        _gpu("A100-80", 80, 2039, (312, 19.5), 300, "NVIDIA A100 datasheet, SXM4 80 GB"),
        _gpu("H100", 80, 3350, (989, 67), 450, "NVIDIA H100 datasheet, SXM5 80 GB (1,979 with sparsity, halved)"),
        _gpu("H200", 141, 4800, (989, 67), 450, "NVIDIA H200 datasheet, SXM5 141 GB (1,979 with sparsity, halved)"),
        _gpu("L40S", 48, 864, (362, 91.6), 32, "NVIDIA L40S datasheet; PCIe 4.0 x16"),
        _gpu("RTX-4090", 24, 1008, (165.2, 82.6), 32, "NVIDIA Ada GPU architecture whitepaper, RTX 4090; PCIe 4.0 x16"),
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
    for field in ("gflops", "memory", "bandwidth"):
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
    bandwidth, rate = assumed.bandwidth * 1e9, assumed.gflops * 1e9
    return Device("cpu", memory, bandwidth, rate, rate, assumed.network * 1e9, "--gflops, --memory, --bandwidth")


@dataclass(frozen=True, slots=True)
class Machine:
    """`count` equal devices, in nodes of eight, and what is assumed about them."""

    device: Device
    count: int
    assumed: Assumptions

    @property
    def usable(self) -> float:
        """Bytes of one device that tensors may take."""
        return self.device.memory * self.assumed.memory_share

    @property
    def bandwidth(self) -> float:
        """Bytes per second that a device is assumed to read and write."""
        return self.device.bandwidth * self.assumed.bandwidth_share

    def rate(self, precision: Literal["fp32", "bf16"]) -> float:
        """Operations per second of necessary work that a device is assumed to do."""
        return self.device.peak(precision) * self.assumed.training_share

    def gather(self, size: float) -> float:
        """Seconds of an all-gather or a reduce-scatter of `size` bytes, in the node and then between nodes.

        With n devices in a node and m nodes: (n − 1) / n · size / link + (m − 1) / m · size / n / network.
        """
        inside = min(self.count, NODE)
        nodes = -(-self.count // NODE)
        between = (nodes - 1) / nodes * size / inside / (self.assumed.network * 1e9)
        return (inside - 1) / inside * size / self.device.link + between

    def all_reduce(self, size: float) -> float:
        """Seconds to add up `size` bytes over all devices: a reduce-scatter and an all-gather."""
        return 2 * self.gather(size)
