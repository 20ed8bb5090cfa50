from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import logsigmoid

from exalign.objectives import bradley_terry_loss


def test_a_pair_costs_minus_log_sigmoid_of_the_margin(draw):
    rewards, preferred = draw(5, 2), torch.tensor([0, 1, 1, 0, 1])
    won, lost = rewards[torch.arange(5), preferred], rewards[torch.arange(5), 1 - preferred]
    torch.testing.assert_close(bradley_terry_loss(rewards, preferred), -logsigmoid(won - lost))


def test_k_completions_cost_the_mean_over_the_losers_that_exist(draw):
    rewards = draw(1, 4).requires_grad_()
    mask = torch.tensor([[True, False, True, True]])
    r = rewards[0]
    expected = -(logsigmoid(r[2] - r[0]) + logsigmoid(r[2] - r[3])) / 2
    loss = bradley_terry_loss(rewards, torch.tensor([2]), mask)
    torch.testing.assert_close(loss, expected[None])
    torch.testing.assert_close(torch.autograd.grad(loss.sum(), rewards), torch.autograd.grad(expected, rewards))


def test_gradient_sums_to_zero_and_follows_the_margin(draw):
    rewards = draw(3, 2).requires_grad_()
    (gradient,) = torch.autograd.grad(bradley_terry_loss(rewards, torch.tensor([0, 0, 0])).sum(), rewards)
    doubt = torch.sigmoid(rewards[:, 1] - rewards[:, 0]).detach()
    torch.testing.assert_close(gradient, torch.stack([-doubt, doubt], dim=1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_finite_for_extremes_and_prompts_without_rivals(dtype):
    rewards = torch.tensor([[1e4, -1e4], [-1e4, 1e4], [5.0, math.nan], [math.nan, math.nan]], dtype=dtype)
    rewards.requires_grad_()
    mask = torch.tensor([[True, True], [True, True], [True, False], [False, False]])
    loss = bradley_terry_loss(rewards, torch.zeros(4, dtype=torch.int64), mask)
    (gradient,) = torch.autograd.grad(loss.sum(), rewards)
    margin = 2 * torch.tensor(1e4, dtype=dtype).item()
    assert loss.tolist() == [0.0, margin, 0.0, 0.0]
    assert gradient.tolist() == [[0, 0], [-1, 1], [0, 0], [0, 0]]


@pytest.mark.parametrize(
    ("rewards", "preferred", "says"),
    [
        (torch.zeros(2), torch.tensor([0, 0]), r"must be \[B, K\]"),
        (torch.zeros(2, 2).long(), torch.tensor([0, 0]), "floating-point"),
        (torch.zeros(2, 2), torch.tensor([0]), "one per row"),
        (torch.zeros(2, 2), torch.tensor([0.0, 1.0]), "int64"),
        (torch.zeros(2, 2), torch.tensor([0, 2]), "outside"),
    ],
)
def test_wrong_input_is_a_value_error(rewards, preferred, says):
    with pytest.raises(ValueError, match=says):
        bradley_terry_loss(rewards, preferred)


def test_a_winner_that_is_masked_is_a_value_error():
    with pytest.raises(ValueError, match="masked"):
        bradley_terry_loss(torch.zeros(1, 2), torch.tensor([0]), torch.tensor([[False, True]]))
