"""What one stage costs: operations of necessary work (`models.flops`), seconds on the machine, bytes on a device.

Operations are counted on the model itself, on torch's meta device, for one group of the mean lengths, times the
groups. Seconds are the larger of what the operations need and what else bounds a stage:

* training: whole micro-batches go to devices, so a step takes ⌈micro-batches / devices⌉ of them in a row, then adds up
  gradients (or gathers shards for every one) and reads and writes 7 numbers per trained parameter for AdamW;
* sampling: each step reads all matrices, the prompt's keys once per group and those of every live completion, and
  starts its operations one after the other.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from exalign.models.flops import forward_flops, training_flops
from exalign.rollout.settings import SampleSettings
from exalign.run.budget.architecture import Architecture
from exalign.run.budget.devices import Machine
from exalign.run.budget.load import Load
from exalign.run.budget.memory import (
    Memory,
    groups_in_flight,
    inference_memory,
    replicated,
    sampling_memory,
    sharded,
    training_memory,
)
from exalign.run.on_demand import SHARD
from exalign.training.train_settings import TrainSettings

OPERATIONS_PER_LAYER, OPERATIONS_PER_GROUP = 12, 22
"""Operations that a decoding step starts in a block, and in each block for each group that runs (read off the code)."""

STORED_BYTES_PER_TOKEN = 8
"""Of records on disk: four for a token's id, about four for its text."""

MOMENTS_READ_AND_WRITTEN = 7
"""Of each trained weight AdamW reads weight, gradient and two moments, and writes all but the gradient."""


@dataclass(frozen=True, slots=True)
class Cost:
    """A stage, or a part of one. `tokens` counts each prompt once; `stored` are bytes written to disk.

    `replicated` is the memory of a device that holds everything, `sharded` that of one under a full shard (training on
    all devices only). `bound` says what the seconds are made of for the most part.
    """

    stage: str
    model: str
    parameters: int
    trained: int
    devices: int
    tokens: int
    flops: float
    seconds: float
    bound: str
    replicated: Memory
    sharded: Memory | None = None
    stored: float = 0.0

    def fits(self, usable: float) -> str:
        """`yes`, `sharded` where only a full shard fits, or `no`."""
        if self.replicated.total <= usable:
            return "yes"
        return "sharded" if self.sharded is not None and self.sharded.total <= usable else "no"


def together(stage: str, parts: Sequence[Cost]) -> Cost:
    """Parts that follow one another, each leaving its memory to the next."""
    longest = max(parts, key=lambda part: part.seconds)
    largest = max(parts, key=lambda part: part.replicated.total)
    return replace(
        longest,
        stage=stage,
        model=parts[0].model,
        parameters=parts[0].parameters,
        trained=max(part.trained for part in parts),
        tokens=sum(part.tokens for part in parts),
        flops=sum(part.flops for part in parts),
        seconds=sum(part.seconds for part in parts),
        replicated=largest.replicated,
        sharded=largest.sharded,
        stored=sum(part.stored for part in parts),
    )


def training_cost(
    stage: str, models: Sequence[Architecture], settings: TrainSettings, load: Load, machine: Machine
) -> Cost:
    """A stage that trains on groups that stand: every epoch reads them all once."""
    whole = training_memory(models, settings, load)
    spread = sharded(whole, models, settings, machine.count)
    whole = replicated(whole, machine.count)
    full_shard = whole.total > machine.usable >= spread.total
    necessary = settings.epochs * load.prompts * sum(training_flops(m.module, [load.group()]) for m in models)
    executed = necessary + settings.gradient_checkpointing * settings.epochs * load.prompts * sum(
        forward_flops(m.module, [load.group()]) for m in models
    )
    steps = settings.epochs * -(-load.prompts // settings.batch_prompts)
    micro = microbatches_of_a_step(settings, load)
    rounds = -(-micro // machine.count)
    trained = float(sum(model.trained_bytes for model in models))
    exchange = (
        rounds * machine.gather(2 * whole.weights / (1 + (settings.precision == "bf16")) + trained)
        if full_shard
        else machine.all_reduce(trained)
    )
    update = MOMENTS_READ_AND_WRITTEN * trained / machine.bandwidth / (machine.count if full_shard else 1)
    terms = {
        "operations": executed * rounds / micro / machine.rate(settings.precision),
        "exchange": steps * exchange,
        "update": steps * update,
    }
    bound = max(terms, key=lambda name: terms[name])
    if bound == "operations" and micro < machine.count:
        bound = "batch"
    policies = min(settings.save_policies, steps)
    checkpoints = 2 * (models[0].weight_bytes + 2 * trained)  # the one under way is written beside the last
    return Cost(
        stage,
        models[0].name,
        sum(model.parameters for model in models),
        sum(model.trained for model in models),
        machine.count,
        settings.epochs * load.tokens,
        necessary,
        sum(terms.values()),
        bound,
        whole,
        spread,
        stored=(policies + 1) * models[0].weight_bytes + checkpoints,
    )


def microbatches_of_a_step(settings: TrainSettings, load: Load) -> int:
    """How many micro-batches of whole groups of the mean length a step has: the devices that it can occupy."""
    groups = max(1, settings.token_budget // load.group_tokens)
    return -(-min(settings.batch_prompts, load.prompts) // groups)


def forward_cost(
    stage: str, model: Architecture, load: Load, machine: Machine, *, token_budget: int, precision: str | None = None
) -> Cost:
    """A stage that computes groups that stand, without gradients: references and scores. Groups are dealt out."""
    read = load if model.shares_prompts else load.alone()
    flops = read.prompts * forward_flops(model.module, [read.group()])
    devices = min(machine.count, load.prompts)
    rate = machine.rate("bf16" if precision == "bf16" else model.precision)
    memory = inference_memory(model, max(token_budget, read.longest_group))
    if precision == "bf16":
        memory = replace(memory, copies=model.half_copies)
    return Cost(
        stage,
        model.name,
        model.parameters,
        0,
        devices,
        read.tokens,
        flops,
        flops / rate / devices,
        "operations",
        memory,
    )


def sampling_cost(stage: str, model: Architecture, load: Load, settings: SampleSettings, machine: Machine) -> Cost:
    """A stage that draws K completions per prompt; prompts are dealt out, a shard of 256 at a time on each device."""
    devices = min(machine.count, load.prompts)
    share = -(-load.prompts // devices)  # of the prompts, on the device that has most
    in_shard = min(share, SHARD)
    groups = groups_in_flight(replace(load, prompts=in_shard), settings.batch_completions)
    rows = groups * load.completions
    steps_of_shard = max(1.0, in_shard / groups) * load.completion_tokens
    steps = share / in_shard * steps_of_shard
    live = in_shard * load.completions * load.completion_tokens / steps_of_shard / rows
    cached = groups * (load.prompt_tokens + load.completions * load.completion_tokens / 2) * live
    layers = int(model.config.num_hidden_layers)
    started = layers * (OPERATIONS_PER_LAYER + OPERATIONS_PER_GROUP * groups)
    flops = load.prompts * forward_flops(model.module, [load.group()])
    terms = {
        "operations": share / load.prompts * flops / machine.rate(model.precision),
        "bandwidth": steps * (model.read_bytes + cached * model.cache_bytes_per_token) / machine.bandwidth,
        "launches": steps * started * machine.assumed.launch * 1e-6,
    }
    bound = max(terms, key=lambda name: terms[name])
    return Cost(
        stage,
        model.name,
        model.parameters,
        0,
        devices,
        load.tokens,
        flops,
        terms[bound],
        bound,
        sampling_memory(model, replace(load, prompts=in_shard), settings.batch_completions),
        stored=float(STORED_BYTES_PER_TOKEN * load.tokens),
    )


def frozen(model: Architecture) -> Memory:
    """A model that only stands by: a reference or a scorer beside what is trained."""
    return Memory(weights=model.weight_bytes)
