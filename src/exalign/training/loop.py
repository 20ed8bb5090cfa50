"""The one training loop, on Accelerate. A task gives it batches and a loss; everything else is here or in `state`.

The loss of a step is Σ over its groups of the task's loss, divided by the task's weight of the whole step: neither
the token budget, nor accumulation, nor the number of processes changes it. Whatever a step needs is a function of
(seed, step), so an interrupted run that is started again ends as if it had not been interrupted.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from accelerate import Accelerator
from pydantic import Field
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from exalign.data.batching import Group, microbatches
from exalign.errors import InputError
from exalign.models.actor_critic import ActorCritic
from exalign.models.loading import save_model
from exalign.models.logprobs import PackedPolicy
from exalign.models.scalar_head import PackedScorer
from exalign.settings import Settings
from exalign.storage import fingerprint
from exalign.training.accelerator import make_accelerator, sharding_wanted
from exalign.training.batches import Batches
from exalign.training.optimizer import adamw, learning_rate_factor, set_learning_rate
from exalign.training.progress import TrainingProgress
from exalign.training.sharding import Whole, shard, whole_number
from exalign.training.state import (
    MetricsLog,
    Position,
    load_checkpoint,
    prune_checkpoints,
    remove_leftovers,
    save_checkpoint,
)

Trainable = PackedPolicy | PackedScorer | ActorCritic
MAX_SKIPPED_IN_A_ROW = 10
WITHOUT_EFFECT_ON_RESULTS = {"token_budget", "gradient_checkpointing", "checkpoint_every", "trackers"}
"""Settings of memory, speed and bookkeeping."""


class NotFiniteError(InputError):
    """Loss or gradient was not finite for so many steps in a row that training was stopped."""


class TrainSettings(Settings):
    """How a model is trained, whatever the task."""

    learning_rate: float = Field(1e-5, gt=0, description="peak learning rate of AdamW")
    batch_prompts: int = Field(64, gt=0, description="prompts per optimizer step, over all processes")
    epochs: int = Field(1, gt=0, description="times each prompt is seen")
    warmup_fraction: float = Field(0.1, ge=0, lt=1, description="share of the steps in which the rate rises linearly")
    schedule: Literal["constant", "linear", "cosine"] = Field(
        "cosine", description="how the rate falls after warm-up; linear and cosine fall towards 0"
    )
    adam_betas: tuple[float, float] = Field((0.9, 0.95), description="AdamW's decay rates of the two moments")
    weight_decay: float = Field(0.0, ge=0, description="AdamW's decay of weight matrices; biases and norms have none")
    max_grad_norm: float = Field(1.0, gt=0, description="gradients with a larger norm are scaled down to it")
    token_budget: int = Field(4096, gt=0, description="tokens per forward pass: memory and speed, never the result")
    precision: Literal["fp32", "bf16"] = Field("fp32", description="bf16: matrix products in bfloat16, weights as is")
    gradient_checkpointing: bool = Field(False, description="recompute activations: less memory, about a third slower")
    checkpoint_every: int = Field(100, gt=0, description="steps between checkpoints that an interrupted run needs")
    save_policies: int = Field(1, gt=0, description="models saved, closer together at first, the final one included")
    seed: int = Field(0, ge=0, description="seeds the order of the prompts; a recipe adds its own seed to it")
    trackers: tuple[str, ...] = Field((), description="trackers known to Accelerate: tensorboard, wandb, trackio, …")

    def rate_of(self, name: str) -> float:
        """What the learning rate is multiplied with for the parameter of this name; a task with parts overrides it."""
        return 1.0

    @property
    def leaves_some_out(self) -> bool:
        """Whether in some steps a trained parameter gets no gradient; a task with parts overrides it."""
        return False

    @property
    def idle_steps(self) -> int:
        """How many steps at the start leave the policy as it is; a task with parts overrides it."""
        return 0


class Task(Protocol):
    """What a stage gives the loop."""

    @property
    def batches(self) -> Batches: ...

    def weight(self, groups: Sequence[Group]) -> float:
        """What a sum over these groups is divided by: their number, or their completion tokens."""

    def loss(self, model: nn.Module, groups: Sequence[Group]) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss and the metrics, each as a scalar sum in units of `weight`."""


@dataclass(frozen=True, slots=True)
class _Trainer:
    accelerator: Accelerator
    model: nn.Module
    optimizer: Any
    task: Task
    settings: TrainSettings
    warmup_steps: int


def train(
    task: Task,
    module: Trainable,
    tokenizer: PreTrainedTokenizerBase,
    settings: TrainSettings,
    folder: Path,
    *,
    card: str,
) -> Path:
    """Train `module` in place, continuing what stands in `folder`; return the folder of the final model.

    `module` is what the task calls, and so what is wrapped for several processes; `module.model`, the transformers
    model inside it, is what is saved. Where the launcher asks for FSDP its weights are sharded, and stay so.

    Writes `model`, `metrics.jsonl` (a row per optimizer step, counted from 1), `checkpoints` and `policies`. A step
    whose loss or gradient is not finite changes nothing and is recorded with `skipped` 1; `MAX_SKIPPED_IN_A_ROW` of
    them end the run with `NotFiniteError`, an `InputError`.
    """
    folder = Path(folder)
    num_steps = len(task.batches)
    whole = Whole(module)
    trainer = _prepare(task, module, settings, folder)
    accelerator, writes = trainer.accelerator, trainer.accelerator.is_main_process
    if writes:
        remove_leftovers(folder)
    position = load_checkpoint(folder / "checkpoints", _fingerprint(task, settings), trainer.model, trainer.optimizer)
    policy_steps = saved_steps(num_steps, settings.save_policies, idle=settings.idle_steps)
    with (
        TrainingProgress(folder.name, num_steps=num_steps, done=position.step, visible=writes) as progress,
        MetricsLog(folder / "metrics.jsonl", step=position.step, writes=writes) as metrics,
    ):
        if position.step:
            progress.say(f"{folder.name}: continues after step {position.step} of {num_steps}")
        while position.step < num_steps:
            row = _take_step(trainer, position.step)
            accelerator.log({name: value for name, value in row.items() if value is not None}, step=row["step"])
            metrics.append(row)
            progress.update(row)
            position = _advance(position, skipped=bool(row["skipped"]))
            if position.step in policy_steps:
                with whole.on_leader() as complete:
                    if writes:
                        policy = folder / "policies" / f"step-{position.step:06d}"
                        save_model(complete.model, tokenizer, policy, card=card)
            if position.step % settings.checkpoint_every == 0 or position.step == num_steps:
                metrics.sync()
                save_checkpoint(folder / "checkpoints", position, trainer.model, trainer.optimizer, writes=writes)
    with whole.on_leader() as complete:
        if writes:
            save_model(complete.model, tokenizer, folder / "model", card=card)
            prune_checkpoints(folder / "checkpoints", num_steps, keep=1)
    for tracker in accelerator.trackers:
        tracker.finish()  # but not `end_training`, which ends the processes' group: another stage may follow
    accelerator.wait_for_everyone()
    accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False).eval()
    return folder / "model"


def saved_steps(num_steps: int, count: int, *, idle: int = 0) -> list[int]:
    """The `count` steps, or all if they are fewer, after which a policy is saved: the last one, and squares before it.

    KL to the start grows fastest in the first steps, where a frontier of evenly spaced policies would have none. The
    first `idle` steps, which leave the policy as it is, are passed over.

    >>> saved_steps(24, 4), saved_steps(3, 5), saved_steps(24, 3, idle=8)
    ([2, 6, 14, 24], [1, 2, 3], [10, 16, 24])
    """
    idle = min(idle, num_steps - 1)
    moving, steps = num_steps - idle, [0]
    count = min(count, moving)
    for index in range(1, count + 1):
        steps.append(max(steps[-1] + 1, -(-moving * index**2 // count**2)))
    return [idle + step for step in steps[1:]]


def accumulate(
    accelerator: Accelerator, model: nn.Module, task: Task, groups: Sequence[Group], token_budget: int
) -> dict[str, float]:
    """Put the gradient of the step's loss into the parameters; return loss and metrics, divided by the step's weight.

    Process r of R takes micro-batches r, r + R, …; where they run out it repeats the first with factor 0, so that
    every process makes the same number of passes (collective operations wait for all). DDP exchanges gradients in the
    last pass; sharded gradients are reduced in every pass, so that no process ever holds whole ones.
    """
    micro = microbatches(groups, token_budget=token_budget)
    weight = sum(task.weight(part) for part in micro)
    rounds = range(accelerator.process_index, len(micro) + accelerator.process_index, accelerator.num_processes)
    sums: dict[str, Tensor] = {}
    for index in rounds:
        part, factor = (micro[index], 1.0 / weight) if index < len(micro) else (micro[0], 0.0)
        synchronised = index == rounds[-1]
        with nullcontext() if synchronised else accelerator.no_sync(model):
            with accelerator.autocast():
                loss, part_metrics = task.loss(model, part)
            # Processes are averaged, the loss is a sum over them.
            accelerator.backward(loss * (factor * accelerator.num_processes))
        for name, value in {"loss": loss, **part_metrics}.items():
            sums[name] = sums.get(name, 0.0) + value.detach() * factor
    totals = accelerator.reduce(torch.stack(list(sums.values())), reduction="sum")
    return dict(zip(sums, totals.tolist(), strict=True))


def _take_step(trainer: _Trainer, step: int) -> dict[str, Any]:
    started = time.perf_counter()
    settings, optimizer = trainer.settings, trainer.optimizer
    torch.manual_seed(int(fingerprint([settings.seed, step, trainer.accelerator.process_index]), 16) >> 1)
    groups = trainer.task.batches[step]
    factor = learning_rate_factor(
        step, num_steps=len(trainer.task.batches), warmup_steps=trainer.warmup_steps, schedule=settings.schedule
    )
    set_learning_rate(optimizer, settings.learning_rate * factor)
    values = accumulate(trainer.accelerator, trainer.model, trainer.task, groups, settings.token_budget)
    norm = trainer.accelerator.clip_grad_norm_(trainer.model.parameters(), settings.max_grad_norm)
    values["grad_norm"] = whole_number(norm)
    skipped = not (math.isfinite(values["loss"]) and math.isfinite(values["grad_norm"]))
    if not skipped:
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    seconds, tokens = time.perf_counter() - started, sum(group.num_tokens for group in groups)
    return {
        "step": step + 1,
        **{name: value if math.isfinite(value) else None for name, value in values.items()},
        "learning_rate": settings.learning_rate * factor,
        "skipped": int(skipped),
        "tokens": tokens,
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
    }


def _advance(position: Position, *, skipped: bool) -> Position:
    in_a_row = position.skipped_in_a_row + 1 if skipped else 0
    if in_a_row >= MAX_SKIPPED_IN_A_ROW:
        raise NotFiniteError(
            f"Training stopped at step {position.step + 1}: loss or gradient was not finite {in_a_row} times in a row; "
            "lower learning_rate, or look for extreme values in the data."
        )
    return replace(position, step=position.step + 1, skipped_in_a_row=in_a_row)


def _prepare(task: Task, module: Trainable, settings: TrainSettings, folder: Path) -> _Trainer:
    sharding = sharding_wanted()
    accelerator = make_accelerator(
        folder, precision=settings.precision, trackers=settings.trackers, some_left_out=settings.leaves_some_out
    )
    flat = {name: v if isinstance(v, int | float | str) else str(v) for name, v in settings.model_dump().items()}
    accelerator.init_trackers("exalign", config=flat)
    module.train()
    if settings.gradient_checkpointing:
        for model in module.children():
            part: Any = model
            # The second name is that of older transformers 5 releases.
            enable = getattr(part, "activation_checkpointing_enable", None) or part.gradient_checkpointing_enable
            enable({"use_reentrant": False})
    if sharding is not None:
        shard(module, accelerator.device, sharding)
    optimizer: Any = adamw(
        module,
        betas=settings.adam_betas,
        weight_decay=settings.weight_decay,
        device=accelerator.device,
        rate_of=settings.rate_of,
    )
    prepared: nn.Module = module
    if sharding is None:
        prepared, optimizer = accelerator.prepare(module, optimizer)
    warmup_steps = int(settings.warmup_fraction * len(task.batches))
    return _Trainer(accelerator, prepared, optimizer, task, settings, warmup_steps)


def _fingerprint(task: Task, settings: TrainSettings) -> str:
    deciding = settings.model_dump(exclude=WITHOUT_EFFECT_ON_RESULTS)
    return fingerprint({"settings": deciding, "batches": task.batches.fingerprint, "steps": len(task.batches)})
