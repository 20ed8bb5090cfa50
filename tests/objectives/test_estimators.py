"""Estimators against worlds where the answer is known in closed form."""

from __future__ import annotations

import math

import pytest
import torch

from exalign.objectives import (
    effective_sample_size,
    group_spread,
    kl_estimate,
    log_importance_weights,
    optimal_frontier,
    reward_correlation,
    weighted_mean,
)

RAGGED = torch.tensor([[True, True, True], [True, False, True], [False, False, False]])


def test_kl_estimate_is_the_mean_log_ratio_over_the_samples_that_exist(draw):
    policy, reference = draw(3, 3), draw(3, 3)
    ratio = policy - reference
    expected = [ratio[0].mean(), (ratio[1, 0] + ratio[1, 2]) / 2, 0.0]
    torch.testing.assert_close(kl_estimate(policy, reference, RAGGED), torch.tensor(expected, dtype=torch.float64))


def test_kl_estimate_agrees_with_the_exact_kl_within_its_standard_error(draw):
    log_p, log_q = draw(6).log_softmax(-1), draw(6).log_softmax(-1)
    picks = torch.multinomial(log_p.exp(), 20_000, replacement=True, generator=torch.Generator().manual_seed(1))
    estimate = kl_estimate(log_p[picks][None], log_q[picks][None]).item()
    standard_error = group_spread((log_p - log_q)[picks][None]).item() / math.sqrt(20_000)
    exact = (log_p.exp() * (log_p - log_q)).sum().item()
    assert abs(estimate - exact) < 4 * standard_error


def test_importance_weights_turn_one_expectation_into_another(draw):
    """Completions listed once each are samples of the uniform proposal; the weights are then the target itself."""
    target = draw(2, 5).log_softmax(-1)
    log_w = log_importance_weights(target + 7.0, torch.full((2, 5), -math.log(5), dtype=torch.float64))
    torch.testing.assert_close(log_w, target)
    values = draw(2, 5)
    torch.testing.assert_close(weighted_mean(log_w, values), (target.exp() * values).sum(-1))


def test_effective_sample_size_runs_from_one_to_all():
    weights = torch.tensor([[0.25, 0.25, 0.25, 0.25], [1.0, 0.0, 0.0, 0.0], [0.5, 0.5, 0.0, 0.0]]).log()
    torch.testing.assert_close(effective_sample_size(weights), torch.tensor([4.0, 1.0, 2.0]))
    mask = torch.tensor([[True, True, False], [False, False, False]])
    log_w = log_importance_weights(torch.zeros(2, 3), torch.zeros(2, 3), mask)
    torch.testing.assert_close(effective_sample_size(log_w, mask), torch.tensor([2.0, 0.0]))


def test_group_spread_sets_the_length_of_the_first_gradient(draw):
    values = draw(4, 6)
    torch.testing.assert_close(group_spread(values), values.std(-1, correction=0))
    torch.testing.assert_close(group_spread(values, torch.zeros(4, 6).bool()), torch.zeros(4, dtype=torch.float64))
    assert group_spread(torch.full((1, 3), 7.0)).item() == 0.0


def test_optimal_frontier_is_exact_where_samples_are_the_whole_space(draw):
    """With π_sft uniform over N completions, each listed once, the estimates are the quantities themselves."""
    rewards, betas = draw(3, 6), torch.tensor([0.2, 1.0, 5.0], dtype=torch.float64)
    frontier = optimal_frontier(rewards, betas)
    other = draw(3, 6)
    judged = optimal_frontier(rewards, betas, judged=other)
    torch.testing.assert_close((judged.kl, judged.effective_samples), (frontier.kl, frontier.effective_samples))
    for column, beta in enumerate(betas.tolist()):
        log_z = torch.logsumexp(rewards / beta, -1) - math.log(6)
        optimum = -math.log(6) + rewards / beta - log_z[:, None]
        torch.testing.assert_close(frontier.reward[:, column], (optimum.exp() * rewards).sum(-1))
        torch.testing.assert_close(judged.reward[:, column], (optimum.exp() * other).sum(-1))
        kl = (optimum.exp() * (optimum + math.log(6))).sum(-1)
        torch.testing.assert_close(frontier.kl[:, column], kl)
        torch.testing.assert_close(frontier.effective_samples[:, column], 1 / optimum.exp().square().sum(-1))


def test_optimal_frontier_of_a_gaussian_reward_is_a_parabola():
    """r ~ N(0, 1) under π_sft makes π*_β's reward 1/β at KL 1/(2β²); ESS/N is exp(−1/β²)."""
    rewards = torch.randn(40, 50_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    betas = torch.tensor([4.0, 2.0, 1.0], dtype=torch.float64)
    frontier = optimal_frontier(rewards, betas)

    def agrees(values, expected):
        standard_error = values.std(0) / math.sqrt(40)
        return ((values.mean(0) - expected).abs() < 4 * standard_error + 1e-4).all()

    assert agrees(frontier.reward, 1 / betas)
    assert agrees(frontier.kl, 1 / (2 * betas**2))
    torch.testing.assert_close(frontier.effective_samples.mean(0) / 50_000, (-1 / betas**2).exp(), rtol=0.02, atol=0)


def test_optimal_frontier_is_never_below_a_policy_of_the_same_kl(draw):
    """Any reweighting with the KL of π*_β has no more reward: that is what optimal means."""
    rewards = draw(1, 12)
    frontier = optimal_frontier(rewards, torch.tensor([0.7], dtype=torch.float64))
    budget = frontier.kl.item()
    for _ in range(50):
        direction = draw(1, 12)
        low, high = 0.0, 200.0
        for _ in range(60):  # bisection for the temperature at which this policy spends the same KL
            scale = (low + high) / 2
            log_w = (scale * direction).log_softmax(-1)
            kl = (log_w.exp() * (log_w + math.log(12))).sum().item()
            low, high = (scale, high) if kl < budget else (low, scale)
        assert (log_w.exp() * rewards).sum().item() <= frontier.reward.item() + 1e-9


def test_optimal_frontier_stays_finite_and_respects_masks(draw):
    rewards = torch.tensor([[1e4, -1e4, math.nan], [3.0, 3.0, 3.0]])
    mask = torch.tensor([[True, True, False], [True, True, True]])
    frontier = optimal_frontier(rewards, torch.tensor([1e-3, 1e6]), mask)
    for values in (frontier.reward, frontier.kl, frontier.effective_samples):
        assert values.isfinite().all()
    assert frontier.reward[0].tolist() == pytest.approx([1e4, 0.0], abs=101)
    torch.testing.assert_close(frontier.kl[0, 0], torch.tensor(math.log(2)))
    torch.testing.assert_close(frontier.kl[1], torch.zeros(2), atol=1e-6, rtol=0)


@pytest.mark.parametrize(
    "call",
    [
        lambda: optimal_frontier(torch.zeros(2, 3), torch.tensor([0.0])),
        lambda: optimal_frontier(torch.zeros(2, 3), torch.tensor([1])),
        lambda: optimal_frontier(torch.zeros(2, 3), torch.tensor(1.0)),
        lambda: optimal_frontier(torch.zeros(0, 3), torch.tensor([1.0])),
        lambda: optimal_frontier(torch.zeros(3, 3), torch.tensor([1.0]), RAGGED),
        lambda: kl_estimate(torch.zeros(2, 3), torch.zeros(3, 2)),
    ],
)
def test_wrong_input_is_a_value_error(call):
    with pytest.raises(ValueError):
        call()


def test_the_optimum_correlates_perfectly_with_its_reward(draw) -> None:
    rewards, reference = draw(3, 6), draw(3, 6)
    optimum = reference + rewards / 0.3 - 2.0
    torch.testing.assert_close(reward_correlation(optimum, reference, rewards), torch.ones(3, dtype=torch.float64))
    torch.testing.assert_close(reward_correlation(optimum, reference, -rewards), -torch.ones(3, dtype=torch.float64))


def test_correlation_is_that_of_numpy_and_0_without_spread(draw) -> None:
    policy, reference, rewards = draw(4, 5), draw(4, 5), draw(4, 5)
    mask = torch.tensor([[True] * 5, [True, True, True, False, False], [True] + [False] * 4, [False] * 5])
    rewards[~mask] = math.nan
    found = reward_correlation(policy, reference, rewards, mask)
    for row, count in ((0, 5), (1, 3)):
        ratio = (policy - reference)[row, :count]
        expected = torch.corrcoef(torch.stack([ratio, rewards[row, :count]]))[0, 1]
        assert float(found[row]) == pytest.approx(float(expected), rel=1e-10)
    assert found[2:].tolist() == [0, 0]
    same = torch.full((1, 5), 0.1, dtype=torch.float64)
    assert reward_correlation(same + 7, same, draw(1, 5)).item() == 0
    assert reward_correlation(draw(1, 5), draw(1, 5), same).item() == 0


def test_kl_of_the_optimum_falls_in_beta_between_its_limits(draw) -> None:
    rewards = draw(20, 16)
    rewards[0, 3] = rewards[0].max()  # a tie: two of 16 share the best
    kls = optimal_frontier(rewards, torch.logspace(-4, 4, 60, dtype=torch.float64)).kl.mean(0)
    assert (kls.diff() <= 1e-12).all() and float(kls[-1]) < 1e-6
    assert float(kls[0]) == pytest.approx((19 * math.log(16) + math.log(8)) / 20, rel=1e-3)


def test_two_samples_by_hand() -> None:
    """Rewards 0 and 1: w = σ(1/β), KL = log 2 + w log w + (1 − w) log(1 − w)."""
    w = 1 / (1 + math.exp(-2.0))
    kl = math.log(2) + w * math.log(w) + (1 - w) * math.log(1 - w)
    frontier = optimal_frontier(torch.tensor([[0.0, 1.0]], dtype=torch.float64), torch.tensor([0.5]).double())
    assert frontier.kl.item() == pytest.approx(kl, rel=1e-12)
