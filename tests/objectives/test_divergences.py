"""Each divergence against a twin written number by number, at its extremes, and with completions that are not there."""

from __future__ import annotations

import functools
import itertools
import math

import pytest
import torch

from exalign.objectives import (
    alpha_divergence,
    forward_kl,
    jeffreys,
    jensen_shannon,
    log_policy_distribution,
    log_preference_target,
    log_reward_target,
    reverse_kl,
)

INF = math.inf


def kl_by_hand(p, t):
    return math.fsum(a * math.log(a / b) for a, b in zip(p, t, strict=True) if a > 0)


def mixture(p, t):
    return [(a + b) / 2 for a, b in zip(p, t, strict=True)]


def alpha_by_hand(p, t, alpha):
    return (1 - math.fsum(a**alpha * b ** (1 - alpha) for a, b in zip(p, t, strict=True))) / (alpha * (1 - alpha))


BY_HAND = [
    (reverse_kl, kl_by_hand),
    (forward_kl, lambda p, t: -math.fsum(b * math.log(a) for a, b in zip(p, t, strict=True))),
    (jensen_shannon, lambda p, t: (kl_by_hand(p, mixture(p, t)) + kl_by_hand(t, mixture(p, t))) / 2),
    (jeffreys, lambda p, t: kl_by_hand(p, t) + kl_by_hand(t, p)),
    (lambda p, t: alpha_divergence(p, t, alpha=0.3), lambda p, t: alpha_by_hand(p, t, 0.3)),
    (lambda p, t: alpha_divergence(p, t, alpha=0.5), lambda p, t: alpha_by_hand(p, t, 0.5)),
]


@pytest.mark.parametrize(("function", "by_hand"), BY_HAND)
def test_value_is_the_formula(draw, function, by_hand):
    log_p, log_t = draw(6, 4).log_softmax(-1), draw(6, 4).log_softmax(-1)
    expected = [by_hand(p, t) for p, t in zip(log_p.exp().tolist(), log_t.exp().tolist(), strict=True)]
    torch.testing.assert_close(function(log_p, log_t), torch.tensor(expected, dtype=torch.float64))


def test_gradient_is_that_of_finite_differences(draw, divergence):
    mask = torch.tensor([[True, True, True, True], [True, True, False, True], [False, True, False, False]])
    log_t = log_reward_target(draw(3, 4), beta_r=0.5, mask=mask)
    reference = draw(3, 4)

    def loss(policy):
        return divergence(log_policy_distribution(policy, reference, beta_pi=0.7, mask=mask), log_t, mask)

    assert torch.autograd.gradcheck(loss, draw(3, 4).requires_grad_())


def test_smallest_exactly_where_policy_and_target_agree(draw, divergence):
    log_t = draw(5, 4).log_softmax(-1)
    log_p = log_t.clone().requires_grad_()
    at_target = divergence(log_p.log_softmax(-1), log_t)
    if divergence is forward_kl:  # a cross-entropy: what is left is the target's entropy
        torch.testing.assert_close(at_target, -(log_t.exp() * log_t).sum(-1))
    else:
        torch.testing.assert_close(at_target, torch.zeros(5, dtype=torch.float64))
    (gradient,) = torch.autograd.grad(at_target.sum(), log_p)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient))
    elsewhere = divergence((log_t + 0.1 * draw(5, 4)).log_softmax(-1), log_t)
    assert (elsewhere > at_target).all()


def test_symmetric_members_are_symmetric(draw):
    log_p, log_t = draw(5, 4).log_softmax(-1), draw(5, 4).log_softmax(-1)
    torch.testing.assert_close(jensen_shannon(log_p, log_t), jensen_shannon(log_t, log_p))
    torch.testing.assert_close(jeffreys(log_p, log_t), jeffreys(log_t, log_p))
    torch.testing.assert_close(alpha_divergence(log_p, log_t, alpha=0.2), alpha_divergence(log_t, log_p, alpha=0.8))


def test_alpha_runs_from_one_kl_to_the_other(draw):
    """The next term of the expansion is linear in the distance δ from the end; 1 − Σ loses 1e-16/δ to rounding."""
    log_p, log_t = draw(5, 4).log_softmax(-1), draw(5, 4).log_softmax(-1)
    for delta in (1e-3, 1e-5):
        near_reverse = alpha_divergence(log_p, log_t, alpha=1 - delta)
        torch.testing.assert_close(near_reverse, reverse_kl(log_p, log_t), rtol=0, atol=20 * delta)
        near_forward = alpha_divergence(log_p, log_t, alpha=delta)
        torch.testing.assert_close(near_forward, reverse_kl(log_t, log_p), rtol=0, atol=20 * delta)


def test_alpha_one_half_is_four_times_squared_hellinger(draw):
    log_p, log_t = draw(5, 4).log_softmax(-1), draw(5, 4).log_softmax(-1)
    hellinger = 1 - ((log_p + log_t) / 2).exp().sum(-1)
    torch.testing.assert_close(alpha_divergence(log_p, log_t, alpha=0.5), 4 * hellinger)


def test_bounds_are_reached_when_nothing_is_shared():
    log_p, log_t = torch.tensor([[0.0, -INF]]), torch.tensor([[-INF, 0.0]])
    torch.testing.assert_close(jensen_shannon(log_p, log_t), torch.tensor([math.log(2)]))
    torch.testing.assert_close(alpha_divergence(log_p, log_t, alpha=0.25), torch.tensor([1 / (0.25 * 0.75)]))
    assert reverse_kl(log_p, log_t).tolist() == [INF]
    assert jeffreys(log_p, log_t).tolist() == [INF]


def test_impossible_under_both_counts_nothing_without_a_mask(draw, divergence):
    """What a mask has made −inf in both distributions stays out, should the mask be forgotten here."""
    mask = torch.tensor([[True, True, False, True], [False, True, False, True], [False] * 4])
    policy = draw(3, 4).requires_grad_()
    log_p = log_policy_distribution(policy, draw(3, 4), beta_pi=0.5, mask=mask)
    log_t = log_reward_target(draw(3, 4), beta_r=0.5, mask=mask)
    with_mask, without = divergence(log_p, log_t, mask), divergence(log_p, log_t)
    assert torch.equal(with_mask, without)
    gradients = [torch.autograd.grad(loss.sum(), policy, retain_graph=True)[0] for loss in (with_mask, without)]
    assert torch.equal(*gradients)
    assert gradients[0].abs().max() > 0.01


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_no_nan_arises_on_the_way_back(draw, divergence):
    """PyTorch's anomaly detection, which stops at any NaN inside a backward pass, stays usable."""
    mask = torch.tensor([[True, True, False], [False, True, False], [False] * 3])
    one_hot = torch.tensor([[0.0, -INF, -INF], [-INF, 0.0, -INF], [-INF] * 3], dtype=torch.float64)
    targets = [log_reward_target(draw(3, 3), beta_r=0.5, mask=mask)]
    if divergence not in (reverse_kl, jeffreys):  # infinite against a target that excludes a completion
        targets.append(one_hot)
    for log_t, also_here in itertools.product(targets, (mask, None)):
        policy = draw(3, 3).requires_grad_()
        with torch.autograd.detect_anomaly():
            log_p = log_policy_distribution(policy, draw(3, 3), beta_pi=0.5, mask=mask)
            divergence(log_p, log_t, also_here).sum().backward()
        assert policy.grad.isfinite().all()


@pytest.mark.filterwarnings("ignore:Anomaly Detection")
@pytest.mark.parametrize("finite", [reverse_kl, jensen_shannon, functools.partial(alpha_divergence, alpha=0.4)])
def test_a_completion_that_the_policy_excludes_gets_no_gradient(draw, finite):
    policy = torch.tensor([[0.3, -INF, 0.1]], dtype=torch.float64).requires_grad_()
    log_t = log_reward_target(draw(1, 3), beta_r=0.5)
    with torch.autograd.detect_anomaly():
        loss = finite(log_policy_distribution(policy, draw(1, 3), beta_pi=0.5), log_t)
        loss.sum().backward()
    assert loss.isfinite().all()
    assert policy.grad.isfinite().all()
    assert policy.grad[0, 1] == 0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("size", [1.0, 1e4])
def test_finite_in_value_and_gradient_however_extreme(divergence, dtype, size):
    patterns = torch.tensor(
        [[1, -1, 0, 1], [-1, 1, 1, -1], [1, 1, 1, 1], [-1, 0, 0, 0], [0, 1, 0, 0], [-1, -1, 1, 1]], dtype=dtype
    )
    mask = torch.tensor([[1, 1, 1, 1], [1, 1, 1, 1], [1, 1, 0, 1], [1, 0, 0, 0], [0, 0, 0, 0], [1, 1, 1, 0]]).bool()
    policy = (size * patterns).requires_grad_()
    log_p = log_policy_distribution(policy, -size * patterns, beta_pi=1.0, mask=mask)
    targets = [
        log_reward_target(-size * patterns, beta_r=0.1, mask=mask),
        log_reward_target(size * patterns, beta_r=0.1, mask=mask),
        log_preference_target(torch.tensor([1, 0, 1, 0, 0, 2]), num_completions=4, epsilon=1e-3, mask=mask),
    ]
    for log_t in targets:
        loss = divergence(log_p, log_t, mask)
        (gradient,) = torch.autograd.grad(loss.sum(), policy, retain_graph=True)
        assert loss.isfinite().all()
        assert gradient.isfinite().all()
        assert loss.dtype == torch.promote_types(dtype, torch.float32)
        assert (gradient[~mask] == 0).all()


def test_one_completion_or_none_is_zero_without_gradient(draw, divergence):
    mask = torch.tensor([[False, True, False], [False, False, False]])
    policy = draw(2, 3).requires_grad_()
    log_p = log_policy_distribution(policy, draw(2, 3), beta_pi=0.1, mask=mask)
    for log_t in (
        log_reward_target(draw(2, 3), beta_r=0.1, mask=mask),
        log_preference_target(torch.tensor([1, 2]), num_completions=3, epsilon=0.1, mask=mask, dtype=torch.float64),
    ):
        loss = divergence(log_p, log_t, mask)
        (gradient,) = torch.autograd.grad(loss.sum(), policy, retain_graph=True)
        assert loss.tolist() == [0.0, 0.0]
        assert (gradient == 0).all()


def test_masking_equals_removing(draw, divergence):
    mask = torch.tensor([[True, False, True, True, False]])
    policy, reference, rewards = draw(1, 5), draw(1, 5), draw(1, 5)
    keep = mask[0]

    def loss(policy, reference, rewards, mask=None):
        log_p = log_policy_distribution(policy, reference, beta_pi=0.5, mask=mask)
        return divergence(log_p, log_reward_target(rewards, beta_r=0.5, mask=mask), mask)

    torch.testing.assert_close(
        loss(policy, reference, rewards, mask), loss(policy[:, keep], reference[:, keep], rewards[:, keep])
    )


def test_no_prompts_is_no_loss(divergence):
    assert divergence(torch.zeros(0, 3), torch.zeros(0, 3)).shape == (0,)


def test_wrong_shapes_types_and_alpha_are_value_errors(divergence):
    good = torch.zeros(2, 3)
    with pytest.raises(ValueError, match=r"log_p_target is \[2, 2\]"):
        divergence(good, torch.zeros(2, 2))
    with pytest.raises(ValueError, match=r"must be \[B, K\]"):
        divergence(torch.zeros(3), torch.zeros(3))
    with pytest.raises(ValueError, match="floating-point"):
        divergence(good, good.long())
    with pytest.raises(ValueError, match="boolean"):
        divergence(good, good, good)
    for alpha in (0.0, 1.0, -1.0, 2.0, math.nan):
        with pytest.raises(ValueError, match="alpha"):
            alpha_divergence(good, good, alpha=alpha)
