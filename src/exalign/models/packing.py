"""What of the fast way a model can take, found out once per model: rules first, then a trial against plain rows.

The trial runs a stream of two tiny trees and the same paths alone, and the model's own logits and ours. Whatever an
architecture does that the rules do not know, a difference there sends it the slower way, and the reason is said once.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from exalign.data.batching import Group
from exalign.models.lm_head import LogitMap
from exalign.models.prefix_tree import TreeStream, whole_stream
from exalign.models.tree_attention import tree_layout, use_own_attention, use_tree_attention
from exalign.models.vocabulary import is_plain_embedding

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Plan:
    """`tree`: prompts are computed once per group. `logit_map`: what the head does; None where only the model knows.

    `embeds`: the body takes the rows of its plain embedding in the place of ids.
    """

    tree: bool
    logit_map: LogitMap | None
    embeds: bool = False


_plans: WeakKeyDictionary[nn.Module, Plan] = WeakKeyDictionary()


def plan_for(model: nn.Module) -> Plan:
    """The plan of a transformers model (also under PEFT), made at the first call."""
    base = base_of(model)
    if base not in _plans:
        # The trials compare more finely than autocast computes; it does not know meta tensors, which have no trials.
        device = device_of(base).type
        with nullcontext() if device == "meta" else torch.autocast(device, enabled=False):
            _plans[base] = _make_plan(base)
    return _plans[base]


def base_of(model: nn.Module) -> Any:
    """The transformers model itself, without the PEFT shell; adapters live inside it."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]


def device_of(model: nn.Module) -> torch.device:
    """Where the model's inputs go: the device of its first parameter."""
    return next(model.parameters()).device


def stream_hidden(base: Any, stream: TreeStream, embedded: Tensor | None = None) -> Tensor:
    """Final hidden states `[N, H]` of a stream of trees, from its ids or from their embeddings `[1, N, H]`."""
    tokens = {"input_ids": stream.input_ids} if embedded is None else {"inputs_embeds": embedded}
    with tree_layout(stream.layout):
        states = base.base_model(**tokens, position_ids=stream.position_ids, use_cache=False)
    return states.last_hidden_state[0]


def row_hidden(base: Any, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """Final hidden states `[N, L, H]` of ordinary rows."""
    return base.base_model(input_ids=input_ids, attention_mask=attention_mask, use_cache=False).last_hidden_state


def padded_rows(groups: Sequence[Group], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """One row `prompt + completion` per completion, padded on the right: ids, mask `[N, L]`; prompt lengths `[N]`."""
    rows = [torch.cat([group.prompt_ids, ids]) for group in groups for ids in group.completion_ids]
    lengths = torch.tensor([len(row) for row in rows], device=device)
    prompts = torch.tensor([len(group.prompt_ids) for group in groups for _ in group.completion_ids], device=device)
    input_ids = nn.utils.rnn.pad_sequence(rows, batch_first=True).to(device)
    attention_mask = (torch.arange(input_ids.shape[1], device=device) < lengths[:, None]).long()
    return input_ids, attention_mask, prompts


def predicted_tokens(attention_mask: Tensor, prompt_lengths: Tensor) -> Tensor:
    """Which of the positions 1 … L − 1 of padded rows hold completion tokens, bool `[N, L − 1]`."""
    positions = torch.arange(1, attention_mask.shape[1], device=attention_mask.device)
    return (positions >= prompt_lengths[:, None]) & attention_mask[:, 1:].bool()


def unflatten(values: Tensor, groups: Sequence[Group]) -> Tensor:
    """One row of `values [N, …]` per completion, in order → `[B, K, …]`, 0 where a group has no i-th completion."""
    width = max(group.num_completions for group in groups)
    rows = [index * width + i for index, group in enumerate(groups) for i in range(group.num_completions)]
    flat = values.new_zeros(len(groups) * width, *values.shape[1:])
    flat = flat.index_copy(0, torch.tensor(rows, device=values.device), values)
    return flat.unflatten(0, (len(groups), width))


def unflatten_tokens(values: Tensor, sequences: Tensor, groups: Sequence[Group]) -> Tensor:
    """One value per completion token → `[B, K, T]`, padded with 0 on the right; T is the longest completion.

    `values` `[N]`; `sequences` `[N]` the completion that a token belongs to, counted through the groups; the tokens of
    one completion come in their order, whatever stands between them.
    """
    lengths = [len(ids) for group in groups for ids in group.completion_ids]
    rows = values[sequences.argsort(stable=True)].split(lengths)
    return unflatten(nn.utils.rnn.pad_sequence(rows, batch_first=True), groups)


def _make_plan(base: Any) -> Plan:
    reason = _foreseen(base)
    testable = not any(parameter.is_meta or hasattr(parameter, "placements") for parameter in base.parameters())
    if reason is None:
        use_tree_attention(base)
        reason = _tree_trial(base) if testable else None
        if reason is not None:
            use_own_attention(base)
    logit_map: LogitMap | None = _logit_map(base.config)
    if testable and logit_map and base.get_output_embeddings() is not None and not _head_trial(base, logit_map):
        logger.warning("%s: its head is not a plain map of hidden states; computing full logits.", type(base).__name__)
        logit_map = None
    if reason is not None:
        logger.warning("%s: prompts are repeated for each completion, because %s.", type(base).__name__, reason)
    return Plan(reason is None, logit_map, embeds=reason is None and testable and _takes_embeddings(base))


def _foreseen(base: Any) -> str | None:
    """Why this architecture cannot read a stream of trees, as far as its description tells."""
    if not getattr(base, "_supports_attention_backend", False):
        return "its attention does not go through transformers' attention interface"
    if getattr(base.config, "is_encoder_decoder", False):
        return "it has an encoder beside its decoder"
    others = set(getattr(base.config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    if others:
        return f"it has layers of kind {', '.join(sorted(others))}"
    return None


@torch.no_grad()
def _tree_trial(base: Any) -> str | None:
    """Run a small stream and its paths alone; None where they agree, else what was wrong."""
    device, vocabulary = device_of(base), base.get_input_embeddings().num_embeddings
    ids = (torch.arange(24) * 7 + 3) % vocabulary
    groups = [Group(0, ids[:5], (ids[5:7], ids[7:12], ids[12:13])), Group(1, ids[13:14], (ids[14:18], ids[18:24]))]
    stream = whole_stream(groups, device)
    try:
        together = stream_hidden(base, stream)
        for group, tree in zip(groups, stream.layout.trees, strict=True):
            for leaf, (begin, end) in zip(group.completion_ids, tree.leaf_spans, strict=True):
                alone = row_hidden(base, torch.cat([group.prompt_ids, leaf])[None].to(device))[0, -len(leaf) :]
                if not _agree(together[begin:end], alone):
                    return "a trial stream did not give the hidden states of plain rows (is dropout on?)"
    except Exception as error:  # any architecture may run here; whatever it raises means: not this way
        return f"a trial stream failed ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''})"
    return None


@torch.no_grad()
def _takes_embeddings(base: Any) -> bool:
    embedding = base.get_input_embeddings()
    if not is_plain_embedding(embedding):
        return False
    ids = (torch.arange(6) * 7 + 3) % embedding.num_embeddings
    stream = whole_stream([Group(0, ids[:2], (ids[2:4], ids[4:]))], device_of(base))
    try:
        return torch.equal(stream_hidden(base, stream), stream_hidden(base, stream, embedding(stream.input_ids)))
    except Exception:  # any architecture may run here; one that wants its ids as well keeps the ordinary way
        return False


@torch.no_grad()
def _head_trial(base: Any, logit_map: LogitMap) -> bool:
    ids = (torch.arange(6) * 7 + 3) % base.get_input_embeddings().num_embeddings
    row = ids[None].to(device_of(base))
    mapped = logit_map.apply_(base.get_output_embeddings()(row_hidden(base, row)).clone())
    return _agree(mapped, base(input_ids=row, use_cache=False).logits)


def _agree(ours: Tensor, theirs: Tensor) -> bool:
    tolerance = 1e-4 if theirs.dtype in (torch.float32, torch.float64) else 3e-2
    return bool((ours - theirs).abs().max() <= tolerance * theirs.abs().max())


def _logit_map(config: Any) -> LogitMap:
    """What the architectures that change their logits call it: Cohere, Granite, Gemma."""
    text = config.get_text_config()
    scale = getattr(text, "logit_scale", None) or 1.0
    divisor = getattr(text, "logits_scaling", None) or 1.0
    return LogitMap(scale=float(scale) / float(divisor), cap=getattr(text, "final_logit_softcapping", None))
