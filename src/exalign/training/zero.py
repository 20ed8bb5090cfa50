"""Optimizer states, or gradients and states, divided among processes by DeepSpeed: ZeRO-1 and ZeRO-2.

Weights stay whole on every process; each updates its part of them and all exchange the results. What is divided is one
flat tensor per parameter group, so that a group's weights have one count of steps: a weight without gradient moves on
with moments of 0, where a plain AdamW leaves it out.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from exalign.processes import on_cpu

MOMENTS = ("exp_avg", "exp_avg_sq")
BUCKET = 2**26
"""Numbers exchanged at a time: a quarter of a GiB in float32."""


class ZeroOptimizer:
    """A DeepSpeed engine in the place of an optimizer: what the loop asks of one, and its state whole.

    `engine` takes the place of `module` in forward and backward; `optimizer`, a plain AdamW over the weights of
    `module`, becomes one over this process's part of them. Everything but `param_groups` and `zero_grad` has to be
    called by all processes. `stage` is 1 or 2; `bf16` where the forward runs under autocast.
    """

    def __init__(self, module: nn.Module, optimizer: Optimizer, *, stage: int, bf16: bool) -> None:
        deepspeed = _deepspeed()
        self.module = module
        names = {parameter: name for name, parameter in module.named_parameters()}
        self._groups = [
            {**group, "params": [names[parameter] for parameter in group["params"]]} for group in optimizer.param_groups
        ]
        config = {
            "train_micro_batch_size_per_gpu": 1,  # demanded, and without effect on what is used here
            "zero_optimization": {"stage": stage, "reduce_bucket_size": BUCKET, "allgather_bucket_size": BUCKET},
            # The engine ends the autocast around it and begins its own. Gradients of "safe" modules would be exchanged
            # in bf16.
            "torch_autocast": {"enabled": bf16, "dtype": "bfloat16", "lower_precision_safe_modules": []},
        }
        self.engine: Any = deepspeed.initialize(model=module, optimizer=optimizer, config=config)[0]
        self._zero: Any = self.engine.optimizer
        # Otherwise DeepSpeed looks for the weights' states after the first step of the first group, where only that
        # group has any, and does not find the others.
        self._start_from(0.0)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Those of this process's part; learning rates are set in them."""
        return self._zero.param_groups

    def clip(self, max_norm: float) -> Tensor:
        """The norm of the step's gradient, nan where it is not finite; `step` scales it down to `max_norm`."""
        self._zero.clip_grad = max_norm
        norm = self._zero.scaled_global_norm()
        return torch.where(norm < 0, torch.nan, norm)  # DeepSpeed's sign for not finite is −1

    def step(self) -> None:
        """Update the weights on all processes."""
        self.engine.step()

    def zero_grad(self, set_to_none: bool = True) -> None:
        """Forget the step's gradient, also where no step was made with it."""
        self._zero.zero_grad(set_to_none=set_to_none)
        for kept in (self._zero.averaged_gradients, self._zero.all_grad_tensors):
            for group in kept:
                kept[group] = None

    def whole_state(self) -> dict[str, Any]:
        """The state by the names of the weights, on the CPU, as torch's `get_optimizer_state_dict` gives it.

        One weight's at a time is whole on the device.
        """
        from deepspeed.utils import safe_get_full_optimizer_state

        state: dict[str, dict[str, Tensor]] = {}
        steps = next(iter(self._zero.optimizer.state.values()))["step"].cpu()
        for name, weight in self._trained():
            state[name] = {key: safe_get_full_optimizer_state(weight, key).cpu() for key in MOMENTS}
            state[name]["step"] = steps.clone()  # one for each: AdamW counts in place
        groups = [{**group, "lr": now["lr"]} for group, now in zip(self._groups, self.param_groups, strict=True)]
        return {"state": state, "param_groups": groups}

    def put(self, state: dict[str, Any]) -> None:
        """Take this process's part of what `whole_state` gave, or a plain optimizer; and of the weights of `module`,
        which were changed.
        """
        from deepspeed.utils import safe_set_full_optimizer_state

        self._zero.refresh_fp32_params()
        (steps,) = {float(values["step"]) for values in state["state"].values()} or {0.0}
        self._start_from(steps)
        for name, weight in self._trained():
            for key in MOMENTS if name in state["state"] else ():
                safe_set_full_optimizer_state(weight, state["state"][name][key].to(weight.device), key)

    def release(self) -> None:
        """Let go of the module and of this process's part: there are no further steps."""
        self.engine.destroy()

    def _start_from(self, steps: float) -> None:
        """AdamW's state after so many steps with gradients of 0."""
        optimizer = self._zero.optimizer
        for group in optimizer.param_groups:
            (part,) = group["params"]
            optimizer.state[part] = {key: torch.zeros_like(part) for key in MOMENTS}
            optimizer.state[part]["step"] = torch.tensor(steps, device=part.device)
        self._zero._hp_optimizer_states_linked = False
        self._zero._lazy_init_hp_params_optimizer_state()

    def _trained(self) -> Iterator[tuple[str, nn.Parameter]]:
        return ((name, weight) for name, weight in self.module.named_parameters() if weight.requires_grad)


def _deepspeed() -> Any:
    """The package, which is not everywhere."""
    warnings.filterwarnings("ignore", message=r"`torch.distributed.\w+` is deprecated")  # DeepSpeed's calls, not ours
    import deepspeed

    if on_cpu():  # where it would compile an exchange through shared memory, and say so; gloo does without
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
    return deepspeed
