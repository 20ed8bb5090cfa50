"""Accelerate as the launcher set it up: one process or several, DDP, FSDP2 or ZeRO."""

from __future__ import annotations

import os
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.util import find_spec
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
from torch.optim import Optimizer

from exalign.errors import InputError
from exalign.processes import join, on_cpu, several, shards
from exalign.training.sharding import Sharding
from exalign.training.zero import ZeroOptimizer

_TRUE = ("1", "true")


class ZeroAccelerator(Accelerator):
    """Accelerate, but what concerns gradients and the optimizer is DeepSpeed's engine's. One model in its life."""

    zero_stage = 2
    _optimizer: ZeroOptimizer

    def prepare(self, model: nn.Module, optimizer: Optimizer) -> tuple[nn.Module, Any]:
        """The engine, which takes the place of the model, and what takes that of the optimizer."""
        self._optimizer = ZeroOptimizer(model, optimizer, stage=self.zero_stage, bf16=self.mixed_precision == "bf16")
        return self._optimizer.engine, self._optimizer

    @contextmanager
    def no_sync(self, model: Any) -> Iterator[None]:
        """A pass that is not the last of its step."""
        model.set_gradient_accumulation_boundary(False)
        try:
            yield
        finally:
            model.set_gradient_accumulation_boundary(True)

    def backward(self, loss: Tensor, **kwargs: Any) -> None:
        self._optimizer.engine.backward(loss, **kwargs)

    def clip_grad_norm_(self, parameters: Any, max_norm: float, norm_type: int = 2) -> Tensor:
        return self._optimizer.clip(max_norm)

    def unwrap_model(self, model: nn.Module, *args: Any, **kwargs: Any) -> nn.Module:
        """The module, without what the engine hung on it: it is trained no more."""
        self._optimizer.release()
        return self._optimizer.module


def make_accelerator(folder: Path, *, precision: str, trackers: Sequence[str], some_left_out: bool) -> Accelerator:
    """The accelerator of one training; `some_left_out` where some steps give some parameters no gradient."""
    missing = [name for name in trackers if name not in map(str, get_available_trackers())]
    if missing:
        raise InputError(f"trackers: {missing[0]!r} is not installed, or unknown to Accelerate.")
    if on_cpu():  # Accelerate imports DeepSpeed where it finds it, which complains that it found no GPU
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    stage = zero_wanted()
    if stage is not None and some_left_out:
        raise InputError(
            "Steps in which some weights get no gradient are not supported under DeepSpeed; set critic_steps to 0, or "
            "train under FSDP2."
        )
    if precision == "bf16" and on_cpu() and torch.backends.cpu.get_cpu_capability() == "AVX2":
        warnings.warn(
            "This processor has no bfloat16 instructions: precision bf16 takes about ten times as long as fp32 here. "
            "Leave precision out.",
            stacklevel=2,
        )
    join()
    AcceleratorState._reset_state()  # a process may train several models, each in its own precision
    # Accelerate itself shards one model in the life of a process, on accelerators only, and rounds what the module
    # returns to bf16, log-probabilities among them; so it does not hear of FSDP, and `sharding` does that part.
    # Of DeepSpeed it knows one number of micro-batches for all steps; so it does not hear of that either.
    with patch_environment(accelerate_use_fsdp="false", accelerate_use_deepspeed="false"):
        accelerator = (Accelerator if stage is None else ZeroAccelerator)(
            cpu=several() and on_cpu(),
            mixed_precision="bf16" if precision == "bf16" else "no",
            log_with=list(trackers) or None,
            project_dir=str(folder),
            kwargs_handlers=[
                DistributedDataParallelKwargs(find_unused_parameters=some_left_out),
                # Its cache would keep a copy of every block's weights that were gathered for a moment.
                AutocastKwargs(cache_enabled=not shards()),
            ],
        )
    if isinstance(accelerator, ZeroAccelerator):
        accelerator.zero_stage = stage or 0
    return accelerator


def sharding_wanted() -> Sharding | None:
    """What the launcher's configuration says about sharding; None where it asks for none.

    What it asks for and cannot get is an `InputError`.
    """
    if os.environ.get("ACCELERATE_USE_MEGATRON_LM", "").lower() in _TRUE:
        raise InputError("Training under Megatron-LM is not supported; use FSDP2, which shards weights as well.")
    if not shards():
        return None
    if os.environ.get("FSDP_VERSION", "1") != "2":
        raise InputError("Only version 2 of FSDP is supported; set fsdp_version: 2 in accelerate's configuration.")
    plugin = FullyShardedDataParallelPlugin()
    unsupported = {
        "fsdp_cpu_ram_efficient_loading": plugin.cpu_ram_efficient_loading,
        "fsdp_activation_checkpointing": plugin.activation_checkpointing,
        "fsdp_offload_params": os.environ.get("FSDP_OFFLOAD_PARAMS", "").lower() in _TRUE,
    }
    for name in (name for name, asked in unsupported.items() if asked):
        instead = "; gradient_checkpointing in the recipe does that" if "checkpointing" in name else ""
        raise InputError(f"{name} is not supported; set it to false in accelerate's configuration{instead}.")
    if os.environ.get("FSDP_AUTO_WRAP_POLICY", "NO_WRAP") not in ("NO_WRAP", "TRANSFORMER_BASED_WRAP"):
        raise InputError("fsdp_auto_wrap_policy: only TRANSFORMER_BASED_WRAP and NO_WRAP are supported.")
    if not torch.distributed.is_initialized() and not several():
        return None  # nobody to share with
    return Sharding(
        blocks=plugin.auto_wrap_policy is not None, reshard_after_forward=bool(plugin.reshard_after_forward)
    )


def zero_wanted() -> int | None:
    """The ZeRO stage, 1 or 2, of the launcher's configuration for DeepSpeed; None where it asks for none.

    What it asks for and cannot get is an `InputError`.
    """
    if os.environ.get("ACCELERATE_USE_DEEPSPEED", "").lower() not in _TRUE:
        return None
    stage = os.environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "2")
    if stage not in ("1", "2"):
        raise InputError(f"zero_stage {stage} is not supported; set it to 1 or 2, or shard the weights with FSDP2.")
    for name in ("offload_optimizer_device", "offload_param_device", "config_file"):
        if os.environ.get(f"ACCELERATE_DEEPSPEED_{name.upper()}", "none").lower() != "none":
            name = "deepspeed_config_file" if name == "config_file" else name
            raise InputError(f"{name} is not supported; remove it from accelerate's configuration.")
    if find_spec("deepspeed") is None:
        raise InputError("DeepSpeed is not installed: pip install 'exalign[deepspeed]'.")
    return int(stage) if several() else None  # alone there is nobody to share with
