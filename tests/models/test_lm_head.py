"""Token log-probs against the plain formula, value and gradients, for every kind of head; and what they keep alive."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from exalign.models import lm_head
from exalign.models.lm_head import LogitMap, token_logprobs

VOCAB, WIDTH = 211, 12
MAPS = [LogitMap(), LogitMap(scale=0.3, temperature=0.7), LogitMap(scale=1.4, cap=3.0, temperature=1.3)]


def problem(dtype: torch.dtype, *, bias: bool, num_rows: int = 300) -> tuple[Tensor, nn.Linear, Tensor, Tensor]:
    head = nn.Linear(WIDTH, VOCAB, bias=bias, dtype=dtype)
    hidden = (torch.randn(num_rows, WIDTH) * 3).to(dtype).requires_grad_()
    rows = torch.cat([torch.zeros(5).long(), torch.arange(1, num_rows), torch.tensor([num_rows - 1] * 3)])
    return hidden, head, rows, torch.randint(VOCAB, rows.shape)


def plain(hidden: Tensor, head: nn.Linear, rows: Tensor, targets: Tensor, logit_map: LogitMap) -> Tensor:
    logits = head(hidden) * logit_map.scale
    if logit_map.cap is not None:
        logits = torch.tanh(logits / logit_map.cap) * logit_map.cap
    return torch.log_softmax(logits.to(torch.float64) / logit_map.temperature, dim=-1)[rows, targets]


class Behind(nn.Module):
    """A head that is not a plain linear layer, as an adapter's is not."""

    def __init__(self, inner: nn.Linear) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, hidden: Tensor) -> Tensor:
        return self.inner(hidden)


@pytest.mark.parametrize("kept_bytes", [lm_head.KEPT_BYTES, 150 * VOCAB * 8, 0], ids=["kept", "some", "computed again"])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("logit_map", MAPS)
@pytest.mark.parametrize("wrap", [lambda head: head, Behind], ids=["linear", "module"])
def test_value_and_gradients_for_any_incoming_gradient(monkeypatch, kept_bytes, bias, logit_map, wrap) -> None:
    monkeypatch.setattr(lm_head, "KEPT_BYTES", kept_bytes)
    monkeypatch.setattr(lm_head, "TILE_BYTES", 0)  # the fewest rows per tile
    hidden, head, rows, targets = problem(torch.float64, bias=bias)
    weight = torch.randn(len(rows), dtype=torch.float64)  # a different incoming gradient for every token
    inputs = [hidden, *head.parameters()]
    fast = token_logprobs(hidden, wrap(head), rows, targets, logit_map=logit_map)
    slow = plain(hidden, head, rows, targets, logit_map)
    assert torch.allclose(fast, slow, atol=1e-12)
    for ours, theirs in zip(
        torch.autograd.grad((fast * weight).sum(), inputs),
        torch.autograd.grad((slow * weight).sum(), inputs),
        strict=True,
    ):
        assert torch.allclose(ours, theirs, atol=1e-11)


@pytest.mark.parametrize("frozen", ["head", "body"])
def test_what_is_frozen_gets_no_gradient_and_costs_no_product(frozen) -> None:
    hidden, head, rows, targets = problem(torch.float64, bias=False)
    trained = [hidden] if frozen == "head" else list(head.parameters())
    for parameter in head.parameters() if frozen == "head" else [hidden]:
        parameter.requires_grad_(False)
    counter = ProductCounter()
    with counter:
        fast = token_logprobs(hidden, head, rows, targets).sum()
        ours = torch.autograd.grad(fast, trained)
    theirs = torch.autograd.grad(plain(hidden, head, rows, targets, LogitMap()).sum(), trained)
    assert all(torch.allclose(a, b, atol=1e-11) for a, b in zip(ours, theirs, strict=True))
    assert counter.products == 2  # the logits, and one gradient


class ProductCounter(TorchDispatchMode):
    """Counts matrix products with the whole vocabulary."""

    def __init__(self) -> None:
        super().__init__()
        self.products = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        self.products += func._overloadpacket in (torch.ops.aten.mm, torch.ops.aten.addmm_)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("autocast", [False, True], ids=["weights", "autocast"])
def test_half_precision_ends_with_the_factors_of_the_logits(autocast: bool) -> None:
    """Logits that were rounded to 8 bits are the trap, whatever softmax and sum make of them."""
    hidden, head, rows, targets = problem(torch.float32 if autocast else torch.bfloat16, bias=False)
    factors = (side.detach().bfloat16().double() for side in (hidden, head.weight))
    logits = next(factors) @ next(factors).t()
    exact = torch.log_softmax(logits, dim=-1)[rows, targets]
    trap = torch.log_softmax(logits.bfloat16().double(), dim=-1)[rows, targets]
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        ours = token_logprobs(hidden, head, rows, targets)
    assert ours.dtype == torch.float32
    assert (ours - exact).abs().max() < 1e-5 < 1e-3 < (trap - exact).abs().max()
    assert abs(ours.sum().item() - exact.sum().item()) < 1e-2 < abs(trap.sum().item() - exact.sum().item())
    ours.sum().backward()
    assert head.weight.grad is not None
    assert head.weight.grad.dtype == head.weight.dtype


def test_the_gradient_of_a_frequent_token_is_summed_in_float32() -> None:
    """Of 4,096 times the same target: a sum in 16 bits stops growing at 256 equal parts."""
    hidden, head = torch.ones(4096, WIDTH, requires_grad=True), nn.Linear(WIDTH, VOCAB)
    rows, targets = torch.arange(4096), torch.full((4096,), 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        token_logprobs(hidden, head, rows, targets).sum().backward()
    found, bias = head.weight.grad, head.bias.grad
    head.zero_grad()
    torch.log_softmax(head(hidden), dim=-1)[rows, targets].sum().backward()
    torch.testing.assert_close(found[3], head.weight.grad[3], rtol=0.01, atol=1)
    torch.testing.assert_close(bias[3], head.bias.grad[3], rtol=0.01, atol=1)


class LargestTensor(TorchDispatchMode):
    """Remembers the largest number of elements any operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        for value in result if isinstance(result, tuple | list) else [result]:
            if isinstance(value, Tensor):
                self.elements = max(self.elements, value.untyped_storage().nbytes() // value.element_size())
        return result


@pytest.mark.parametrize("bias", [False, True])
def test_no_tensor_of_tokens_times_vocabulary_ever_exists(monkeypatch, bias) -> None:
    monkeypatch.setattr(lm_head, "KEPT_BYTES", 0)
    monkeypatch.setattr(lm_head, "TILE_BYTES", 0)
    hidden, head, rows, targets = problem(torch.float32, bias=bias, num_rows=640)
    with LargestTensor() as largest:
        token_logprobs(hidden, head, rows, targets, logit_map=MAPS[2]).sum().backward()
    assert largest.elements <= 64 * VOCAB < 640 * VOCAB


def test_mixed_precision_uses_the_autocast_type_and_returns_float32() -> None:
    hidden, head, rows, targets = problem(torch.float32, bias=True)
    expected = plain(hidden, head, rows, targets, LogitMap())
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = token_logprobs(hidden, head, rows, targets)
    assert ours.dtype == torch.float32
    assert 1e-4 < (ours - expected).abs().max() < 0.2
    ours.sum().backward()
    assert head.weight.grad is not None
    assert head.weight.grad.dtype == torch.float32
