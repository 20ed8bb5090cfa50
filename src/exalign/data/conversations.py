"""Chat messages as data sets write them, and the prompt that several dialogues share."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Sequence
from typing import Any

from exalign.data.record import Prompt

HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
"""The turn markers of Anthropic's dialogues."""

_SHAREGPT_ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system"}


def clean_text(value: Any, name: str, counts: Counter[str]) -> str:
    """`value` as text that can be stored; `ValueError` where it is not text.

    Lone surrogates, which JSON can spell but UTF-8 cannot, become U+FFFD and are counted.

    >>> clean_text("a\\ud800b", "prompt", counts := Counter()), counts["lone_surrogates_replaced"]
    ('a\ufffdb', 1)
    """
    if not isinstance(value, str):
        raise ValueError(f"`{name}` must be text, but is {_kind(value)}.")
    if value.isascii():
        return value
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        counts["lone_surrogates_replaced"] += 1
        return value.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return value


def clean_messages(value: Any, name: str, counts: Counter[str]) -> tuple[dict[str, str], ...]:
    """A list of messages as `role`/`content` dicts; ShareGPT's `from`/`value` is understood.

    Other keys of a message (tool calls, names) are left out and counted; content that is not text is a `ValueError`.
    """
    if not isinstance(value, Sequence) or isinstance(value, str | bytes) or not value:
        raise ValueError(f"`{name}` must be a list of chat messages, but is {_kind(value)}.")
    return tuple(_message(entry, name, counts) for entry in value)


def _message(entry: Any, name: str, counts: Counter[str]) -> dict[str, str]:
    if not isinstance(entry, dict):
        raise ValueError(f"`{name}` must hold messages with `role` and `content`, but holds {_kind(entry)}.")
    if "from" in entry and "value" in entry:
        role, content, used = _sharegpt_role(entry["from"]), entry["value"], {"from", "value"}
    else:
        role, content, used = entry.get("role"), entry.get("content"), {"role", "content"}
    if any(extra is not None for key, extra in entry.items() if key not in used):
        counts["messages_with_other_keys"] += 1
    return {
        "role": clean_text(role, f"{name}.role", counts),
        "content": clean_text(content, f"{name}.content", counts),
    }


def _sharegpt_role(name: Any) -> Any:
    return _SHAREGPT_ROLES.get(name, name) if isinstance(name, str) else name


def clean_prompt(value: Any, name: str, counts: Counter[str]) -> Prompt:
    """A prompt: text as it is, or a list of messages."""
    return clean_text(value, name, counts) if isinstance(value, str) else clean_messages(value, name, counts)


def clean_answer(value: Any, name: str, counts: Counter[str]) -> str:
    """A completion: text as it is, or the content of a list with exactly one assistant message."""
    if isinstance(value, str):
        return clean_text(value, name, counts)
    messages = clean_messages(value, name, counts)
    if len(messages) != 1 or messages[0]["role"] != "assistant":
        roles = ", ".join(message["role"] for message in messages)
        raise ValueError(f"`{name}` must be one assistant message, but has the roles {roles}.")
    return messages[0]["content"]


def shared_prompt(texts: Sequence[str]) -> tuple[str, list[str]] | None:
    """Split dialogues into their common prompt, up to its last `\\n\\nAssistant:`, and what each says after it.

    None where the dialogues part before that: where none of their assistant turns has the same past, or where the
    person's side goes on after they part, which would make words of the person part of a completion.

    >>> shared_prompt(["\\n\\nHuman: Hi\\n\\nAssistant: Hello!", "\\n\\nHuman: Hi\\n\\nAssistant: Hey."])
    ('\\n\\nHuman: Hi\\n\\nAssistant:', [' Hello!', ' Hey.'])
    """
    position = os.path.commonprefix(list(texts)).rfind(ASSISTANT)  # noqa: RUF071 - by character is what is meant
    if position < 0:
        return None
    end = position + len(ASSISTANT)
    answers = [text[end:] for text in texts]
    return None if any(HUMAN in answer for answer in answers) else (texts[0][:end], answers)


def shared_messages(dialogues: Sequence[tuple[dict[str, str], ...]]) -> tuple[Prompt, list[str]] | None:
    """Split conversations that differ in their last (assistant) message only; None where they part before."""
    prompt = dialogues[0][:-1]
    if any(dialogue[:-1] != prompt or dialogue[-1]["role"] != "assistant" for dialogue in dialogues):
        return None
    return prompt, [dialogue[-1]["content"] for dialogue in dialogues]


def _kind(value: Any) -> str:
    return "missing (null)" if value is None else f"{type(value).__name__} {str(value)[:40]!r}"
