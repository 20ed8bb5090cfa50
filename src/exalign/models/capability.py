"""What of the fast ways a model can take, found out once per model: rules first, then a trial against plain rows.

The trial runs a stream of two tiny trees and the same paths alone, and the model's own logits and ours. Whatever an
architecture does that the rules do not know, a difference there sends it the slower way, and the reason is said once.

Some rotary embeddings (LongRoPE, dynamic NTK) change with the longest text of a batch, or of an earlier one. Here they
are a function of each sequence alone, as transformers has it of a row by itself.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from exalign.data.batching import Group
from exalign.errors import InputError
from exalign.models.attention import current_layout, laid_out, share_prompts, use_own_attention
from exalign.models.lm_head import LogitMap, embed, is_plain_embedding, may_add_in_place
from exalign.models.prefix_tree import (
    Predictions,
    TreeLayout,
    TreeStream,
    padded_rows,
    places_of,
    policy_stream,
    whole_stream,
)

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class RopeSwitch:
    """Rotary frequencies that change for sequences of more than `limit` tokens; with `every`, with each length."""

    limit: int
    every: bool

    def side(self, length: int) -> int:
        """Equal for lengths that have the same frequencies."""
        return 0 if length <= self.limit else length if self.every else 1


@dataclass(frozen=True, slots=True)
class Plan:
    """`tree`: prompts are computed once per group. `logit_map`: what the head does; None where only the model knows.

    `embeds`: the body takes the rows of its plain embedding in the place of ids. `rope`: None for most models.
    `windows`: those of the layers, None that of a layer that sees everything.
    """

    tree: bool
    logit_map: LogitMap | None
    embeds: bool = False
    rope: RopeSwitch | None = None
    windows: tuple[int | None, ...] = (None,)

    def sides(self, groups: Sequence[Group]) -> tuple[Sequence[Group], Tensor]:
        """The groups, those divided whose completions lie on both sides of the rotary embedding's limit.

        And where in `[B, K]` of the groups as they were, laid flat, each completion stands, see `places_of`.
        """
        places = places_of(groups)
        if self.rope is None or max(map(_longest, groups)) <= self.rope.limit:
            return groups, places
        parts: list[Group] = []
        numbers: list[int] = []
        first = 0
        for group in groups:
            members: dict[int, list[int]] = {}
            for i, ids in enumerate(group.completion_ids):
                members.setdefault(self.rope.side(len(group.prompt_ids) + len(ids)), []).append(i)
            for side in members.values():
                parts.append(replace(group, completion_ids=tuple(group.completion_ids[i] for i in side)))
                numbers += [first + i for i in side]
            first += group.num_completions
        return parts, places[torch.tensor(numbers)]


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


def body_of(base: Any) -> Any:
    """The model without its head; itself where it has no such part."""
    body = base.base_model
    return base.get_decoder() if body is base and hasattr(base, "get_decoder") else body


def stream_hidden(base: Any, stream: TreeStream, embedded: Tensor | None = None) -> Tensor:
    """Final hidden states `[N, H]` of a stream of trees, from its ids or from their embeddings `[1, N, H]`."""
    tokens = {"input_ids": stream.input_ids} if embedded is None else {"inputs_embeds": embedded}
    with laid_out(stream.layout):
        # Given any mask, transformers does not look for packed texts in the positions, which waits for the device.
        ones = torch.ones_like(stream.position_ids)
        states = body_of(base)(**tokens, attention_mask=ones, position_ids=stream.position_ids, use_cache=False)
    return states.last_hidden_state[0]


def predicting_states(
    model: nn.Module, groups: Sequence[Group], *, add_in_place: bool = False
) -> tuple[Tensor, Predictions]:
    """The final hidden states `[R, H]` that predict completion tokens, and which of them they predict.

    `add_in_place`: the gradient of a plain embedding is added to its `.grad` directly where that is safe.
    """
    plan, base, device = plan_for(model), base_of(model), device_of(model)
    if not plan.tree:
        input_ids, attention_mask, wanted = padded_rows(groups, device)
        return row_hidden(base, input_ids, attention_mask).flatten(0, 1).index_select(0, wanted.positions), wanted
    parts, places = plan.sides(groups)
    stream, wanted = policy_stream(parts, device, places=places, windows=plan.windows)
    embedding = base.get_input_embeddings()
    direct = add_in_place and plan.embeds and torch.is_grad_enabled() and may_add_in_place(embedding.weight)
    hidden = stream_hidden(base, stream, embed(stream.input_ids, embedding) if direct else None)
    return hidden.index_select(0, wanted.positions), wanted


def row_hidden(base: Any, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
    """Final hidden states `[N, L, H]` of rows that are padded on the right."""
    return _rows(body_of(base), "last_hidden_state", input_ids, attention_mask)


def row_logits(model: nn.Module, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
    """The model's own logits `[N, L, V]` of rows that are padded on the right."""
    return _rows(model, "logits", input_ids, attention_mask)


def _rows(module: Any, wanted: str, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
    if attention_mask is not None and len(input_ids) > 1 and rope_switch(module.config) is not None:
        lengths = attention_mask.sum(dim=1).tolist()
        rows = [
            _rows(module, wanted, row[None, :length], None)[0] for row, length in zip(input_ids, lengths, strict=True)
        ]
        return nn.utils.rnn.pad_sequence(rows, batch_first=True)
    return getattr(module(input_ids=input_ids, attention_mask=attention_mask, use_cache=False), wanted)


def rope_switch(config: Any) -> RopeSwitch | None:
    """From which length on the rotary frequencies of a model with this config are others; None where they never are."""
    text = config.get_text_config()
    parameters = getattr(text, "rope_parameters", None) or {}
    kinds = [parameters, *(kind for kind in parameters.values() if isinstance(kind, dict))]
    switches = []
    for kind in kinds:
        name, own = str(kind.get("rope_type")), getattr(text, "max_position_embeddings", None)
        if name == "longrope":
            own = kind.get("original_max_position_embeddings") or own
        if own and (name == "longrope" or "dynamic" in name):
            switches.append(RopeSwitch(int(own), every="dynamic" in name))
    return min(switches, key=lambda switch: (switch.limit, not switch.every), default=None)


def check_positions(config: Any, longest: int, *, settings: str, samples: bool) -> str | None:
    """Before any work: whether texts of up to `longest` tokens fit a model with this config.

    `settings` names what the number is the sum of. More than the model has learned positions for is an `InputError`;
    beyond those of a rotary embedding it is a sentence to be said, except where the model `samples` and its rotary
    embedding would change on the way, so that no log-probability were that of the distribution drawn from.
    """
    text = config.get_text_config()
    limit, switch = getattr(text, "max_position_embeddings", None), rope_switch(config)
    if switch is not None and samples and longest > switch.limit:
        raise InputError(
            f"{settings} is {longest}, but the model's rotary embedding changes beyond {switch.limit} tokens, where "
            "nothing can be sampled whose log-probability is known; lower one of them."
        )
    if not isinstance(limit, int) or limit <= 0 or longest <= limit:
        return None
    if not getattr(text, "rope_parameters", None):
        raise InputError(f"{settings} is {longest}, but the model has {limit} positions; lower one of them.")
    return f"{settings} is {longest}, but the model was made for {limit} positions; longer texts may come out poorly."


def _longest(group: Group) -> int:
    return len(group.prompt_ids) + max((len(ids) for ids in group.completion_ids), default=0)


def _make_plan(base: Any) -> Plan:
    rope = rope_switch(base.config)
    if rope is not None:
        _steady_rope(base)
    reason = unsupported(base)
    testable = not any(parameter.is_meta or hasattr(parameter, "placements") for parameter in base.parameters())
    if testable and base.get_output_embeddings() is not None:
        check_causal(base)
    logit_map: LogitMap | None = _logit_map(base.config)
    with evaluating(base):
        if reason is None:
            share_prompts(base)
            reason = _tree_trial(base) if testable else None
            if reason is not None:
                use_own_attention(base)
        if testable and logit_map and base.get_output_embeddings() is not None and not _head_trial(base, logit_map):
            said = "%s: its head is not a plain map of hidden states; computing full logits."
            logger.warning(said, type(base).__name__)
            logit_map = None
        if reason is not None:
            logger.warning("%s: prompts are repeated for each completion, because %s.", type(base).__name__, reason)
        embeds = reason is None and testable and _takes_embeddings(base)
    window = widest(base.config.get_text_config(), "sliding_window")
    return Plan(reason is None, logit_map, embeds=embeds, rope=rope, windows=(None, window))


def unsupported(base: Any) -> str | None:
    """Why this architecture cannot share prompts, as far as its description tells."""
    if not getattr(base, "_supports_attention_backend", False):
        return "its attention does not go through transformers' attention interface"
    if getattr(base.config, "is_encoder_decoder", False):
        return "it has an encoder beside its decoder"
    others = set(getattr(base.config.get_text_config(), "layer_types", None) or ()) - {
        "full_attention",
        "sliding_attention",
    }
    if others:
        return f"it has layers of kind {', '.join(sorted(others))}"
    return None


def widest(config: Any, name: str) -> int | None:
    """A number of a model's config, the largest where its layers have numbers of their own (Gemma 3n and 4)."""
    try:
        found = getattr(config, name, None)
    except RuntimeError:  # transformers says no number for all where layers differ
        found = [getattr(layer, name, None) for layer in config.per_layer_config]
    return max(filter(None, found), default=None) if isinstance(found, list | tuple) else found


def in_short(error: Exception) -> str:
    """What an architecture raised, in short."""
    return f"{type(error).__name__}: {(str(error).strip().splitlines() or [''])[0]}"


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode, and afterwards in the mode it was in."""
    training = model.training
    if training:
        model.eval()
    try:
        yield
    finally:
        if training:
            model.train()


def trial_ids(base: Any, count: int) -> Tensor:
    """A text of no meaning, int64 `[count]` on the CPU."""
    return (torch.arange(count) * 7 + 3) % base.get_input_embeddings().weight.shape[0]


@torch.no_grad()
def check_causal(base: Any) -> None:
    """An `InputError` for a language model whose states of a text's beginning depend on what follows."""
    ids = trial_ids(base, 6)
    with evaluating(base):
        try:
            whole, begun = (row_hidden(base, part[None].to(device_of(base)))[0, :3] for part in (ids, ids[:3]))
        except Exception:  # any architecture may run here, also one whose body is not to be had alone
            return
    if not bool(whole.isfinite().all()):
        raise InputError(f"{type(base).__name__}: its weights give no finite numbers; load another copy of them.")
    if not _agree(whole, begun):
        raise InputError(
            f"{type(base).__name__} reads the tokens that follow as well, so it gives no probability of the next one; "
            "name a causal language model (some are one with is_decoder: true in their config)."
        )


@torch.no_grad()
def check_steady(base: Any) -> None:
    """Say it where a model that is to be trained has noise in training that is not called dropout."""
    row, training = trial_ids(base, 6)[None].to(device_of(base)), base.training
    try:
        states = [row_hidden(base.train(mode), row) for mode in (False, True)]
    except Exception:  # one that cannot be read so trains as it did, and is not looked at
        return
    finally:
        base.train(training)
    if not _agree(*states):
        logger.warning(
            "%s gives other states in training than in evaluation, by noise that is not called dropout: log-ratios do "
            "not begin at 0; look for it in its config.",
            type(base).__name__,
        )


@torch.no_grad()
def _tree_trial(base: Any) -> str | None:
    """Run a small stream and its paths alone; None where they agree, else what was wrong."""
    device, ids = device_of(base), trial_ids(base, 24)
    groups = [Group(0, ids[:5], (ids[5:7], ids[7:12], ids[12:13])), Group(1, ids[13:14], (ids[14:18], ids[18:24]))]
    stream = whole_stream(groups, device)[0]
    try:
        together = stream_hidden(base, stream)
        for group, tree in zip(groups, stream.layout.trees, strict=True):
            for leaf, (begin, end) in zip(group.completion_ids, tree.leaf_spans, strict=True):
                alone = row_hidden(base, torch.cat([group.prompt_ids, leaf])[None].to(device))[0, -len(leaf) :]
                if not _agree(together[begin:end], alone):
                    return "a trial stream did not give the hidden states of plain rows (is dropout on?)"
    except Exception as error:  # any architecture may run here; whatever it raises means: not this way
        return f"a trial stream failed ({in_short(error)})"
    return None


@torch.no_grad()
def _takes_embeddings(base: Any) -> bool:
    embedding = base.get_input_embeddings()
    if not is_plain_embedding(embedding):
        return False
    ids = trial_ids(base, 6)
    stream = whole_stream([Group(0, ids[:2], (ids[2:4], ids[4:]))], device_of(base))[0]
    try:
        return torch.equal(stream_hidden(base, stream), stream_hidden(base, stream, embedding(stream.input_ids)))
    except Exception:  # any architecture may run here; one that wants its ids as well keeps the ordinary way
        return False


@torch.no_grad()
def _head_trial(base: Any, logit_map: LogitMap) -> bool:
    row = trial_ids(base, 6)[None].to(device_of(base))
    try:
        mapped = logit_map.apply_(base.get_output_embeddings()(row_hidden(base, row)).clone())
    except Exception:  # any architecture may run here, also one whose body is not to be had alone
        return False
    return _agree(mapped, base(input_ids=row, use_cache=False).logits)


def _agree(ours: Tensor, theirs: Tensor) -> bool:
    tolerance = 1e-4 if theirs.dtype in (torch.float32, torch.float64) else 3e-2
    return bool((ours - theirs).abs().max() <= tolerance * theirs.abs().max())


def _logit_map(config: Any) -> LogitMap:
    """What the architectures that change their logits call it: Cohere, Granite, Gemma and RecurrentGemma."""
    text = config.get_text_config()

    def number(*names: str) -> float | None:
        found = (getattr(text, name, None) for name in names)
        return next((float(value) for value in found if isinstance(value, int | float) and value), None)

    scale = (number("logit_scale") or 1.0) / (number("logits_scaling") or 1.0)
    return LogitMap(scale=scale, cap=number("final_logit_softcapping", "logits_soft_cap"))


def _steady_rope(base: Any) -> None:
    """Have every rotary embedding that looks at lengths look at one tree's at a time, and at no earlier pass's."""
    for module in base.modules():
        kinds = getattr(module, "rope_type", None)
        kinds = kinds.values() if isinstance(kinds, dict) else [kinds]
        if any(kind == "longrope" or "dynamic" in str(kind) for kind in kinds):
            module.register_forward_pre_hook(_forget_lengths)
            module.register_forward_hook(_tree_by_tree, with_kwargs=True)


def _forget_lengths(module: nn.Module, _: Any) -> None:
    for name in list(vars(module)):
        if name.endswith("max_seq_len_cached"):
            setattr(module, name, 0)


def _tree_by_tree(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
    """The rotary embedding of a stream, tree by tree: each has the frequencies of its own longest path, read whole."""
    layout, switch = current_layout.get(), rope_switch(module.config)
    if not isinstance(layout, TreeLayout) or switch is None or layout.longest + layout.unread <= switch.limit:
        return output
    names = dict(zip(("x", "position_ids", "layer_type"), args, strict=False)) | kwargs
    positions, parts = names.pop("position_ids"), []
    for tree in layout.trees:
        last = positions.new_tensor([[tree.longest + layout.unread - 1]])
        _forget_lengths(module, None)
        found = module.forward(position_ids=torch.cat([positions[:, tree.start : tree.end], last], dim=1), **names)
        parts.append([states[:, :-1] for states in (found if isinstance(found, tuple) else (found,))])
    joined = tuple(torch.cat(states, dim=1) for states in zip(*parts, strict=True))
    return joined if isinstance(output, tuple) else joined[0]
