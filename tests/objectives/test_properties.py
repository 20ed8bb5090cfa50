"""What holds for every group of completions: permutation, shifts, padding, gradients that sum to zero."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

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

DIVERGENCES = (
    reverse_kl,
    forward_kl,
    jensen_shannon,
    jeffreys,
    lambda p, t, mask=None: alpha_divergence(p, t, mask, alpha=0.4),
)
divergences = st.sampled_from(DIVERGENCES)
betas = st.floats(0.05, 2.0)


@st.composite
def groups(draw, size):
    """(policy_logp, reference_logp, rewards, mask), each `[B, K]`; numbers up to `size`, rows of any raggedness."""
    prompts, completions = draw(st.integers(1, 3)), draw(st.integers(1, 5))
    numbers = st.lists(st.floats(-size, size), min_size=prompts * completions, max_size=prompts * completions)
    values = [torch.tensor(draw(numbers), dtype=torch.float64).view(prompts, completions) for _ in range(3)]
    mask = draw(st.lists(st.booleans(), min_size=prompts * completions, max_size=prompts * completions))
    return *values, torch.tensor(mask).view(prompts, completions)


def evaluate(divergence, policy, reference, rewards, mask, *, beta_pi=0.5, beta_r=0.5):
    """Loss `[B]` and its gradient over `policy`."""
    policy = policy.clone().requires_grad_()
    log_p = log_policy_distribution(policy, reference, beta_pi=beta_pi, mask=mask)
    loss = divergence(log_p, log_reward_target(rewards, beta_r=beta_r, mask=mask), mask)
    (gradient,) = torch.autograd.grad(loss.sum(), policy)
    return loss.detach(), gradient


def close(actual, expected):
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=1e-9)


@settings(max_examples=40)
@given(groups(size=1e4), divergences, betas, betas)
def test_finite_and_the_gradient_sums_to_zero(group, divergence, beta_pi, beta_r):
    loss, gradient = evaluate(divergence, *group, beta_pi=beta_pi, beta_r=beta_r)
    assert loss.isfinite().all()
    assert gradient.isfinite().all()
    assert (loss >= -1e-9).all()
    total = gradient.sum(-1).abs()
    assert (total <= 1e-9 * (1 + gradient.abs().sum(-1))).all()


@settings(max_examples=40)
@given(groups(size=20), divergences, st.randoms(use_true_random=False))
def test_the_order_of_completions_does_not_matter(group, divergence, random):
    order = list(range(group[0].shape[1]))
    random.shuffle(order)
    loss, gradient = evaluate(divergence, *group)
    permuted_loss, permuted_gradient = evaluate(divergence, *(tensor[:, order] for tensor in group))
    close(permuted_loss, loss)
    close(permuted_gradient, gradient[:, order])


@settings(max_examples=40)
@given(groups(size=20), divergences, st.floats(-50, 50), st.floats(-50, 50))
def test_a_constant_added_to_rewards_or_log_ratios_does_not_matter(group, divergence, to_rewards, to_policy):
    policy, reference, rewards, mask = group
    close(
        evaluate(divergence, policy + to_policy, reference, rewards + to_rewards, mask),
        evaluate(divergence, policy, reference, rewards, mask),
    )


@settings(max_examples=40)
@given(groups(size=20), divergences, st.floats(allow_nan=True, allow_infinity=True))
def test_what_stands_in_masked_places_does_not_matter(group, divergence, anything):
    *values, mask = group
    dirty = [tensor.masked_fill(~mask, anything) for tensor in values]
    loss, gradient = evaluate(divergence, *values, mask)
    dirty_loss, dirty_gradient = evaluate(divergence, *dirty, mask)
    assert torch.equal(dirty_loss, loss)
    assert torch.equal(dirty_gradient, gradient)


@settings(max_examples=40)
@given(groups(size=20), divergences)
def test_prompts_do_not_see_each_other(group, divergence):
    loss, gradient = evaluate(divergence, *group)
    for row in range(len(loss)):
        alone = evaluate(divergence, *(tensor[row : row + 1] for tensor in group))
        close(alone, (loss[row : row + 1], gradient[row : row + 1]))


@settings(max_examples=40)
@given(st.integers(1, 6), st.floats(1e-9, 1 - 1e-9), st.data())
def test_a_preference_target_is_a_distribution_led_by_epsilon(completions, epsilon, data):
    preferred = data.draw(st.integers(0, completions - 1))
    mask = torch.tensor([data.draw(st.lists(st.booleans(), min_size=completions, max_size=completions))])
    mask[0, preferred] = True
    target = log_preference_target(
        torch.tensor([preferred]), num_completions=completions, epsilon=epsilon, mask=mask, dtype=torch.float64
    )
    close(target.exp().sum(-1), torch.ones(1, dtype=torch.float64))
    assert torch.equal(target.isfinite(), mask)
    if mask.sum() > 1:
        close(target[0, preferred].exp().item(), 1 - epsilon)
