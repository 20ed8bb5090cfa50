"""Accelerate as the launcher set it up (one process, DDP, FSDP2), weights divided among processes, and whole copies of
them: to be saved, or to sample from.

Only the forward of the module that the loop calls gathers weights. What stands outside its blocks (embeddings, head,
final norm) is one group, gathered from the beginning of a pass to its end, because the tiled head uses its weight in
the backward pass as well; each block is gathered where it is used.
"""

from __future__ import annotations

import copy
import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from accelerate.tracking import get_available_trackers
from accelerate.utils import (
    AutocastKwargs,
    DistributedDataParallelKwargs,
    FullyShardedDataParallelPlugin,
    patch_environment,
)
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from exalign.device import device, is_on
from exalign.errors import InputError
from exalign.models.capability import base_of
from exalign.processes import join, several, shards


def make_accelerator(folder: Path, *, precision: str, trackers: Sequence[str], some_left_out: bool) -> Accelerator:
    """The accelerator of one training; `some_left_out` where some steps give some parameters no gradient."""
    missing = [name for name in trackers if name not in map(str, get_available_trackers())]
    if missing:
        raise InputError(f"trackers: {missing[0]!r} is not installed, or unknown to Accelerate.")
    on_cpu = device().type == "cpu"
    if on_cpu:  # Accelerate imports DeepSpeed where it finds it, which complains that it found no GPU
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    if precision == "bf16" and on_cpu and torch.backends.cpu.get_cpu_capability() == "AVX2":
        warnings.warn(
            "This processor has no bfloat16 instructions: precision bf16 takes about ten times as long as fp32 here. "
            "Leave precision out.",
            stacklevel=2,
        )
    join()
    AcceleratorState._reset_state()  # a process may train several models, each in its own precision
    # Accelerate itself shards one model in the life of a process, on accelerators only, and rounds what the module
    # returns to bf16, log-probabilities among them; so it does not hear of FSDP, and `shard` does that part.
    with patch_environment(accelerate_use_fsdp="false"):
        return Accelerator(
            cpu=several() and on_cpu,
            mixed_precision="bf16" if precision == "bf16" else "no",
            log_with=list(trackers) or None,
            project_dir=str(folder),
            kwargs_handlers=[
                DistributedDataParallelKwargs(find_unused_parameters=some_left_out),
                # Its cache would keep a copy of every block's weights that were gathered for a moment.
                AutocastKwargs(cache_enabled=not shards()),
            ],
        )


@dataclass(frozen=True, slots=True)
class Sharding:
    """`blocks`: each block that a transformers model names as indivisible is gathered on its own, not all together;
    `reshard_after_forward`: it is freed after its forward and gathered again for its backward.
    """

    blocks: bool
    reshard_after_forward: bool


def sharding_wanted() -> Sharding | None:
    """What the launcher's configuration says about sharding; None where it asks for none.

    What it asks for and cannot get is an `InputError`.
    """
    if not shards():
        return None
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise InputError("Only version 2 of FSDP is supported; set fsdp_version: 2 in accelerate's configuration.")
    plugin = FullyShardedDataParallelPlugin()
    unsupported = {
        "fsdp_cpu_ram_efficient_loading": plugin.cpu_ram_efficient_loading,
        "fsdp_activation_checkpointing": plugin.activation_checkpointing,
        "fsdp_offload_params": is_on("FSDP_OFFLOAD_PARAMS"),
    }
    for name in (name for name, asked in unsupported.items() if asked):
        instead = "; gradient_checkpointing in the recipe does that" if "checkpointing" in name else ""
        said = f"set it to false in accelerate's configuration, or give --{name} false"
        raise InputError(f"{name} is not supported; {said}{instead}.")
    if os.environ.get("FSDP_AUTO_WRAP_POLICY", "NO_WRAP") not in ("NO_WRAP", "TRANSFORMER_BASED_WRAP"):
        raise InputError("fsdp_auto_wrap_policy: only TRANSFORMER_BASED_WRAP and NO_WRAP are supported.")
    if not torch.distributed.is_initialized() and not several():
        return None  # nobody to share with
    return Sharding(
        blocks=plugin.auto_wrap_policy is not None, reshard_after_forward=bool(plugin.reshard_after_forward)
    )


def shard(module: nn.Module, device: torch.device, sharding: Sharding) -> None:
    """Divide the weights of `module` among all processes, in place; afterwards they are DTensors on `device`.

    Weights, gradients and their sums stay in the weights' own type, so that precision is what autocast makes it, as in
    one process.
    """
    # Nothing here is changed in place after it was returned.
    warnings.filterwarnings("ignore", message=r"FSDP2-wrapped module .* returned a view tensor")
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    indivisible = {name for part in module.children() for name in base_of(part)._no_split_modules or ()}
    for inner in list(module.modules()):
        if sharding.blocks and type(inner).__name__ in indivisible:
            fully_shard(inner, mesh=mesh, reshard_after_forward=sharding.reshard_after_forward)
    fully_shard(module, mesh=mesh, reshard_after_forward=False)


class Whole:
    """Access to a module with all its weights, whether it is sharded by now or not. To be made before it is sharded.

    Where weights are going to be sharded it keeps the module's structure without them, because a sharded module cannot
    be copied. Every process has to open a context of its, for gathering is a collective operation.
    """

    def __init__(self, module: nn.Module) -> None:
        self._module = module
        if not shards():
            return
        names: dict[nn.Parameter, str] = {}
        self._tied: dict[str, str] = {}
        for name, parameter in module.named_parameters(remove_duplicate=False):
            first = names.setdefault(parameter, name)
            if first != name:
                self._tied[name] = first
        # What the copy finds in its memo it does not copy.
        memo = {id(p): nn.Parameter(p.detach().to("meta"), requires_grad=p.requires_grad) for p in names}
        self._empty: Any = copy.deepcopy(module, memo)

    def on_leader(self) -> AbstractContextManager[Any]:
        """A sharded module with whole weights on the leader's CPU, None on the others; another one as it is."""
        return self._filled(cpu=True)

    def everywhere(self) -> AbstractContextManager[Any]:
        """A sharded module with whole weights on the device of every process; another one as it is."""
        return self._filled(cpu=False)

    @contextmanager
    def _filled(self, *, cpu: bool) -> Iterator[Any]:
        if not isinstance(self._module, FSDPModule):
            yield self._module
            return
        state = get_model_state_dict(self._module, options=StateDictOptions(full_state_dict=True, cpu_offload=cpu))
        if not state:
            yield None
            return
        before = dict(self._empty.named_parameters(remove_duplicate=False))
        try:
            self._empty.load_state_dict(state, assign=True)
            for name, first in self._tied.items():
                _put(self._empty, name, self._empty.get_parameter(first))
            self._empty.to(next(self._empty.parameters()).device)  # the buffers that no state holds
            yield self._empty
        finally:
            for name, parameter in before.items():
                _put(self._empty, name, parameter)


def whole_number(value: Tensor) -> float:
    """A number that may be divided among processes, as every process's own."""
    return float(value.full_tensor() if hasattr(value, "full_tensor") else value)


def _put(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
    owner, _, last = name.rpartition(".")
    setattr(module.get_submodule(owner), last, parameter)
