"""The sampler for transformers models: K completions of each prompt, drawn while other prompts come and go.

Below it: how a token is drawn (one uniform number in, one token and its log-probability out; N rows of logits, M draws
of which several may share a row, V vocabulary), and the decoders that turn tokens into the next token's logits.
"""

from __future__ import annotations

import copy
import hashlib
import inspect
import logging
import math
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from itertools import chain
from typing import Any, Protocol
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import pad
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from exalign.data.record import Completion, Record
from exalign.data.tokenization import answer_lead, completion_text, cut_prompt, end_ids, prompt_token_ids
from exalign.device import device_memory, to_device
from exalign.errors import InputError
from exalign.models.attention import PagedLayout, Pages, SharedCache, StepLayout, laid_out, share_prompts
from exalign.models.capability import (
    base_of,
    check_causal,
    check_positions,
    device_of,
    evaluating,
    in_short,
    unsupported,
)
from exalign.models.memory import is_out_of_memory, release_memory
from exalign.models.prefix_tree import BLOCK, Tree, TreeLayout
from exalign.models.sizes import completions_at_once, measured
from exalign.rollout.settings import SampleSettings

_ENTERING_TOKENS = 2048  # prompt tokens read in one step: enough for efficient products, little enough to hold
_BLOCK = 256  # tokens whose weights are summed before the search: the float64 running sum is over V / 256 blocks
_TILE = 8  # rows of logits handled at once, so that a tile and its weights stay in the processor's cache
_log = logging.getLogger(__name__)


class Sampler(Protocol):
    """Draws completions from a policy.

    `sample` yields one record for each one it is given, in the same order, with `prompt_ids` and K completions
    that carry `text`, `token_ids`, `finish_reason` and `logprob`: log q(y|x) in nats of the distribution that was
    sampled from, summed over the tokens, the end-of-sequence token included exactly when it was drawn.
    """

    counts: Counter[str]
    """What was counted so far: prompts cut, completions, their tokens."""

    def sample(self, records: Iterable[Record]) -> Iterator[Record]: ...


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
        self._model = base_of(model)  # adapters live inside its layers; the wrapper around it hides its signature
        if draws_rounded(model, settings):
            self._model = rounded(self._model)
        self._tokenizer = tokenizer
        self._settings = settings
        memory = device_memory(self._model.device)
        self._room = completions_at_once(
            measured([self._model], memory),
            memory,
            settings.batch_completions,
            prompt_tokens=settings.max_prompt_tokens / settings.num_completions,
            tokens=settings.max_new_tokens,
        )
        self._temperature = temperature
        self._seed = seed
        self._eos_ids = check_drawing(self._model, tokenizer, settings, temperature)
        with evaluating(self._model):
            self._decoder = decoder_for(self._model)

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
                fresh = [Branches(group.branches.prompt_ids, len(group.logps)) for group in running]
                again = [replace(group, branches=branches) for group, branches in zip(running, fresh, strict=True)]
                waiting.put_back(sorted(again, key=lambda group: group.index))
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
        record = with_prompt_ids(record, self._tokenizer, self._settings, self.counts)
        number = self._settings.num_completions
        uniforms = prompt_uniforms(self._seed, record.id, number, self._settings.max_new_tokens)
        prompt = torch.tensor(record.prompt_ids, dtype=torch.long)
        return _Running(index, record, uniforms, Branches(prompt, number))

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

    def _step(self, running: list[_Running]) -> None:
        """One token more for every live completion; those that end leave."""
        settings = self._settings
        with torch.inference_mode(), evaluating(self._model):
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
            found, logp_list = torch.stack([ids.double(), logps]).tolist()  # in one copy; ids are exact in it
            if not all(map(math.isfinite, logp_list)):
                raise InputError("The model gives no finite probabilities: its weights, or sums in 16 bits, are NaN.")
            id_list = [int(number) for number in found]
            for group in running:
                part = slice(start, start + len(group.live))
                start = part.stop
                self._extend(group, id_list[part], logp_list[part])

    def _extend(self, group: _Running, ids: list[int], logps: list[float]) -> None:
        group.branches.length += 1
        keep = []
        for place, (number, token, logp) in enumerate(zip(group.live, ids, logps, strict=True)):
            group.token_ids[number].append(token)
            group.logps[number] += logp
            if token not in self._eos_ids and group.branches.length < self._settings.max_new_tokens:
                keep.append(place)
        group.branches.tokens = torch.tensor([ids[place] for place in keep], dtype=torch.long)
        if len(keep) < len(group.live):
            group.live = [group.live[place] for place in keep]
            if keep:
                self._decoder.keep(group.branches, keep)

    def _finish(self, group: _Running) -> Record:
        drawn = [
            completion_of(group.record, ids, logp, self._eos_ids, self._tokenizer)
            for ids, logp in zip(group.token_ids, group.logps, strict=True)
        ]
        return with_completions(group.record, drawn, self.counts)


def draws_rounded(model: nn.Module, settings: SampleSettings) -> bool:
    """Whether a copy of float32 weights in bfloat16 draws, whose log-probabilities are not quite the model's."""
    return settings.precision == "bf16" and base_of(model).dtype == torch.float32


_ROUNDED: WeakKeyDictionary[Any, Any] = WeakKeyDictionary()
"""The copy of a model, which stays while the model does: where weights change it takes them over."""


def rounded(model: Any) -> Any:
    """A copy of the model as it is now, its float32 weights in bfloat16; all else is shared or stays what it is."""
    if model not in _ROUNDED:
        halves = {
            id(weight): nn.Parameter(weight.detach().bfloat16(), requires_grad=False)
            if weight.dtype == torch.float32
            else weight
            for weight in model.parameters()
        }
        _ROUNDED[model] = copy.deepcopy(model, halves)
    found = _ROUNDED[model]
    with torch.no_grad():
        for half, weight in zip(found.parameters(), model.parameters(), strict=True):
            half.copy_(weight)
    return found


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


def check_drawing(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, settings: SampleSettings, temperature: float
) -> frozenset[int]:
    """The ids that end a completion of the model: those that end one in data, and those of its generation config.

    An `InputError` where it cannot draw as the settings ask.
    """
    if not 0 < temperature < float("inf"):
        raise InputError(f"The temperature must be a positive number, not {temperature}.")
    longest, limits = settings.max_prompt_tokens + settings.max_new_tokens, "max_prompt_tokens + max_new_tokens"
    warning = check_positions(model.config, longest, settings=limits, samples=True)
    if warning is not None:
        _log.warning(warning)
    own = getattr(getattr(model, "generation_config", None), "eos_token_id", None)  # an id, several, or none
    return end_ids(tokenizer).union([] if own is None else [own] if isinstance(own, int) else own)


def with_prompt_ids(
    record: Record, tokenizer: PreTrainedTokenizerBase, settings: SampleSettings, counts: Counter[str]
) -> Record:
    """The record with its prompt as ids, cut where it is too long, and counted."""
    whole = prompt_token_ids(record, tokenizer)
    ids = cut_prompt(whole, tokenizer, settings.max_prompt_tokens)
    counts.update(prompts=1, prompts_cut=len(ids) < len(whole), prompt_tokens=len(ids))
    return replace(record, prompt_ids=tuple(ids))


def completion_of(
    record: Record, ids: Sequence[int], logprob: float, ends: Collection[int], tokenizer: PreTrainedTokenizerBase
) -> Completion:
    """The completion of ids that were drawn behind `record.prompt_ids`: one that ended keeps the id that ended it.

    Its text goes without that, and is what data would hold (see `completion_text` and `answer_lead`).
    """
    stopped, lead = ids[-1] in ends, answer_lead(record, tokenizer)
    text = completion_text(tokenizer, record.prompt_ids or (), ids[:-1] if stopped else ids, lead)
    return Completion(text, tuple(ids), "stop" if stopped else "length", logprob)


def with_completions(record: Record, drawn: Sequence[Completion], counts: Counter[str]) -> Record:
    """The record with what was drawn for it, counted."""
    counts.update(
        completions=len(drawn),
        completions_stopped=sum(completion.finish_reason == "stop" for completion in drawn),
        completion_tokens=sum(len(completion.token_ids or ()) for completion in drawn),
    )
    return replace(record, completions=tuple(drawn), preferred=None)


def prompt_uniforms(seed: int, prompt_id: str, num_completions: int, length: int) -> np.ndarray:
    """Uniform numbers in [0, 1), float64 `[num_completions, length]`, one for each token that may be drawn.

    Row j is a function of `seed`, `prompt_id` and j alone: neither the other prompts, nor K, nor the longest length
    allowed change the numbers that a completion is drawn with.

    >>> few, many = prompt_uniforms(0, "a", 2, 3), prompt_uniforms(0, "a", 4, 5)
    >>> bool((few == many[:2, :3]).all())
    True
    """
    key = int.from_bytes(hashlib.sha256(f"{seed}\0{prompt_id}".encode()).digest()[:16], "little")
    rows = [np.random.Generator(np.random.Philox(key=key, counter=j << 192)) for j in range(num_completions)]
    return np.stack([row.random(length) for row in rows])


def draw_tokens(
    logits: Tensor,
    uniforms: Tensor,
    draws_per_row: Tensor,
    *,
    temperature: float,
    top_k: int | None = None,
    top_p: float | None = None,
) -> tuple[Tensor, Tensor]:
    """Draw from softmax(logits / temperature) by inverting its cumulative distribution.

    `logits` `[N, V]`; on the CPU, `draws_per_row` int64 `[N]`, summing to M, says how many draws each row serves, and
    `uniforms` float64 `[M]` are in [0, 1), in the order of the rows. Returns ids int64 `[M]` and log-probabilities
    float64 `[M]` in nats. With `top_k` or `top_p` the tokens they leave out have probability zero, and the
    log-probability is that of the renormalised distribution. Sums are in float32 within blocks of 256 tokens (in
    float64 where the logits are) and in float64 across them.
    """
    ids, logps, start = [], [], 0
    size = _TILE if logits.device.type == "cpu" else len(logits)
    ends = draws_per_row.cumsum(0).tolist()
    every_row = torch.repeat_interleave(torch.arange(len(logits)) % size, draws_per_row)
    uniforms, every_row = to_device(logits.device, uniforms, every_row)
    for first in range(0, len(logits), size):
        stop = ends[min(first + size, len(logits)) - 1]
        scaled = _scaled(logits[first : first + size], temperature)
        if top_k is not None or top_p is not None:
            _filter(scaled, top_k, top_p)
        tile_ids, tile_logps = _invert(scaled, every_row[start:stop], uniforms[start:stop])
        ids.append(tile_ids)
        logps.append(tile_logps)
        start = stop
    return torch.cat(ids), torch.cat(logps)


def _scaled(logits: Tensor, temperature: float) -> Tensor:
    """`logits / temperature` in at least float32, in a new tensor whose width is a multiple of the block."""
    dtype = torch.promote_types(logits.dtype, torch.float32)
    width = -(-logits.shape[1] // _BLOCK) * _BLOCK
    scaled = torch.full((len(logits), width), -torch.inf, dtype=dtype, device=logits.device)
    torch.div(logits.to(dtype), temperature, out=scaled[:, : logits.shape[1]])
    return scaled


def _filter(scaled: Tensor, top_k: int | None, top_p: float | None) -> None:
    """Set to −inf, in place, what top-k and then top-p leave out; the most probable token always stays."""
    if top_k is not None:
        kth = scaled.topk(min(top_k, scaled.shape[1])).values[:, -1:]
        scaled.masked_fill_(scaled < kth, -torch.inf)
    if top_p is not None:
        ordered, order = scaled.sort(descending=True)
        probability = ordered.double().softmax(-1)
        left_out = probability.cumsum(-1) - probability >= top_p
        scaled.masked_fill_(left_out.scatter(1, order, left_out), -torch.inf)


def _invert(scaled: Tensor, rows: Tensor, uniforms: Tensor) -> tuple[Tensor, Tensor]:
    """The first token whose cumulative weight exceeds the uniform's share of the total, and its log-probability."""
    top = scaled.amax(1, keepdim=True)
    weights = (scaled - top).exp_().view(len(scaled), -1, _BLOCK)
    cumulative = weights.sum(2).double().cumsum(1)[rows]
    total = cumulative[:, -1:]
    target = torch.minimum(uniforms[:, None] * total, _just_below(total))
    block = torch.searchsorted(cumulative, target, right=True).clamp_max(cumulative.shape[1] - 1)  # NaN is beyond all
    before = torch.where(block > 0, cumulative.gather(1, (block - 1).clamp_min(0)), 0.0)
    within = weights[rows, block[:, 0]].double().cumsum(1)
    # The block's own float64 total may differ from its float32 sum in the last digits: stay inside it.
    rest = torch.minimum(target - before, _just_below(within[:, -1:]))
    place = torch.searchsorted(within, rest, right=True)[:, 0].clamp_max(_BLOCK - 1)
    ids = block[:, 0] * _BLOCK + place
    logps = (scaled[rows, ids].double() - top[rows, 0].double()) - total[:, 0].log()
    return ids, logps


def _just_below(values: Tensor) -> Tensor:
    return torch.nextafter(values, torch.zeros_like(values))


@dataclass(eq=False)
class Branches:
    """One prompt and the completions that still grow from it, all of the same length.

    `tokens` int64 `[R]` holds the last token of each of the R live completions; it is None until the prompt has been
    read. Both are on the CPU. `cache` belongs to the decoder.
    """

    prompt_ids: Tensor
    num_completions: int
    tokens: Tensor | None = None
    length: int = 0
    cache: Any = field(default=None, repr=False)


class Decoder(Protocol):
    """Turns tokens into the next token's logits, remembering what came before.

    `step` reads the prompt of each entering group and one token of each live completion of the others, and returns
    logits `[N, V]` in the order of the groups: one row for an entering group, R rows for another. `keep` forgets the
    completions of a group that are not in `rows` (positions in `tokens`, ascending).
    """

    def step(self, groups: Sequence[Branches]) -> Tensor: ...

    def keep(self, group: Branches, rows: Sequence[int]) -> None: ...


class PlainDecoder:
    """One forward pass per group and step, the prompt repeated for each of its completions; nothing is padded.

    By the model's own cache, or without one: the whole texts again for each token. The slow twin of `SharedDecoder`.
    """

    def __init__(self, model: Any, *, cached: bool = True) -> None:
        self._model = model
        self._cached = cached

    def step(self, groups: Sequence[Branches]) -> Tensor:
        return torch.cat([self._prefill(group) if group.tokens is None else self._decode(group) for group in groups])

    def keep(self, group: Branches, rows: Sequence[int]) -> None:
        # Not every cache can drop rows (recurrent states cannot): finished rows are fed on, their logits left out.
        group.cache.live = group.cache.live[torch.tensor(rows)]

    def _prefill(self, group: Branches) -> Tensor:
        input_ids = group.prompt_ids.expand(group.num_completions, -1)
        output = self._model(input_ids=input_ids.to(device_of(self._model)), use_cache=self._cached)
        live = torch.arange(group.num_completions)
        group.cache = _RepeatedRows(output if self._cached else None, input_ids, live)
        return output.logits[:1, -1]

    def _decode(self, group: Branches) -> Tensor:
        assert group.tokens is not None
        state: _RepeatedRows = group.cache
        input_ids = group.tokens.new_zeros(group.num_completions, 1)
        input_ids[state.live, 0] = group.tokens
        if not self._cached:
            state.input_ids = torch.cat([state.input_ids, input_ids], dim=1)
            rows = state.input_ids[state.live].to(device_of(self._model))
            return self._model(input_ids=rows, use_cache=False).logits[:, -1]
        name = "past_key_values" if getattr(state.output, "past_key_values", None) is not None else "cache_params"
        input_ids, live = to_device(device_of(self._model), input_ids, state.live)
        state.output = self._model(input_ids=input_ids, use_cache=True, **{name: getattr(state.output, name)})
        return state.output.logits[live, -1]


@dataclass(eq=False)
class _RepeatedRows:
    """The model's last output, which holds the cache of all K rows; or, without, their ids; and the rows that live."""

    output: Any
    input_ids: Tensor
    live: Tensor


class SharedDecoder:
    """Each prompt is read once: one forward pass per step over a packed row, for all groups.

    The row holds the entering prompts, then one token of each live completion.
    """

    def __init__(self, model: Any) -> None:
        share_prompts(model)
        self._model = model

    def step(self, groups: Sequence[Branches]) -> Tensor:
        """Logits of the next tokens; entering groups must stand before the running ones."""
        entering = [group for group in groups if group.tokens is None]
        running = [group for group in groups if group.tokens is not None]
        for group in entering:
            group.cache = SharedCache(num_rows=group.num_completions, prompt_length=len(group.prompt_ids))
        row, positions, wanted = to_device(device_of(self._model), *_packed(entering, running))
        with laid_out(StepLayout([group.cache for group in entering], [group.cache for group in running])):
            output = self._model(input_ids=row, position_ids=positions, use_cache=False, logits_to_keep=wanted)
        for group in running:
            group.cache.length += 1
        return output.logits[0]

    def keep(self, group: Branches, rows: Sequence[int]) -> None:
        group.cache.keep(list(rows))


def _packed(entering: Sequence[Branches], running: Sequence[Branches]) -> tuple[Tensor, Tensor, Tensor]:
    """The row of a step, whole prompts before last tokens: ids and positions `[1, N]`, and where logits are wanted."""
    ids = [group.prompt_ids for group in entering]
    positions = [torch.arange(len(prompt)) for prompt in ids]
    last = torch.tensor([len(prompt) for prompt in ids], dtype=torch.long).cumsum(0) - 1
    for group in running:
        assert group.tokens is not None
        ids.append(group.tokens)
        positions.append(torch.full((len(group.tokens),), group.cache.prompt_length + group.cache.length))
    row = torch.cat(ids)
    start = int(last[-1]) + 1 if entering else 0
    return row[None], torch.cat(positions)[None], torch.cat([last, torch.arange(start, len(row))])


@dataclass(eq=False)
class _PagedCache:
    """The pages of one group: its prompt's `[p]`, and those of each live completion `[R, n]`, with `length` tokens."""

    prompt: np.ndarray
    own: np.ndarray
    prompt_length: int
    length: int = 0


class PagedDecoder:
    """`SharedDecoder` on an accelerator: what a step costs in launches and copies does not grow with groups or rows.

    Keys and values of all groups lie in pages. Which page belongs to whom is known on the CPU; what a step needs of it
    goes over in one copy. The last tokens of all completions are filled up to a power of two of rows by ones that see
    nothing and are written to the first page, which is nobody's.
    """

    def __init__(self, model: Any) -> None:
        share_prompts(model)
        self._model = model
        self._pages = Pages()

    def step(self, groups: Sequence[Branches]) -> Tensor:
        entering = [group for group in groups if group.tokens is None]
        running = [group for group in groups if group.tokens is not None]
        slots = self._take_pages(entering, running)
        rows, lengths = self._rows(running) if running else [], [len(group.prompt_ids) for group in entering]
        ends = np.cumsum(lengths).tolist()
        prompts = tuple(Tree(end - length, length, ()) for end, length in zip(ends, lengths, strict=True))
        row, positions, wanted = _packed(entering, running)
        missing = sum(lengths) + len(rows[0]) - len(slots) if running else 0
        parts = [*(pad(part, (0, missing)) for part in (row, positions, slots)), wanted, *rows]
        row, positions, slots, wanted, *rows = to_device(device_of(self._model), *parts)
        layout = TreeLayout(prompts, sum(lengths)) if prompts else None
        with laid_out(PagedLayout(self._pages, layout, slots, rows)):
            # Given any mask, transformers does not look for packed texts in the positions, which waits for the device.
            output = self._model(
                input_ids=row,
                position_ids=positions,
                attention_mask=torch.ones_like(row),
                use_cache=False,
                logits_to_keep=wanted,
            )
        for group in running:
            group.cache.length += 1
        return output.logits[0]

    def keep(self, group: Branches, rows: Sequence[int]) -> None:
        group.cache.own = group.cache.own[list(rows)]

    def _take_pages(self, entering: Sequence[Branches], running: Sequence[Branches]) -> Tensor:
        """Give every token of the step a place; the places. A page that no group here has is free."""
        if not running:
            self._pages = Pages()  # nobody has any: what they had grown to is let go, for which there may be no room
        full = [group for group in running if group.cache.length == group.cache.own.shape[1] * BLOCK]
        prompts = [-(-len(group.prompt_ids) // BLOCK) for group in entering]
        needed = sum(prompts) + sum(len(group.cache.own) for group in full)
        taken = [0, *(page for group in running for page in (*group.cache.prompt, *group.cache.own.flat))]
        free = np.setdiff1d(np.arange(self._pages.count), taken)
        if len(free) < needed:
            free = np.concatenate([free, np.arange(max(1, self._pages.count), 2 * (self._pages.count + needed))])
            self._pages.count = 2 * (self._pages.count + needed)
        for group in full:
            own, free = free[: len(group.cache.own)], free[len(group.cache.own) :]
            group.cache.own = np.concatenate([group.cache.own, own[:, None]], axis=1)
        slots = []
        for group, number in zip(entering, prompts, strict=True):
            own, free = free[:number], free[number:]
            length, rows = len(group.prompt_ids), np.empty((group.num_completions, 0), np.int64)
            group.cache = _PagedCache(own, rows, length)
            slots.append((own[:, None] * BLOCK + np.arange(BLOCK)).flatten()[:length])
        slots += [group.cache.own[:, -1] * BLOCK + group.cache.length % BLOCK for group in running]
        return torch.from_numpy(np.concatenate(slots))

    def _rows(self, running: Sequence[Branches]) -> list[Tensor]:
        """`PagedLayout.rows` on the CPU."""
        caches: list[_PagedCache] = [group.cache for group in running]
        number = sum(len(cache.own) for cache in caches)
        longest = max(len(cache.prompt) + cache.own.shape[1] for cache in caches)
        rows = np.full((4, 1 << max(0, number - 1).bit_length()), -2, np.int32)
        rows[3] = 0
        tables = np.zeros((rows.shape[1], longest), np.int32)
        pages = np.full((3, self._pages.count), -1, np.int32)
        first = segment = 0
        for cache in caches:
            count, (prompt, own) = len(cache.own), (len(cache.prompt), cache.own.shape[1])
            part, segments = slice(first, first + count), segment + 1 + np.arange(count)
            position = cache.prompt_length + cache.length
            rows[:, part] = segments, *(np.full(count, n) for n in (segment, position, prompt + own))
            tables[part, :prompt], tables[part, prompt : prompt + own] = cache.prompt, cache.own
            begins = np.arange(max(prompt, own)) * BLOCK
            pages[:, cache.prompt] = np.full(prompt, segment), begins[:prompt], cache.prompt_length - begins[:prompt]
            pages[0, cache.own], pages[2, cache.own] = segments[:, None], BLOCK
            pages[1, cache.own] = cache.prompt_length + begins[:own]
            first, segment = part.stop, segment + 1 + count
        found = [torch.from_numpy(part) for part in (*rows[:3], *pages)]
        return [*found, torch.from_numpy(rows[3])[:, None, None], torch.from_numpy(tables)[:, None, None]]


_TRIED: WeakKeyDictionary[Any, Callable[[Any], Decoder]] = WeakKeyDictionary()
"""Which decoder serves a model, so that every model is tried once."""


def decoder_for(model: Any) -> Decoder:
    """The fastest decoder that gives this model's logits of whole texts, found by trying; a slower one is said."""
    if model not in _TRIED:
        _TRIED[model] = _found(model)
    return _TRIED[model](model)


def _found(model: Any) -> Callable[[Any], Decoder]:
    name, reason = type(model).__name__, unsupported(model)
    if reason is None and not {"position_ids", "logits_to_keep"} <= set(inspect.signature(model.forward).parameters):
        reason = "its forward does not take position_ids and logits_to_keep"
    if reason is None and model.device.type != "cpu":
        slow = why_not(PagedDecoder(model), model)
        if slow is None:
            return PagedDecoder
        _log.warning("%s is sampled group by group, which is slower: %s.", name, slow)
    reason = reason or why_not(SharedDecoder(model), model)
    if reason is None:
        return SharedDecoder
    slower = why_not(PlainDecoder(model), model)
    if slower is None:
        _log.warning("%s is sampled without shared prompts, which is slower: %s.", name, reason)
        return PlainDecoder
    check_causal(model)
    _log.warning("%s is sampled by reading whole texts for each token, which is far slower: %s.", name, slower)
    return partial(PlainDecoder, cached=False)


def why_not(decoder: Decoder, model: Any) -> str | None:
    """Why this decoder cannot serve this model, or None where it can.

    Some architectures keep state or build masks where nothing here sees it. So the answer is found by trying: short
    prompts with two completions each, step by step, must give the logits of whole texts. In half precision, whose
    rounding may be large in one text, a second trial on other tokens decides.
    """
    third, half = model.get_input_embeddings().weight.shape[0] // 3, model.dtype in (torch.float16, torch.bfloat16)
    reason = _trial(decoder, model, third)
    return reason and (_trial(decoder, model, 2 * third) if half else reason)


@torch.no_grad()
def _trial(decoder: Decoder, model: Any, first: int) -> str | None:
    """Such a trial on tokens from `first` on, which are no special ones: these stand at the beginning or the end."""
    vocabulary, device = model.get_input_embeddings().weight.shape[0], model.device
    starts = [torch.arange(start, start + length) for start, length in ((0, 5), (3, 2))]
    prompts = [(first + tokens) % vocabulary for tokens in starts]
    groups = [Branches(prompt, 2) for prompt in prompts]
    texts = [[prompt] for prompt in prompts]  # of the first logits, the completions of a prompt share one row
    try:
        for step in range(3):
            every = [text[None].to(device) for rows in texts for text in rows]
            whole = [model(input_ids=text, use_cache=False).logits[0, -1] for text in every]
            ours, theirs = (logits.float().log_softmax(-1) for logits in (decoder.step(groups), torch.stack(whole)))
            if not _same_logits(ours, theirs, half=model.dtype in (torch.float16, torch.bfloat16)):
                return "its logits differ from those of whole texts"
            tokens = torch.tensor([first + step, first + 7 * step + 1]) % vocabulary
            for place, group in enumerate(groups):
                group.tokens, group.length = tokens, step + 1
                rows = texts[place] * (2 // len(texts[place]))
                texts[place] = [torch.cat([row, token[None]]) for row, token in zip(rows, tokens, strict=True)]
    except Exception as error:  # any architecture may run here; whatever it raises means: not this way
        return in_short(error)
    return None


def _same_logits(ours: Tensor, theirs: Tensor, *, half: bool) -> bool:
    """Whether rows of log-probabilities are the same, up to rounding.

    Half precision rounds differently in every kernel: single tokens of a pretrained model are off by nats, a row in all
    by up to a twelfth of its spread (SmolLM2, aligned 12 times; by nearly half after special tokens), and where a token
    is unseen some row by 0.7 of it or more.
    """
    if not half:
        return torch.allclose(ours, theirs, atol=1e-3, rtol=0)
    return bool(((ours - theirs).square().mean(dim=-1).sqrt() <= 0.3 * theirs.std(dim=-1)).all())
