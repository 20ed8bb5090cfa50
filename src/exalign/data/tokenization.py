"""From records to token ids, with an exact boundary between prompt and completion.

The prompt and each completion are tokenised separately and concatenated, so no token straddles the boundary and all K
completions see the same prompt ids. One invariant holds for every record that comes out, and what breaks it is dropped
and counted: the ids of prompt and completion decode to what the tokenizer makes of the whole text, which holds the
completion's text; what tokenizer or template put in front is there once; and what the template puts behind an answer
ends it, else the end-of-sequence token. Ids that a record already carries are used as they are: sampled ids are never
decoded and tokenised again.
"""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any

from jinja2 import TemplateError
from pydantic import Field
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from exalign.data.batching import Group, group_of
from exalign.data.record import Completion, Record
from exalign.errors import InputError
from exalign.settings import Settings


class TokenLimits(Settings):
    """How many tokens of a prompt and of a completion are used."""

    max_prompt_tokens: int = Field(512, gt=1, description="Longer prompts lose their beginning, once per prompt.")
    max_completion_tokens: int = Field(
        512, gt=0, description="Longer completions lose their end, and with it the end-of-sequence token."
    )


class UnfitError(InputError):
    """A record that this tokenizer and its template cannot write as it is; `reason` is the name it is counted under."""

    def __init__(self, record: Record, reason: str, sentence: str) -> None:
        super().__init__(f"Record {record.id}: {sentence}")
        self.reason = reason


def eos_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The end-of-sequence id; a tokenizer without one is an `InputError`."""
    if tokenizer.eos_token_id is None:
        raise InputError(
            f"T{_named(tokenizer)[1:]} has no end-of-sequence token: set eos_token in its tokenizer_config.json."
        )
    return int(tokenizer.eos_token_id)


def end_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """The ids that end a completion in data: the end-of-sequence id, and what the chat template puts behind answers."""
    turn = Record("", ({"role": "user", "content": "Hello"},))
    try:
        return frozenset([eos_id(tokenizer), _turn_of(turn, tokenizer).end_id])
    except UnfitError:
        return frozenset([eos_id(tokenizer)])


def with_token_ids(record: Record, tokenizer: PreTrainedTokenizerBase, counts: Counter[str]) -> Record:
    """The record with all ids of its prompt and completions, uncut; one that breaks the invariant is an `UnfitError`.

    A finished completion ends with exactly one end token. Counted: `answers_changed_by_template` (it would cut or alter
    them, so the answer's own text stands in their place), `messages_left_out_by_template`,
    `tools_left_out_by_template` and `texts_with_unknown_tokens`.
    """
    if record.prompt_ids is not None and all(completion.token_ids for completion in record.completions):
        return record
    turn = _turn_of(record, tokenizer, counts)
    prompt = _prompt_ids(record, turn, tokenizer)
    completions = [_completion_ids(record, c, turn, prompt, tokenizer, counts) for c in record.completions]
    unknown = tokenizer.unk_token_id
    known = (None, tokenizer.eos_token_id, tokenizer.bos_token_id)
    if unknown not in known and any(unknown in ids for ids in (prompt, *completions)):
        counts["texts_with_unknown_tokens"] += 1
    return _written(record, prompt, completions)


def _written(record: Record, prompt: list[int], completions: list[list[int]]) -> Record:
    return replace(record, prompt_ids=tuple(prompt)).with_each("token_ids", map(tuple, completions))


def tokenize_record(
    record: Record, tokenizer: PreTrainedTokenizerBase, *, index: int, limits: TokenLimits, counts: Counter[str]
) -> Group:
    """The `Group` of one record (see `with_token_ids`), `index` its position in the source.

    A prompt over the limit loses its beginning (special tokens in front stay), once for all K; `counts["prompts_cut"]`.
    A completion longer than its limit with its end token is cut and has none; `counts["completions_cut"]`. Completions
    that carry a log-probability were sampled: they cannot be cut, so limits below them are an `InputError`, as is a
    tokenizer without end-of-sequence.
    """
    record = with_token_ids(record, tokenizer, counts)
    prompt, completions = list(record.prompt_ids or ()), [list(c.token_ids or ()) for c in record.completions]
    sampled = [c.logprob is not None or c.reference_logprob is not None for c in record.completions]
    if len(prompt) > limits.max_prompt_tokens:
        if any(sampled):
            raise _too_short(record, "prompt", len(prompt), limits.max_prompt_tokens)
        prompt = cut_prompt(prompt, tokenizer, limits.max_prompt_tokens)
        counts["prompts_cut"] += 1
    for position, ids in enumerate(completions):
        if len(ids) > limits.max_completion_tokens:
            if sampled[position]:
                raise _too_short(record, "completion", len(ids), limits.max_completion_tokens)
            completions[position] = ids[: limits.max_completion_tokens]
            counts["completions_cut"] += 1
    return group_of(_written(record, prompt, completions), index, from_proposal=True)


def tokenize_records(
    records: Iterable[Record], tokenizer: PreTrainedTokenizerBase, *, limits: TokenLimits, counts: Counter[str]
) -> Iterator[Group]:
    """`tokenize_record` of each record, `index` its position among them.

    Dropped and counted: records that break the invariant, by their reason, and preferences that two completions with
    the same tokens would share (`pairs_equal_as_tokens`). Where all records break it, the last one's `UnfitError` says
    so for all.
    """
    unfit, index, fit = None, -1, 0
    for index, record in enumerate(records):
        try:
            group = tokenize_record(record, tokenizer, index=index, limits=limits, counts=counts)
        except UnfitError as error:
            unfit = error
            counts[error.reason] += 1
            continue
        fit += 1
        if has_equal_rival(group):
            counts["pairs_equal_as_tokens"] += 1
        else:
            yield group
    if unfit is not None and not fit:
        unfit.args = (f"None of the {index + 1} records can be used with this tokenizer. {unfit}",)
        raise unfit


def has_equal_rival(group: Group) -> bool:
    """Whether another completion has the same tokens as the preferred one, so that the preference says nothing."""
    texts = [ids.tolist() for ids in group.completion_ids]
    return group.preferred is not None and texts.count(texts[group.preferred]) > 1


def split_text(
    record: Record, tokenizer: PreTrainedTokenizerBase, *, prompt_tokens: int, counts: Counter[str]
) -> Record | None:
    """A record of plain text (empty prompt, K = 1) with its first `prompt_tokens` tokens as the prompt.

    The text is tokenised once; prompt and completion keep those ids (behind what the tokenizer puts in front), and
    their texts join to the whole. A text with nothing left for the completion is dropped (None) and counted:
    `texts_too_short`.
    """
    (completion,) = record.completions
    ids = _encode(tokenizer, _without_ends(completion.text, tokenizer))
    if len(ids) <= prompt_tokens:
        counts["texts_too_short"] += 1
        return None
    whole = _decode(tokenizer, ids)
    added = _added(_decode(tokenizer, ids[:prompt_tokens]), whole)
    finished = replace(
        completion, text=added, token_ids=(*ids[prompt_tokens:], eos_id(tokenizer)), finish_reason="stop"
    )
    return replace(
        record,
        prompt=whole[: len(whole) - len(added)],
        prompt_ids=tuple(_leading_special(tokenizer) + ids[:prompt_tokens]),
        completions=(finished,),
    )


def prompt_token_ids(record: Record, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """All ids of the prompt, uncut. An empty prompt is the begin-of-sequence (else the end-of-sequence) id.

    Text gets the special tokens the tokenizer puts in front, never those it puts behind; messages are rendered by the
    tokenizer's chat template, which has the word on special tokens, up to where the assistant speaks; a last message of
    the assistant is the beginning of the answer.
    """
    turn = _Turn("", eos_id(tokenizer)) if record.prompt_ids is not None else _turn_of(record, tokenizer)
    return _prompt_ids(record, turn, tokenizer)


def completion_text(
    tokenizer: PreTrainedTokenizerBase, prompt_ids: Sequence[int], ids: Sequence[int], lead: str = ""
) -> str:
    """The text that `ids`, without the one that ended them, add to the prompt's: prompt and text join to the whole.

    Special tokens have no text. `lead` (see `answer_lead`) is what the chat template itself puts in front of an answer.
    """
    before, whole = (_decode(tokenizer, [*prompt_ids, *more], skip=True) for more in ((), ids))
    return _added(before, whole).removeprefix(lead)


def token_text(tokenizer: PreTrainedTokenizerBase, token_id: int) -> str:
    """The text of one token inside a text, where a space in front of a word stays."""
    context = _encode(tokenizer, "a")
    return _added(_decode(tokenizer, context), _decode(tokenizer, [*context, token_id]))


def as_conversation(record: Record, tokenizer: PreTrainedTokenizerBase) -> Record:
    """The record with the ids of its texts as tokenizer and template write whole conversations.

    That is what a model which only reads (a reward model, a classifier) is given of a record that is unfit for one that
    speaks. The prompt is what all K begin with, so the boundary has no meaning of its own.
    """
    whole = []
    for completion in record.completions:
        if isinstance(record.prompt, str):
            ids = _leading_special(tokenizer) + _encode(tokenizer, record.prompt + completion.text)
            whole.append(ids if completion.finish_reason == "length" else [*ids, eos_id(tokenizer)])
        else:
            messages, opening = _messages(record)
            whole.append(_encode(tokenizer, _render(record, tokenizer, messages, answer=opening + completion.text)))
    shared = min(len(os.path.commonprefix(whole)), *(len(ids) - 1 for ids in whole))  # noqa: RUF071 - of lists
    return _written(record, whole[0][:shared], [ids[shared:] for ids in whole])


def answer_lead(record: Record, tokenizer: PreTrainedTokenizerBase) -> str:
    """What the chat template puts between the prompt and an answer's own text, mostly nothing or a space."""
    return _turn_of(record, tokenizer).lead


def cut_prompt(ids: list[int], tokenizer: PreTrainedTokenizerBase, max_prompt_tokens: int) -> list[int]:
    """The last `max_prompt_tokens` ids, in front of them the special tokens that began the whole."""
    if len(ids) <= max_prompt_tokens:
        return ids
    head = _leading_special(tokenizer) or [tokenizer.bos_token_id]
    if ids[: len(head)] != head or len(head) >= max_prompt_tokens:
        head = []
    return head + ids[len(ids) - max_prompt_tokens + len(head) :]


PAD, BOS, EOS = "<pad>", "<bos>", "<eos>"


def build_tokenizer(texts: Iterable[str], *, vocab_size: int = 512) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer trained on `texts`, with `<pad>`, `<bos>` and `<eos>`; any text round-trips."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[PAD, BOS, EOS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, bos_token=BOS, eos_token=EOS, clean_up_tokenization_spaces=False
    )


# --- what the chat template writes ---

_RUN: dict[str, datetime | None] = {"date": None}
_PLACE = "Zq7answer7qZ"


def pin_date(moment: datetime | None) -> None:
    """Chat templates that write the date write `moment`, in this process; None: the time at which they are rendered.

    A run calls this in each of its processes with the moment it began, so that its tokens are the same every day.
    """
    _RUN["date"] = moment


def render_chat(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Any], *, tools: Any = None, answering: bool = True
) -> str:
    """The text of chat messages by the tokenizer's template, up to where the assistant speaks if `answering`.

    `tokenizer.chat_template_kwargs`, which `load_tokenizer` sets, are the template's own settings. Raises what
    transformers raises where the template refuses the messages.
    """
    template = tokenizer.get_chat_template(None, tools)
    more = dict(getattr(tokenizer, "chat_template_kwargs", None) or {})
    if "strftime_now" in template:  # transformers passes templates data only, so the date comes as a macro in the text
        moment = _RUN["date"] or datetime.now()
        more["exalign_date"] = {code: moment.strftime(code) for code in sorted(set(_CODES.findall(template)), key=len)}
        template = _DATE_MACRO + template
    rendered = tokenizer.apply_chat_template(
        [dict(message) for message in messages],
        tools=tools,
        chat_template=template,
        add_generation_prompt=answering,
        tokenize=False,
        **more,
    )
    return str(rendered)


_CODES = re.compile(r"%-?[A-Za-z]")
_DATE_MACRO = (
    "{%- macro strftime_now(format) -%}{%- set date = namespace(text=format) -%}{%- for code, value in "
    "exalign_date.items() -%}{%- set date.text = date.text.replace(code, value) -%}{%- endfor -%}{{- date.text -}}"
    "{%- endmacro -%}"
)


@dataclass(frozen=True, slots=True)
class _Turn:
    """How an answer stands behind its prompt, as text: `start`, `lead`, the answer, `behind`.

    `start` is the prompt, up to where the assistant speaks. Some templates open the answer there for it (`opened`, say
    "<think>"), and leave that out of conversations. `end` is the part of `behind` in front of the token that ends it.
    """

    start: str
    end_id: int
    lead: str = ""
    opened: str = ""
    end: str = ""
    behind: str = ""


def _turn_of(record: Record, tokenizer: PreTrainedTokenizerBase, counts: Counter[str] | None = None) -> _Turn:
    if isinstance(record.prompt, str):
        return _Turn(record.prompt, eos_id(tokenizer))
    messages, opening = _messages(record)
    start = _render(record, tokenizer, messages)
    before, found, behind = _render(record, tokenizer, messages, answer=opening + _PLACE).rpartition(_PLACE)
    if not found:
        raise UnfitError(record, "records_refused_by_template", f"{_template_of(tokenizer)} writes no answers.")
    if counts is not None:
        _count_left_out(record, tokenizer, messages, start, counts)
    lead = opened = ""
    if opening:
        start = before if before.endswith(opening.strip()) or before.endswith(opening) else start + opening
    elif before.startswith(start):
        lead = before[len(start) :]
        if lead.strip() and start == _render(record, tokenizer, messages, answering=False):
            start = before.rstrip(" ")  # a template without a generation prompt: the answer's header is the prompt's
            lead = before[len(start) :]
    elif start.startswith(before):
        opened = start[len(before) :]
    else:
        raise UnfitError(
            record,
            "prompts_changed_by_template",
            f"{_template_of(tokenizer)} changes the prompt once the answer follows, "
            "so the two have no boundary; use a template whose prompt stays as it is.",
        )
    return _Turn(start, lead=lead, opened=opened, behind=behind, **_end_of(behind, tokenizer))


def _named(tokenizer: PreTrainedTokenizerBase) -> str:
    return f"the tokenizer {getattr(tokenizer, 'name_or_path', None) or 'given'}"


def _template_of(tokenizer: PreTrainedTokenizerBase) -> str:
    return f"the chat template of {_named(tokenizer)}"


def _messages(record: Record) -> tuple[list[Any], str]:
    """The messages of a prompt, without the beginning of the answer that the last one may be, and that beginning."""
    messages: list[Any] = list(record.prompt)
    if messages and messages[-1]["role"] == "assistant" and isinstance(messages[-1].get("content"), str):
        return messages[:-1], messages[-1]["content"]
    return messages, ""


def _end_of(behind: str, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The token that ends an answer: the first special one of what stands behind it, else the end of sequence."""
    ids = _encode(tokenizer, behind)
    added = tokenizer.added_tokens_decoder if ids else {}
    for token_id in ids:
        text = str(added.get(token_id, ""))
        if text and text in behind:
            return {"end_id": token_id, "end": behind[: behind.index(text)]}
    return {"end_id": eos_id(tokenizer), "end": behind.rstrip()}


def _count_left_out(
    record: Record, tokenizer: PreTrainedTokenizerBase, messages: list[Any], start: str, counts: Counter[str]
) -> None:
    said = [m.get("content") for m in messages if m["role"] != "assistant"]
    if any(isinstance(text, str) and text.strip() not in start for text in said):
        counts["messages_left_out_by_template"] += 1
    if record.tools and _render(replace(record, tools=None), tokenizer, messages) == start:
        counts["tools_left_out_by_template"] += 1


def _render(
    record: Record,
    tokenizer: PreTrainedTokenizerBase,
    messages: list[Any],
    *,
    answer: str | None = None,
    answering: bool = True,
) -> str:
    if tokenizer.chat_template is None:
        raise UnfitError(
            record,
            "records_without_template",
            f"it is a conversation, but {_named(tokenizer)} has no chat template: "
            "use a chat model's tokenizer, or data with plain text.",
        )
    if answer is not None:
        messages = [*messages, {"role": "assistant", "content": answer}]
    try:
        tools = json.loads(record.tools) if record.tools else None
        return render_chat(tokenizer, messages, tools=tools, answering=answering and answer is None)
    except (TemplateError, ValueError, TypeError, LookupError) as error:
        said = f"{_template_of(tokenizer)} refuses it ({error})."
        raise UnfitError(record, "records_refused_by_template", said) from None


# --- ids ---


def _prompt_ids(record: Record, turn: _Turn, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    ids = list(record.prompt_ids or ())
    if record.prompt_ids is None:
        ids = _encode(tokenizer, turn.start)
        front = _leading_special(tokenizer) if isinstance(record.prompt, str) else []
        ids = ids if front and ids[: len(front)] == front else front + ids
    if ids:
        return ids
    start = tokenizer.bos_token_id
    return [eos_id(tokenizer) if start is None else int(start)]


def _completion_ids(
    record: Record,
    completion: Completion,
    turn: _Turn,
    prompt: list[int],
    tokenizer: PreTrainedTokenizerBase,
    counts: Counter[str],
) -> list[int]:
    if completion.token_ids is not None:
        return list(completion.token_ids) or [turn.end_id]
    text = _without_ends(completion.text, tokenizer, turn.end_id)
    if not isinstance(record.prompt, str):
        text = _answer(record, text, turn, tokenizer, counts)
    if completion.finish_reason == "length":
        return _encode_behind(record, prompt, turn, text, tokenizer, counts) or [turn.end_id]
    return [*_encode_behind(record, prompt, turn, text + turn.end, tokenizer, counts), turn.end_id]


def _answer(record: Record, text: str, turn: _Turn, tokenizer: PreTrainedTokenizerBase, counts: Counter[str]) -> str:
    """What stands between the prompt and the answer's end: by the template, as long as that holds the answer's text.

    Where it does not (a template that cuts reasoning out of conversations), the answer itself stands there, as a model
    would say it behind this prompt; and what the prompt opens for the answer is not said twice.
    """
    messages, opening = _messages(record)
    whole = _render(record, tokenizer, messages, answer=opening + text)
    rest = whole[len(turn.start) :]
    if whole.startswith(turn.start) and text.strip() in rest and rest.endswith(turn.behind):
        return rest[: len(rest) - len(turn.behind)]
    tag = turn.opened.strip()
    if tag and text.lstrip().startswith(tag):
        text = text.lstrip().removeprefix(tag).removeprefix(turn.opened[turn.opened.index(tag) + len(tag) :])
    elif re.fullmatch(r"\W\w+\W", tag) and f"{tag[0]}/{tag[1:]}" not in text:
        raise UnfitError(
            record,
            "answers_without_reasoning",
            f"{_template_of(tokenizer)} opens the answer with {tag}, and this one does not close it; give answers "
            "with their reasoning, or a tokenizer (tokenizer.source) or tokenizer.chat_template_kwargs without it.",
        )
    counts["answers_changed_by_template"] += 1
    return turn.lead + text


def _without_ends(text: str, tokenizer: PreTrainedTokenizerBase, end_id: int | None = None) -> str:
    """The text without end tokens, spelled out, at its end, and without the white space behind them."""
    ends = {str(tokenizer.convert_ids_to_tokens(i)) for i in (eos_id(tokenizer), end_id) if i is not None}
    while (end := next((end for end in ends if text.rstrip().endswith(end)), None)) is not None:
        text = text.rstrip().removesuffix(end)
    return text


def _encode_behind(
    record: Record,
    prompt: list[int],
    turn: _Turn,
    text: str,
    tokenizer: PreTrainedTokenizerBase,
    counts: Counter[str],
) -> list[int]:
    """The ids of `text` behind the prompt: those with which both decode to what they are as one text.

    Alone a text may get a space in front that is not there behind a prompt (SentencePiece, `add_prefix_space`); then
    it is encoded behind something else, whose ids are taken off. Where the tokenizer changes the whole text (Unicode
    normal forms, spaces around special tokens), what it makes of the whole is what counts.
    """
    alone, near = _encode(tokenizer, text), prompt[-8:]
    if not alone or _decode(tokenizer, near + alone) == _decode(tokenizer, near) + text:
        return alone
    start = _encode(tokenizer, turn.start)
    candidates = [alone, *_encode_in_context(tokenizer, text)]
    for wanted in (_decode(tokenizer, _encode(tokenizer, turn.start + text)), _decode(tokenizer, start) + text):
        for ids in candidates:
            if _decode(tokenizer, start + ids) == wanted:
                return ids
    if "".join(_decode(tokenizer, start + alone).split()) == "".join((_decode(tokenizer, start) + text).split()):
        counts["texts_with_spaces_changed_by_tokenizer"] += 1  # it has no tokens for spaces, and none for their absence
        return alone
    raise UnfitError(
        record,
        "texts_changed_by_tokenizer",
        f"the tokenizer has no ids for the completion {text[:40]!r} that decode to it behind this prompt.",
    )


def _encode_in_context(tokenizer: PreTrainedTokenizerBase, text: str) -> Iterator[list[int]]:
    for context in ("\n", ".", "a", "0"):
        ids, both = _encode(tokenizer, context), _encode(tokenizer, context + text)
        if both[: len(ids)] == ids:
            yield both[len(ids) :]


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    # verbose=False: a text longer than the model's window is cut later, with a count instead of a warning
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]) if text else []


def _decode(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], *, skip: bool = False) -> str:
    if not ids:
        return ""
    return str(tokenizer.decode(list(ids), skip_special_tokens=skip, clean_up_tokenization_spaces=False))


def _added(before: str, whole: str) -> str:
    """What `whole` adds to `before`, of which a half character at the end may have become another one."""
    return whole[len(os.path.commonprefix([before, whole])) :]  # noqa: RUF071 - by character is what is meant


def _leading_special(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer puts before a text: for most causal models nothing or the begin-of-sequence id."""
    plain, special = _encode(tokenizer, "a"), list(tokenizer("a", verbose=False)["input_ids"])
    places = (n for n in range(len(special)) if special[n : n + len(plain)] == plain)
    return special[: next(places, 0)]


def _too_short(record: Record, part: str, tokens: int, limit: int) -> InputError:
    name = f"max_{part}_tokens"
    return InputError(
        f"Record {record.id}: its sampled {part} has {tokens} tokens, more than {name} = {limit}; cutting it would "
        f"make its log-probability wrong, so raise {name} or sample again with it."
    )
