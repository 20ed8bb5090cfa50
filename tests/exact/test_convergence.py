"""Theorems 3.2 and 3.3 with their rates: the K-sample gradient against the exact one.

Two independent ways: expectations summed over every possible outcome of K draws, free of noise, in a world of three
completions; and measurement over replicates, in a world of fifteen, with tolerances from its own standard errors.
"""

from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
import torch

from exalign.exact.alignment import example_problem
from exalign.exact.convergence import (
    divergence_gradient,
    draw_counts,
    fit_slope,
    gradient_errors,
    gradient_from_counts,
    length_of_mean,
    on_policy_figure,
    policy_logits,
    ppo_gradient,
    rloo_gradient,
)
from exalign.objectives import (
    forward_kl,
    jensen_shannon,
    log_policy_distribution,
    log_reward_target,
    reverse_kl,
)

THEOREMS = {"3.2 EXO": (reverse_kl, "reverse_kl_gradient"), "3.3 DPO": (forward_kl, "forward_kl_gradient")}


@pytest.fixture(params=THEOREMS.values(), ids=THEOREMS.keys())
def theorem(request):
    """A divergence and the name of the exact gradient that its samples tend to."""
    return request.param


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def summed_errors(problem, logits, divergence, exact, size):
    """Bias and rms error of three completions' K-sample gradient, summed over all (K+1)(K+2)/2 outcomes."""
    first, second = torch.meshgrid(torch.arange(size + 1), torch.arange(size + 1), indexing="ij")
    possible = first + second <= size
    counts = torch.stack([first[possible], second[possible], size - (first + second)[possible]], dim=1).double()
    log_chance = math.lgamma(size + 1) - torch.lgamma(counts + 1).sum(1) + counts @ problem.reference_logp
    gradients = gradient_from_counts(problem, logits, divergence, counts, problem.reference_logp)
    errors = gradients @ problem.world.scores(logits).flatten(1) - exact.flatten()
    chance = log_chance.exp()[:, None]
    torch.testing.assert_close(chance.sum(), torch.tensor(1.0, dtype=torch.float64))
    return (chance * errors).sum(0).norm().item(), (chance[:, 0] * errors.square().sum(1)).sum().sqrt().item()


def test_rates_summed_over_all_outcomes_are_minus_one_and_minus_one_half(theorem):
    """Between K and 2K the slope is the theory's up to a term that falls as 1/K: it halves when K doubles."""
    divergence, exact_name = theorem
    problem, logits = example_problem(seed=2, num_tokens=2, num_steps=2)
    exact = getattr(problem, exact_name)(logits)
    sizes = [64, 128, 256, 512]
    errors = [summed_errors(problem, logits, divergence, exact, size) for size in sizes]
    for column, theory in ((0, -1.0), (1, -0.5)):
        slopes = [math.log2(errors[i + 1][column] / errors[i][column]) for i in range(3)]
        away = [slope - theory for slope in slopes]
        assert abs(away[-1]) < 2 / sizes[-2]
        for early, late in itertools.pairwise(away):
            assert late / early == pytest.approx(0.5, abs=0.1)


def test_measured_errors_agree_with_the_summed_ones(theorem):
    divergence, exact_name = theorem
    problem, logits = example_problem(seed=2, num_tokens=2, num_steps=2)
    exact = getattr(problem, exact_name)(logits)
    sizes = [2, 8, 64]
    measured = gradient_errors(problem, logits, divergence, exact, sizes, replicates=4000, generator=seeded())
    for row, size in enumerate(sizes):
        bias, rms = summed_errors(problem, logits, divergence, exact, size)
        assert abs(measured.bias[row].item() - bias) < 4 * measured.bias_error[row]
        assert abs(measured.rms[row].item() - rms) < 4 * measured.rms_error[row]
        assert measured.bias_error[row] < 0.1 * bias  # so that the agreement says something


def test_measured_rates_are_minus_one_and_minus_one_half(theorem):
    """From K = 32 on, where the next term of the expansion bends the line by about 1/32."""
    divergence, exact_name = theorem
    problem, logits = example_problem(seed=3)
    exact = getattr(problem, exact_name)(logits)
    sizes = [32, 64, 128, 256, 512, 1024]
    errors = gradient_errors(problem, logits, divergence, exact, sizes, replicates=4000, generator=seeded())
    for slope, theory in ((errors.bias_slope(), -1.0), (errors.rms_slope(), -0.5)):
        assert slope.standard_error < 0.02
        assert abs(slope.value - theory) < 4 * slope.standard_error + 1 / 32


def test_theorem_3_2_the_limit_is_the_alignment_objective_over_minus_beta_r():
    problem, logits = example_problem(seed=3)
    target = -problem.objective_gradient(logits) / problem.beta_r
    errors = gradient_errors(problem, logits, reverse_kl, target, [4096], replicates=500, generator=seeded())
    assert errors.rms[0] < 0.1 * target.norm()
    assert errors.bias[0] < 0.002 * target.norm()


def test_exo_and_dpo_tend_to_different_gradients():
    """Measured against the other's limit, the error stays at the distance between the two limits."""
    problem, logits = example_problem(seed=3)
    reverse, forward = problem.reverse_kl_gradient(logits), problem.forward_kl_gradient(logits)
    distance = (reverse - forward).norm().item()
    errors = gradient_errors(problem, logits, reverse_kl, forward, [4096], replicates=500, generator=seeded())
    assert errors.bias[0].item() == pytest.approx(distance, rel=0.01)
    assert distance > 0.1 * reverse.norm().item()


def test_any_proposal_has_the_same_limit_at_the_same_rate(theorem):
    divergence, exact_name = theorem
    problem, logits = example_problem(seed=3)
    uniform = torch.full_like(problem.reference_logp, -math.log(len(problem.reference_logp)))
    for proposal in (problem.world.log_probs(logits), uniform):
        errors = gradient_errors(
            problem,
            logits,
            divergence,
            getattr(problem, exact_name)(logits),
            [64, 128, 256, 512],
            replicates=4000,
            generator=seeded(),
            proposal_logp=proposal,
        )
        slope = errors.bias_slope()
        assert abs(slope.value + 1) < 4 * slope.standard_error + 1 / 64


def test_without_its_correction_another_proposal_has_another_limit():
    """Completions of the policy taken for completions of π_sft: more of them do not help."""
    problem, logits = example_problem(seed=3)
    policy = problem.world.log_probs(logits)
    scores = problem.world.scores(logits).flatten(1)
    exact = problem.reverse_kl_gradient(logits).flatten()

    def error(size, assumed):
        counts = draw_counts(policy, size, replicates=500, generator=seeded())
        gradients = gradient_from_counts(problem, logits, reverse_kl, counts, assumed) @ scores
        return (gradients.mean(0) - exact).norm().item()

    assert error(4096, policy) < 0.01 * exact.norm().item()
    assert error(4096, problem.reference_logp) > 0.1 * exact.norm().item()


@pytest.mark.parametrize("divergence", [reverse_kl, forward_kl, jensen_shannon])
def test_counting_completions_equals_listing_them(divergence):
    problem, logits = example_problem(seed=0)
    proposal = problem.world.log_probs(logits)
    drawn = torch.multinomial(proposal.exp(), 12, replacement=True, generator=seeded()).repeat(1, 1)
    policy = problem.world.log_probs(logits)[drawn].requires_grad_()
    reference, q = problem.reference_logp[drawn], proposal[drawn]
    log_p = log_policy_distribution(policy, reference, beta_pi=problem.beta_pi, proposal_logp=q)
    log_t = log_reward_target(problem.rewards[drawn], beta_r=problem.beta_r, reference_logp=reference, proposal_logp=q)
    (listed,) = torch.autograd.grad(divergence(log_p, log_t, None).sum(), policy)
    counts = torch.bincount(drawn[0], minlength=len(proposal)).double()[None]
    assert counts.max() > 1
    counted = gradient_from_counts(problem, logits, divergence, counts, proposal)
    torch.testing.assert_close(torch.zeros_like(counted).index_add(1, drawn[0], listed), counted)


def test_counts_are_multinomial():
    """Mean K p and covariance K (diag p − p pᵀ), within four standard errors of the estimates."""
    log_p = torch.tensor([0.5, 0.1, 0.25, 0.15], dtype=torch.float64).log()
    size, replicates = 10, 20_000
    counts = draw_counts(log_p, size, replicates=replicates, generator=seeded())
    assert (counts.sum(1) == size).all()
    assert (counts >= 0).all()
    p = log_p.exp()
    covariance = size * (p.diag() - p.outer(p))
    assert ((counts.mean(0) - size * p).abs() < 4 * (covariance.diag() / replicates).sqrt()).all()
    centred = counts - size * p
    products = centred[:, :, None] * centred[:, None, :]
    assert ((products.mean(0) - covariance).abs() < 4 * products.std(0) / math.sqrt(replicates)).all()


def test_the_length_of_a_noisy_mean_is_corrected_and_its_error_is_right():
    """Mean of length 1 under unit noise in 20 dimensions, 50 replicates: uncorrected, its square would average 1.4."""
    noise = torch.randn(400, 50, 20, generator=seeded(), dtype=torch.float64)
    noise[:, :, 0] += 1
    measured = torch.tensor([length_of_mean(errors) for errors in noise], dtype=torch.float64)
    squares = measured[:, 0].square()
    assert abs(squares.mean().item() - 1) < 4 * squares.std().item() / 20
    assert measured[:, 1].mean().item() == pytest.approx(measured[:, 0].std().item(), rel=0.15)


def test_a_slope_and_its_standard_error():
    """A line is recovered exactly; with equal errors σ the slope's is σ/√Σ(x − x̄)²."""
    x = torch.tensor([0.0, 1.0, 2.0, 5.0], dtype=torch.float64)
    slope = fit_slope(x, 3 - 0.7 * x, torch.full_like(x, 0.2))
    assert slope.value == pytest.approx(-0.7)
    assert slope.standard_error == pytest.approx(0.2 / math.sqrt(14))


def test_a_slope_needs_two_points():
    problem, logits = example_problem(seed=0)
    exact = problem.reverse_kl_gradient(logits)
    errors = gradient_errors(problem, logits, reverse_kl, exact, [4, 8], replicates=100, generator=seeded())
    with pytest.raises(ValueError, match="two measured points"):
        errors.bias_slope(at_least=8)


def on_policy(seed=3):
    """A problem at β_π = 1, a policy that has left π_sft, and its log-probabilities."""
    problem, logits = example_problem(seed=seed)
    problem = replace(problem, beta_pi=1.0, beta_r=0.3)
    return problem, logits, problem.world.log_probs(logits)


@pytest.mark.parametrize("size", [2, 5, 64])
def test_exo_on_its_own_samples_is_rloo_for_every_draw(size):
    """(K−1)/K of it, sample by sample: the identity of `objectives.penalised_rewards` on the policy's parameters."""
    problem, logits, policy = on_policy()
    frequencies = draw_counts(policy, size, replicates=50, generator=seeded()) / size
    exo = divergence_gradient(problem, logits, reverse_kl, policy)(frequencies, size)
    rloo = rloo_gradient(problem, logits)(frequencies, size)
    torch.testing.assert_close(exo, (size - 1) / size * rloo, rtol=1e-9, atol=1e-12)


def test_rloo_and_ppo_have_no_bias():
    """RLOO over all 15² pairs of completions; PPO, which is linear in the frequencies, at their expectation."""
    problem, logits, policy = on_policy()
    exact, count = problem.reverse_kl_gradient(logits).flatten(), len(policy)
    one = torch.eye(count, dtype=torch.float64)
    pairs = (one[:, None] + one[None, :]).flatten(0, 1) / 2
    chance = (policy[:, None] + policy[None, :]).exp().flatten()
    torch.testing.assert_close(chance @ rloo_gradient(problem, logits)(pairs, 2), exact, rtol=1e-9, atol=1e-12)
    for lam in (0.0, 0.5, 0.95, 1.0):
        found = ppo_gradient(problem, logits, lam=lam)(policy.exp()[None], 1)[0]
        torch.testing.assert_close(found, exact, rtol=1e-9, atol=1e-12)


def test_at_lambda_1_an_advantage_is_what_the_completion_got_less_what_its_prefix_promised():
    """For completion (1, 0, …): A_t = R − E[R | prefix], times the score of each of its tokens."""
    problem, logits, policy = on_policy()
    rewards = problem.rewards - problem.beta_r * (policy - problem.reference_logp)
    n = next(i for i, completion in enumerate(problem.world.completions) if len(completion) == 3)
    completion, expected = problem.world.completions[n], torch.zeros_like(logits)
    for step, token in enumerate(completion):
        prefix = completion[:step]
        inside = [i for i, other in enumerate(problem.world.completions) if other[:step] == prefix]
        promised = (policy[inside].exp() * rewards[inside]).sum() / policy[inside].exp().sum()
        row = problem.world.prefixes.index(prefix)
        expected[row] -= (rewards[n] - promised) * logits.softmax(dim=-1)[row]
        expected[row, token] += rewards[n] - promised
    alone = torch.zeros(1, len(policy), dtype=torch.float64)
    alone[0, n] = 1
    found = ppo_gradient(problem, logits, lam=1.0)(alone, 1)[0]
    torch.testing.assert_close(found, -expected.flatten() / problem.beta_r, rtol=1e-9, atol=1e-12)


def test_logits_of_a_policy_give_it_back():
    problem, _, policy = on_policy()
    torch.testing.assert_close(problem.world.log_probs(policy_logits(problem, policy)), policy)


def test_the_figure_on_policy_shows_what_is_proved():
    """On-policy the bias of EXO is the K-th part of the gradient; RLOO and PPO have none; all errors fall as 1/√K."""
    curves = on_policy_figure(replicates=400)
    own = curves["EXO, on-policy"]
    length, weight = own.bias * own.num_completions, (own.bias_error * own.num_completions).square().reciprocal()
    mean = (weight * length).sum() / weight.sum()
    assert ((length - mean).abs() < 4 * own.bias_error * own.num_completions).all()
    assert float(own.bias_slope().value) == pytest.approx(-1, abs=0.1)
    for name in ("RLOO", "PPO, perfect critic"):
        assert (curves[name].bias <= 4 * curves[name].bias_error).all()
        assert curves[name].rms_slope(at_least=8).value == pytest.approx(-0.5, abs=0.1)
    assert (own.rms < curves["RLOO"].rms + 3 * own.rms_error).all()  # the smaller gradient has the smaller spread
    assert float(curves["EXO, from π_sft"].bias[3]) > 2 * float(own.bias[3])
