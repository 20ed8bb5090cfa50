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
from exalign.models.lm_head import embed, may_add_in_place, token_logprobs
from exalign.models.memory import computed
from exalign.models.prefix_tree import PaddedRows, padded_rows, policy_stream, unflatten_tokens


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

    def forward(self, groups: Sequence[Group], *, temperature: float, by_token: bool = False) -> Tensor:
        """log π(y_i|x) `[B, K]` in nats, see `completion_logprobs`; or by token, see `completion_token_logprobs`."""
        if by_token:
            return completion_token_logprobs(self.model, groups, temperature=temperature, add_in_place=True)
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


def completion_token_logprobs(
    model: nn.Module, groups: Sequence[Group], *, temperature: float, add_in_place: bool = False
) -> Tensor:
    """log π(y_t|x, y_<t) `[B, K, T]` in nats, with gradient; 0 where there is no token. T is the longest completion.

    The terms of the sum that `completion_logprobs` returns, by the same code; `model` is a bare transformers model.
    `add_in_place`, for the forward of a module: the vocabulary's gradients are added to `.grad` directly.
    """
    _check(temperature)
    logp, _, cells = _token_logprobs(model, groups, temperature, add_in_place=add_in_place)
    return unflatten_tokens(logp, cells, groups)


def plain_completion_logprobs(model: nn.Module, groups: Sequence[Group], *, temperature: float) -> Tensor:
    """The slow twin of `completion_logprobs`: one padded row per completion, full logits. For tests and comparison."""
    _check(temperature)
    logp, places, _ = _plain_logprobs(model, groups, temperature)
    return _summed(logp, places, groups)


def plain_completion_token_logprobs(model: nn.Module, groups: Sequence[Group], *, temperature: float) -> Tensor:
    """The slow twin of `completion_token_logprobs`."""
    _check(temperature)
    logp, _, cells = _plain_logprobs(model, groups, temperature)
    return unflatten_tokens(logp, cells, groups)


def holds(model: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether `model` is of this kind under whatever wraps it for distribution or compilation."""
    inner: Any = model
    while not isinstance(inner, kind):
        inner = getattr(inner, "module", None) or getattr(inner, "_orig_mod", None)
        if inner is None:
            return False
    return True


def _packed_logprobs(model: nn.Module, groups: Sequence[Group], temperature: float, *, add_in_place: bool) -> Tensor:
    logp, places, _ = _token_logprobs(model, groups, temperature, add_in_place=add_in_place)
    return _summed(logp, places, groups)


def _summed(logp: Tensor, places: Tensor, groups: Sequence[Group]) -> Tensor:
    """Sums over the tokens of each completion, `[B, K]`."""
    width = max(group.num_completions for group in groups)
    return logp.new_zeros(len(groups) * width).index_add(0, places, logp).view(len(groups), width)


def _token_logprobs(
    model: nn.Module, groups: Sequence[Group], temperature: float, *, add_in_place: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """log π of every completion token `[T]`, and its `places` and `cells` `[T]`, see `Predictions`."""
    plan, base, device = plan_for(model), base_of(model), device_of(model)
    if plan.logit_map is None:
        return _plain_logprobs(model, groups, temperature)
    logit_map = replace(plan.logit_map, temperature=temperature)
    head = base.get_output_embeddings()
    if not plan.tree:
        rows = padded_rows(groups, device)
        hidden = _predicting(row_hidden(base, rows.input_ids, rows.attention_mask), rows)
        order, host_rows = torch.arange(len(hidden), device=device), torch.arange(len(hidden))
        logp = token_logprobs(hidden, head, order, rows.targets, logit_map=logit_map, host_rows=host_rows)
        return logp, rows.places, rows.cells
    parts, places = plan.sides(groups)
    stream, wanted = policy_stream(parts, device, places=places, windows=plan.windows)
    embedding = base.get_input_embeddings()
    direct = add_in_place and plan.embeds and torch.is_grad_enabled() and may_add_in_place(embedding.weight)
    hidden = stream_hidden(base, stream, embed(stream.input_ids, embedding) if direct else None)
    logp = token_logprobs(
        hidden.index_select(0, wanted.positions),
        head,
        wanted.rows,
        wanted.targets,
        logit_map=logit_map,
        add_in_place=add_in_place,
        host_rows=wanted.host_rows,
    )
    return logp, wanted.places, wanted.cells


def _plain_logprobs(model: nn.Module, groups: Sequence[Group], temperature: float) -> tuple[Tensor, Tensor, Tensor]:
    """The same by the model's own logits of padded rows."""
    rows = padded_rows(groups, device_of(model))
    logits = _predicting(row_logits(model, rows.input_ids, rows.attention_mask), rows)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))  # before the softmax and the sum, never after
    logp = torch.log_softmax(logits / temperature, dim=-1).gather(1, rows.targets[:, None]).squeeze(1)
    return logp, rows.places, rows.cells


def _predicting(states: Tensor, rows: PaddedRows) -> Tensor:
    return states.flatten(0, 1).index_select(0, rows.positions)


def _check(temperature: float) -> None:
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
