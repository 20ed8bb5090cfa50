"""The sampler on vLLM's engine: token ids in, token ids and their log-probabilities out. vLLM is known here only.

Written to vLLM's documentation and not run yet: see the table in docs/ray.md.
"""

from __future__ import annotations

import hashlib
import math
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from transformers import PreTrainedTokenizerBase

from exalign.data.record import Completion, Record
from exalign.errors import InputError
from exalign.rollout.sampler import completion_of, saved_end_ids, with_completions, with_prompt_ids
from exalign.rollout.settings import SampleSettings, VLLMSettings


class EngineLogprob(Protocol):
    """vLLM's `Logprob`, as far as it is read."""

    logprob: float


class EngineOutput(Protocol):
    """vLLM's `CompletionOutput`, as far as it is read: `logprobs` has one mapping for each token."""

    index: int
    token_ids: Sequence[int]
    logprobs: Sequence[Mapping[int, EngineLogprob]] | None
    finish_reason: str | None


class VLLMSampler:
    """Draws K completions per prompt with vLLM from the model in `folder`; see `Sampler`.

    The engine reports log-probabilities after temperature, top-k and top-p, which are those of the distribution that it
    draws from. Every prompt has its own seed, a function of `seed` and the record's id. Its completions are others than
    `GroupedSampler`'s. `counts` tells the same as there. Raises `InputError` where vLLM is not installed.
    """

    def __init__(
        self,
        folder: Path,
        tokenizer: PreTrainedTokenizerBase,
        settings: SampleSettings,
        *,
        engine: Mapping[str, Any],
        temperature: float,
        seed: int,
    ) -> None:
        try:
            import vllm
            from vllm.inputs import TokensPrompt
        except ImportError:
            raise InputError('cluster.vllm needs vLLM and a GPU: pip install "exalign[vllm]".') from None
        self.counts: Counter[str] = Counter()
        self._sampling_params: Any = vllm.SamplingParams
        self._tokens_prompt: Any = TokensPrompt
        self._tokenizer = tokenizer
        self._settings = settings
        self._temperature = temperature
        self._seed = seed
        self._ends = saved_end_ids(folder, tokenizer)
        self._engine = vllm.LLM(model=str(folder), **engine)

    def sample(self, records: Iterable[Record]) -> Iterator[Record]:
        """Yield each record with `prompt_ids` and K completions, in the order given."""
        entered = [with_prompt_ids(record, self._tokenizer, self._settings, self.counts) for record in records]
        prompts = [self._tokens_prompt(prompt_token_ids=list(record.prompt_ids or ())) for record in entered]
        ends = sorted(self._ends)
        parameters = [
            self._sampling_params(
                **sampling_arguments(self._settings, self._temperature, prompt_seed(self._seed, record.id), ends)
            )
            for record in entered
        ]
        outputs = self._engine.generate(prompts, parameters, use_tqdm=False)
        for record, output in zip(entered, outputs, strict=True):
            completions = completions_of(record, output.outputs, self._settings, self._ends, self._tokenizer)
            yield with_completions(record, completions, self.counts)


def engine_arguments(settings: VLLMSettings, sample: SampleSettings, *, dtype: str, gpus: int) -> dict[str, Any]:
    """What `vllm.LLM` is given beside the folder.

    Only safetensors are read, no code of the model runs, and none of its own sampling settings take effect.
    """
    return {
        "dtype": dtype,
        "max_model_len": sample.max_prompt_tokens + sample.max_new_tokens,
        "tensor_parallel_size": gpus,
        "gpu_memory_utilization": settings.memory_share,
        "logprobs_mode": "processed_logprobs",
        "generation_config": "vllm",
        "load_format": "safetensors",
        "trust_remote_code": False,
    }


def sampling_arguments(settings: SampleSettings, temperature: float, seed: int, ends: list[int]) -> dict[str, Any]:
    """What `vllm.SamplingParams` is given; `logprobs` = 0 asks for the drawn token's own and no other."""
    return {
        "n": settings.num_completions,
        "temperature": temperature,
        "top_p": 1.0 if settings.top_p is None else settings.top_p,
        "top_k": 0 if settings.top_k is None else settings.top_k,
        "max_tokens": settings.max_new_tokens,
        "seed": seed,
        "stop_token_ids": ends,
        "logprobs": 0,
        "detokenize": False,
    }


def prompt_seed(seed: int, prompt_id: str) -> int:
    """A prompt's own seed, of 62 bits: the engine adds the number of the completion to it.

    >>> prompt_seed(0, "a") == prompt_seed(0, "b"), prompt_seed(0, "a") < 2**62
    (False, True)
    """
    return int.from_bytes(hashlib.sha256(f"{seed}\0{prompt_id}".encode()).digest()[:8], "little") >> 2


def completions_of(
    record: Record,
    outputs: Sequence[EngineOutput],
    settings: SampleSettings,
    ends: Collection[int],
    tokenizer: PreTrainedTokenizerBase,
) -> tuple[Completion, ...]:
    """The K completions of one prompt from the engine's outputs, which come in any order.

    What does not fit together is an `InputError`: another number of completions, a token without a log-probability, or
    a completion that neither ended with one of `ends` nor reached the limit.
    """
    if sorted(output.index for output in outputs) != list(range(settings.num_completions)):
        raise InputError(f"vLLM gave {len(outputs)} completions for {record.id}, not {settings.num_completions}.")
    completions = []
    for output in sorted(outputs, key=lambda output: output.index):
        ids = list(output.token_ids)
        logps = [float(row[token].logprob) for token, row in zip(ids, output.logprobs or (), strict=False)]
        if not ids or len(logps) != len(ids):
            raise InputError(f"vLLM gave {len(ids)} tokens but {len(logps)} log-probabilities for {record.id}.")
        completion = completion_of(record, ids, math.fsum(logps), ends, tokenizer)
        at_limit = completion.finish_reason == "length" and len(ids) == settings.max_new_tokens
        if completion.finish_reason != output.finish_reason or not (completion.finish_reason == "stop" or at_limit):
            raise InputError(
                f"vLLM says that a completion of {record.id} ended by {output.finish_reason!r}, but its "
                f"{len(ids)} tokens say {completion.finish_reason!r}; its log-probabilities cannot be trusted."
            )
        completions.append(completion)
    return tuple(completions)
