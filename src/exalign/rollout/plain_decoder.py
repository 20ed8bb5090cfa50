"""Decoding by a model's own key/value cache: works for every architecture, and is the slow twin of the shared one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor, nn


@dataclass(eq=False)
class Branches:
    """One prompt and the completions that still grow from it, all of the same length.

    `tokens` int64 `[R]` holds the last token of each of the R live completions; it is None until the prompt has been
    read. `cache` belongs to the decoder.
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
    """One forward pass per group and step, the prompt repeated for each of its completions; nothing is padded."""

    def __init__(self, model: nn.Module) -> None:
        self._model = model

    def step(self, groups: Sequence[Branches]) -> Tensor:
        return torch.cat([self._prefill(group) if group.tokens is None else self._decode(group) for group in groups])

    def keep(self, group: Branches, rows: Sequence[int]) -> None:
        # Not every cache can drop rows (recurrent states cannot): finished rows are fed on, their logits left out.
        group.cache.live = group.cache.live[torch.tensor(rows, device=group.cache.live.device)]

    def _prefill(self, group: Branches) -> Tensor:
        input_ids = group.prompt_ids.expand(group.num_completions, -1)
        output = self._model(input_ids=input_ids, use_cache=True)
        live = torch.arange(group.num_completions, device=input_ids.device)
        group.cache = _RepeatedRows(output, live)
        return output.logits[:1, -1]

    def _decode(self, group: Branches) -> Tensor:
        assert group.tokens is not None
        state: _RepeatedRows = group.cache
        input_ids = group.tokens.new_zeros(group.num_completions, 1)
        input_ids[state.live, 0] = group.tokens
        name = "past_key_values" if getattr(state.output, "past_key_values", None) is not None else "cache_params"
        state.output = self._model(input_ids=input_ids, use_cache=True, **{name: getattr(state.output, name)})
        return state.output.logits[state.live, -1]


@dataclass(eq=False)
class _RepeatedRows:
    """The last output of the model, which holds the cache of all K rows, and the rows that still matter."""

    output: Any
    live: Tensor
