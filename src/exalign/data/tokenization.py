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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cached_property
from typing import Any

from jinja2 import TemplateError
from pydantic import Field
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerBase, PreTrainedTokenizerFast

from exalign.data.batching import Group, group_of
from exalign.data.record import Completion, Record
from exalign.errors import InputError
from exalign.settings import Settings
from exalign.storage import whole_characters


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
        return frozenset([eos_id(tokenizer), _Text(turn, tokenizer).turn.end_id])
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
    text = _Text(record, tokenizer, counts)
    prompt, completions = text.prompt_ids, [text.completion_ids(completion) for completion in record.completions]
    text.count_left_out()
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
    return _Text(record, tokenizer).prompt_ids


def completion_text(
    tokenizer: PreTrainedTokenizerBase, prompt_ids: Sequence[int], ids: Sequence[int], lead: str = ""
) -> str:
    """The text that `ids`, without the one that ended them, add to the prompt's: prompt and text join to the whole.

    Special tokens have no text. `lead` (see `answer_lead`) is what the chat template itself puts in front of an answer.
    """
    before, whole = (_decode(tokenizer, [*prompt_ids, *more], skip=True) for more in ((), ids))
    return _added(before, whole).removeprefix(lead)


def reads_texts_in_ids(records: Iterable[Record], tokenizer: PreTrainedTokenizerBase) -> bool:
    """Whether the tokenizer reads in the ids of most completions what their texts begin with; False where none has."""
    having = [one for record in records for one in record.completions if one.token_ids and one.text.strip()]
    pairs = [(one.text.strip(), _decode(tokenizer, one.token_ids or (), skip=True).strip()) for one in having]
    right = sum(text[:20] in read or (read != "" and read[:20] in text) for text, read in pairs)
    return 2 * right > len(pairs)


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
            whole.append(_encode(tokenizer, _Text(record, tokenizer).render(completion.text)))
    shared = min(len(os.path.commonprefix(whole)), *(len(ids) - 1 for ids in whole))  # noqa: RUF071 - of lists
    return _written(record, whole[0][:shared], [ids[shared:] for ids in whole])


def answer_lead(record: Record, tokenizer: PreTrainedTokenizerBase) -> str:
    """What the chat template puts between the prompt and an answer's own text, mostly nothing or a space."""
    return _Text(record, tokenizer).turn.lead


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

    `tokenizer.chat_template_kwargs`, which `load_tokenizer` sets, are the template's own settings. Arguments of tool
    calls, which data has as objects or as JSON text of them, go in as objects, for templates that write JSON; as text
    into one that refuses objects or would print them as Python does. Raises what transformers raises where the template
    refuses the messages.
    """

    def written(form: Callable[[str | dict[str, Any]], Any]) -> str:
        return _rendered(tokenizer, [_with_arguments(message, form) for message in messages], tools, answering)

    try:
        found = written(_as_object)
    except _REFUSALS:
        return written(_as_text)
    if any("tool_calls" in message for message in messages):
        with suppress(*_REFUSALS):
            return written(_as_text) if found == written(lambda told: str(_as_object(told))) else found
    return found


_REFUSALS = (TemplateError, ValueError, TypeError, LookupError)


def _as_object(told: str | dict[str, Any]) -> Any:
    return json.loads(told) if isinstance(told, str) else told


def _as_text(told: str | dict[str, Any]) -> str:
    return told if isinstance(told, str) else json.dumps(told, ensure_ascii=False)


def _with_arguments(given: Mapping[str, Any], form: Callable[[str | dict[str, Any]], Any]) -> dict[str, Any]:
    """A message, a call in it, or the function that is called, with arguments that spell an object in this form."""
    found = dict(given)
    if isinstance(calls := given.get("tool_calls"), list):
        found["tool_calls"] = [_with_arguments(call, form) if isinstance(call, Mapping) else call for call in calls]
    if isinstance(function := given.get("function"), Mapping):
        found["function"] = _with_arguments(function, form)
    with suppress(ValueError, RecursionError):
        if isinstance(told := given.get("arguments"), str | dict) and isinstance(_as_object(told), dict):
            found["arguments"] = form(told)
    return found


def _rendered(tokenizer: PreTrainedTokenizerBase, messages: list[Any], tools: Any, answering: bool) -> str:
    template = tokenizer.get_chat_template(None, tools)
    more = dict(getattr(tokenizer, "chat_template_kwargs", None) or {})
    if "strftime_now" in template:  # transformers passes templates data only, so the date comes as a macro in the text
        moment = _RUN["date"] or datetime.now()
        more["exalign_date"] = {code: moment.strftime(code) for code in sorted(set(_CODES.findall(template)), key=len)}
        template = _DATE_MACRO + template
    rendered = tokenizer.apply_chat_template(
        messages,
        tools=tools,
        chat_template=template,
        add_generation_prompt=answering,
        tokenize=False,
        **more,
    )
    return whole_characters(str(rendered))  # JSON can spell half of one


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


class _Text:
    """A record as the tokenizer and its template write it; `counts` takes what they change."""

    def __init__(self, record: Record, tokenizer: PreTrainedTokenizerBase, counts: Counter[str] | None = None) -> None:
        self.record, self.tokenizer, self.counts = record, tokenizer, Counter() if counts is None else counts
        self.chat = not isinstance(record.prompt, str)
        self.messages: list[Any] = list(record.prompt) if self.chat else []
        self.opening = ""
        """The beginning of the answer, which the last message may be."""
        last = self.messages[-1] if self.messages else {}
        closed = {"tool_calls", "reasoning_content"} & last.keys()
        if last.get("role") == "assistant" and isinstance(last.get("content"), str) and not closed:
            self.opening = self.messages.pop()["content"]

    def unfit(self, reason: str, sentence: str) -> UnfitError:
        return UnfitError(self.record, reason, sentence)

    def render(self, answer: str | None = None, *, answering: bool = True, tools: bool = True) -> str:
        """The conversation, with the answer behind it or up to where the assistant speaks."""
        if self.tokenizer.chat_template is None:
            raise self.unfit(
                "records_without_template",
                f"it is a conversation, but {_named(self.tokenizer)} has no chat template: "
                "use a chat model's tokenizer, or data with plain text.",
            )
        answers = [] if answer is None else [{"role": "assistant", "content": self.opening + answer}]
        try:
            given = json.loads(self.record.tools) if self.record.tools and tools else None
            messages, speaks = [*self.messages, *answers], answering and answer is None
            return render_chat(self.tokenizer, messages, tools=given, answering=speaks)
        except _REFUSALS as error:
            said = f"{_template_of(self.tokenizer)} refuses it ({error})."
            raise self.unfit("records_refused_by_template", said) from None

    @cached_property
    def asked(self) -> str:
        return self.render()

    @cached_property
    def turn(self) -> _Turn:
        if isinstance(self.record.prompt, str):
            return _Turn(self.record.prompt, eos_id(self.tokenizer))
        start, opening = self.asked, self.opening
        before, found, behind = self.render(_PLACE).rpartition(_PLACE)
        if not found:
            raise self.unfit("records_refused_by_template", f"{_template_of(self.tokenizer)} writes no answers.")
        lead = opened = ""
        if opening:
            start = before if before.endswith(opening.strip()) or before.endswith(opening) else start + opening
        elif before.startswith(start):
            lead = before[len(start) :]
            if lead.strip() and start == self.render(answering=False):
                start = before.rstrip(" ")  # the template has no generation prompt: the answer's header is the prompt's
                lead = before[len(start) :]
        elif start.startswith(before):
            opened = start[len(before) :]
        else:
            raise self.unfit(
                "prompts_changed_by_template",
                f"{_template_of(self.tokenizer)} changes the prompt once the answer follows, "
                "so the two have no boundary; use a template whose prompt stays as it is.",
            )
        return _Turn(start, lead=lead, opened=opened, behind=behind, **_end_of(behind, self.tokenizer))

    def count_left_out(self) -> None:
        if not self.chat:
            return
        said = [message.get("content") for message in self.messages if message["role"] != "assistant"]
        if any(isinstance(text, str) and text.strip() not in self.asked for text in said):
            self.counts["messages_left_out_by_template"] += 1
        if self.record.tools and self.render(tools=False) == self.asked:
            self.counts["tools_left_out_by_template"] += 1
        if any("tool_calls" in message for message in self.messages):
            bare = _Text(self.record, self.tokenizer)
            bare.messages = [{key: value for key, value in m.items() if key != "tool_calls"} for m in self.messages]
            with suppress(UnfitError):  # a template that needs the calls writes them
                if bare.asked == self.asked:
                    self.counts["tool_calls_left_out_by_template"] += 1

    @cached_property
    def prompt_ids(self) -> list[int]:
        ids = list(self.record.prompt_ids or ())
        if self.record.prompt_ids is None:
            ids = _encode(self.tokenizer, self.turn.start)
            front = [] if self.chat else _leading_special(self.tokenizer)
            ids = ids if ids[: len(front)] == front else front + ids
        start = self.tokenizer.bos_token_id
        return ids or [eos_id(self.tokenizer) if start is None else int(start)]

    def completion_ids(self, completion: Completion) -> list[int]:
        turn = self.turn
        if completion.token_ids is not None:
            return list(completion.token_ids) or [turn.end_id]
        text = _without_ends(completion.text, self.tokenizer, turn.end_id)
        text = self._answer(text) if self.chat else text
        if completion.finish_reason == "length":
            return self._behind(text) or [turn.end_id]
        return [*self._behind(text + turn.end), turn.end_id]

    def _answer(self, text: str) -> str:
        """What stands between the prompt and the answer's end: by the template, as long as that holds the text.

        Where it does not (a template that cuts reasoning out of conversations), the answer itself stands there, as a
        model would say it behind this prompt; and what the prompt opens for the answer is not said twice.
        """
        turn, whole = self.turn, self.render(text)
        rest = whole[len(turn.start) :]
        if whole.startswith(turn.start) and text.strip() in rest and rest.endswith(turn.behind):
            return rest[: len(rest) - len(turn.behind)]
        tag = turn.opened.strip()
        if tag and text.lstrip().startswith(tag):
            text = text.lstrip().removeprefix(tag).removeprefix(turn.opened[turn.opened.index(tag) + len(tag) :])
        elif re.fullmatch(r"\W\w+\W", tag) and f"{tag[0]}/{tag[1:]}" not in text:
            raise self.unfit(
                "answers_without_reasoning",
                f"{_template_of(self.tokenizer)} opens the answer with {tag}, and this one does not close it; give "
                "answers with their reasoning, or a tokenizer (tokenizer.source) or tokenizer.chat_template_kwargs "
                "without it.",
            )
        self.counts["answers_changed_by_template"] += 1
        return turn.lead + text

    def _behind(self, text: str) -> list[int]:
        """The ids of `text` behind the prompt: those with which both decode to what they are as one text.

        Alone a text may get a space in front that is not there behind a prompt (SentencePiece, `add_prefix_space`);
        then it is encoded behind something else, whose ids are taken off. Where the tokenizer changes the whole text
        (Unicode normal forms, spaces around special tokens), what it makes of the whole is what counts.
        """
        tokenizer = self.tokenizer
        alone, near = _encode(tokenizer, text), self.prompt_ids[-8:]
        if not alone or _decode(tokenizer, near + alone) == _decode(tokenizer, near) + text:
            return alone
        start = _encode(tokenizer, self.turn.start)
        said = _decode(tokenizer, start) + text
        candidates = [alone, *_encode_in_context(tokenizer, text)]
        for wanted in (_decode(tokenizer, _encode(tokenizer, self.turn.start + text)), said):
            for ids in candidates:
                if _decode(tokenizer, start + ids) == wanted:
                    return ids
        if "".join(_decode(tokenizer, start + alone).split()) == "".join(said.split()):
            self.counts["texts_with_spaces_changed_by_tokenizer"] += 1  # it has none for spaces and for their absence
            return alone
        raise self.unfit(
            "texts_changed_by_tokenizer",
            f"the tokenizer has no ids for the completion {text[:40]!r} that decode to it behind this prompt.",
        )


def _named(tokenizer: PreTrainedTokenizerBase) -> str:
    return f"the tokenizer {getattr(tokenizer, 'name_or_path', None) or 'given'}"


def _template_of(tokenizer: PreTrainedTokenizerBase) -> str:
    return f"the chat template of {_named(tokenizer)}"


def _end_of(behind: str, tokenizer: PreTrainedTokenizerBase) -> dict[str, Any]:
    """The token that ends an answer: the first special one of what stands behind it, else the end of sequence."""
    ids = _encode(tokenizer, behind)
    added = tokenizer.added_tokens_decoder if ids else {}
    for token_id in ids:
        text = str(added.get(token_id, ""))
        if text and text in behind:
            return {"end_id": token_id, "end": behind[: behind.index(text)]}
    return {"end_id": eos_id(tokenizer), "end": behind.rstrip()}


# --- ids ---


def _without_ends(text: str, tokenizer: PreTrainedTokenizerBase, end_id: int | None = None) -> str:
    """The text without end tokens, spelled out, at its end, and without the white space behind them."""
    ends = {str(tokenizer.convert_ids_to_tokens(i)) for i in (eos_id(tokenizer), end_id) if i is not None}
    while (end := next((end for end in ends if text.rstrip().endswith(end)), None)) is not None:
        text = text.rstrip().removesuffix(end)
    return text


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
