"""The sampler for transformers models: K completions of each prompt, drawn while other prompts come and go."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import chain
from typing import Any

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from exalign.data.record import Record
from exalign.data.tokenization import cut_prompt, prompt_token_ids
from exalign.errors import InputError
from exalign.models.memory import is_out_of_memory, release_memory
from exalign.rollout.completions import completion_of, end_ids
from exalign.rollout.draw import draw_tokens, prompt_uniforms
from exalign.rollout.plain_decoder import Branches, Decoder, PlainDecoder
from exalign.rollout.settings import SampleSettings
from exalign.rollout.shared_decoder import SharedDecoder, why_not_shared

_ENTERING_TOKENS = 2048  # prompt tokens read in one step: enough for efficient products, little enough to hold
_log = logging.getLogger(__name__)


class GroupedSampler:
    """Draws K completions per prompt from softmax(logits / τ) and keeps the log-probability of what it drew.

    Each prompt's numbers come from a stream that depends on `seed` and the record's id only, so a completion does not
    depend on the other prompts, on their order or on how many are decoded together (up to the rounding of the model's
    own matrix products). A prompt is computed once for its K completions; a finished completion leaves at once, and
    waiting prompts take the places; a model whose attention cannot be shared is decoded plainly, and a warning says so.
    Where memory runs out those under way begin again, half as many at a time, and a warning says so too.

    `temperature` is τ > 0. Raises `InputError` for a tokenizer without end-of-sequence token, a τ that is not
    positive, or limits that exceed the model's positions. `counts` tells what was done: `prompts`, `prompts_cut` (their
    left part was dropped), `completions`, `completions_stopped`, `prompt_tokens`, `completion_tokens`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        settings: SampleSettings,
        *,
        temperature: float,
        seed: int,
    ) -> None:
        self.counts: Counter[str] = Counter()
        # Adapters live inside the layers of the base model; the wrapper around it hides its signature.
        plain: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
        self._model = plain
        self._tokenizer = tokenizer
        self._settings = settings
        self._room = settings.batch_completions
        self._temperature = temperature
        self._seed = seed
        settings_of_model = getattr(self._model, "generation_config", None)
        self._eos_ids = end_ids(getattr(settings_of_model, "eos_token_id", None), tokenizer)
        if not 0 < temperature < float("inf"):
            raise InputError(f"The temperature must be a positive number, not {temperature}.")
        longest = settings.max_prompt_tokens + settings.max_new_tokens
        _check_positions(self._model, longest)
        self._decoder = _decoder(self._model, longest)

    def sample(self, records: Iterable[Record]) -> Iterator[Record]:
        """Yield each record with `prompt_ids` and K completions, in the order given; see `Sampler`."""
        waiting = _Waiting(self._enter(index, record) for index, record in enumerate(records))
        running: list[_Running] = []
        finished: dict[int, Record] = {}
        next_index = 0
        while True:
            running = self._admit(waiting, running)
            if not running:
                return
            if not self._fits(running):
                waiting.put_back([self._again(group) for group in sorted(running, key=lambda group: group.index)])
                running = []
                release_memory()
                continue
            for group in running:
                if not group.live:
                    finished[group.index] = self._finish(group)
            running = [group for group in running if group.live]
            while next_index in finished:
                yield finished.pop(next_index)
                next_index += 1

    def _enter(self, index: int, record: Record) -> _Running:
        """A record made ready: its prompt as ids, its uniform numbers drawn."""
        whole = prompt_token_ids(record, self._tokenizer)
        ids = cut_prompt(whole, self._tokenizer, self._settings.max_prompt_tokens)
        self.counts["prompts_cut"] += len(ids) < len(whole)
        self.counts["prompts"] += 1
        self.counts["prompt_tokens"] += len(ids)
        number = self._settings.num_completions
        uniforms = prompt_uniforms(self._seed, record.id, number, self._settings.max_new_tokens)
        prompt = torch.tensor(ids, dtype=torch.long, device=self._model.device)
        return _Running(index, replace(record, prompt_ids=tuple(ids)), uniforms, Branches(prompt, number))

    def _admit(self, waiting: _Waiting, running: list[_Running]) -> list[_Running]:
        """The running groups, and before them those that enter: while there is room, and always one where none runs."""
        live = sum(len(group.live) for group in running)
        entering: list[_Running] = []
        tokens = 0
        while (group := waiting.first) is not None:
            live += len(group.live)
            tokens += len(group.branches.prompt_ids)
            crowded = live > self._room and (entering or running)
            if crowded or (tokens > _ENTERING_TOKENS and entering):
                break
            entering.append(group)
            waiting.advance()
        return entering + running

    def _fits(self, running: list[_Running]) -> bool:
        """Make a step. False where memory ran out in it, and fewer completions are decoded together from now on."""
        try:
            self._step(running)
            return True
        except RuntimeError as error:
            if not is_out_of_memory(error):
                raise
        live = sum(len(group.live) for group in running)
        if len(running) == 1:
            raise InputError(
                f"The {live} completions of prompt {running[0].record.id} do not fit in memory; lower "
                "sample.num_completions or sample.max_new_tokens."
            )
        while self._room >= live:
            self._room //= 2
        _log.warning("%d completions together do not fit in memory; it goes on with at most %d.", live, self._room)
        return False

    def _again(self, group: _Running) -> _Running:
        branches = Branches(group.branches.prompt_ids, self._settings.num_completions)
        return _Running(group.index, group.record, group.uniforms, branches)

    def _step(self, running: list[_Running]) -> None:
        """One token more for every live completion; those that end leave."""
        settings = self._settings
        with torch.inference_mode(), _evaluating(self._model):
            logits = self._decoder.step([group.branches for group in running])
            draws_per_row: list[int] = []
            for group in running:
                draws_per_row += [len(group.live)] if group.branches.tokens is None else [1] * len(group.live)
            uniforms = np.concatenate([group.uniforms[group.live, group.branches.length] for group in running])
            ids, logps = draw_tokens(
                logits,
                torch.from_numpy(uniforms),
                torch.tensor(draws_per_row),
                temperature=self._temperature,
                top_k=settings.top_k,
                top_p=settings.top_p,
            )
            start = 0
            id_list, logp_list = ids.tolist(), logps.tolist()
            for group in running:
                part = slice(start, start + len(group.live))
                start = part.stop
                self._extend(group, ids[part], id_list[part], logp_list[part])

    def _extend(self, group: _Running, tokens: Tensor, ids: list[int], logps: list[float]) -> None:
        group.branches.length += 1
        keep = []
        for place, (number, token, logp) in enumerate(zip(group.live, ids, logps, strict=True)):
            group.token_ids[number].append(token)
            group.logps[number] += logp
            if token not in self._eos_ids and group.branches.length < self._settings.max_new_tokens:
                keep.append(place)
        group.branches.tokens = tokens
        if len(keep) < len(group.live):
            group.branches.tokens = tokens[torch.tensor(keep, dtype=torch.long, device=tokens.device)]
            group.live = [group.live[place] for place in keep]
            if keep:
                self._decoder.keep(group.branches, keep)

    def _finish(self, group: _Running) -> Record:
        completions = []
        for ids, logp in zip(group.token_ids, group.logps, strict=True):
            completions.append(completion_of(ids, logp, self._eos_ids, self._tokenizer))
            self.counts["completions"] += 1
            self.counts["completions_stopped"] += ids[-1] in self._eos_ids
            self.counts["completion_tokens"] += len(ids)
        return replace(group.record, completions=tuple(completions), preferred=None)


@dataclass(eq=False)
class _Running:
    """A record on its way: `live` are the numbers (0…K−1) of its completions that have not ended."""

    index: int
    record: Record
    uniforms: np.ndarray
    branches: Branches
    live: list[int] = field(init=False)
    token_ids: list[list[int]] = field(init=False)
    logps: list[float] = field(init=False)

    def __post_init__(self) -> None:
        self.live = list(range(self.branches.num_completions))
        self.token_ids = [[] for _ in self.live]
        self.logps = [0.0 for _ in self.live]


class _Waiting:
    """An iterator whose `first` element can be looked at before it is taken; None where there is none."""

    def __init__(self, groups: Iterable[_Running]) -> None:
        self._groups = iter(groups)
        self.advance()

    def advance(self) -> None:
        self.first = next(self._groups, None)

    def put_back(self, groups: list[_Running]) -> None:
        self._groups = chain(groups, [] if self.first is None else [self.first], self._groups)
        self.advance()


@contextmanager
def _evaluating(model: PreTrainedModel) -> Iterator[None]:
    """The model in evaluation mode, and afterwards in the mode it was in."""
    training = model.training
    if training:
        model.eval()
    try:
        yield
    finally:
        if training:
            model.train()


def _decoder(model: PreTrainedModel, longest: int) -> Decoder:
    with torch.inference_mode(), _evaluating(model):
        reason = why_not_shared(model, longest=longest)
    if reason is None:
        return SharedDecoder(model)
    _log.warning("%s is sampled without shared prompts, which is slower: %s.", type(model).__name__, reason)
    return PlainDecoder(model)


def _check_positions(model: PreTrainedModel, longest: int) -> None:
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and longest > limit:
        raise InputError(
            f"max_prompt_tokens + max_new_tokens is {longest}, but the model has {limit} positions; lower one of them."
        )
