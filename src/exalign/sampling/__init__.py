"""Samplers: prompts in, the same prompts with K completions and their log-probabilities out."""

from exalign.sampling.grouped import GroupedSampler
from exalign.sampling.protocol import Sampler, SampleSettings

__all__ = ["GroupedSampler", "SampleSettings", "Sampler"]
