"""Theorem 3.1 and the closed-form gradients, on every completion of a small world."""

from __future__ import annotations

import dataclasses

import pytest
import torch

from exalign.exact.alignment import example_problem, kl, optimal_policy
from exalign.objectives import forward_kl, log_policy_distribution, log_reward_target, reverse_kl

BETAS = [(1.0, 0.3), (0.5, 0.5), (0.1, 2.0), (1.8, 0.3)]


def make_problem(beta_pi, beta_r):
    problem, logits = example_problem(seed=1)
    return dataclasses.replace(problem, beta_pi=beta_pi, beta_r=beta_r), logits


@pytest.mark.parametrize(("beta_pi", "beta_r"), BETAS)
def test_theorem_3_1_the_optimum_makes_the_product_of_experts_the_target(beta_pi, beta_r):
    problem, _ = make_problem(beta_pi, beta_r)
    torch.testing.assert_close(problem.experts(problem.optimum), problem.target)
    for distance in (problem.reverse_kl, problem.forward_kl):
        assert abs(distance(problem.optimum).item()) < 1e-14


@pytest.mark.parametrize(("beta_pi", "beta_r"), BETAS)
def test_equation_11_the_objective_is_log_z_minus_the_reverse_kl(beta_pi, beta_r):
    """J = −β_r KL(π_θ^{β_π}‖π*_{β_r}) + β_r log Z, so its maximum is β_r log Z, reached at the optimum."""
    problem, logits = make_problem(beta_pi, beta_r)
    most = beta_r * (problem.reference_logp + problem.rewards / beta_r).logsumexp(-1)
    policy = problem.world.log_probs(logits)
    torch.testing.assert_close(problem.objective(policy), most - beta_r * problem.reverse_kl(policy))
    torch.testing.assert_close(problem.objective(problem.optimum), most)
    assert problem.objective(policy) < most


def test_beta_pi_of_one_gives_the_usual_objective():
    """E_π[r] − β KL(π‖π_sft) (Eq. 4)."""
    problem, logits = make_problem(1.0, 0.3)
    policy = problem.world.log_probs(logits)
    usual = (policy.exp() * problem.rewards).sum() - 0.3 * kl(policy, problem.reference_logp)
    torch.testing.assert_close(problem.objective(policy), usual)
    torch.testing.assert_close(problem.optimum, optimal_policy(problem.reference_logp, problem.rewards, beta=0.3))


@pytest.mark.parametrize(("beta_pi", "beta_r"), BETAS[:2])
def test_theorem_3_1_ascending_the_objective_arrives_at_the_optimum(beta_pi, beta_r):
    problem, start = make_problem(beta_pi, beta_r)
    logits = start.clone().requires_grad_()
    optimizer = torch.optim.LBFGS([logits], max_iter=300, tolerance_change=0, line_search_fn="strong_wolfe")

    def closure():
        logits.grad = -problem.objective_gradient(logits.detach())
        return -problem.objective(problem.world.log_probs(logits.detach()))

    optimizer.step(closure)
    arrived = problem.world.log_probs(logits.detach())
    torch.testing.assert_close(arrived.exp(), problem.optimum.exp(), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("beta_pi", "beta_r"), BETAS)
@pytest.mark.parametrize("name", ["reverse_kl", "forward_kl", "objective"])
def test_closed_form_gradients_are_those_of_automatic_differentiation(name, beta_pi, beta_r):
    problem, logits = make_problem(beta_pi, beta_r)
    closed = getattr(problem, f"{name}_gradient")(logits)
    parameter = logits.clone().requires_grad_()
    (automatic,) = torch.autograd.grad(getattr(problem, name)(problem.world.log_probs(parameter)), parameter)
    torch.testing.assert_close(closed, automatic)
    assert closed.abs().max() > 1e-3


@pytest.mark.parametrize(("beta_pi", "beta_r"), BETAS)
def test_the_losses_on_all_completions_are_the_exact_divergences(beta_pi, beta_r):
    """Listing every completion once is drawing from the uniform proposal: K = N, and nothing is estimated."""
    problem, logits = make_problem(beta_pi, beta_r)
    policy = problem.world.log_probs(logits)
    uniform = torch.zeros_like(policy)[None]
    log_p = log_policy_distribution(policy[None], problem.reference_logp[None], beta_pi=beta_pi, proposal_logp=uniform)
    log_t = log_reward_target(
        problem.rewards[None], beta_r=beta_r, reference_logp=problem.reference_logp[None], proposal_logp=uniform
    )
    torch.testing.assert_close(log_p[0], problem.experts(policy))
    torch.testing.assert_close(log_t[0], problem.target)
    torch.testing.assert_close(reverse_kl(log_p, log_t)[0], problem.reverse_kl(policy))
    entropy = -(log_t.exp() * log_t).sum()
    torch.testing.assert_close(forward_kl(log_p, log_t)[0], problem.forward_kl(policy) + entropy)
