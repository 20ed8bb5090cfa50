"""Weights divided among processes (FSDP2), and whole copies of them: to be saved, or to sample from.

Only the forward of the module that the loop calls gathers weights. What stands outside its blocks (embeddings, head,
final norm) is one group, gathered from the beginning of a pass to its end, because the tiled head uses its weight in
the backward pass as well; each block is gathered where it is used.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard

from exalign.models.packing import base_of
from exalign.processes import shards


@dataclass(frozen=True, slots=True)
class Sharding:
    """`blocks`: each block that a transformers model names as indivisible is gathered on its own, not all together;
    `reshard_after_forward`: it is freed after its forward and gathered again for its backward.
    """

    blocks: bool
    reshard_after_forward: bool


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


def is_sharded(module: nn.Module) -> bool:
    """Whether `shard` has been here."""
    return isinstance(module, FSDPModule)


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

    @contextmanager
    def on_leader(self) -> Iterator[Any]:
        """A sharded module with whole weights on the leader's CPU, None on the others; another one as it is."""
        with self._filled(cpu=True) as module:
            yield module

    @contextmanager
    def everywhere(self) -> Iterator[Any]:
        """A sharded module with whole weights on the device of every process; another one as it is."""
        with self._filled(cpu=False) as module:
            yield module

    @contextmanager
    def _filled(self, *, cpu: bool) -> Iterator[Any]:
        if not is_sharded(self._module):
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
    whole = value.full_tensor() if hasattr(value, "full_tensor") else value
    return float(whole)


def _put(module: nn.Module, name: str, parameter: nn.Parameter) -> None:
    owner, _, last = name.rpartition(".")
    setattr(module.get_submodule(owner), last, parameter)
