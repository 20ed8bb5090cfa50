"""Sequence log-probabilities log π(y|x): sums over a completion's tokens, in nats, of log-softmax(logits / τ)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from exalign.data.batching import Group
from exalign.models.capability import base_of, device_of, plan_for, row_hidden, row_logits, stream_hidden
from exalign.models.lm_head import LogitMap, embed, may_add_in_place, token_logprobs
from exalign.models.memory import computed
from exalign.models.prefix_tree import (
    padded_rows,
    policy_stream,
    predicted_tokens,
    predictions,
    unflatten,
    unflatten_tokens,
)


class PackedPolicy(nn.Module):
    """A policy whose forward takes groups and returns log π(y|x): the module to give to Accelerate, DDP or FSDP.

    They hook into the forward of what they wrap, and parameters that are read outside it are not gathered; here the
    body and the head are both inside. `completion_logprobs` takes it wrapped or bare. `model` is the policy itself.
    In a single process it adds the vocabulary's gradients to `.grad` directly: use `backward()`, not `autograd.grad`.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        plan_for(model)  # before anything wraps the parameters

    def forward(self, groups: Sequence[Group], *, temperature: float) -> Tensor:
        """log π(y_i|x) `[B, K]` in nats, see `completion_logprobs`."""
        return _packed_logprobs(self.model, groups, temperature, add_in_place=True)


def completion_logprobs(model: nn.Module, groups: Sequence[Group], *, temperature: float) -> Tensor:
    """log π(y_i|x) `[B, K]` in nats, with gradient; 0 where a group has no i-th completion.

    log π(y|x) = Σ_t log softmax(logits_t / τ)[y_t] over all tokens of y. float32 whatever the model's type (float64
    for a float64 model). `model` is a transformers model, one under PEFT, or a `PackedPolicy`, wrapped for
    distribution or not. Each prompt is computed once for its K completions, nothing is padded, and no logits are kept;
    an architecture that cannot take this way takes a slower one, and says so once. `ValueError` for τ ≤ 0.
    """
    _check(temperature)
    if holds(model, PackedPolicy):
        return model(groups, temperature=temperature)
    return _packed_logprobs(model, groups, temperature, add_in_place=False)


def reference_logprobs(
    model: nn.Module, groups: Sequence[Group], *, temperature: float, token_budget: int
) -> list[Tensor]:
    """log π(y_i|x) `[K]` of each group, without gradient, on the CPU: the numbers that stand for a reference model.

    By the code path of training, in micro-batches of whole groups up to `token_budget` tokens, or as many as fit.
    """
    found: dict[int, Tensor] = {}
    with torch.no_grad():
        work = partial(completion_logprobs, model, temperature=temperature)
        for batch, values in computed(lambda part: work(part).cpu(), groups, token_budget=token_budget):
            found |= {id(group): row[: group.num_completions] for group, row in zip(batch, values, strict=True)}
    return [found[id(group)] for group in groups]


def completion_token_logprobs(model: nn.Module, groups: Sequence[Group], *, temperature: float) -> Tensor:
    """log π(y_t|x, y_<t) `[B, K, T]` in nats, with gradient; 0 where there is no token. T is the longest completion.

    The terms of the sum that `completion_logprobs` returns, by the same code; `model` is a bare transformers model.
    """
    _check(temperature)
    return unflatten_tokens(*_token_logprobs(model, groups, temperature, add_in_place=False), groups)


def packed_token_logprobs(model: nn.Module, groups: Sequence[Group], temperature: float) -> Tensor:
    """`completion_token_logprobs` for the forward of a module: vocabulary gradients are added to `.grad` in place."""
    return unflatten_tokens(*_token_logprobs(model, groups, temperature, add_in_place=True), groups)


def plain_completion_logprobs(model: nn.Module, groups: Sequence[Group], *, temperature: float) -> Tensor:
    """The slow twin of `completion_logprobs`: one padded row per completion, full logits. For tests and comparison."""
    _check(temperature)
    logp, predicted = _plain_logprobs(model, groups, temperature)
    return unflatten((logp * predicted).sum(dim=1), groups)


def plain_completion_token_logprobs(model: nn.Module, groups: Sequence[Group], *, temperature: float) -> Tensor:
    """The slow twin of `completion_token_logprobs`."""
    _check(temperature)
    logp, predicted = _plain_logprobs(model, groups, temperature)
    return unflatten_tokens(logp[predicted], predicted.nonzero()[:, 0], groups)


def holds(model: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether `model` is of this kind under whatever wraps it for distribution or compilation."""
    inner: Any = model
    while not isinstance(inner, kind):
        inner = getattr(inner, "module", None) or getattr(inner, "_orig_mod", None)
        if inner is None:
            return False
    return True


def _packed_logprobs(model: nn.Module, groups: Sequence[Group], temperature: float, *, add_in_place: bool) -> Tensor:
    logp, sequences = _token_logprobs(model, groups, temperature, add_in_place=add_in_place)
    num_sequences = sum(group.num_completions for group in groups)
    return unflatten(logp.new_zeros(num_sequences).index_add(0, sequences, logp), groups)


def _token_logprobs(
    model: nn.Module, groups: Sequence[Group], temperature: float, *, add_in_place: bool
) -> tuple[Tensor, Tensor]:
    """log π of every completion token `[N]`, and the completion it belongs to `[N]`, counted through the groups."""
    plan, base, device = plan_for(model), base_of(model), device_of(model)
    if plan.logit_map is None:
        logp, predicted = _plain_logprobs(model, groups, temperature)
        return logp[predicted], predicted.nonzero()[:, 0]
    logit_map = replace(plan.logit_map, temperature=temperature)
    if not plan.tree:
        return _padded_logprobs(base, groups, logit_map)
    parts, numbers = plan.sides(groups)
    stream = policy_stream(parts, device)
    wanted = predictions(parts, stream.layout, device)
    embedding, head = base.get_input_embeddings(), base.get_output_embeddings()
    direct = add_in_place and plan.embeds and torch.is_grad_enabled() and may_add_in_place(embedding.weight)
    hidden = stream_hidden(base, stream, embed(stream.input_ids, embedding) if direct else None)
    hidden = torch.cat([hidden[begin:end] for begin, end in wanted.spans])
    logp = token_logprobs(hidden, head, wanted.rows, wanted.targets, logit_map=logit_map, add_in_place=add_in_place)
    return logp, wanted.sequences if numbers is None else numbers.to(device)[wanted.sequences]


def _padded_logprobs(base: Any, groups: Sequence[Group], logit_map: LogitMap) -> tuple[Tensor, Tensor]:
    input_ids, attention_mask, prompt_lengths = padded_rows(groups, device_of(base))
    predicted = predicted_tokens(attention_mask, prompt_lengths)
    hidden = row_hidden(base, input_ids, attention_mask)[:, :-1][predicted]
    rows = torch.arange(len(hidden), device=hidden.device)
    head, targets = base.get_output_embeddings(), input_ids[:, 1:][predicted]
    return token_logprobs(hidden, head, rows, targets, logit_map=logit_map), predicted.nonzero()[:, 0]


def _plain_logprobs(model: nn.Module, groups: Sequence[Group], temperature: float) -> tuple[Tensor, Tensor]:
    """log π of the tokens at positions 1 … L − 1 of padded rows, and which of them are completion tokens."""
    input_ids, attention_mask, prompt_lengths = padded_rows(groups, device_of(model))
    logits = row_logits(model, input_ids, attention_mask)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))  # before the softmax and the sum, never after
    logp = torch.log_softmax(logits[:, :-1] / temperature, dim=-1).gather(2, input_ids[:, 1:, None]).squeeze(2)
    return logp, predicted_tokens(attention_mask, prompt_lengths)


def _check(temperature: float) -> None:
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
