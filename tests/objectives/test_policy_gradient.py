"""Laws of PPO's pieces in float64; expected values are sums written out or derivatives by hand."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from exalign.objectives import (
    adapted_kl_coefficient,
    clipped_policy_loss,
    clipped_value_loss,
    explained_variance,
    generalised_advantages,
    is_clipped,
    token_rewards,
    whiten,
)

LENGTHS = (5, 1, 7, 3)
CLIP = 0.2


@pytest.fixture
def mask() -> Tensor:
    return torch.arange(7) < torch.tensor(LENGTHS)[:, None]


def poisoned(values: Tensor, mask: Tensor) -> Tensor:
    """The same on the real tokens, NaN on padding."""
    return torch.where(mask, values, math.nan)


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.7), (1.0, 1.0), (0.99, 0.0), (0.0, 0.5)])
def test_advantages_are_the_double_sum(gamma: float, lam: float, mask: Tensor, draw) -> None:
    """A_t = Σ_l (γλ)^l (r + γ V' − V), one sequence and one token at a time."""
    rewards, values = draw(4, 7), draw(4, 7)
    found = generalised_advantages(poisoned(rewards, mask), poisoned(values, mask), mask, gamma=gamma, lam=lam)
    for i, length in enumerate(LENGTHS):
        v = [*values[i, :length].tolist(), 0.0]
        delta = [float(rewards[i, t]) + gamma * v[t + 1] - v[t] for t in range(length)]
        for t in range(length):
            expected = sum((gamma * lam) ** (s - t) * delta[s] for s in range(t, length))
            assert float(found[i, t]) == pytest.approx(expected, abs=1e-12)
        assert not found[i, length:].any()


def test_without_a_critic_and_without_discount_the_advantage_is_the_reward_to_go(mask: Tensor, draw) -> None:
    rewards = torch.where(mask, draw(4, 7), 0)
    found = generalised_advantages(rewards, torch.zeros_like(rewards), mask, gamma=1.0, lam=1.0)
    to_go = rewards.flip(1).cumsum(1).flip(1)
    torch.testing.assert_close(found, torch.where(mask, to_go, 0), rtol=0, atol=1e-12)


def test_lambda_1_makes_the_returns_free_of_the_critic(mask: Tensor, draw) -> None:
    rewards, one, other = draw(4, 7), draw(4, 7), draw(4, 7)
    returns = [
        generalised_advantages(rewards, values, mask, gamma=0.9, lam=1.0) + torch.where(mask, values, 0)
        for values in (one, other)
    ]
    torch.testing.assert_close(*returns, rtol=0, atol=1e-12)


def test_a_perfect_critic_leaves_no_advantage(mask: Tensor, draw) -> None:
    """V equal to the reward to go makes every δ 0, for every λ."""
    rewards = torch.where(mask, draw(4, 7), 0)
    values = rewards.flip(1).cumsum(1).flip(1)
    for lam in (0.0, 0.5, 1.0):
        assert float(generalised_advantages(rewards, values, mask, gamma=1.0, lam=lam).abs().max()) < 1e-12


def test_token_rewards_add_up_to_the_reward_less_beta_times_the_log_ratio(mask: Tensor, draw) -> None:
    rewards, ratio = draw(4), draw(4, 7)
    found = token_rewards(rewards, poisoned(ratio, mask), mask, beta=0.3)
    sums = torch.stack([ratio[i, :n].sum() for i, n in enumerate(LENGTHS)])
    torch.testing.assert_close(found.sum(1), rewards - 0.3 * sums, rtol=0, atol=1e-12)
    for i, length in enumerate(LENGTHS):  # the reward comes with the last token, and only there
        torch.testing.assert_close(found[i, : length - 1], -0.3 * ratio[i, : length - 1], rtol=0, atol=1e-12)
        assert not found[i, length:].any()


def test_whitened_values_have_mean_0_and_variance_1_over_real_tokens(mask: Tensor, draw) -> None:
    values = 5 + 3 * draw(4, 7)
    found = whiten(poisoned(values, mask), mask, epsilon=0.0)
    assert float(found[mask].mean()) == pytest.approx(0, abs=1e-12)
    assert float(found[mask].var(correction=0)) == pytest.approx(1, abs=1e-12)
    assert not found[~mask].any()
    torch.testing.assert_close(whiten(3 * values + 7, mask, epsilon=0.0), found, rtol=0, atol=1e-12)
    assert not whiten(torch.full_like(values, 2.0), mask).any()


@pytest.mark.parametrize(
    ("ratio", "advantage", "loss", "slope"),
    [
        # Inside the clip: −ρA, whose derivative over log π is −ρA too.
        (1.0, 2.0, -2.0, -2.0),
        (1.1, 2.0, -2.2, -2.2),
        (0.9, -2.0, 1.8, 1.8),
        # Beyond it in the direction that A asks for: the constant −(1 ± c)A.
        (1.5, 2.0, -2.4, 0.0),
        (0.5, -2.0, 1.6, 0.0),
        # Beyond it the other way: nothing is cut off.
        (0.5, 2.0, -1.0, -1.0),
        (1.5, -2.0, 3.0, 3.0),
    ],
)
def test_clipped_policy_loss_by_hand(ratio: float, advantage: float, loss: float, slope: float) -> None:
    sampled = torch.tensor([[-1.7]], dtype=torch.float64)
    logp = (sampled + math.log(ratio)).requires_grad_()
    arguments = (logp, sampled, torch.full_like(sampled, advantage), torch.ones(1, 1, dtype=torch.bool))
    found = clipped_policy_loss(*arguments, clip=CLIP)
    found.sum().backward()
    assert float(found.detach()) == pytest.approx(loss, rel=1e-12)
    assert float(logp.grad) == pytest.approx(slope, rel=1e-12)
    assert bool(is_clipped(*arguments, clip=CLIP)) == (slope == 0.0)


@pytest.mark.parametrize(
    ("value", "old", "target", "loss", "slope"),
    [
        (1.1, 1.0, 3.0, 0.5 * 1.9**2, -1.9),  # inside the clip: V − R
        (2.0, 1.0, 3.0, 0.5 * 1.8**2, 0.0),  # moved towards R by more than c: held at 1.2
        (0.0, 1.0, 3.0, 0.5 * 3.0**2, -3.0),  # moved away from R: pulled back in full
        (5.0, 1.0, 3.0, 0.5 * 2.0**2, 2.0),  # past R, further than the held one is short of it
    ],
)
def test_clipped_value_loss_by_hand(value: float, old: float, target: float, loss: float, slope: float) -> None:
    values = torch.tensor([[value]], dtype=torch.float64, requires_grad=True)
    sampled, returns = (torch.tensor([[number]], dtype=torch.float64) for number in (old, target))
    found = clipped_value_loss(values, sampled, returns, torch.ones(1, 1, dtype=torch.bool), clip=CLIP)
    found.sum().backward()
    assert float(found.detach()) == pytest.approx(loss, rel=1e-12)
    assert float(values.grad) == pytest.approx(slope, rel=1e-12)


def test_at_the_sampling_policy_the_gradient_is_the_policy_gradient(mask: Tensor, draw) -> None:
    advantages, sampled = draw(4, 7), draw(4, 7)
    logp = sampled.clone().requires_grad_()
    clipped_policy_loss(logp, sampled, advantages, mask, clip=CLIP).sum().backward()
    torch.testing.assert_close(logp.grad, torch.where(mask, -advantages, 0), rtol=0, atol=1e-12)


def test_padding_reaches_neither_losses_nor_gradients(mask: Tensor, draw) -> None:
    """With NaN on padding everything is as for the rows alone, cut to their lengths."""
    a, b, c = draw(4, 7), draw(4, 7), draw(4, 7)
    for function in (clipped_policy_loss, clipped_value_loss):
        first = poisoned(a, mask).requires_grad_()
        found = function(first, poisoned(b, mask), poisoned(c, mask), mask, clip=CLIP)
        found.sum().backward()
        for i, length in enumerate(LENGTHS):
            alone = a[i : i + 1, :length].clone().requires_grad_()
            rest = (b[i : i + 1, :length], c[i : i + 1, :length])
            expected = function(alone, *rest, torch.ones(1, length, dtype=torch.bool), clip=CLIP)
            expected.sum().backward()
            torch.testing.assert_close(found[i, :length], expected[0], rtol=0, atol=1e-12)
            torch.testing.assert_close(first.grad[i, :length], alone.grad[0], rtol=0, atol=1e-12)
            assert not found[i, length:].any() and not first.grad[i, length:].any()
    assert not is_clipped(poisoned(a, mask), poisoned(b, mask), poisoned(c, mask), mask, clip=CLIP)[~mask].any()


def test_explained_variance(mask: Tensor, draw) -> None:
    returns, noise = draw(4, 7), draw(4, 7)
    for values, expected in (
        (returns, 1.0),
        (returns + 3.0, 1.0),  # a constant error is the mean's, not the variance's
        (torch.full_like(returns, 9.0), 0.0),
        (-returns, -3.0),  # Var(2R) / Var(R) = 4
    ):
        assert float(explained_variance(poisoned(values, mask), returns, mask)) == pytest.approx(expected, abs=1e-12)
    by_hand = 1 - float((returns - noise)[mask].var() / returns[mask].var())
    assert float(explained_variance(noise, returns, mask)) == pytest.approx(by_hand, abs=1e-12)
    assert float(explained_variance(noise, torch.ones_like(returns), mask)) == 0.0


@pytest.mark.parametrize(
    ("kl", "factor"),
    [
        (6.0, 1.0),  # at the target β stays
        (6.6, 1 + 0.5 * 0.1),
        (5.7, 1 - 0.5 * 0.05),
        (7.2, 1 + 0.5 * 0.2),  # where the clip begins
        (600.0, 1 + 0.5 * 0.2),
        (4.8, 1 - 0.5 * 0.2),
        (0.0, 1 - 0.5 * 0.2),
        (-1.0, 1 - 0.5 * 0.2),
        (math.nan, 1.0),
        (math.inf, 1.0),
    ],
)
def test_the_coefficient_follows_the_kl_in_proportion_to_a_clipped_error(kl: float, factor: float) -> None:
    found = adapted_kl_coefficient(0.3, kl, target=6.0, rate=0.5)
    assert found == pytest.approx(0.3 * factor, rel=1e-12)
    assert adapted_kl_coefficient(0.0, kl, target=6.0, rate=0.5) == 0.0


def test_where_kl_falls_with_the_coefficient_the_controller_ends_at_the_target() -> None:
    """KL = 1/β, so the target 2 is met at β = ½; the error shrinks by about 1 − K a step, from either side."""
    for beta in (1e-3, 0.4, 50.0):
        for _ in range(400):
            beta = adapted_kl_coefficient(beta, 1 / beta, target=2.0, rate=0.3)
        assert beta == pytest.approx(0.5, rel=1e-9)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda z, m: adapted_kl_coefficient(-0.1, 1.0, target=1.0, rate=0.1), "beta"),
        (lambda z, m: adapted_kl_coefficient(0.1, 1.0, target=0.0, rate=0.1), "target"),
        (lambda z, m: adapted_kl_coefficient(0.1, 1.0, target=1.0, rate=0.0), "rate"),
        (lambda z, m: adapted_kl_coefficient(0.1, 1.0, target=1.0, rate=5.0), "rate times clip"),
        (lambda z, m: token_rewards(z[:, 0], z, m, beta=-1.0), "beta"),
        (lambda z, m: token_rewards(z[0], z, m, beta=1.0), "one per row"),
        (lambda z, m: token_rewards(z[:, 0], z, m.flip(1), beta=1.0), "first tokens"),
        (lambda z, m: generalised_advantages(z, z, m, gamma=1.1, lam=1.0), "gamma"),
        (lambda z, m: generalised_advantages(z, z, m, gamma=1.0, lam=-0.1), "lam"),
        (lambda z, m: generalised_advantages(z, z, m.flip(1), gamma=1.0, lam=1.0), "first tokens"),
        (lambda z, m: generalised_advantages(z, z[:2], m, gamma=1.0, lam=1.0), "values is"),
        (lambda z, m: clipped_policy_loss(z, z, z, m, clip=0.0), "clip"),
        (lambda z, m: clipped_value_loss(z, z, z, m.long(), clip=0.1), "boolean"),
    ],
)
def test_wrong_arguments_are_named(change, message: str, mask: Tensor, draw) -> None:
    with pytest.raises(ValueError, match=message):
        change(draw(4, 7), mask)
