"""Accelerate as the launcher set it up: one process or several, whole weights (DDP) or sharded ones (FSDP2)."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

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

from exalign.errors import InputError
from exalign.processes import join, on_cpu, several, shards
from exalign.training.sharding import Sharding

_TRUE = ("1", "true")


def make_accelerator(folder: Path, *, precision: str, trackers: Sequence[str], some_left_out: bool) -> Accelerator:
    """The accelerator of one training; `some_left_out` where some steps give some parameters no gradient."""
    missing = [name for name in trackers if name not in map(str, get_available_trackers())]
    if missing:
        raise InputError(f"trackers: {missing[0]!r} is not installed, or unknown to Accelerate.")
    join()
    AcceleratorState._reset_state()  # a process may train several models, each in its own precision
    # Accelerate itself shards one model in the life of a process, on accelerators only, and rounds what the module
    # returns to bf16, log-probabilities among them; so it does not hear of FSDP, and `sharding` does that part.
    with patch_environment(accelerate_use_fsdp="false"):
        return Accelerator(
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


def sharding_wanted() -> Sharding | None:
    """What the launcher's configuration says about sharding; None where it asks for none.

    What it asks for and cannot get is an `InputError`.
    """
    for name, variable in (("DeepSpeed", "ACCELERATE_USE_DEEPSPEED"), ("Megatron-LM", "ACCELERATE_USE_MEGATRON_LM")):
        if os.environ.get(variable, "").lower() in _TRUE:
            raise InputError(f"Training under {name} is not supported; use FSDP2, which shards as much as ZeRO-3.")
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
