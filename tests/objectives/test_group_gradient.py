"""Laws of RLOO, GRPO and GSPO in float64, and the identity that makes EXO on its own samples RLOO."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from exalign.objectives import (
    clipped_policy_loss,
    clipped_sequence_loss,
    divided_by_spread,
    group_mean_advantages,
    leave_one_out_advantages,
    log_policy_distribution,
    log_reward_target,
    penalised_rewards,
    reverse_kl,
    token_advantages,
    token_kl_penalty,
)

MASK = torch.tensor([[True, True, True, True], [True, True, False, False], [True, False, False, False], [False] * 4])


def rloo_loss(policy: Tensor, advantages: Tensor) -> Tensor:
    """As RLOO has it in the step that its samples come from, where every ratio is 1."""
    everywhere = torch.ones_like(policy, dtype=torch.bool)
    return clipped_policy_loss(policy, policy.detach(), advantages, everywhere, clip=0.2).mean(dim=1)


@pytest.fixture
def rewards(draw) -> Tensor:
    return torch.where(MASK, draw(4, 4), math.nan)


@pytest.mark.parametrize("advantages_of", [group_mean_advantages, leave_one_out_advantages])
def test_advantages_have_mean_0_and_one_completion_has_none(advantages_of, rewards: Tensor) -> None:
    found = advantages_of(rewards, MASK)
    torch.testing.assert_close(found.sum(dim=1), torch.zeros(4, dtype=torch.float64), rtol=0, atol=1e-12)
    assert found[0].abs().min() > 0 and not found[2:].any() and not found[~MASK].any()
    torch.testing.assert_close(advantages_of(rewards + 7, MASK), found, rtol=0, atol=1e-12)
    torch.testing.assert_close(advantages_of(rewards[:2, :2]), advantages_of(rewards[:2, :2], MASK[:2, :2]))


def test_a_completion_is_left_out_of_its_own_baseline(rewards: Tensor) -> None:
    found = leave_one_out_advantages(rewards, MASK)
    for row, count in ((0, 4), (1, 2)):
        values = rewards[row, :count].tolist()
        for i, value in enumerate(values):
            others = [other for j, other in enumerate(values) if j != i]
            assert float(found[row, i]) == pytest.approx(value - sum(others) / len(others), rel=1e-12)
    torch.testing.assert_close(found[:2], group_mean_advantages(rewards, MASK)[:2] * torch.tensor([[4 / 3], [2.0]]))


def test_two_completions_by_hand() -> None:
    rewards = torch.tensor([[3.0, 1.0]], dtype=torch.float64)
    assert leave_one_out_advantages(rewards).tolist() == [[2.0, -2.0]]
    assert group_mean_advantages(rewards).tolist() == [[1.0, -1.0]]
    scaled = divided_by_spread(group_mean_advantages(rewards), rewards, epsilon=1e-9)
    assert scaled.flatten().tolist() == pytest.approx([1.0, -1.0])  # their spread is 1
    assert divided_by_spread(scaled, 10 * rewards, epsilon=1e-9).flatten().tolist() == pytest.approx([0.1, -0.1])


def test_ties_have_no_gradient() -> None:
    policy = torch.zeros(1, 3, dtype=torch.float64, requires_grad=True)
    rewards = torch.full((1, 3), 0.7, dtype=torch.float64)
    for advantages in (leave_one_out_advantages(rewards), group_mean_advantages(rewards)):
        scaled = divided_by_spread(advantages, rewards)
        (gradient,) = torch.autograd.grad(rloo_loss(policy, scaled).sum(), policy)
        assert not gradient.any()


def test_the_spread_takes_the_scale_away(rewards: Tensor) -> None:
    def scaled(values: Tensor) -> Tensor:
        return divided_by_spread(group_mean_advantages(values, MASK), values, MASK, epsilon=1e-12)

    torch.testing.assert_close(scaled(5 * rewards), scaled(rewards), rtol=1e-9, atol=0)
    torch.testing.assert_close(scaled(rewards)[0].square().mean(), torch.tensor(1.0, dtype=torch.float64))


@pytest.mark.parametrize("beta_r", [0.1, 0.5, 2.0])
def test_exo_on_its_own_samples_is_rloo_with_the_kl_in_the_reward(beta_r: float, draw) -> None:
    """q = π_θ and β_π = 1: p_f is uniform, the gradient −(R_i − mean R)/(β_r K), which is (K−1)/K of RLOO's over β_r.

    RLOO is written out here: −(1/K) (R_i − mean of the other R) for each log π_θ(y_i).
    """
    policy, reference, rewards = draw(3, 5).requires_grad_(), draw(3, 5), draw(3, 5)
    own = policy.detach()
    log_p = log_policy_distribution(policy, reference, beta_pi=1.0, proposal_logp=own)
    log_t = log_reward_target(rewards, beta_r=beta_r, reference_logp=reference, proposal_logp=own)
    torch.testing.assert_close(log_p.detach(), torch.full_like(own, -math.log(5)))
    (exo,) = torch.autograd.grad(reverse_kl(log_p, log_t).sum(), policy)
    penalised = rewards - beta_r * (own - reference)
    for row in range(3):
        values = penalised[row].tolist()
        for i, value in enumerate(values):
            rloo = -(value - (sum(values) - value) / 4) / 5
            assert float(exo[row, i]) == pytest.approx(4 / 5 * rloo / beta_r, rel=1e-10, abs=1e-14)
    advantages = leave_one_out_advantages(penalised_rewards(rewards, policy, reference, beta=beta_r))
    (composed,) = torch.autograd.grad(rloo_loss(policy, advantages).sum(), policy)
    torch.testing.assert_close(exo, 4 / 5 * composed / beta_r, rtol=1e-10, atol=1e-14)


def test_exo_below_beta_pi_1_is_another_gradient(draw) -> None:
    """The weights (π_sft/π_θ)^{1−β_π} send own samples back towards π_sft: p_f is no longer uniform."""
    policy, reference = draw(2, 4), draw(2, 4)
    log_p = log_policy_distribution(policy, reference, beta_pi=0.1, proposal_logp=policy)
    expected = (0.9 * (reference - policy)).log_softmax(dim=1)
    torch.testing.assert_close(log_p, expected)


TOKENS = torch.tensor([[True, True, True], [True, False, False], [False, False, False]])


def test_a_sequence_ratio_is_the_geometric_mean_of_its_tokens() -> None:
    moved = torch.tensor([[0.3, -0.1, 0.1], [0.2, math.nan, math.nan], [math.nan] * 3], dtype=torch.float64)
    sampled = torch.zeros(3, 3, dtype=torch.float64)
    advantages = torch.tensor([2.0, -1.0, 5.0], dtype=torch.float64)
    found = clipped_sequence_loss(moved, sampled, advantages, TOKENS, clip=0.5)
    assert found.tolist()[:2] == pytest.approx([-2.0 * math.exp(0.1), math.exp(0.2)])


def test_a_completion_is_clipped_whole_and_at_ratio_1_it_is_the_policy_gradient() -> None:
    sampled, advantages = torch.zeros(2, 3, dtype=torch.float64), torch.tensor([1.0, -1.0], dtype=torch.float64)

    def gradient(logp: Tensor, clip: float) -> Tensor:
        logp = logp.clone().requires_grad_()
        return torch.autograd.grad(clipped_sequence_loss(logp, sampled, advantages, TOKENS[:2], clip=clip).sum(), logp)[
            0
        ]

    at_1 = gradient(sampled, 0.1)
    torch.testing.assert_close(at_1, torch.tensor([[-1.0, -1.0, -1.0], [3.0, 0.0, 0.0]], dtype=torch.float64) / 3)
    # One token moved by 0.6 is a mean of 0.2: beyond 0.1 in the direction that A asks for, all three are cut off.
    far = torch.tensor([[0.6, 0.0, 0.0], [-0.2, 0.0, 0.0]], dtype=torch.float64)
    assert not gradient(far, 0.1).any() and gradient(far, 0.5).any(dim=1).all()
    per_token = clipped_policy_loss(far, sampled, token_advantages(advantages, TOKENS[:2]), TOKENS[:2], clip=0.1)
    assert per_token[0].tolist() == pytest.approx([-1.1, -1.0, -1.0])  # GRPO clips the one token alone


def test_the_token_penalty_is_a_kl_and_its_gradient_the_other_one(draw) -> None:
    """Summed over all tokens of a vocabulary of 6 under π_θ: the value is KL(π_θ‖π_sft)."""
    logits, reference = draw(1, 6).requires_grad_(), draw(1, 6).log_softmax(dim=1)
    logp = logits.log_softmax(dim=1)
    penalty = token_kl_penalty(logp, reference, torch.ones(1, 6, dtype=torch.bool))
    assert (penalty >= 0).all()
    chance = logp.detach().exp()
    expected = (chance * (logp - reference)).sum()
    assert float((chance * penalty).sum().detach()) == pytest.approx(float(expected.detach()), rel=1e-12)
    (found,) = torch.autograd.grad((chance * penalty).sum(), logits, retain_graph=True)
    (other,) = torch.autograd.grad(-(reference.exp() * logp).sum(), logits)
    torch.testing.assert_close(found, other, rtol=0, atol=1e-12)


def test_what_does_not_fit_is_named() -> None:
    values = torch.zeros(2, 3)
    with pytest.raises(ValueError, match="clip must be a finite number above 0"):
        clipped_sequence_loss(values, values, torch.zeros(2), TOKENS[:2], clip=0.0)
    with pytest.raises(ValueError, match=r"advantages must be \[2\]"):
        clipped_sequence_loss(values, values, torch.zeros(3), TOKENS[:2], clip=0.1)
    with pytest.raises(ValueError, match="beta must be at least 0"):
        penalised_rewards(values, values, values, beta=-0.1)
    with pytest.raises(ValueError, match="epsilon must be a finite number above 0"):
        divided_by_spread(values, values, epsilon=0.0)
