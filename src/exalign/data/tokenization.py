"""From records to token ids, with an exact boundary between prompt and completion.

The prompt and each completion are tokenised separately and concatenated, so no token straddles the boundary and all K
completions see the same prompt ids. Ids that a record already carries are used as they are: sampled ids are never
decoded and tokenised again.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import torch
from jinja2 import TemplateError
from pydantic import Field
from transformers import PreTrainedTokenizerBase

from exalign.data.batching import Group
from exalign.data.record import Completion, Record
from exalign.errors import InputError
from exalign.settings import Settings


class TokenLimits(Settings):
    """How many tokens of a prompt and of a completion are used."""

    max_prompt_tokens: int = Field(512, gt=1, description="Longer prompts lose their beginning, once per prompt.")
    max_completion_tokens: int = Field(
        512, gt=0, description="Longer completions lose their end, and with it the end-of-sequence token."
    )


def eos_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The end-of-sequence id; a tokenizer without one is an `InputError`."""
    if tokenizer.eos_token_id is None:
        name = tokenizer.name_or_path or "given"
        raise InputError(
            f"The tokenizer {name} has no end-of-sequence token: set eos_token in its tokenizer_config.json."
        )
    return int(tokenizer.eos_token_id)


def tokenize_record(
    record: Record,
    tokenizer: PreTrainedTokenizerBase,
    *,
    index: int,
    max_prompt_tokens: int,
    max_completion_tokens: int,
    counts: Counter[str],
) -> Group:
    """The `Group` of one record, `index` its position in the source.

    A prompt over `max_prompt_tokens` loses its beginning (a leading begin-of-sequence token stays), once for all K;
    `counts["prompts_cut"]`. A finished completion ends with exactly one end-of-sequence token; one that is longer
    than `max_completion_tokens` with it is cut and has none; `counts["completions_cut"]`. Completions that carry a
    log-probability were sampled: they cannot be cut, so limits below them are an `InputError`, as are a
    tokenizer without end-of-sequence and chat messages without a chat template that fits.
    """
    prompt = prompt_token_ids(record, tokenizer)
    completions = [completion_token_ids(record, c, tokenizer) for c in record.completions]
    sampled = [c.logprob is not None or c.reference_logprob is not None for c in record.completions]
    if len(prompt) > max_prompt_tokens:
        if any(sampled):
            raise _too_short(record, "prompt", len(prompt), "max_prompt_tokens", max_prompt_tokens)
        prompt = cut_prompt(prompt, tokenizer, max_prompt_tokens)
        counts["prompts_cut"] += 1
    for position, ids in enumerate(completions):
        if len(ids) > max_completion_tokens:
            if sampled[position]:
                raise _too_short(record, "completion", len(ids), "max_completion_tokens", max_completion_tokens)
            completions[position] = ids[:max_completion_tokens]
            counts["completions_cut"] += 1
    return Group(
        index=index,
        prompt_ids=torch.tensor(prompt, dtype=torch.long),
        completion_ids=tuple(torch.tensor(ids, dtype=torch.long) for ids in completions),
        rewards=_values(record, "reward"),
        preferred=record.preferred,
        reference_logp=_values(record, "reference_logprob"),
        proposal_logp=_values(record, "logprob"),
    )


def tokenize_records(
    records: Iterable[Record],
    tokenizer: PreTrainedTokenizerBase,
    *,
    max_prompt_tokens: int,
    max_completion_tokens: int,
    counts: Counter[str],
) -> Iterator[Group]:
    """`tokenize_record` of each record, `index` its position among them.

    Dropped and counted: preferences that two completions with the same tokens would share (`pairs_equal_as_tokens`).
    """
    for index, record in enumerate(records):
        group = tokenize_record(
            record,
            tokenizer,
            index=index,
            max_prompt_tokens=max_prompt_tokens,
            max_completion_tokens=max_completion_tokens,
            counts=counts,
        )
        if has_equal_rival(group):
            counts["pairs_equal_as_tokens"] += 1
        else:
            yield group


def has_equal_rival(group: Group) -> bool:
    """Whether another completion has the same tokens as the preferred one, so that the preference says nothing."""
    if group.preferred is None:
        return False
    winner = group.completion_ids[group.preferred]
    others = (ids for i, ids in enumerate(group.completion_ids) if i != group.preferred)
    return any(torch.equal(ids, winner) for ids in others)


def split_text(
    record: Record, tokenizer: PreTrainedTokenizerBase, *, prompt_tokens: int, counts: Counter[str]
) -> Record | None:
    """A record of plain text (empty prompt, K = 1) with its first `prompt_tokens` tokens as the prompt.

    The text is tokenised once; prompt and completion keep those ids (behind a begin-of-sequence id, where the
    tokenizer puts one), and their texts are what the ids decode to.
    A text with nothing left for the completion is dropped (None) and counted: `texts_too_short`.
    """
    (completion,) = record.completions
    ids = _encode(tokenizer, completion.text)
    if len(ids) <= prompt_tokens:
        counts["texts_too_short"] += 1
        return None
    prompt, rest = ids[:prompt_tokens], ids[prompt_tokens:]
    return replace(
        record,
        prompt=_decode(tokenizer, prompt),
        prompt_ids=tuple(_leading_special(tokenizer) + prompt),
        completions=(
            replace(
                completion,
                text=_decode(tokenizer, rest),
                token_ids=tuple(_ended(rest, tokenizer)),
                finish_reason="stop",
            ),
        ),
    )


def prompt_token_ids(record: Record, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """All ids of the prompt, uncut. An empty prompt is the begin-of-sequence (else the end-of-sequence) id.

    Text gets the special tokens the tokenizer puts in front, never those it puts behind; messages are rendered
    by the tokenizer's chat template up to where the assistant speaks.
    """
    if record.prompt_ids is not None:
        ids = list(record.prompt_ids)
    elif isinstance(record.prompt, str):
        ids = _leading_special(tokenizer) + _encode(tokenizer, record.prompt)
    else:
        ids = _encode(tokenizer, _render(record, tokenizer, answer=None))
    if ids:
        return ids
    start = tokenizer.bos_token_id
    return [eos_id(tokenizer) if start is None else int(start)]


def completion_token_ids(record: Record, completion: Completion, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """All ids of a completion, uncut, ended with one end-of-sequence id unless it was cut by a length limit."""
    if completion.token_ids is not None:
        return list(completion.token_ids) or [eos_id(tokenizer)]
    unfinished = completion.finish_reason == "length"
    if isinstance(record.prompt, str) or unfinished:
        ids = _encode(tokenizer, completion.text)
        return ids if unfinished and ids else _ended(ids, tokenizer)
    start = _render(record, tokenizer, answer=None)
    whole = _render(record, tokenizer, answer=completion.text)
    if not whole.startswith(start):
        raise InputError(
            f"Record {record.id}: the tokenizer's chat template changes the prompt once the answer follows, "
            "so the two have no boundary; use a template whose prompt stays as it is."
        )
    return _ended(_encode(tokenizer, whole[len(start) :]), tokenizer)


def cut_prompt(ids: list[int], tokenizer: PreTrainedTokenizerBase, max_prompt_tokens: int) -> list[int]:
    """The last `max_prompt_tokens` ids, of which the first stays a begin-of-sequence id if it was one."""
    if len(ids) <= max_prompt_tokens:
        return ids
    head = ids[:1] if ids[0] == tokenizer.bos_token_id and max_prompt_tokens > 1 else []
    return head + ids[len(ids) - max_prompt_tokens + len(head) :]


def _ended(ids: list[int], tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """`ids` with exactly one end-of-sequence id at the end. White space that a chat template puts behind it goes."""
    eos = eos_id(tokenizer)
    if eos in ids:
        last = len(ids) - 1 - ids[::-1].index(eos)
        if not _decode(tokenizer, ids[last + 1 :]).strip():
            ids = ids[:last]
            while ids and ids[-1] == eos:
                ids = ids[:-1]
    return [*ids, eos]


def _encode(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    # verbose=False: a text longer than the model's window is cut later, with a count instead of a warning
    return list(tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]) if text else []


def _decode(tokenizer: PreTrainedTokenizerBase, ids: list[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)) if ids else ""


def _leading_special(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What the tokenizer puts before a text: for most causal models nothing or the begin-of-sequence id."""
    start = tokenizer.bos_token_id
    return [int(start)] if start is not None and start in tokenizer("", verbose=False)["input_ids"][:1] else []


def _render(record: Record, tokenizer: PreTrainedTokenizerBase, *, answer: str | None) -> str:
    if tokenizer.chat_template is None:
        raise InputError(
            f"Record {record.id} is a conversation, but the tokenizer has no chat template: "
            "use a chat model's tokenizer, or data with plain text."
        )
    messages: list[dict[str, Any]] = [dict(message) for message in record.prompt]  # type: ignore[arg-type]
    if answer is not None:
        messages.append({"role": "assistant", "content": answer})
    try:
        return str(tokenizer.apply_chat_template(messages, add_generation_prompt=answer is None, tokenize=False))
    except (TemplateError, ValueError, TypeError) as error:
        raise InputError(f"Record {record.id}: the tokenizer's chat template refuses it ({error}).") from None


def _values(record: Record, name: str) -> torch.Tensor | None:
    values = [getattr(completion, name) for completion in record.completions]
    if not values or any(value is None for value in values):
        return None
    return torch.tensor(values, dtype=torch.float32)


def _too_short(record: Record, part: str, tokens: int, name: str, limit: int) -> InputError:
    return InputError(
        f"Record {record.id}: its sampled {part} has {tokens} tokens, more than {name} = {limit}; cutting it would "
        f"make its log-probability wrong, so raise {name} or sample again with it."
    )
