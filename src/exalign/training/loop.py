"""The one training loop, on Accelerate. A task gives it batches and a loss; everything else is here or in `checkpoint`.

The loss of a step is Σ over its groups of the task's loss, divided by the task's weight of the whole step: neither
the token budget, nor accumulation, nor the number of processes changes it. Whatever a step needs is a function of
(seed, step), so an interrupted run that is started again ends as if it had not been interrupted.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
import yaml
from accelerate import Accelerator
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from exalign.data.batching import Group, microbatches
from exalign.device import device_memory
from exalign.errors import InputError, first_line
from exalign.models.capability import base_of, check_steady
from exalign.models.heads import ActorCritic, PackedScorer
from exalign.models.loading import save_model, some_rows
from exalign.models.logprobs import PackedPolicy
from exalign.models.memory import TooLargeError, computed, fitting, release_memory
from exalign.models.sizes import measured, training_sizes
from exalign.redaction import redact_values
from exalign.settings import Settings
from exalign.storage import fingerprint, link_folder, remove_folder, remove_leftovers, write_json
from exalign.terminal import LINE_SECONDS, escape_controls, shown, time_left
from exalign.training.batches import Batches, saved_steps
from exalign.training.checkpoint import (
    MetricsLog,
    Position,
    last_checkpoint,
    load_checkpoint,
    prune_checkpoints,
    rows_up_to,
    save_checkpoint,
)
from exalign.training.distributed import Whole, make_accelerator, shard, sharding_wanted, whole_number
from exalign.training.guards import (
    forget_stop,
    interrupted,
    keep_skipped,
    not_finite,
    record_stop,
    recovered_after,
    smaller_budget,
    with_recoveries,
)
from exalign.training.optimizer import adamw, learning_rate_factor, set_learning_rate
from exalign.training.train_settings import TrainSettings

SHOWN_ROWS = 4
"""Prompts of a step that trackers show, with their completions, where a policy is saved."""
HELD_OUT_NUMBERS = ("loss", "accuracy", "margin", "reward_correlation")
"""Those of a task's numbers that are measured on held-out groups, as `held_out_loss` … of the step's row of metrics."""
Trainable = PackedPolicy | PackedScorer | ActorCritic


class Save(Protocol):
    """Writes the policy as it is; `verified` by loading it in plain transformers."""

    def __call__(self, path: Path, *, verified: bool = False) -> None: ...


class Task(Protocol):
    """What a stage gives the loop."""

    @property
    def batches(self) -> Batches: ...

    def weight(self, groups: Sequence[Group]) -> float:
        """What a sum over these groups is divided by: their number, or their completion tokens."""

    def loss(self, model: nn.Module, groups: Sequence[Group]) -> tuple[Tensor, dict[str, Tensor]]:
        """The loss and the metrics, each as a scalar sum in units of `weight`.

        What a step says beside these, one number for all of it, is the task's `numbers`, if it has any.
        """


@dataclass(slots=True)
class HeldOut:
    """Groups that nothing is trained on, measured at every saved policy. With `stop_after` n a training ends where n of
    these in a row have no lower loss on them than the best before, and what it leaves ends with that one.

    A function of the weights alone, and read back from the metrics: an interrupted training ends where it would have.
    """

    groups: Sequence[Group] = ()
    stop_after: int | None = None
    losses: dict[int, float] = field(default_factory=dict)
    """By the steps after which a policy was saved; what is not a number is never the best."""

    def begin(self, metrics: Path, step: int) -> None:
        """Take up what was measured up to `step`."""
        if self.stop_after is not None and not self.groups:
            raise InputError("stop_after looks at held-out preferences or rewards, and there are none.")
        self.losses = {}
        for row in map(json.loads, rows_up_to(metrics, step)):
            if "held_out_loss" in row:
                self.note(row["step"], row["held_out_loss"])

    def note(self, step: int, loss: float | None) -> None:
        """Take up what was measured after `step`."""
        self.losses[step] = loss if loss is not None and math.isfinite(loss) else math.inf

    @property
    def best(self) -> int:
        """The step with the lowest loss, the first of several."""
        return min(self.losses, key=lambda step: (self.losses[step], step))

    @property
    def stops(self) -> bool:
        """Whether training has come to its end."""
        if self.stop_after is None or not self.losses:
            return False
        return sum(step > self.best for step in self.losses) >= self.stop_after

    def keep_best(self, folder: Path) -> str:
        """Take the policies after the best away, and name that one the model; a sentence that says so."""
        for path in sorted((folder / "policies").glob("step-*")):
            if path.name[5:].isdigit() and int(path.name[5:]) > self.best:
                remove_folder(path)
        link_folder(folder / "policies" / f"step-{self.best:06d}", folder / "model")
        last = max(self.losses)
        sentence = f"the held-out loss is lowest after step {self.best} ({self.losses[self.best]:.4g}), which is kept; "
        sentence += (
            f"training stopped after step {last} ({self.losses[last]:.4g}), {self.stop_after} saved policies later"
            if self.stops
            else f"training went on to step {last} ({self.losses[last]:.4g})"
        )
        write_json(folder / "held-out.json", {"best": self.best, "last": last, "sentence": sentence})
        return sentence


@dataclass(slots=True)
class _Trainer:
    accelerator: Accelerator
    model: nn.Module
    optimizer: Any
    task: Task
    settings: TrainSettings
    tokenizer: PreTrainedTokenizerBase
    folder: Path
    token_budget: int
    """That of the settings, or what they leave to choose, or less once memory has run out."""
    held_out: HeldOut
    saved_at: int = 0
    """The step of the last checkpoint."""
    seen: Sequence[Group] = ()
    """Those of the last step that was taken here."""


def train(
    task: Task,
    module: Trainable,
    tokenizer: PreTrainedTokenizerBase,
    settings: TrainSettings,
    folder: Path,
    *,
    card: str,
    held_out: HeldOut | None = None,
) -> Path:
    """Train `module` in place, continuing what stands in `folder`; return the folder of the final model.

    `module` is what the task calls, and so what is wrapped for several processes; `module.model`, the transformers
    model inside it, is what is saved. Where the launcher asks for FSDP its weights are sharded, and stay so.

    Writes `model`, `metrics.jsonl` (a row per optimizer step, counted from 1), `checkpoints` and `policies`. A step
    whose loss or gradient is not finite changes nothing and is recorded with `skipped` 1, its batch in `skipped`;
    `max_skipped_in_a_row` of them, or where no other is left, end the run with `NotFiniteError`, an `InputError` (see
    `guards`). Where memory runs out the token budget is halved and the step begun again. Ctrl-C is a
    `KeyboardInterrupt` with a sentence that says what stands. `held_out` is measured at every saved policy, and may end
    the training: `model` is then its best policy, while `module` is where training ended.
    """
    folder = Path(folder)
    if settings.idle_steps >= len(task.batches):
        raise InputError(
            f"No step would be taken: there are {len(task.batches)}, and the first {settings.idle_steps} leave the "
            "policy as it is; lower critic_steps, or give more data or epochs."
            if settings.idle_steps
            else "No step would be taken: there are no batches to train on."
        )
    whole = Whole(module)
    held_out = held_out or HeldOut()
    trainer = _prepare(task, module, tokenizer, settings, folder, held_out)
    accelerator, writes = trainer.accelerator, trainer.accelerator.is_main_process
    card = with_recoveries(card, folder)

    def save(path: Path, *, verified: bool = False) -> None:
        with whole.on_leader() as complete:
            if writes:
                rows = trainer.seen or some_rows(complete.model, tokenizer) if verified else ()
                save_model(complete.model, tokenizer, path, card=card, rows=rows)

    if writes:
        remove_leftovers(folder)
    _take_steps(trainer, save)
    if held_out.stop_after is None:
        save(folder / "model", verified=True)
    elif writes:
        Console(stderr=True).print(shown(f"{folder.name}: {held_out.keep_best(folder)}"), soft_wrap=True)
    if writes:
        prune_checkpoints(folder / "checkpoints", len(task.batches), keep=1)
    for tracker in accelerator.trackers:
        tracker.finish()  # but not `end_training`, which ends the processes' group: another stage may follow
    accelerator.wait_for_everyone()
    accelerator.unwrap_model(trainer.model, keep_fp32_wrapper=False).eval()
    return folder / "model"


def accumulate(
    accelerator: Accelerator,
    model: nn.Module,
    task: Task,
    groups: Sequence[Group],
    token_budget: int,
    *,
    agreement: bool = False,
) -> dict[str, float]:
    """Put the gradient of the step's loss into the parameters; return loss and metrics, divided by the step's weight.
    Where that is 0 the loss is 0 and the metrics are not a number.

    Process r of R takes micro-batches r, r + R, …; where they run out it repeats the first with factor 0, so that
    every process makes the same number of passes (collective operations wait for all). DDP exchanges gradients in the
    last pass; sharded gradients are reduced in every pass, so that no process ever holds whole ones.
    `TooLargeError` where a micro-batch does not fit in memory; part of the gradient is there then.

    With `agreement`, `gradient_agreement` is the cosine of the gradients of the groups' first and second half. Where it
    is c, the whole step's has a cosine of about √(2c/(1 + c)) with the expected gradient.
    """
    half = len(groups) // 2 if agreement else 0
    before, after = (microbatches(side, token_budget=token_budget) for side in (groups[:half], groups[half:]))
    micro = before + after
    weight = sum(task.weight(part) for part in micro)
    rounds = range(accelerator.process_index, len(micro) + accelerator.process_index, accelerator.num_processes)
    sums: dict[str, Tensor] = {}
    for index in rounds:
        if before and index == len(before):
            first = {p: p.grad.clone() for p in model.parameters() if p.grad is not None}
        part, factor = (micro[index], 1.0 / (weight or 1.0)) if index < len(micro) else (micro[0], 0.0)
        synchronised = index == rounds[-1]
        with nullcontext() if synchronised else accelerator.no_sync(model), fitting(part):
            with accelerator.autocast():
                loss, part_metrics = task.loss(model, part)
            # Processes are averaged, the loss is a sum over them.
            accelerator.backward(loss * (factor * accelerator.num_processes))
        for name, value in {"loss": loss, **part_metrics}.items():
            sums[name] = sums.get(name, 0.0) + value.detach() * factor
    if before:
        sums["gradient_agreement"] = _agreement(model, first)
    totals = accelerator.reduce(torch.stack(list(sums.values())), reduction="sum")
    found = dict(zip(sums, totals.tolist(), strict=True))
    # Where nothing counts the loss is 0, and nothing is known beside it.
    return {name: value if weight or name == "loss" else math.nan for name, value in found.items()}


def _agreement(model: nn.Module, first: Mapping[nn.Parameter, Tensor]) -> Tensor:
    """The cosine of the gradients `first` and of what was added to them since."""
    sums: list[Tensor] = []
    for parameter in model.parameters():
        if (whole := parameter.grad) is not None:
            one = first.get(parameter, torch.zeros_like(whole))
            other = whole - one
            sums.append(torch.stack([(one * other).sum(), one.square().sum(), other.square().sum()]))
    product, ours, theirs = torch.stack(sums).sum(dim=0)
    return product / (ours * theirs).sqrt()


def _take_steps(trainer: _Trainer, save: Save) -> None:
    """All steps from the last checkpoint on, with what is written on the way."""
    settings, folder, writes = trainer.settings, trainer.folder, trainer.accelerator.is_main_process
    num_steps, position = len(trainer.task.batches), _start(trainer)
    policy_steps = saved_steps(num_steps, settings.save_policies, idle=settings.idle_steps)
    held_out = trainer.held_out
    held_out.begin(folder / "metrics.jsonl", position.step)
    with (
        TrainingProgress(folder.name, num_steps=num_steps, done=position.step, visible=writes) as progress,
        MetricsLog(folder / "metrics.jsonl", step=position.step, writes=writes) as metrics,
    ):

        def say(sentence: str) -> None:
            progress.say(f"{folder.name}: {sentence}")

        if position.step:
            say(f"continues after step {position.step} of {num_steps}")
        try:
            while position.step < num_steps and not held_out.stops:
                row = _take_step(trainer, position.step, say)
                if held_out.groups and row["step"] in policy_steps:
                    row |= _measured(trainer, row["step"])
                trainer.accelerator.log({n: value for n, value in row.items() if value is not None}, step=row["step"])
                metrics.append(row)
                progress.update(row)
                in_a_row = position.skipped_in_a_row + 1 if row["skipped"] else 0
                position = replace(position, step=row["step"], skipped_in_a_row=in_a_row)
                if row["skipped"]:
                    _skip(trainer, row, in_a_row, say)
                if position.step in policy_steps:
                    _show_rows(trainer, position.step)
                    save(folder / "policies" / f"step-{position.step:06d}", verified=held_out.stop_after is not None)
                # Among skipped steps there is none: a recovery begins before the first of them.
                due = position.step % settings.checkpoint_every == 0 and not row["skipped"]
                if due or position.step == num_steps or held_out.stops:
                    metrics.sync()
                    save_checkpoint(folder / "checkpoints", position, trainer.model, trainer.optimizer, writes=writes)
                    trainer.saved_at = position.step
        except KeyboardInterrupt:
            raise interrupted(folder, position.step, num_steps, saved_at=trainer.saved_at) from None


def _take_step(trainer: _Trainer, step: int, say: Callable[[str], None]) -> dict[str, Any]:
    started = time.perf_counter()
    settings, optimizer = trainer.settings, trainer.optimizer
    seed = int(fingerprint([settings.seed, step, trainer.accelerator.process_index]), 16) >> 1
    torch.manual_seed(seed)
    groups = trainer.seen = trainer.task.batches[step]
    num_steps = len(trainer.task.batches)
    warmup_steps = int(settings.warmup_fraction * num_steps)
    factor = learning_rate_factor(step, num_steps=num_steps, warmup_steps=warmup_steps, schedule=settings.schedule)
    set_learning_rate(optimizer, settings.learning_rate * factor)
    values = {**getattr(trainer.task, "numbers", {}), **_gradient(trainer, groups, step, seed, say)}
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
        "token_budget": trainer.token_budget,
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
    }


def _show_rows(trainer: _Trainer, step: int) -> None:
    """Some of what the step was trained on, which may be samples of its own, as a table in trackers that have any."""
    if not trainer.accelerator.trackers:
        return
    columns, texts = ["prompt", "completion", "reward"], partial(trainer.tokenizer.decode, skip_special_tokens=True)
    rows = [
        [texts(group.prompt_ids), texts(ids), None if group.rewards is None else round(float(group.rewards[number]), 4)]
        for group in trainer.seen[:SHOWN_ROWS]
        for number, ids in enumerate(group.completion_ids)
    ]
    for tracker in trainer.accelerator.trackers:
        if hasattr(tracker, "log_table"):
            tracker.log_table("rows", columns=columns, data=rows, step=step)
        elif tracker.name == "tensorboard":  # which shows text as Markdown
            lines = [
                "| " + " | ".join(" ".join(str(cell).replace("|", "\\|").split()) for cell in row) + " |"
                for row in rows
            ]
            tracker.log({"rows": "\n".join(["| " + " | ".join(columns) + " |", "|---|---|---|", *lines])}, step=step)


def _measured(trainer: _Trainer, step: int) -> dict[str, float | None]:
    """The task's means over the held-out groups, by the code path of training; every process computes all of them."""
    sums: dict[str, float] = {}

    def work(part: Sequence[Group]) -> tuple[Tensor, dict[str, Tensor]]:
        try:
            with fitting(part):
                return trainer.task.loss(trainer.model, part)
        except TooLargeError as error:  # which ends it where there are several processes
            smaller_budget(error, trainer.token_budget, step=step, saved_at=trainer.saved_at)
            raise

    with torch.no_grad(), trainer.accelerator.autocast():
        for part, (loss, metrics) in computed(work, trainer.held_out.groups, token_budget=trainer.token_budget):
            values = {"loss": loss} | metrics | {"weight": loss.new_tensor(trainer.task.weight(part))}
            for name in {*HELD_OUT_NUMBERS, "weight"} & values.keys():
                sums[name] = sums.get(name, 0.0) + float(values[name])
    found = {name: sums[name] / (sums["weight"] or 1.0) for name in HELD_OUT_NUMBERS if name in sums}
    trainer.held_out.note(step, found["loss"])
    return {f"held_out_{name}": value if math.isfinite(value) else None for name, value in found.items()}


def _gradient(
    trainer: _Trainer, groups: Sequence[Group], step: int, seed: int, say: Callable[[str], None]
) -> dict[str, float]:
    """`accumulate`, begun again with half the token budget where memory runs out, to the same gradient."""
    accelerator, every = trainer.accelerator, trainer.settings.agreement_every
    agreement = every is not None and step % every == 0 and accelerator.num_processes == 1
    while True:
        torch.manual_seed(seed)
        try:
            return accumulate(
                accelerator, trainer.model, trainer.task, groups, trainer.token_budget, agreement=agreement
            )
        except TooLargeError as error:
            budget = smaller_budget(error, trainer.token_budget, step=step + 1, saved_at=trainer.saved_at)
            say(f"{error}; from step {step + 1} on token_budget is {budget:,} instead of {trainer.token_budget:,}")
            trainer.token_budget = budget
        trainer.optimizer.zero_grad(set_to_none=True)
        release_memory()


def _skip(trainer: _Trainer, row: dict[str, Any], in_a_row: int, say: Callable[[str], None]) -> None:
    """Keep the batch of a step that was not taken, and stop where it was one too many."""

    def loss_of(group: Group) -> Tensor:
        with trainer.accelerator.autocast():
            return trainer.task.loss(trainer.model, [group])[0]

    writes, skipped = trainer.accelerator.is_main_process, trainer.folder / "skipped"
    say(keep_skipped(skipped, row, trainer.seen, loss_of, trainer.tokenizer, writes=writes))
    num_steps = len(trainer.task.batches)
    all_steps = row["step"] == num_steps and in_a_row >= num_steps - trainer.settings.idle_steps
    if all_steps or in_a_row >= trainer.settings.max_skipped_in_a_row:
        # The weights that all these batches failed on were made by the step before them, and may be to blame.
        good = last_checkpoint(trainer.folder / "checkpoints", before=row["step"] - in_a_row)
        error = not_finite(row["step"], in_a_row, skipped, last_good=good, all_steps=all_steps)
        if writes:
            record_stop(trainer.folder, str(error), trainer.settings, after_step=good)
        raise error


def _start(trainer: _Trainer) -> Position:
    """Where the last checkpoint left model and optimizer."""
    folder, batches = trainer.folder, trainer.task.batches
    deciding = trainer.settings.deciding()
    settled = {name: value for name, value in deciding.items() if name not in trainer.settings.step_sizes()}
    made_from = {"batches": batches.fingerprint, "steps": len(batches)}
    position = load_checkpoint(
        folder / "checkpoints",
        fingerprint({"settings": deciding, **made_from}),
        trainer.model,
        trainer.optimizer,
        settled=fingerprint({"settings": settled, **made_from}),
        recovered_after=recovered_after(folder, trainer.settings),
    )
    trainer.saved_at = position.step
    if trainer.accelerator.is_main_process:
        forget_stop(folder)
    return position


def _prepare(
    task: Task,
    module: Trainable,
    tokenizer: PreTrainedTokenizerBase,
    settings: TrainSettings,
    folder: Path,
    held_out: HeldOut,
) -> _Trainer:
    sharding = sharding_wanted()
    accelerator = make_accelerator(
        folder, precision=settings.precision, trackers=settings.trackers, some_left_out=settings.leaves_some_out
    )
    flat = {name: v if isinstance(v, int | float | str) else str(v) for name, v in settings.model_dump().items()}
    try:
        accelerator.init_trackers("exalign", config=flat, init_kwargs=tracked_as(folder.absolute()))
    except Exception as error:  # each tracker raises its own, for example where nobody is logged in
        raise InputError(f"trackers: {first_line(error)}") from error
    for model in module.children():
        if hasattr(base_of(model), "get_input_embeddings"):
            check_steady(base_of(model))
    module.train()
    memory = device_memory(accelerator.device)
    budget, checkpointing = training_sizes(
        measured(module.children(), memory),
        memory,
        token_budget=settings.token_budget,
        checkpointing=settings.gradient_checkpointing,
        autocast=settings.precision == "bf16",
        shards=1 if sharding is None else accelerator.num_processes,
    )
    if checkpointing:
        for model in module.children():
            part: Any = model
            # The second name is that of older transformers 5 releases.
            enable = getattr(part, "activation_checkpointing_enable", None) or part.gradient_checkpointing_enable
            try:
                enable({"use_reentrant": False})
            except ValueError as error:
                raise InputError(f"gradient_checkpointing: {first_line(error)} Set it to false.") from error
    if sharding is None:
        module.to(accelerator.device)  # before there is an optimizer, which may mark its weights
    else:
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
        prepared, optimizer = accelerator.prepare(module, optimizer, device_placement=[False, True])
    return _Trainer(accelerator, prepared, optimizer, task, settings, tokenizer, folder, budget, held_out)


def tracked_as(folder: Path) -> dict[str, dict[str, Any]]:
    """What each tracker calls a training: its place in the run, whose name is the group of all that it trains.

    The run is the folder around it that holds a recipe; without one it is the folder that it stands in.
    """
    run = next((around for around in folder.parents if (around / "recipe.yaml").is_file()), folder.parent)
    group, name = run.name, folder.relative_to(run).as_posix()
    alike = {"group": group, "name": name}
    return {"wandb": alike, "trackio": alike, "mlflow": {"run_name": name, "tags": {"group": group}}}


class TrainingProgress:
    """A context that shows the rows of metrics it is given; `visible=False` shows nothing (all processes but one)."""

    def __init__(self, label: str, *, num_steps: int, done: int, visible: bool, console: Console | None = None) -> None:
        self.label = label
        self.num_steps = num_steps
        self.console = console or Console(stderr=True, quiet=not visible)
        self._last_line, self._begun, self._done = 0.0, time.monotonic(), done
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        fields = TextColumn("[dim]{task.fields[numbers]}[/dim]")
        self._bar = Progress(*columns, fields, console=self.console, disable=not self.console.is_terminal)
        self._task = self._bar.add_task(escape_controls(label), total=num_steps, completed=done, numbers="")

    def __enter__(self) -> TrainingProgress:
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()

    def say(self, text: str) -> None:
        """Print one line beside the bar."""
        self.console.print(shown(text), soft_wrap=True)

    def update(self, row: dict[str, Any]) -> None:
        """Show the metrics of a finished step."""
        names = [name for name in ("loss", "kl", "accuracy", "tokens_per_second") if row.get(name) is not None]
        numbers = "  ".join(f"{name.replace('_', ' ')} {row[name]:.4g}" for name in names)
        self._bar.update(self._task, completed=row["step"], numbers=numbers)
        now = time.monotonic()
        last = row["step"] == self.num_steps
        if not self.console.is_terminal and (last or now - self._last_line >= LINE_SECONDS):
            self._last_line = now
            left = time_left(self._begun, row["step"] - self._done, self.num_steps - self._done)
            self.say(f"{self.label}: step {row['step']}/{self.num_steps}  {numbers}{'' if last else left}")


_CARD = """---
library_name: transformers
pipeline_tag: {pipeline_tag}
tags:
- exalign
---
# {title}

{description}

Trained with exalign under these settings:

```yaml
{settings}```
"""


def model_card(title: str, description: str, settings: Settings, *, pipeline_tag: str) -> str:
    """A model card in Markdown with the front matter that model hubs read."""
    text = yaml.safe_dump(redact_values(settings.model_dump(mode="json")), sort_keys=False)
    return _CARD.format(title=title, description=description, settings=text, pipeline_tag=pipeline_tag)
