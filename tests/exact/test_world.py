from __future__ import annotations

import pytest
import torch

from exalign.exact.alignment import World

SIZES = [(2, 1), (2, 2), (3, 3), (4, 2)]


def draw_logits(world, num_tokens):
    generator = torch.Generator().manual_seed(0)
    return torch.randn(len(world.prefixes), num_tokens, generator=generator, dtype=torch.float64)


@pytest.mark.parametrize(("num_tokens", "num_steps"), SIZES)
def test_every_completion_is_listed_once(num_tokens, num_steps):
    """(V−1)^t prefixes at depth t, each ended by the end token or, at the last step, cut with one of V−1 others."""
    world = World.enumerate(num_tokens=num_tokens, num_steps=num_steps)
    assert len(world.prefixes) == sum((num_tokens - 1) ** depth for depth in range(num_steps))
    assert len(world.completions) == len(world.prefixes) + (num_tokens - 1) ** num_steps
    assert len(set(world.completions)) == len(world.completions)
    for completion in world.completions:
        assert 0 not in completion[:-1]
        assert completion[-1] == 0 or len(completion) == num_steps


@pytest.mark.parametrize(("num_tokens", "num_steps"), SIZES)
def test_log_probs_are_the_sum_over_tokens_and_total_one(num_tokens, num_steps):
    world = World.enumerate(num_tokens=num_tokens, num_steps=num_steps)
    logits = draw_logits(world, num_tokens)
    table = logits.log_softmax(-1)
    by_hand = [
        sum(table[world.prefixes.index(completion[:step]), token].item() for step, token in enumerate(completion))
        for completion in world.completions
    ]
    log_probs = world.log_probs(logits)
    torch.testing.assert_close(log_probs, torch.tensor(by_hand, dtype=torch.float64))
    torch.testing.assert_close(log_probs.exp().sum(), torch.tensor(1.0, dtype=torch.float64))


@pytest.mark.parametrize(("num_tokens", "num_steps"), SIZES)
def test_scores_are_the_jacobian_of_the_log_probs(num_tokens, num_steps):
    world = World.enumerate(num_tokens=num_tokens, num_steps=num_steps)
    logits = draw_logits(world, num_tokens)
    torch.testing.assert_close(world.scores(logits), torch.autograd.functional.jacobian(world.log_probs, logits))
    mean = torch.einsum("n,ncv->cv", world.log_probs(logits).exp(), world.scores(logits))
    torch.testing.assert_close(mean, torch.zeros_like(mean))  # E[∂ log π] = 0


@pytest.mark.parametrize(("num_tokens", "num_steps"), [(1, 2), (2, 0)])
def test_a_world_without_choice_is_refused(num_tokens, num_steps):
    with pytest.raises(ValueError, match="a world needs"):
        World.enumerate(num_tokens=num_tokens, num_steps=num_steps)
