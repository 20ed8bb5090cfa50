"""The policy's distribution and the two targets: their formulas, ragged K, any proposal, and what they refuse."""

from __future__ import annotations

import math

import pytest
import torch

from exalign.objectives import log_policy_distribution, log_preference_target, log_reward_target

NAN, INF = math.nan, math.inf


def softmax_by_hand(scores):
    """Log-softmax of a list of numbers, spelled out."""
    highest = max(scores)
    log_total = highest + math.log(math.fsum(math.exp(score - highest) for score in scores))
    return [score - log_total for score in scores]


def test_policy_distribution_is_the_softmax_of_scaled_log_ratios():
    policy, reference = [-3.0, -1.5, -9.0], [-2.0, -2.5, -9.5]
    expected = softmax_by_hand([0.5 * (p - r) for p, r in zip(policy, reference, strict=True)])
    actual = log_policy_distribution(
        torch.tensor([policy], dtype=torch.float64), torch.tensor([reference], dtype=torch.float64), beta_pi=0.5
    )
    torch.testing.assert_close(actual, torch.tensor([expected], dtype=torch.float64))


def test_reward_target_is_the_softmax_of_rewards_over_beta():
    rewards = [0.3, -1.0, 2.0, 0.3]
    expected = softmax_by_hand([r / 0.25 for r in rewards])
    actual = log_reward_target(torch.tensor([rewards], dtype=torch.float64), beta_r=0.25)
    torch.testing.assert_close(actual, torch.tensor([expected], dtype=torch.float64))


def test_preference_target_gives_the_rest_equal_shares_of_epsilon():
    actual = log_preference_target(torch.tensor([2, 0]), num_completions=4, epsilon=0.03, dtype=torch.float64).exp()
    expected = torch.tensor([[0.01, 0.01, 0.97, 0.01], [0.97, 0.01, 0.01, 0.01]], dtype=torch.float64)
    torch.testing.assert_close(actual, expected)


def test_preference_target_shares_epsilon_among_the_completions_that_exist():
    mask = torch.tensor([[True, True, False], [False, True, False], [False, False, False]])
    actual = log_preference_target(torch.tensor([0, 1, 0]), num_completions=3, epsilon=1e-3, mask=mask)
    expected = torch.tensor(
        [[math.log1p(-1e-3), math.log(1e-3), -INF], [-INF, 0.0, -INF], [-INF, -INF, -INF]], dtype=torch.float32
    )
    torch.testing.assert_close(actual, expected)


@pytest.mark.parametrize("beta", [0.1, 1.0, 1.7])
def test_the_reference_as_proposal_changes_nothing(draw, beta):
    policy, reference, rewards = draw(3, 5), draw(3, 5), draw(3, 5)
    torch.testing.assert_close(
        log_policy_distribution(policy, reference, beta_pi=beta, proposal_logp=reference),
        log_policy_distribution(policy, reference, beta_pi=beta),
    )
    torch.testing.assert_close(
        log_reward_target(rewards, beta_r=beta, reference_logp=reference, proposal_logp=reference),
        log_reward_target(rewards, beta_r=beta),
    )


def test_any_proposal_enters_as_an_importance_weight(draw):
    policy, reference, proposal, rewards = draw(2, 4), draw(2, 4), draw(2, 4), draw(2, 4)
    torch.testing.assert_close(
        log_policy_distribution(policy, reference, beta_pi=0.3, proposal_logp=proposal),
        torch.log_softmax(0.3 * policy + 0.7 * reference - proposal, dim=-1),
    )
    torch.testing.assert_close(
        log_reward_target(rewards, beta_r=0.3, reference_logp=reference, proposal_logp=proposal),
        torch.log_softmax(reference + rewards / 0.3 - proposal, dim=-1),
    )


def test_a_proposal_that_repeats_completions_counts_them(draw):
    """n_i copies of completion i, q uniform over the copies, are one completion of weight n_i."""
    policy, reference, rewards = draw(1, 3), draw(1, 3), draw(1, 3)
    copies = torch.tensor([1, 3, 2])
    counted = reference - copies.log()
    repeat = [tensor.repeat_interleave(copies, dim=1) for tensor in (policy, reference, rewards)]
    once = log_policy_distribution(policy, reference, beta_pi=0.5, proposal_logp=counted)
    many = log_policy_distribution(repeat[0], repeat[1], beta_pi=0.5)
    torch.testing.assert_close(once - copies.log(), many[:, [0, 1, 4]])
    once = log_reward_target(rewards, beta_r=0.5, reference_logp=reference, proposal_logp=counted)
    torch.testing.assert_close(once - copies.log(), log_reward_target(repeat[2], beta_r=0.5)[:, [0, 1, 4]])


def test_what_stands_in_masked_places_reaches_neither_value_nor_gradient(draw):
    mask = torch.tensor([[True, True, False], [False, True, False], [False, False, False]])
    garbage = torch.tensor([NAN, INF, -INF], dtype=torch.float64)
    policy, reference = (torch.where(mask, draw(3, 3), garbage) for _ in range(2))
    policy.requires_grad_()
    log_p = log_policy_distribution(policy, reference, beta_pi=0.5, mask=mask)
    torch.testing.assert_close(log_p[:1, :2], log_policy_distribution(policy[:1, :2], reference[:1, :2], beta_pi=0.5))
    assert log_p[1].tolist() == [-INF, 0.0, -INF]
    assert log_p[2].tolist() == [-INF] * 3
    (gradient,) = torch.autograd.grad(log_p[mask][0], policy)
    assert gradient.isfinite().all()
    assert (gradient[~mask] == 0).all()
    rewards = torch.where(mask, draw(3, 3), garbage).requires_grad_()
    log_t = log_reward_target(rewards, beta_r=0.5, mask=mask)
    assert torch.equal(log_t.isfinite(), mask)
    (gradient,) = torch.autograd.grad(log_t[mask][0], rewards)
    assert gradient.isfinite().all()


def test_large_rewards_keep_their_differences():
    """float32 holds 1e6 to 1/16: subtracting before dividing by β keeps what is there; dividing first would not."""
    rewards = torch.tensor([[1e6, 1e6 + 0.125]])
    torch.testing.assert_close(
        log_reward_target(rewards, beta_r=0.1), torch.tensor([softmax_by_hand([0.0, 1.25])], dtype=torch.float32)
    )


@pytest.mark.parametrize(
    ("given", "returned"),
    [
        (torch.float16, torch.float32),
        (torch.bfloat16, torch.float32),
        (torch.float32, torch.float32),
        (torch.float64, torch.float64),
    ],
)
def test_results_are_at_least_single_precision(given, returned):
    values = torch.zeros(1, 2, dtype=given)
    assert log_policy_distribution(values, values.float(), beta_pi=1.0).dtype == returned
    assert log_reward_target(values, beta_r=1.0).dtype == returned


def policy_distribution(policy=None, reference=None, **options):
    values = torch.zeros(2, 3)
    return log_policy_distribution(
        values if policy is None else policy,
        values if reference is None else reference,
        **{"beta_pi": 0.1, **options},
    )


def preference_target(preferred=(0, 0), **options):
    return log_preference_target(torch.as_tensor(preferred), **{"num_completions": 3, "epsilon": 1e-3, **options})


ONLY_FIRST = torch.tensor([[True, False, False], [True, True, True]])


@pytest.mark.parametrize(
    ("call", "says"),
    [
        (lambda: policy_distribution(policy=torch.zeros(2, 4)), r"reference_logp is \[2, 3\] but policy_logp is"),
        (lambda: policy_distribution(policy=torch.zeros(3)), r"must be \[B, K\]"),
        (lambda: policy_distribution(torch.zeros(2, 0), torch.zeros(2, 0)), "K ≥ 1"),
        (lambda: policy_distribution(policy=torch.zeros(2, 3, dtype=torch.int64)), "floating-point"),
        (lambda: policy_distribution(proposal_logp=torch.zeros(2, 1)), r"proposal_logp is \[2, 1\]"),
        (lambda: policy_distribution(mask=torch.ones(2, 3)), "mask must be boolean"),
        (lambda: policy_distribution(mask=torch.ones(2, dtype=torch.bool)), r"mask is \[2\]"),
        (lambda: policy_distribution(beta_pi=0.0), "beta_pi must be"),
        (lambda: policy_distribution(beta_pi=-0.1), "beta_pi must be"),
        (lambda: policy_distribution(beta_pi=NAN), "beta_pi must be"),
        (lambda: policy_distribution(beta_pi=INF), "beta_pi must be"),
        (lambda: log_reward_target(torch.zeros(2, 3), beta_r=0.0), "beta_r must be"),
        (lambda: log_reward_target(torch.zeros(2, 3, dtype=torch.int64), beta_r=1.0), "floating-point"),
        (lambda: log_reward_target(torch.zeros(2, 3), beta_r=1.0, proposal_logp=torch.zeros(2, 3)), "needs both"),
        (lambda: log_reward_target(torch.zeros(2, 3), beta_r=1.0, reference_logp=torch.zeros(2, 3)), "needs both"),
        (lambda: preference_target(epsilon=-0.1), "epsilon must lie"),
        (lambda: preference_target(epsilon=1.0), "epsilon must lie"),
        (lambda: preference_target(epsilon=NAN), "epsilon must lie"),
        (lambda: preference_target([0, 3]), r"preferred\[1\] is 3, outside 0 … 2"),
        (lambda: preference_target([-1, 0]), r"preferred\[0\] is -1"),
        (lambda: preference_target([1, 0], mask=ONLY_FIRST), r"preferred\[0\] is 1, a masked"),
        (lambda: preference_target([[0, 0]]), "int64"),
        (lambda: preference_target([0.0, 0.0]), "int64"),
        (lambda: preference_target(mask=torch.ones(2, 2, dtype=torch.bool)), "mask is"),
        (lambda: preference_target(num_completions=0), "at least 1"),
    ],
)
def test_wrong_input_is_a_value_error_that_names_it(call, says):
    with pytest.raises(ValueError, match=says):
        call()
