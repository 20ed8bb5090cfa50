"""Sequence log-probabilities log π(y|x): sums over a completion's tokens, in nats, of log-softmax(logits / τ)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from exalign.data.batching import Group
from exalign.models.capability import base_of, device_of, plan_for, predicting_states, row_logits
from exalign.models.lm_head import token_logprobs
from exalign.models.memory import computed
from exalign.models.prefix_tree import Predictions, padded_rows, unflatten, unflatten_tokens


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

    def work(part: Sequence[Group]) -> Tensor:
        return completion_logprobs(model, part, temperature=temperature).cpu()

    found: dict[int, Tensor] = {}
    with torch.no_grad():
        for batch, values in computed(work, groups, token_budget=token_budget):
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
    logp, wanted = _token_logprobs(model, groups, temperature, add_in_place=add_in_place)
    return unflatten_tokens(logp, wanted.cells, groups)


def plain_completion_logprobs(model: nn.Module, groups: Sequence[Group], *, temperature: float) -> Tensor:
    """The slow twin of `completion_logprobs`: one padded row per completion, full logits. For tests and comparison."""
    _check(temperature)
    logp, wanted = _plain_logprobs(model, groups, temperature)
    return unflatten(logp, groups, wanted.places)


def plain_completion_token_logprobs(model: nn.Module, groups: Sequence[Group], *, temperature: float) -> Tensor:
    """The slow twin of `completion_token_logprobs`."""
    _check(temperature)
    logp, wanted = _plain_logprobs(model, groups, temperature)
    return unflatten_tokens(logp, wanted.cells, groups)


def holds(model: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether `model` is of this kind under whatever wraps it for distribution or compilation."""
    inner: Any = model
    while not isinstance(inner, kind):
        inner = getattr(inner, "module", None) or getattr(inner, "_orig_mod", None)
        if inner is None:
            return False
    return True


def _packed_logprobs(model: nn.Module, groups: Sequence[Group], temperature: float, *, add_in_place: bool) -> Tensor:
    logp, wanted = _token_logprobs(model, groups, temperature, add_in_place=add_in_place)
    return unflatten(logp, groups, wanted.places)


def _token_logprobs(
    model: nn.Module, groups: Sequence[Group], temperature: float, *, add_in_place: bool
) -> tuple[Tensor, Predictions]:
    """log π of every completion token `[T]`."""
    plan = plan_for(model)
    if plan.logit_map is None:
        return _plain_logprobs(model, groups, temperature)
    hidden, wanted = predicting_states(model, groups, add_in_place=add_in_place)
    logp = token_logprobs(
        hidden,
        base_of(model).get_output_embeddings(),
        wanted.rows,
        wanted.targets,
        logit_map=replace(plan.logit_map, temperature=temperature),
        add_in_place=add_in_place and plan.tree,
        host_rows=wanted.host_rows,
    )
    return logp, wanted


def _plain_logprobs(model: nn.Module, groups: Sequence[Group], temperature: float) -> tuple[Tensor, Predictions]:
    """The same by the model's own logits of padded rows."""
    input_ids, attention_mask, wanted = padded_rows(groups, device_of(model))
    logits = row_logits(model, input_ids, attention_mask).flatten(0, 1).index_select(0, wanted.positions)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))  # before the softmax and the sum, never after
    return torch.log_softmax(logits / temperature, dim=-1).gather(1, wanted.targets[:, None]).squeeze(1), wanted


def _check(temperature: float) -> None:
    if not temperature > 0:
        raise ValueError(f"temperature must be positive, got {temperature}")
