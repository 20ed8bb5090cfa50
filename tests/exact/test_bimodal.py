"""Figures 1 and 5: one-mode policies against a two-mode optimum."""

from __future__ import annotations

import functools
import math

import pytest
import torch

from exalign.exact.bimodal import (
    alignment_loss,
    fit_gaussian,
    gaussian_logp,
    objective_figure,
    two_mode_figure,
    two_mode_line,
)
from exalign.exact.convergence import gradient_error_figure
from exalign.objectives import alpha_divergence, forward_kl, jeffreys, jensen_shannon, reverse_kl

LINE = two_mode_line()
VALLEY = LINE.points.abs() < 0.5


@functools.cache
def fit(divergence):
    return fit_gaussian(LINE, divergence)


def moments(logp):
    mean = (logp.exp() * LINE.points).sum()
    return mean.item(), (logp.exp() * (LINE.points - mean).square()).sum().sqrt().item()


def test_the_optimum_is_the_reference_reweighted_and_has_two_modes():
    by_hand = (LINE.reference_logp + LINE.rewards / LINE.beta).log_softmax(-1)
    torch.testing.assert_close(LINE.log_target, by_hand)
    inner = LINE.log_target[1:-1]
    modes = LINE.points[1:-1][(inner > LINE.log_target[:-2]) & (inner > LINE.log_target[2:])]
    assert len(modes) == 2
    assert modes.tolist() == pytest.approx([-1.6, 1.6], abs=0.1)


def test_forward_kl_spreads_over_both_modes():
    """Maximum likelihood in an exponential family matches moments: mean and width are those of the optimum."""
    assert moments(fit(forward_kl).log_policy) == pytest.approx(moments(LINE.log_target), abs=1e-6)
    assert fit(forward_kl).log_policy.exp()[VALLEY].sum() > 5 * LINE.log_target.exp()[VALLEY].sum()


def test_reverse_kl_keeps_to_the_main_mode():
    """All of a policy on the side that holds a share s of the optimum costs at least −log s; this one, little more."""
    mean, std = moments(fit(reverse_kl).log_policy)
    assert mean == pytest.approx(-1.6, abs=0.1)
    assert std < 0.3
    side = LINE.log_target.exp()[LINE.points < 0].sum().item()
    assert side > 0.5
    assert -math.log(side) < fit(reverse_kl).losses[-1] < -math.log(side) + 0.05
    assert fit(reverse_kl).log_policy.exp()[VALLEY].sum() < 1e-4


@pytest.mark.parametrize("divergence", [reverse_kl, forward_kl, jensen_shannon, jeffreys])
def test_every_fit_is_the_least_over_a_grid_of_gaussians(divergence):
    """A search over means and widths, sharing nothing with the optimiser, finds nothing lower."""
    means, log_stds = torch.meshgrid(torch.linspace(-3, 3, 61), torch.linspace(-2, 1, 61), indexing="ij")
    gaussians = gaussian_logp(LINE.points, torch.stack([means.flatten(), log_stds.flatten()], dim=1).double())
    losses = divergence(gaussians, LINE.log_target.expand_as(gaussians))
    assert fit(divergence).losses[-1] <= losses.min() + 1e-12
    assert fit(divergence).losses[-1] == pytest.approx(losses.min().item(), abs=0.02)
    assert fit(divergence).losses[-1] < fit(divergence).losses[0]


def test_descending_exo_is_ascending_the_alignment_objective():
    """Their losses differ by log Z alone, at every step of the way (Eq. 11)."""
    log_z = torch.logsumexp(LINE.reference_logp + LINE.rewards / LINE.beta, -1)
    gap = fit(reverse_kl).losses - fit(alignment_loss(LINE)).losses
    torch.testing.assert_close(gap, log_z.expand(301))


def test_figure_1_holds_densities():
    figure = two_mode_figure()
    spacing = figure.points[1] - figure.points[0]
    for density in (figure.reference, figure.target, *figure.policies.values()):
        assert (density.sum() * spacing).item() == pytest.approx(1.0)
    near_reverse = fit_gaussian(LINE, functools.partial(alpha_divergence, alpha=0.9))
    torch.testing.assert_close(figure.policies["alpha 0.9"] * spacing, near_reverse.log_policy.exp())


def test_figure_5_any_policy_finds_the_optimum_a_limited_one_shows_the_objective():
    any_policy, one_mode = objective_figure()
    for density in any_policy.policies.values():
        torch.testing.assert_close(density, any_policy.target, rtol=0, atol=2e-3)
    aligned, exo, dpo = (one_mode.policies[name] for name in ("alignment objective", "EXO", "DPO"))
    torch.testing.assert_close(exo, aligned, rtol=0, atol=1e-6)
    assert (dpo - aligned).abs().max() > 1


def test_gradient_error_figure_has_the_slopes_of_theory():
    figure = gradient_error_figure(replicates=1000)
    for errors in figure.values():
        assert errors.num_completions.tolist() == [2.0**power for power in range(1, 11)]
        for slope, theory in ((errors.bias_slope(at_least=32), -1), (errors.rms_slope(at_least=32), -0.5)):
            assert abs(slope.value - theory) < 4 * slope.standard_error + 1 / 32
