"""Density ratios: by hand, beside a library's kernel estimates, and where the optimum is known exactly."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from scipy.stats import gaussian_kde

from exalign.data.record import Completion, Record
from exalign.errors import InputError
from exalign.evaluation.pool import (
    GRID_POINTS,
    OPTIMUM,
    density_curve,
    density_ratios,
    kernel,
    scott_bandwidth,
    smoothed_ratio,
)
from exalign.evaluation.statistics import Bootstrap
from exalign.exact.alignment import AlignmentProblem, World

RW = 0.1
"""β at which the method aims."""


def record(
    name: str, log_sft: Sequence[float], log_ratio: Sequence[float], rewards: Sequence[float] | None = None
) -> Record:
    rows = zip(log_sft, log_ratio, rewards or [0.0] * len(log_sft), strict=True)
    completions = (Completion("", logprob=s + q, reference_logprob=s, reward=r) for s, q, r in rows)
    return Record(name, "a prompt", tuple(completions))


def test_two_samples_by_hand() -> None:
    """Weights 3 : 1 over two samples at −2 and −1: ratios 1.5 and 0.5, mixed by the kernel's two values."""
    found = density_ratios({"m": [record("p", [-2.0, -1.0], [math.log(3), 0.0])]}, {"m": RW}, [], Bootstrap(20))
    assert found is not None
    (prompt,) = found.prompts
    assert prompt.bandwidth == pytest.approx(math.sqrt(1 / 2) * 2**-0.2)
    curve = next(curve for curve in prompt.curves if curve.policy == "m")
    far = math.exp(-1 / (2 * prompt.bandwidth**2))
    assert (prompt.grid[0], prompt.grid[-1], len(prompt.grid)) == (-2.0, -1.0, GRID_POINTS)
    assert curve.ratio[0] == pytest.approx((1.5 + 0.5 * far) / (1 + far))
    assert curve.ratio[-1] == pytest.approx((1.5 * far + 0.5) / (1 + far))
    assert curve.effective_samples == pytest.approx(1 / (0.75**2 + 0.25**2))


@given(st.integers(3, 40), st.integers(0, 10_000))
def test_it_is_the_ratio_of_two_kernel_density_estimates(samples: int, seed: int) -> None:
    generator = np.random.default_rng(seed)
    log_sft, weights = generator.normal(-50, 10, samples), generator.dirichlet(np.ones(samples))
    grid = np.linspace(log_sft.min(), log_sft.max(), 7)
    below = gaussian_kde(log_sft)
    h = scott_bandwidth(log_sft)
    assert h == pytest.approx(math.sqrt(below.covariance[0, 0]))
    # The library takes its bandwidth as a multiple of the weighted samples' own spread.
    spread = math.sqrt(np.cov(log_sft, aweights=weights))
    above = gaussian_kde(log_sft, bw_method=h / spread, weights=weights)
    found = smoothed_ratio(samples * weights, kernel(grid, log_sft, h))
    np.testing.assert_allclose(found, above(grid) / below(grid), rtol=1e-6)


def test_the_optimum_of_the_enumerable_world_is_found() -> None:
    """With a kernel narrower than the gaps between completions, ρ at log π_sft(y) is π*(y)/π_sft(y) itself."""
    world = World.enumerate(num_tokens=2, num_steps=3)
    generator = torch.Generator().manual_seed(3)
    logits = torch.randn(len(world.prefixes), 2, generator=generator, dtype=torch.float64)
    rewards = torch.randn(len(world.completions), generator=generator, dtype=torch.float64)
    problem = AlignmentProblem(world, world.log_probs(logits), rewards, beta_pi=0.8, beta_r=0.7)
    exact = (problem.optimum - problem.reference_logp).exp().numpy()
    log_sft = problem.reference_logp.numpy()
    drawn = torch.multinomial(problem.reference_logp.exp(), 40_000, replacement=True, generator=generator).numpy()
    gap = np.diff(np.sort(log_sft)).min()
    smooth = kernel(log_sft, log_sft[drawn], gap / 20)
    curve = density_curve(OPTIMUM, rewards.numpy()[drawn] / (0.8 * 0.7), smooth, bootstrap=Bootstrap(30))
    # Of M samples the normaliser is known to a relative error of about std(ratio)/√M; four of them are allowed.
    error = 4 * math.sqrt((exact**2 @ np.exp(log_sft) - 1) / len(drawn))
    np.testing.assert_allclose(curve.ratio, exact, rtol=error)
    ratios = exact[drawn]
    assert curve.effective_samples == pytest.approx(ratios.sum() ** 2 / (ratios**2).sum())


def test_a_policy_that_did_not_move_has_ratio_one_with_certainty() -> None:
    found = density_ratios({"m": [record("p", [-9.0, -5.0, -4.0], [0.3] * 3)]}, {}, [], Bootstrap(50))
    assert found is not None
    (curve,) = found.prompts[0].curves
    for values in (curve.ratio, curve.low, curve.high):
        np.testing.assert_allclose(values, 1)
    assert curve.effective_samples == pytest.approx(3)


def test_the_average_over_the_samples_of_a_wide_kernel_is_one() -> None:
    """A kernel much wider than the samples lie apart averages the ratios M w_i, whose mean is 1."""
    curve = density_curve("m", np.array([0.0, 2.0, -1.0]), kernel(np.linspace(0, 1, 5), np.array([0, 0.5, 1]), 1e4))
    np.testing.assert_allclose(curve.ratio, 1, rtol=1e-6)


def test_the_interval_covers_what_another_draw_would_show() -> None:
    """True ratio at the middle of log π_sft ~ N(0, 1) under a log-ratio independent of it: 1."""
    covered = []
    for seed in range(60):
        generator = np.random.default_rng(seed)
        log_sft, log_ratio = generator.normal(size=(2, 120))
        curve = density_curve("m", log_ratio, kernel(np.zeros(1), log_sft, 0.4), bootstrap=Bootstrap(200))
        covered.append(curve.low[0] <= 1 <= curve.high[0])
    assert np.mean(covered) > 0.85


def test_the_optimum_is_that_of_the_first_method_with_a_reward_target() -> None:
    rewards = [0.0, 0.1]
    one = [record("p", [-2.0, -1.0], [0.0, 0.0], rewards)]
    aims = {"pref": None, "rw": RW}
    found = density_ratios({"pref": one, "rw": one}, aims, [], Bootstrap(20))
    assert found is not None
    assert (found.beta_of, found.beta) == ("rw", RW)
    curve = found.prompts[0].curves[0]
    assert curve.policy == OPTIMUM
    # β = 0.1 turns a difference of 0.1 in reward into a factor e.
    w = math.e / (1 + math.e)
    assert curve.effective_samples == pytest.approx(1 / (w**2 + (1 - w) ** 2))
    notes: list[str] = []
    without = density_ratios({"pref": one}, aims, notes, Bootstrap(20))
    assert without is not None
    assert (without.beta_of, without.beta) == (None, None)
    assert [curve.policy for curve in without.prompts[0].curves] == ["pref"]
    assert "no β for the optimum" in notes[0]


def test_weights_far_beyond_floating_point_give_numbers() -> None:
    rows = [record("p", [-900.0, -2.0, -1.0], [-700.0, 900.0, 0.0], [1e3, -1e3, 0.0])]
    found = density_ratios({"m": rows}, {"m": 5e-7}, [], Bootstrap(50))
    assert found is not None
    for curve in found.prompts[0].curves:
        assert np.isfinite([curve.ratio, curve.low, curve.high]).all()
        assert curve.effective_samples == pytest.approx(1)


def test_prompts_whose_samples_are_all_alike_are_counted() -> None:
    notes: list[str] = []
    assert density_ratios({"m": [record("p", [-1.0, -1.0], [0.0, 1.0])]}, {"m": RW}, notes) is None
    assert notes == ["No density ratio on 1 prompts: all samples there are equally likely."]
    assert density_ratios({}, {}, notes) is None


def test_a_missing_number_names_the_record() -> None:
    bad = Record("p7", "x", (Completion("a", logprob=-1.0, reference_logprob=-1.0), Completion("b")))
    with pytest.raises(InputError, match=r"evaluation/density/m: a completion of 'p7' lacks"):
        density_ratios({"m": [bad]}, {"m": RW}, [])
