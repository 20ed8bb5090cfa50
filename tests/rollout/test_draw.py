"""The draw inverts the cumulative distribution, and its log-probability is that of what it draws from."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from scipy import stats
from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from exalign.rollout.sampler import draw_tokens, prompt_uniforms


def spread_logits(rows: int, vocabulary: int, *, seed: int = 0, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return 3 * torch.randn(rows, vocabulary, generator=torch.Generator().manual_seed(seed), dtype=dtype)


@pytest.mark.parametrize("vocabulary", [2, 23, 256, 257, 1500])
@pytest.mark.parametrize("temperature", [0.5, 1.0, 2.0])
def test_draws_are_the_inverse_cumulative_distribution(vocabulary, temperature):
    logits = spread_logits(11, vocabulary)
    draws = torch.tensor([3, 1, 0, 5, 2, 1, 1, 1, 4, 1, 2])
    uniforms = torch.rand(int(draws.sum()), generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ids, logps = draw_tokens(logits, uniforms, draws, temperature=temperature)
    expected = torch.log_softmax(logits / temperature, -1)
    for row, uniform, token, logp in zip(np.repeat(np.arange(11), draws.numpy()), uniforms, ids, logps, strict=True):
        cumulative = np.cumsum(expected[row].exp().numpy())
        assert token == np.searchsorted(cumulative, uniform, side="right")
        assert logp == pytest.approx(float(expected[row, token]), abs=1e-12)


def test_frequencies_match_the_probabilities_in_float32():
    logits = spread_logits(1, 600, dtype=torch.float32)
    n = 200_000
    uniforms = torch.from_numpy(prompt_uniforms(0, "prompt", 1, n)[0])
    ids, logps = draw_tokens(logits, uniforms, torch.tensor([n]), temperature=0.8)
    probabilities = (logits.double() / 0.8).softmax(-1)[0]
    torch.testing.assert_close(logps, probabilities.log()[ids], atol=1e-5, rtol=0)
    # χ² needs at least about five expected draws in each cell: the rare tokens share one.
    common = probabilities * n >= 5
    observed = torch.bincount(ids, minlength=600).double()
    cells = torch.cat([observed[common], observed[~common].sum()[None]])
    expected = n * torch.cat([probabilities[common], probabilities[~common].sum()[None]])
    assert stats.chisquare(cells.numpy(), expected.numpy()).pvalue > 1e-3


@pytest.mark.parametrize(("top_k", "top_p"), [(5, None), (None, 0.7), (9, 0.5), (1, None), (None, 1e-9), (10**6, 1.0)])
def test_filters_agree_with_transformers_and_the_logprob_is_renormalised(top_k, top_p):
    logits = spread_logits(4, 300)
    filtered = TemperatureLogitsWarper(0.7)(None, logits)
    filtered = TopKLogitsWarper(top_k)(None, filtered) if top_k else filtered
    filtered = TopPLogitsWarper(top_p)(None, filtered) if top_p and top_p < 1 else filtered
    expected = filtered.log_softmax(-1)
    n = 500
    uniforms = torch.rand(4 * n, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    ids, logps = draw_tokens(logits, uniforms, torch.full((4,), n), temperature=0.7, top_k=top_k, top_p=top_p)
    rows = torch.arange(4).repeat_interleave(n)
    torch.testing.assert_close(logps, expected[rows, ids], atol=1e-12, rtol=0)


def test_top_p_keeps_exactly_what_transformers_keeps():
    """The greatest uniform number draws the last token kept: here ids stand in the order of the weights."""
    logits = spread_logits(50, 20).sort(descending=True).values
    for top_p in np.linspace(0.02, 0.98, 49):
        kept = torch.isfinite(TopPLogitsWarper(float(top_p))(None, logits)).sum(-1)
        last = torch.full((50,), 1 - 2**-53, dtype=torch.float64)
        ids, _ = draw_tokens(logits, last, torch.ones(50, dtype=torch.long), temperature=1.0, top_p=float(top_p))
        assert torch.equal(ids, kept - 1)


@pytest.mark.parametrize("uniform", [0.0, 0.5, 1 - 2**-53])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_a_token_of_probability_zero_is_never_drawn(uniform, dtype):
    logits = torch.full((2, 700), -torch.inf, dtype=dtype)
    logits[0, 300] = 1000.0
    logits[1, 1], logits[1, 699] = 5.0, -30.0
    ids, logps = draw_tokens(
        logits, torch.full((2,), uniform, dtype=torch.float64), torch.tensor([1, 1]), temperature=1.0
    )
    assert ids[0] == 300
    assert logps[0] == 0
    assert ids[1] in (1, 699)
    assert torch.isfinite(logps).all()


def test_uniforms_depend_on_seed_prompt_and_number_only():
    numbers = prompt_uniforms(3, "a", 4, 50)
    assert (numbers[:2, :7] == prompt_uniforms(3, "a", 2, 7)).all()
    others = [prompt_uniforms(4, "a", 4, 50), prompt_uniforms(3, "b", 4, 50)]
    flat = np.concatenate([numbers.ravel(), *(other.ravel() for other in others)])
    assert len(np.unique(flat)) == flat.size


def test_the_streams_of_many_prompts_are_uniform_and_unrelated():
    """One prompt's p-value is below 1/1000 for one prompt in a thousand: so it is the p-values that must be uniform."""
    streams = [prompt_uniforms(0, f"prompt {i}", 3, 1000) for i in range(200)]
    uniformity = [stats.kstest(numbers.ravel(), "uniform").pvalue for numbers in streams]
    between_completions = [stats.pearsonr(numbers[0], numbers[1]).pvalue for numbers in streams]
    between_prompts = [stats.pearsonr(a[0], b[0]).pvalue for a, b in itertools.pairwise(streams)]
    for p_values in (uniformity, between_completions, between_prompts):
        assert stats.kstest(p_values, "uniform").pvalue > 1e-3
