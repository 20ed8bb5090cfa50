"""How much of a model is computed at a time: what its numbers need, and what of that fits on a device.

A size changes memory and speed and no result beyond rounding. On a CPU sizes are constants. On an accelerator they are
functions of its `memory` in bytes and of the architecture, so a run that goes on has the same (`device.device_memory`
is that of the device it began on). They are estimates: where one is too large, memory runs out and it is halved.

torch and transformers are imported where they are used: `exalign plan` loads this module at every start.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

from exalign.device import device_memory
from exalign.settings import Auto

if TYPE_CHECKING:
    import torch
    from torch import nn

CPU_TOKENS, CPU_COMPLETIONS = 2048, 64
SCORING_TOKENS = 8192
"""On a CPU: tokens per pass, completions decoded together, and tokens per pass for log-probabilities of samples."""
_TOKENS = (1024, 32768)
_ENOUGH = 4096  # tokens: an accelerator that has no room for them recomputes activations
_COMPLETIONS = 1024
_USABLE = 0.9  # of the memory; the rest is context and fragments


class Architecture:
    """A model on the meta device, adapters included, and its numbers; `origin`: where its configuration came from.

    `parameters` counts all, tied ones once, `trained` those that are. Sizes are bytes: of all weights, of trained ones,
    of what training keeps for these beside them (`state_bytes`), of a block (`layer_bytes`), of autocast's copies of
    float32 matrices (`half_copies`), and of one token's keys and values. One that `speaks` has a head over the
    vocabulary; an encoder that classifies reads each completion with a prompt of its own (`shares_prompts` is false).
    """

    def __init__(self, name: str, module: nn.Module, origin: str) -> None:
        from exalign.models.capability import base_of, widest
        from exalign.models.flops import matrices

        base, weights = base_of(module), list(module.parameters())
        trained, linear = [w for w in weights if w.requires_grad], [weight for _, weight in matrices(module)]
        config: Any = base.config.get_text_config()
        self.name, self.module, self.origin = name, module, origin
        self.parameters, self.trained = (sum(w.numel() for w in some) for some in (weights, trained))
        self.weight_bytes, self.trained_bytes = _bytes(weights), _bytes(trained)
        # Gradient and moments in float32, and what a weight of 16 bits lacks of one (`training.optimizer`).
        self.state_bytes = sum(w.numel() * (3 * w.element_size() if w.element_size() >= 4 else 14) for w in trained)
        self.half_copies = 2 * sum(w.numel() for w in linear if w.element_size() == 4)
        self.speaks = base.get_output_embeddings() is not None
        self.shares_prompts = hasattr(base, "score") or self.speaks
        self.element_size = weights[0].element_size()  # of keys, values and hidden states in inference too
        self.precision = "fp32" if self.element_size >= 4 else "bf16"
        self.hidden, self.heads = int(config.hidden_size), widest(config, "num_attention_heads") or 1
        self.layers, self.vocabulary = int(config.num_hidden_layers), int(config.vocab_size)
        self.head_size = widest(config, "head_dim") or self.hidden // self.heads
        self.key_heads = widest(config, "num_key_value_heads") or self.heads
        self.cache_bytes_per_token = 2 * self.layers * self.key_heads * self.head_size * self.element_size
        names = ("intermediate_size", "n_inner", "ffn_dim", "hidden_dim")
        self.feed_forward = next(filter(None, (widest(config, name) for name in names)), 4 * self.hidden)
        self._measure_block(base)

    def _measure_block(self, base: Any) -> None:
        from torch import nn
        from transformers.pytorch_utils import Conv1D

        lists = [list(m) for m in base.base_model.modules() if isinstance(m, nn.ModuleList) and len(m)]
        block = max(lists, key=len, default=[nn.Identity()])[0]
        self.layer_bytes = _bytes(block.parameters())
        self.gated = any("gate" in name for name, _ in block.named_modules())
        linear = [m for m in block.modules() if isinstance(m, nn.Linear | Conv1D) and m.weight.requires_grad]
        self.cast_inputs = sum(m.in_features if isinstance(m, nn.Linear) else m.weight.shape[0] for m in linear)
        kinds = [type(m).__name__.lower() for m in block.modules()]
        self.rms = any("rms" in kind and "norm" in kind for kind in kinds)

    def block_activations(self, *, autocast: bool) -> float:
        """Bytes that a block keeps for one token: numbers of products have the weights' size, or 2, those of norms 4.

        What goes into linear layers (the outputs of two norms, the attention's, the F of the feed-forward part; under
        autocast every trained layer has a cast copy of its own, frozen ones none); queries, keys and values; what goes
        into the feed-forward's activation function, and with a gate also what comes out of it and what it is multiplied
        with; the inputs of the norms (an RMS norm's normed numbers too); the attention's log-sum-exp.
        """
        shared = 2 * self.hidden + self.heads * self.head_size + self.feed_forward
        inputs, size = (self.cast_inputs, 2) if autocast else (shared, self.element_size)
        attention = (self.heads + 2 * self.key_heads) * self.head_size
        products = inputs + attention + (3 if self.gated else 1) * self.feed_forward
        return size * products + 4 * 2 * self.hidden * (2 if self.rms else 1) + 4 * self.heads

    def training_activations(self, *, autocast: bool, checkpointed: bool) -> float:
        """Bytes that one token keeps for the backward pass, the tiles of logits left out.

        With gradient checkpointing a block keeps its input alone (4 bytes a number), and one block at a time all it
        needs.
        """
        block = self.block_activations(autocast=autocast)
        blocks = self.layers * 4 * self.hidden + block if checkpointed else self.layers * block
        return blocks + 4 * 5 * self.hidden  # embedding, final norm in and out, what the head reads and its gradient

    def head_activations(self, tokens: int, memory: float | None, *, kept: bool = True) -> float:
        """Bytes of the head's tiles for as many tokens: the one at work, and those kept for the backward pass."""
        from exalign.models.lm_head import head_bytes

        most = 4 * self.vocabulary * tokens if self.speaks else 0
        return sum(min(part, most) for part in head_bytes(memory)[0 if kept else 1 :])

    def reading_activations(self) -> float:
        """Bytes of one token without gradients: one block's numbers are alive at a time."""
        return self.block_activations(autocast=False) + 4 * 3 * self.hidden


def _bytes(parameters: Iterable[torch.Tensor]) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in parameters)


def training_sizes(
    models: Sequence[Architecture],
    memory: float | None,
    *,
    token_budget: int | Auto,
    checkpointing: bool | Auto,
    autocast: bool,
    shards: int = 1,
) -> tuple[int, bool]:
    """The token budget of models that are trained together, and whether activations are recomputed.

    Beside weights, gradients, moments and autocast's copies, over `shards` devices, there is room for the weights once
    more: a reference, a reward model. Activations are recomputed where without that the budget, for auto 4,096, would
    not fit.
    """
    if memory is None:
        return CPU_TOKENS if token_budget == "auto" else token_budget, checkpointing is True
    least = _ENOUGH if token_budget == "auto" else token_budget
    state = sum(2 * m.weight_bytes + m.state_bytes + m.half_copies * autocast for m in models) / shards
    room = _USABLE * memory - state - sum(m.head_activations(_TOKENS[1], memory) for m in models)

    def fitting(again: bool) -> float:
        return room / sum(m.training_activations(autocast=autocast, checkpointed=again) for m in models)

    again = fitting(False) < least if checkpointing == "auto" else checkpointing
    return _within(_TOKENS, fitting(again)) if token_budget == "auto" else token_budget, again


def tokens_to_read(models: Sequence[Architecture], memory: float | None, wanted: int | Auto | None) -> int:
    """Tokens per forward pass without gradients, whose activations take half of what the weights leave.

    On a CPU `CPU_TOKENS` for auto, and `SCORING_TOKENS` for None.
    """
    if isinstance(wanted, int):
        return wanted
    if memory is None:
        return SCORING_TOKENS if wanted is None else CPU_TOKENS
    room = (_USABLE * memory - sum(m.weight_bytes for m in models)) / 2
    return _within(_TOKENS, room / sum(m.reading_activations() for m in models))


def completions_at_once(
    models: Sequence[Architecture], memory: float | None, wanted: int | Auto, *, prompt_tokens: float, tokens: int
) -> int:
    """Completions of up to `tokens` tokens decoded together, each with `prompt_tokens` of a prompt to itself.

    Keys and values take a quarter of what the weights leave, because they are copied where their pages grow; the
    logits of a step stand beside them, several times in float32.
    """
    from exalign.models.prefix_tree import BLOCK

    if wanted != "auto":
        return wanted
    if memory is None:
        return CPU_COMPLETIONS
    cached = prompt_tokens + -(-tokens // BLOCK) * BLOCK
    room = (_USABLE * memory - sum(m.weight_bytes for m in models)) / 4
    return _within((1, _COMPLETIONS), room / sum(cached * m.cache_bytes_per_token + 16 * m.vocabulary for m in models))


def reading_budget(model: nn.Module, wanted: int | Auto | None) -> int:
    """`tokens_to_read` for a model where it stands."""
    memory = device_memory(next(model.parameters()).device)
    return tokens_to_read(measured([model], memory), memory, wanted)


def measured(modules: Iterable[nn.Module], memory: float | None) -> list[Architecture]:
    """What sizes follow from; nothing on a CPU, where they are constants."""
    return [] if memory is None else [Architecture("", module, "") for module in modules]


def _within(bounds: tuple[int, int], number: float) -> int:
    """The number in whole multiples of the lower bound, between the bounds."""
    low, high = bounds
    return max(low, min(high, int(number) // low * low))
