"""The laws of the objectives, in float64, with the numbers they imply worked out beside them."""

from __future__ import annotations

import math

import pytest
import torch
from torch.nn.functional import logsigmoid, softplus

from exalign.objectives import (
    forward_kl,
    log_policy_distribution,
    log_preference_target,
    log_reward_target,
    reverse_kl,
    saturated,
)

EPSILON = 1e-3


def pair(d, *, beta_pi=0.1):
    """Log-probabilities `[B, 2]` whose scaled log-ratios differ by d, winner first, and the log-policy they give."""
    policy = torch.stack([torch.as_tensor(d, dtype=torch.float64) / beta_pi, torch.zeros(len(d)).double()], dim=1)
    policy.requires_grad_()
    return policy, log_policy_distribution(policy, torch.zeros_like(policy), beta_pi=beta_pi)


def first_wins(count, epsilon=EPSILON):
    preferred = torch.zeros(count, dtype=torch.int64)
    return log_preference_target(preferred, num_completions=2, epsilon=epsilon, dtype=torch.float64)


def test_law_1_exo_is_zero_exactly_where_log_ratios_and_target_differ_by_a_constant(draw):
    rewards, reference = draw(4, 5), draw(4, 5)
    log_t = log_reward_target(rewards, beta_r=0.2)
    for constant in (0.0, 3.0):
        matching = reference + (rewards / 0.2 + constant) / 0.5
        loss = reverse_kl(log_policy_distribution(matching, reference, beta_pi=0.5), log_t)
        torch.testing.assert_close(loss, torch.zeros(4, dtype=torch.float64))
        off = matching.clone()
        off[:, 0] += 0.1
        assert (reverse_kl(log_policy_distribution(off, reference, beta_pi=0.5), log_t) > 1e-12).all()


def test_law_1_gradient_over_the_log_probs(draw):
    """∂L/∂log π_θ(y_i) = β_π p_i (log p_i − log t_i − L), summing to 0."""
    policy = draw(4, 5).requires_grad_()
    log_p = log_policy_distribution(policy, draw(4, 5), beta_pi=0.3)
    log_t = log_reward_target(draw(4, 5), beta_r=0.2)
    loss = reverse_kl(log_p, log_t)
    (gradient,) = torch.autograd.grad(loss.sum(), policy)
    torch.testing.assert_close(gradient, 0.3 * log_p.exp() * (log_p - log_t - loss[:, None]))
    torch.testing.assert_close(gradient.sum(-1), torch.zeros(4, dtype=torch.float64))


def test_forward_kl_gradient_over_the_log_probs(draw):
    """∂L/∂log π_θ(y_i) = β_π (p_i − t_i)."""
    policy = draw(4, 5).requires_grad_()
    log_p = log_policy_distribution(policy, draw(4, 5), beta_pi=0.3)
    log_t = log_reward_target(draw(4, 5), beta_r=0.2)
    (gradient,) = torch.autograd.grad(forward_kl(log_p, log_t).sum(), policy)
    torch.testing.assert_close(gradient, 0.3 * (log_p.exp() - log_t.exp()))


def test_law_2_exo_on_a_pair_is_the_two_sigmoid_formula():
    """Also the value of TRL's `exo_pair`, which writes β·(log-ratio difference) for d and its label smoothing for ε."""
    d = torch.tensor([-30.0, -10.0, -1.0, 0.0, 0.5, 6.0, 30.0], dtype=torch.float64)
    expected = d.sigmoid() * (logsigmoid(d) - math.log1p(-EPSILON))
    expected = expected + (-d).sigmoid() * (logsigmoid(-d) - math.log(EPSILON))
    torch.testing.assert_close(reverse_kl(pair(d)[1], first_wins(len(d))), expected)


def test_law_2_exo_on_a_pair_is_smallest_at_the_log_odds_of_the_target():
    best = math.log((1 - EPSILON) / EPSILON)
    assert best == pytest.approx(6.907, abs=5e-4)
    policy, log_p = pair([best - 1, best, best + 1])
    (gradient,) = torch.autograd.grad(reverse_kl(log_p, first_wins(3)).sum(), policy)
    assert gradient[0, 0] < -1e-6  # below: the winner is raised
    assert gradient[1].abs().max() < 1e-15
    assert gradient[2, 0] > 1e-6  # beyond: pushed back


def test_law_2_exo_forgets_a_confidently_wrong_pair_and_dpo_does_not():
    """∂/∂d = σ(d)σ(−d)(d − log((1−ε)/ε)) = −7.7e-4 at d = −10, times β_π = 0.1; DPO's is −σ(10) β_π."""
    policy, log_p = pair([-10.0])
    (exo,) = torch.autograd.grad(reverse_kl(log_p, first_wins(1)).sum(), policy, retain_graph=True)
    slope = 1 / (1 + math.exp(10)) / (1 + math.exp(-10)) * (-10 - math.log((1 - EPSILON) / EPSILON))
    assert exo[0, 0].item() == pytest.approx(0.1 * slope, rel=1e-12)
    assert exo[0, 0].item() == pytest.approx(-7.7e-5, rel=5e-3)
    one_hot = torch.tensor([[0.0, -math.inf]], dtype=torch.float64)
    (dpo,) = torch.autograd.grad(forward_kl(log_p, one_hot).sum(), policy)
    assert dpo[0, 0].item() == pytest.approx(-0.1 / (1 + math.exp(-10)), rel=1e-12)
    assert dpo[0, 0].item() == pytest.approx(-0.1, rel=1e-4)


def test_law_2_saturated_pairs_are_counted():
    """The gradients' ratio σ(d)σ(−d)(6.907 − d)/(σ(−d) − ε) falls below 1 % between d = −7.2 and d = −7.3."""
    d = [-20.0, -10.0, -7.3, -7.2, -1.0, 0.0, 6.907, 20.0]
    _, log_p = pair(d)
    assert saturated(log_p, first_wins(len(d))).tolist() == [True, True, True] + [False] * 5


def test_usual_dpo_is_the_forward_kl_with_all_weight_on_the_winner():
    d = torch.tensor([-1e4, -10.0, 0.0, 3.0, 1e4], dtype=torch.float64)
    policy, log_p = pair(d, beta_pi=1.0)
    loss = forward_kl(log_p, first_wins(len(d), epsilon=0.0))
    torch.testing.assert_close(loss, softplus(-d))
    (gradient,) = torch.autograd.grad(loss.sum(), policy)
    torch.testing.assert_close(gradient, torch.stack([-(-d).sigmoid(), (-d).sigmoid()], dim=1))


@pytest.mark.parametrize("epsilon", [1e-1, 1e-3, 1e-9])
def test_smoothed_dpo_differs_from_the_usual_by_epsilon_d(epsilon):
    """−(1−ε) log σ(d) − ε log σ(−d) = −log σ(d) + ε d, so the limit ε → 0 is the usual loss."""
    d = torch.tensor([-10.0, 0.0, 3.0], dtype=torch.float64)
    torch.testing.assert_close(forward_kl(pair(d)[1], first_wins(3, epsilon)), softplus(-d) + epsilon * d)


def test_law_3_the_first_step_is_policy_gradient_with_a_group_mean_baseline(draw):
    """At π_θ = π_sft: ∂L/∂log π_θ(y_i) = −β_π/(β_r K) (r_i − mean r)."""
    beta_pi, beta_r, rewards = 0.5, 0.1, draw(4, 8)
    policy = draw(4, 8).requires_grad_()
    log_p = log_policy_distribution(policy, policy.detach(), beta_pi=beta_pi)
    (gradient,) = torch.autograd.grad(reverse_kl(log_p, log_reward_target(rewards, beta_r=beta_r)).sum(), policy)
    expected = -beta_pi / (beta_r * 8) * (rewards - rewards.mean(-1, keepdim=True))
    torch.testing.assert_close(gradient, expected)


def test_law_5_padding_changes_nothing(draw, divergence):
    policy, reference, rewards = draw(3, 4), draw(3, 4), draw(3, 4)
    mask = torch.tensor([[True] * 4, [True, True, False, False], [True, True, True, False]])

    def value_and_gradient(columns, fill):
        padding = torch.full((3, columns - 4), fill, dtype=torch.float64)
        wide = [torch.cat([tensor, padding], 1) for tensor in (policy, reference, rewards)]
        wide_mask = torch.cat([mask, torch.zeros(3, columns - 4, dtype=torch.bool)], 1)
        wide = [tensor.masked_fill(~wide_mask, fill) for tensor in wide]
        wide[0].requires_grad_()
        log_p = log_policy_distribution(wide[0], wide[1], beta_pi=0.5, mask=wide_mask)
        loss = divergence(log_p, log_reward_target(wide[2], beta_r=0.5, mask=wide_mask), wide_mask)
        (gradient,) = torch.autograd.grad(loss.sum(), wide[0])
        return loss, gradient[:, :4], gradient[:, 4:]

    tight = value_and_gradient(4, 0.0)
    for fill in (0.0, math.nan, 1e4):
        padded = value_and_gradient(9, fill)
        torch.testing.assert_close(padded[:2], tight[:2], rtol=1e-14, atol=1e-15)
        assert (padded[2] == 0).all()


def test_law_5_one_batch_of_64_and_64_batches_of_one_give_the_same_gradient(draw, divergence):
    policy, reference, rewards = draw(64, 4), draw(64, 4), draw(64, 4)

    def gradient(batch):
        parameter = policy[batch].clone().requires_grad_()
        log_p = log_policy_distribution(parameter, reference[batch], beta_pi=0.5)
        loss = divergence(log_p, log_reward_target(rewards[batch], beta_r=0.5)).sum() / 64
        return torch.autograd.grad(loss, parameter)[0]

    whole = gradient(slice(None))
    split = torch.cat([gradient(slice(row, row + 1)) for row in range(64)])
    torch.testing.assert_close(split, whole, rtol=1e-14, atol=1e-17)
