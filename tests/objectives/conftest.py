from __future__ import annotations

import functools

import pytest
import torch

from exalign.objectives import alpha_divergence, forward_kl, jeffreys, jensen_shannon, reverse_kl

DIVERGENCES = {
    "reverse_kl": reverse_kl,
    "forward_kl": forward_kl,
    "jensen_shannon": jensen_shannon,
    "jeffreys": jeffreys,
    "alpha_0.3": functools.partial(alpha_divergence, alpha=0.3),
    "alpha_0.9": functools.partial(alpha_divergence, alpha=0.9),
}


@pytest.fixture(params=DIVERGENCES.values(), ids=DIVERGENCES.keys())
def divergence(request):
    return request.param


@pytest.fixture
def draw():
    """Standard normal float64 tensors from a fixed seed."""
    generator = torch.Generator().manual_seed(0)
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)
