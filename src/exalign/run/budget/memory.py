"""Bytes on one device while a stage works.

Training holds weights, gradients and the two moments of AdamW: with float32 weights 4 + 4 + 8 = 16 bytes for each
trained parameter, and the bytes of its type for each frozen one. `replicated` is DDP (or one device): everything on
each, and from two devices on the gradients once more, in the buckets that are added up. `sharded` is a full shard
(FSDP2): weights, gradients and moments divided by the devices, and what is gathered to compute with.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace

from exalign.models.lm_head import KEPT_BYTES, TILE_BYTES
from exalign.run.budget.architecture import Architecture
from exalign.run.budget.load import Load
from exalign.training.train_settings import TrainSettings

_FIRST_CAPACITY, _ENTERING_TOKENS = 32, 2048  # the sampler's: rows of a new cache, and prompt tokens read in one step


@dataclass(frozen=True, slots=True)
class Memory:
    """Bytes by what they are for; `copies` are autocast's, `exchange` what several devices need to work together."""

    weights: float = 0.0
    gradients: float = 0.0
    optimizer: float = 0.0
    copies: float = 0.0
    activations: float = 0.0
    cache: float = 0.0
    exchange: float = 0.0

    @property
    def total(self) -> float:
        return sum(getattr(self, field.name) for field in fields(self))

    def __add__(self, other: Memory) -> Memory:
        return Memory(*(getattr(self, field.name) + getattr(other, field.name) for field in fields(self)))


def training_state(model: Architecture) -> Memory:
    """Weights, gradients and AdamW's two moments, each of the type of the weight it belongs to."""
    return Memory(weights=model.weight_bytes, gradients=model.trained_bytes, optimizer=2 * model.trained_bytes)


def training_memory(models: Sequence[Architecture], settings: TrainSettings, load: Load) -> Memory:
    """One device that trains these models together (a policy, or a policy and its critic)."""
    whole = Memory()
    tokens = microbatch_tokens(settings, load)
    for model in models:
        copies = model.half_copies if settings.precision == "bf16" else 0
        activations = training_activations(model, settings, tokens)
        whole += replace(training_state(model), copies=copies, activations=activations)
    return whole


def replicated(memory: Memory, count: int) -> Memory:
    """The same under DDP: from two devices on, buckets of the size of the gradients."""
    return replace(memory, exchange=memory.exchange + (memory.gradients if count > 1 else 0.0))


def sharded(memory: Memory, models: Sequence[Architecture], settings: TrainSettings, count: int) -> Memory:
    """The same under a full shard over `count` devices.

    Gathered at a time: the embeddings and the head, the block that works and the one that comes next, in the type of
    the products, and the gradient of the largest of these before it is scattered.
    """
    exchange = 0.0
    for model in models:
        factor = 0.5 if settings.precision == "bf16" and model.element_size == 4 else 1.0
        root = model.weight_bytes - len(model.layers) * model.layer_bytes
        exchange += factor * (root + 2 * model.layer_bytes) + max(root, model.layer_bytes) * (model.trained_share)
    return replace(
        memory,
        weights=memory.weights / count,
        gradients=memory.gradients / count,
        optimizer=memory.optimizer / count,
        copies=0.0,  # what is gathered already has the type of the products
        exchange=memory.exchange + exchange,
    )


def microbatch_tokens(settings: TrainSettings, load: Load) -> int:
    """Tokens of the fullest micro-batch: the budget, more where one group alone has more, less where a step has."""
    whole_step = min(settings.batch_prompts, load.prompts) * load.longest_group
    return min(max(settings.token_budget, load.longest_group), whole_step)


def training_activations(model: Architecture, settings: TrainSettings, tokens: int) -> float:
    """Bytes that `tokens` tokens keep for the backward pass, and the tiles of logits.

    With gradient checkpointing a block keeps its input alone (4 bytes a number), and one block at a time all it needs.
    """
    if settings.precision == "bf16":
        block = block_activations(model, 2, model.cast_inputs)
    else:
        block = block_activations(model, model.element_size, model.shared_inputs)
    count = len(model.layers)
    blocks = count * 4 * model.hidden + block if settings.gradient_checkpointing else count * block
    ends = 4 * 5 * model.hidden  # embedding, final norm in and out, hidden states of the head and their gradient
    return tokens * (blocks + ends) + KEPT_BYTES + TILE_BYTES


def block_activations(model: Architecture, size: int, inputs: int) -> float:
    """Bytes that one block keeps for one token, numbers of products having `size` bytes and those of norms four.

    `inputs` numbers that go into linear layers; queries, keys and values; of the feed-forward part of width F what goes
    into its activation function, and with a gate also what comes out of it and what it is multiplied with; the inputs
    of the two norms (of an RMS norm also the normed numbers); the attention's log-sum-exp.
    """
    heads = model.config.num_attention_heads
    width, gated = model.feed_forward
    products = inputs + (heads + 2 * model.key_heads) * model.head_size + (3 if gated else 1) * width
    return size * products + 4 * model.numbers_of_norms + 4 * heads


def inference_memory(model: Architecture, tokens: int) -> Memory:
    """One device that computes `tokens` tokens at a time without gradients: one block's numbers are alive at a time."""
    block = block_activations(model, model.element_size, model.shared_inputs)
    activations = tokens * (block + 4 * 3 * model.hidden) + 2 * TILE_BYTES
    return Memory(weights=model.weight_bytes, activations=activations)


def sampling_memory(model: Architecture, load: Load, batch_completions: int) -> Memory:
    """One device that samples: weights, the cache of all groups in flight at their longest, and the logits of a step.

    A prompt's keys and values are kept once per group, a completion's in rows that grow by doubling from 32.
    """
    groups = groups_in_flight(load, batch_completions)
    rows = groups * load.completions
    cache = groups * cache_tokens(load) * model.cache_bytes_per_token
    logits = rows * model.config.vocab_size * (4 + model.element_size)
    working = inference_memory(model, max(_ENTERING_TOKENS, load.longest_prompt) + rows)
    return replace(working, cache=float(cache), activations=working.activations + logits)


def groups_in_flight(load: Load, batch_completions: int) -> int:
    """Prompts that are decoded at the same time: whole groups, at least one."""
    return max(1, min(batch_completions // load.completions, load.prompts))


def cache_tokens(load: Load) -> int:
    """Tokens for which one group's cache has room when its completions are as long as they may be.

    The last token of a completion is never read, so T − 1 are cached.
    """
    room, read = _FIRST_CAPACITY, load.longest_completion - 1
    while room < read:
        room *= 2
    return load.longest_prompt + (load.completions * room if read else 0)
