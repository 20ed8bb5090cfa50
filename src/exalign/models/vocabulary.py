"""Gradients of the vocabulary's matrices, added to `.grad` where they belong instead of through a copy of it.

The input embedding and the head are by far the largest matrices of a small model, and often one and the same. Autograd
would allocate, fill with zeros and add such a matrix once per use and micro-batch; here a use adds its rows or its
product to `.grad` directly. Only `PackedPolicy` does so, whose result is for `backward()`: under `torch.autograd.grad`
these gradients would land in `.grad`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable


def may_add_in_place(parameter: Tensor | None) -> bool:
    """Whether nothing waits for this gradient: a trained leaf without hooks, in a single process.

    Distributed training reduces a gradient when autograd delivers it, so there it must be delivered.
    """
    return (
        parameter is not None
        and parameter.is_leaf
        and parameter.requires_grad
        and not parameter._backward_hooks
        and not parameter._post_accumulate_grad_hooks
        and not (torch.distributed.is_available() and torch.distributed.is_initialized())
    )


def gradient_of(parameter: Tensor) -> Tensor:
    """`parameter.grad`, zeros if it was not there."""
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad


def is_plain_embedding(module: nn.Module) -> bool:
    """Whether the module only looks up rows, so that `embed` stands for it."""
    return (
        type(module) is nn.Embedding
        and module.max_norm is None
        and not (module.scale_grad_by_freq or module.sparse or module._forward_hooks or module._forward_pre_hooks)
    )


def embed(input_ids: Tensor, embedding: nn.Embedding) -> Tensor:
    """Rows of the embedding `[…, H]`; backward adds their gradients to the weight's `.grad` in place."""
    return _Embed.apply(input_ids, embedding.weight, embedding.padding_idx)


class _Embed(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, input_ids: Tensor, weight: Tensor, padding_idx: int | None) -> Tensor:
        ctx.save_for_backward(input_ids)
        ctx.weight, ctx.padding_idx = weight, padding_idx
        return weight[input_ids]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None, None]:
        ids, grad = ctx.saved_tensors[0].flatten(), grad.flatten(0, -2)
        if ctx.padding_idx is not None:
            grad = grad.masked_fill((ids == ctx.padding_idx).unsqueeze(1), 0.0)
        gradient_of(ctx.weight).index_add_(0, ids, grad)
        return None, None, None
