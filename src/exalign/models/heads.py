"""Scalar heads: a reward model's or classifier's, read at the last real token; a critic's, read before each token."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from exalign.data.batching import Group
from exalign.models.capability import base_of, device_of, plan_for, predicting_states, row_hidden, stream_hidden
from exalign.models.logprobs import completion_token_logprobs, holds
from exalign.models.prefix_tree import padded_rows, unflatten, unflatten_tokens, whole_stream


class PackedScorer(nn.Module):
    """A reward model or classifier whose forward takes groups: the module to give to Accelerate, DDP or FSDP."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        plan_for(model)  # before anything wraps the parameters

    def forward(self, groups: Sequence[Group]) -> Tensor:
        """Head outputs `[B, K, num_labels]`, see `completion_outputs`."""
        return _packed_outputs(self.model, groups)


class ActorCritic(nn.Module):
    """The policy is `model`, a transformers language model; `critic` is a sequence classifier with one label.

    They share no weights. Their forward takes groups, so that whatever hooks into it (mixed precision) acts on both.
    `kl_coefficient` is a number that their trainer may adapt on the way, and is kept with the weights in checkpoints.
    As under `PackedPolicy`, gradients of the policy's vocabulary go to `.grad` directly: use `backward()`.
    """

    def __init__(self, model: nn.Module, critic: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.critic = critic
        self.kl_coefficient: Tensor
        self.register_buffer("kl_coefficient", torch.zeros(()))
        plan_for(model)
        plan_for(critic)

    def forward(
        self, groups: Sequence[Group], *, temperature: float, critic_alone: bool = False
    ) -> tuple[Tensor, Tensor]:
        """log π(y_t|x, y_<t) in nats and the value V_t of the state before y_t: two `[B, K, T]`, 0 on padding.

        While the critic is trained alone the log-probabilities carry no gradient: whatever exchanges gradients between
        processes then waits for the critic's only.
        """
        with torch.set_grad_enabled(torch.is_grad_enabled() and not critic_alone):
            logp = completion_token_logprobs(self.model, groups, temperature=temperature, add_in_place=True)
        return logp, completion_values(self.critic, groups)


def completion_outputs(model: nn.Module, groups: Sequence[Group]) -> Tensor:
    """Head outputs `[B, K, num_labels]` with gradient, float32 (float64 for a float64 model); 0 where no completion is.

    The token is found by length, never by looking for padding, so a score depends on nothing but prompt and
    completion. Each prompt is computed once for its K completions. `model` is a transformers sequence classifier, one
    under PEFT, or a `PackedScorer`, wrapped or not. A classifier that pools in its own way (an encoder) is asked row by
    row.
    """
    return model(groups) if holds(model, PackedScorer) else _packed_outputs(model, groups)


def completion_values(model: nn.Module, groups: Sequence[Group]) -> Tensor:
    """The critic's value of the state before each completion token, `[B, K, T]` with gradient; 0 where no token is.

    V_t is the head of a sequence classifier with one label, read at the position that predicts token t: the last
    token of the prompt for the first one, which all K completions share. float32 (float64 for a float64 model).
    `ValueError` for a model without such a head.
    """
    base = _critic(model)
    hidden, wanted = predicting_states(model, groups)
    return unflatten_tokens(_head(base, hidden)[wanted.rows, 0], wanted.cells, groups)


def plain_completion_values(model: nn.Module, groups: Sequence[Group]) -> Tensor:
    """The slow twin of `completion_values`: for each token, what stands before it alone in a row."""
    base, device, values = _critic(model), device_of(model), []
    for group in groups:
        for ids in group.completion_ids:
            path = torch.cat([group.prompt_ids, ids]).to(device)
            ends = range(len(group.prompt_ids), len(path))
            values.append(torch.cat([_row_output(base, path[None, :end])[:, 0] for end in ends]))
    tokens = nn.utils.rnn.pad_sequence(values, batch_first=True)
    return unflatten(_accurate(tokens), groups)


def plain_completion_outputs(model: nn.Module, groups: Sequence[Group]) -> Tensor:
    """The slow twin of `completion_outputs`: one completion at a time, alone in its row, without padding."""
    device, outputs = device_of(model), []
    for group in groups:
        for ids in group.completion_ids:
            outputs.append(_row_output(base_of(model), torch.cat([group.prompt_ids, ids])[None].to(device)))
    return unflatten(_accurate(torch.cat(outputs)), groups)


def _critic(model: nn.Module) -> Any:
    base = base_of(model)
    if not hasattr(base, "score") or base.config.num_labels != 1:
        raise ValueError("a critic is a causal model with one label and a head named score")
    return base


def _row_output(base: Any, row: Tensor) -> Tensor:
    if not hasattr(base, "score"):
        return base(input_ids=row).logits
    # Not the model's own forward: it takes the last token that is not padding, and padding may be the end token.
    return _head(base, row_hidden(base, row)[:, -1])


def _packed_outputs(model: nn.Module, groups: Sequence[Group]) -> Tensor:
    plan, base, device = plan_for(model), base_of(model), device_of(model)
    if not hasattr(base, "score"):
        return plain_completion_outputs(model, groups)
    if plan.tree:
        parts, places = plan.sides(groups)
        stream, last, there = whole_stream(parts, device, places=places, windows=plan.windows)
        return unflatten(_head(base, stream_hidden(base, stream).index_select(0, last)), groups, there)
    input_ids, attention_mask, _ = padded_rows(groups, device)
    last = attention_mask.sum(dim=1) - 1
    hidden = row_hidden(base, input_ids, attention_mask)
    return unflatten(_head(base, hidden[torch.arange(len(hidden), device=device), last]), groups)


def _head(base: Any, hidden: Tensor) -> Tensor:
    """The head's numbers, computed in float32 at least: 16 bits, of autocast or of the weights, would round rewards and
    values to 8."""
    weights = {name: _accurate(weight) for name, weight in base.score.named_parameters()}
    with torch.autocast(hidden.device.type, enabled=False):
        found: Tensor = torch.func.functional_call(base.score, weights, (_accurate(hidden),))
        return found


def _accurate(values: Tensor) -> Tensor:
    return values.to(torch.promote_types(values.dtype, torch.float32))
