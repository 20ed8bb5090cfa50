"""Weights of 16 bits take the steps of float32 ones: bit for bit, over micro-batches, and through an interruption."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from torch import Tensor, nn

from exalign.data.batching import Group
from exalign.errors import InputError
from exalign.methods.sft import SFT, MaximumLikelihood, train_sft
from exalign.models.logprobs import PackedPolicy
from exalign.models.model_settings import ModelSettings
from exalign.models.sizes import Architecture
from exalign.training.batches import EpochBatches
from exalign.training.loop import accumulate
from exalign.training.optimizer import adamw, set_learning_rate, whole_weights
from training.tiny_world import CONFIG, make_groups, make_policy, make_tokenizer, read_metrics

BETAS, CPU = (0.9, 0.95), torch.device("cpu")


def test_their_steps_are_those_of_float32_weights() -> None:
    """Steps of a relative size of 1e-4, which bfloat16 alone would round away; some are zero."""
    torch.manual_seed(0)
    narrow = nn.Linear(64, 32).bfloat16()
    with torch.no_grad():
        narrow.weight[0] = 0.0
    wide = nn.Linear(64, 32)
    wide.load_state_dict(narrow.state_dict())
    optimizers = [adamw(model, betas=BETAS, weight_decay=0.1, device=CPU) for model in (narrow, wide)]
    for optimizer in optimizers:
        set_learning_rate(optimizer, 1e-5)
    start = narrow.weight.detach().clone()
    for _ in range(50):
        for ours, theirs in zip(narrow.parameters(), wide.parameters(), strict=True):
            ours.grad = theirs.grad = torch.randn_like(theirs)
        for optimizer in optimizers:
            optimizer.step()
    with whole_weights(optimizers[0]):
        for ours, theirs in zip(narrow.parameters(), wide.parameters(), strict=True):
            assert torch.equal(ours, theirs)
            assert torch.equal(optimizers[0].state[ours]["exp_avg"], optimizers[1].state[theirs]["exp_avg"])
    assert 0 < float((narrow.weight != start).float().mean()) < 0.5  # most have not moved by one of their own steps
    gap = (narrow.weight.float() - wide.weight).abs()
    assert bool((gap <= wide.weight.abs() * 2**-8).all())


def test_their_gradients_are_summed_in_float32() -> None:
    """32 times the same group: its own gradient, to float32's rounding. Summed in bfloat16 it is off by far more."""
    policy, group = make_policy().bfloat16(), make_groups(1)[0]
    adamw(policy, betas=BETAS, weight_decay=0.0, device=CPU)
    task = MaximumLikelihood(EpochBatches([group], batch_prompts=1, epochs=1, seed=0))

    def gradient(part: list[Group]) -> list[Tensor]:
        policy.zero_grad()
        accumulate(Accelerator(cpu=True), PackedPolicy(policy), task, part, 1)
        return [parameter.grad for parameter in policy.parameters()]

    alone, together = gradient([group]), gradient([group] * 32)
    in_halves = [sum([grad.bfloat16() / 32] * 32) for grad in alone]
    assert all(grad.dtype == torch.float32 for grad in together)
    torch.testing.assert_close(together, alone, rtol=1e-6, atol=0.0)
    assert any(not torch.allclose(half.float(), grad, rtol=1e-3) for half, grad in zip(in_halves, alone, strict=True))


def test_a_training_of_them_follows_that_of_float32_weights(tmp_path: Path) -> None:
    losses, settings = {}, SFT(learning_rate=1e-2, batch_prompts=4, epochs=3)
    for dtype in ("float32", "bfloat16"):
        policy = make_policy(settings=ModelSettings(config=CONFIG, dtype=dtype))
        train_sft(policy, make_tokenizer(), make_groups(16), settings, tmp_path / dtype)
        losses[dtype] = [row["loss"] for row in read_metrics(tmp_path / dtype)]
        assert all(weight.dtype == getattr(torch, dtype) for weight in policy.parameters())
    assert losses["bfloat16"] == pytest.approx(losses["float32"], abs=0.02)
    assert losses["float32"][-1] < losses["float32"][0] - 0.05


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_training_keeps_beside_a_weight_is_what_sizes_reckon_with(dtype: torch.dtype) -> None:
    policy = make_policy().to(dtype)
    optimizer = adamw(policy, betas=BETAS, weight_decay=0.0, device=CPU)
    for weight in policy.parameters():
        weight.grad = torch.ones_like(weight, dtype=torch.float32)
    optimizer.step()
    kept = [weight.grad for weight in policy.parameters()]
    kept += [state for states in optimizer.state.values() for name, state in states.items() if name != "step"]
    kept += getattr(optimizer, "_rest", {}).values()
    assert sum(part.nbytes for part in kept) == Architecture("", policy, "").state_bytes


def test_what_cannot_be_trained_is_refused_also_from_python(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(InputError, match="gradients in float16 would be lost"):
        adamw(make_policy().half(), betas=BETAS, weight_decay=0.0, device=CPU)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(InputError, match="16 bits are trained by a single process"):
        adamw(make_policy().bfloat16(), betas=BETAS, weight_decay=0.0, device=CPU)
