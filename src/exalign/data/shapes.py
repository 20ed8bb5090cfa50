"""What the columns of a data source mean: the one place that knows the column names and layouts of the ecosystem.

| columns with content | become |
|---|---|
| `chosen`, `rejected`, (`prompt` or `messages`) | K = 2, `preferred` = 0; the prompt may be what both begin with |
| `completions`, (`prompt` or `messages`), (`rewards`, `ranks` or `preferred`) | K-wise |
| `prompt` that is a tree of `replies` | one K-wise record for every turn of the person's that was answered |
| `prompt`, `completion`, (`label`) | K = 1 |
| `messages` (or `conversations`) | K = 1: the last assistant message; without one, a prompt only |
| `prompt` | K = 0, a prompt to sample for |
| `text`, (`label`) | K = 1 with an empty prompt, or the first `prompt_tokens` tokens as the prompt |

Beside each of them, `system` is the first message, `tools` what the chat template is told, `weight` the row's weight in
the loss. Prompts, completions and sides may be text, a chat message or a list of them, or such a list as JSON text.

One `Shape` holds for a whole source and is decided by what its first rows agree on, never by a single row. Null is
absence, and so is an empty text where other rows have one. What a row has and the shape does not use is counted.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

import jmespath
from jmespath.visitor import TreeInterpreter

from exalign.data.record import Completion, Prompt, Record
from exalign.storage import whole_characters

COLUMNS = (
    "prompt", "system", "tools", "completion", "completions", "rewards", "ranks", "preferred", "chosen", "rejected",
    "messages", "text", "label", "weight",
)  # fmt: skip
"""The columns that have a meaning here."""

TIE = "tie"
HUMAN, ASSISTANT = "\n\nHuman:", "\n\nAssistant:"
"""The turn markers of Anthropic's dialogues."""

Values = Mapping[str, Any]
Message = dict[str, Any]
Parts = tuple[Prompt, tuple[Completion, ...], int | None]
"""Prompt, completions, preferred."""

_ACCEPTED = (
    "prompt+chosen+rejected, chosen+rejected, prompt+completions+rewards, prompt+completion, messages, prompt, or text"
)
_KINDS: tuple[tuple[str, set[str], set[str]], ...] = (
    ("pair", {"chosen", "rejected"}, {"prompt", "messages"}),
    ("group", {"completions"}, {"prompt", "messages", "rewards", "ranks", "preferred"}),
    ("single", {"prompt", "completion"}, {"label"}),
    ("messages", {"messages"}, {"label"}),
    ("prompt", {"prompt"}, set()),
    ("text", {"text"}, {"label"}),
)
"""Each kind with the columns it needs and those it may use; the first that fits is taken."""
_ANSWERS = {"chosen", "rejected", "completion", "completions"}
_SAID = ("prompt", "messages", "completion", "chosen", "rejected")
_LISTED = ("completions", "rewards", "ranks")
_ROLES = {"human": "user", "prompter": "user", "gpt": "assistant", "model": "assistant"}
_ROLES |= {"observation": "tool", "function": "tool"}
_KEYS = ("role", "content", "from", "value", "function_call")
_MESSAGE_KEYS = ("tool_calls", "tool_call_id", "name", "reasoning_content")
"""What a message may have beside role and content, for the chat template."""
_PYTHON_MESSAGES = re.compile(
    r"\s*\[?\s*\{\s*'(role'.*'content|content'.*'role|from'.*'value|value'.*'from)'", re.DOTALL
)
_MAX_UNUSED = 100
"""Unused columns that are counted by name."""


class Dropped(Exception):  # noqa: N818 - a row that says nothing is no error
    """A row that is left out; its argument is the name under which it is counted."""


class Shape:
    """How the rows of one source become records, decided from the first ones.

    `columns` names ours, theirs: a column, or a JMESPath expression over the row, whose lists keep their nulls, so that
    two lists of one row stay aligned. `labels` says what values of `preferred`, `label` and `rewards` mean.
    `ValueError` where the rows have no shape, or `columns` asks for what is not there.

    >>> rows = [{"question": "Hi", "answers": [{"text": "Hello.", "score": 2}, {"text": "Go away.", "score": -1}]}]
    >>> columns = {"prompt": "question", "completions": "answers[].text", "rewards": "answers[].score"}
    >>> shape = Shape(rows, columns, {})
    >>> [(record.prompt, record.rewards) for record in shape.records("0", rows[0], Counter())]
    [('Hi', [2.0, -1.0])]
    """

    def __init__(self, rows: Sequence[Values], columns: Mapping[str, str], labels: Mapping[str, float | str]) -> None:
        self.labels = {spelled(name): meaning for name, meaning in labels.items()}
        self._columns, named = _readers(rows, columns)
        self._json: set[str] = set()
        views = [self._view(row) for row in rows]
        self._json = {name for name in (*_SAID, *_LISTED) if _all_json(name, views)}
        views = [self._view(row) for row in rows]
        self.present: set[str] = set().union(*views)
        self.kind, self.used = _kind(self.present, rows, columns)
        if "rewards" in self.used:
            self.used = self.used - {"ranks"}
        if labels and not self.used & {"preferred", "label", "rewards", "ranks"}:
            raise ValueError("`labels` says what values of a preference, label or reward mean, and there is none here.")
        if idle := sorted(columns.keys() - self.used):
            beside = ", ".join(sorted(self.used - {"system", "tools", "weight"}))
            raise ValueError(f"`columns` names {idle[0]}, which has no content here or no use beside {beside}.")
        views = [{name: value for name, value in view.items() if name in self.used} for view in views]
        if self.kind == "prompt" and any("replies" in view.get("prompt", ()) for view in views if _is_chat(view)):
            self.kind = "tree"
        lists = [value for view in views for value in view.values() if isinstance(value, list)]
        texts = all(isinstance(value, str) for part in lists for value in part)
        if len(rows) == 1 and 1 < len(lists) == len(views[0]) and texts:
            raise ValueError("it is one row with a list for each column: write one row for each place of the lists.")
        self.chat = self.kind != "text" and any({"system", "tools"} & view.keys() or _is_chat(view) for view in views)
        self.repeated = _answers_repeat_prompt(views)
        self._known = self.used - named.keys()
        self._known |= {root for ours, roots in named.items() if ours in self.used for root in roots}

    def records(self, id: str, values: Values, counts: Counter[str]) -> Iterator[Record]:
        """The records of one row: one, none where it was dropped (and counted), or several of a tree.

        A malformed row is a `ValueError` that says what is wrong. Ids of further records end with `#2`, `#3`, ….
        """
        self._count_unused(values, counts)
        view = self._view(values)
        if strange := sorted(_ANSWERS & (view.keys() - self.present - self.used)):
            raise ValueError(f"it has {', '.join(map(repr, strange))}, which the first rows of its source have not.")
        row = {name: value for name, value in view.items() if name in self.used}
        for number, part in enumerate(_tree(row["prompt"]) if self.kind == "tree" and row else [row], start=1):
            try:
                prompt, completions, preferred = self._parts(part, counts)
                prompt = self._told(prompt, row, counts)
            except Dropped as reason:
                counts[str(reason)] += 1
                continue
            weight, tools = _weight(row.get("weight")), _tools(row.get("tools"), counts)
            name = id if number == 1 else f"{id}#{number}"
            kept = {name: value for name, value in values.items() if name not in self._known and _is_kept(value)}
            # As records of a run keep them: dates and decimals are texts for a reward function whenever it is asked.
            columns = json.loads(json.dumps(kept, default=str)) or None
            yield Record(name, prompt, completions, preferred=preferred, weight=weight, tools=tools, columns=columns)

    def _parts(self, row: Values, counts: Counter[str]) -> Parts:
        if self.kind == "pair":
            return self._pair(row, counts)
        if self.kind in ("group", "tree"):
            return self._group(row, counts)
        if self.kind == "single":
            prompt, (answer,) = self._answered(row, {"completion": row.get("completion", "")}, counts)
            return self._single(prompt, answer, row, counts)
        if self.kind == "messages":
            messages = clean_messages(_needed(row, "messages"), "messages", counts)
            if messages[-1]["role"] != "assistant":
                counts["conversations_without_a_last_answer"] += 1
                return messages, (), None
            return self._single(_past_of(messages), _text_of(messages[-1], counts), row, counts)
        if self.kind == "prompt":
            return clean_prompt(_needed(row, "prompt"), "prompt", counts), (), None
        return self._single("", clean_text(row.get("text", ""), "text", counts), row, counts)

    def _pair(self, row: Values, counts: Counter[str]) -> Parts:
        if "chosen" not in row or "rejected" not in row:
            raise Dropped("pairs_with_empty_side")
        prompt, sides = self._answered(row, {name: row[name] for name in ("chosen", "rejected")}, counts)
        if not all(side.strip() for side in sides):
            raise Dropped("pairs_with_empty_side")
        if sides[0].strip() == sides[1].strip():
            raise Dropped("pairs_equal")
        return prompt, tuple(Completion(side) for side in sides), 0

    def _answered(self, row: Values, answers: Values, counts: Counter[str]) -> tuple[Prompt, list[str]]:
        """The prompt and what each of `answers` says to it: texts, messages, or conversations that bring it along."""
        name = "messages" if "messages" in self.used else "prompt"
        given = None if row.get(name) is None else clean_prompt(row[name], name, counts)
        if name == "messages" and given and not isinstance(given, str) and given[-1]["role"] == "assistant":
            raise ValueError("`messages` ends with an answer: say in `columns` what of it is the prompt.")
        if any(not isinstance(value, str) for value in answers.values()):
            past, texts = _common_past([_dialogue(value, name, counts) for name, value in answers.items()], counts)
            return _joined(given, past), texts
        texts = [clean_text(value, name, counts) for name, value in answers.items()]
        if given is None and any(ASSISTANT in text for text in texts):
            return shared_prompt(texts)
        if given is None and name in self.present:
            raise Dropped("rows_without_prompt")
        if given is None and self.kind != "single":
            raise ValueError(
                f"it has no `prompt`, and its answers are texts without {ASSISTANT!r} to find it by: give it a column "
                "of its own; `columns` says what that is called, as columns.prompt=question."
            )
        return given or "", self._without_prompt(given or "", texts, counts)

    def _without_prompt(self, prompt: Prompt, texts: list[str], counts: Counter[str]) -> list[str]:
        """The answers without the prompt in front, where the source repeats it there."""
        if not prompt or not isinstance(prompt, str) or not all(text.startswith(prompt) for text in texts):
            if self.repeated:
                counts["answers_without_their_prompt"] += 1
            return texts
        if not self.repeated:
            counts["answers_that_begin_with_their_prompt"] += 1
            return texts
        counts["prompts_taken_off_answers"] += 1
        return [text[len(prompt) :] for text in texts]

    def _group(self, row: Values, counts: Counter[str]) -> Parts:
        found = _list(_needed(row, "completions"), "completions")
        rewards = self._rewards(row, len(found))
        places = [i for i, text in enumerate(found) if text is not None and (rewards is None or rewards[i] is not None)]
        if empty := sum(isinstance(found[i], str) and not found[i].strip() for i in places):
            counts["answers_that_end_at_once"] += empty  # answers that end at once
        if len(places) < len(found):
            counts["completions_left_out"] += len(found) - len(places)
        if not places:
            raise Dropped("rows_without_completions")
        compared = rewards is not None or "preferred" in self.used
        if len(places) == 1 and (self.kind == "tree" or (compared and len(found) > 1)):
            raise Dropped("rows_with_one_completion_left")
        prompt, texts = self._answered(row, {f"completions[{i}]": found[i] for i in places}, counts)
        kept = [None if rewards is None else rewards[place] for place in places]
        preferred = None
        if "preferred" in self.used:
            winner = self._winner(row.get("preferred"), len(found))
            if winner is not None and winner not in places:
                raise Dropped("rows_without_preference")
            preferred = None if winner is None else places.index(winner)
            kept = [0.0] * len(kept) if winner is None and rewards is None else kept
        if len(kept) > 1 and preferred is None and kept[0] is not None and len(set(kept)) == 1:
            counts["ties"] += 1
        return prompt, tuple(Completion(t, reward=r) for t, r in zip(texts, kept, strict=True)), preferred

    def _rewards(self, row: Values, number: int) -> list[float | None] | None:
        """A reward for each completion, None where it has none; of ranks (the best is the smallest) the negatives."""
        name = "rewards" if "rewards" in row else "ranks"
        if name not in row:
            if not self.used.isdisjoint({"rewards", "ranks"}):
                raise Dropped("rows_without_rewards")
            return None
        values = _list(row[name], name)
        if len(values) != number:
            raise ValueError(f"it has {number} completions but {len(values)} {name}.")
        where = name.removesuffix("s")
        numbers = [None if v is None else self._number(v, f"{where} {i}") for i, v in enumerate(values, start=1)]
        return numbers if name == "rewards" else [None if value is None else 0.0 - value for value in numbers]

    def _winner(self, value: Any, number: int) -> int | None:
        """The place of the preferred completion, None for a tie."""
        if value is None:
            raise Dropped("rows_without_preference")
        meaning = spelled(self.labels.get(spelled(value), value))
        if meaning == TIE and spelled(value) in self.labels:
            return None
        if not meaning.isdecimal() or len(meaning) > 9 or int(meaning) >= number:
            raise ValueError(
                f"`preferred` is {str(value)[:40]!r}, which is no place among {number} completions (counted from 0): "
                "say in `labels` what its values mean, as in {model_a: 0, model_b: 1, tie: tie}."
            )
        return int(meaning)

    def _number(self, value: Any, name: str) -> float:
        number = _finite(self.labels.get(spelled(value), value))
        if number is None:
            raise ValueError(f"{name} must be a finite number, but is {value!s:.40}.")
        return number

    def _single(self, prompt: Prompt, text: str, row: Values, counts: Counter[str]) -> Parts:
        if not text.strip():
            raise Dropped("empty_completions")
        return prompt, (Completion(text, reward=self._label(row.get("label"), counts)),), None

    def _label(self, value: Any, counts: Counter[str]) -> float | None:
        """A label of 0 or 1 however it is spelled, or one that `labels` knows, as a reward; others are counted."""
        name = spelled(value)
        if value is None or name in self.labels or name in ("0", "1", "false", "true"):
            value = value if name in self.labels else {"false": 0, "true": 1}.get(name, value)
            return None if value is None else self._number(value, "label")
        counts["labels_left_out"] += 1
        return None

    def _told(self, prompt: Prompt, row: Values, counts: Counter[str]) -> Prompt:
        """The prompt as messages where the source is a chat, with the row's system message in front."""
        if isinstance(prompt, str):
            chat = self.chat or not {"system", "tools"}.isdisjoint(row)
            prompt = ({"role": "user", "content": prompt},) if chat else prompt
        if "system" not in row:
            return prompt
        system = {"role": "system", "content": clean_text(row["system"], "system", counts)}
        if prompt and prompt[0]["role"] == "system":  # type: ignore[index]
            if prompt[0] != system:
                raise ValueError("it has a `system` column, and its messages begin with another system message.")
            return prompt
        return (system, *prompt)

    def _view(self, values: Values) -> dict[str, Any]:
        """The row under our names, without what has no content, JSON text read where the source writes so."""
        row = {name: values[name] for name in (*COLUMNS, "conversations") if name in values}
        if "conversations" in row and not has_content(row.get("messages")):
            row["messages"] = row["conversations"]
        for ours, read in self._columns.items():
            try:
                row[ours] = read(values)
            except (ValueError, RecursionError) as error:
                raise ValueError(f"`columns` cannot read {ours} ({' '.join(str(error).split())[:200]}).") from None
        row = {name: value for name, value in row.items() if has_content(value) and name != "conversations"}
        return {name: _parsed(value) if name in self._json else value for name, value in row.items()}

    def _count_unused(self, values: Values, counts: Counter[str]) -> None:
        for name, value in values.items():
            if name not in self._known and has_content(value):
                what = "kept beside" if _is_kept(value) else "not used"
                key = "".join(c if c.isprintable() else "?" for c in f"column {name[:60]} {what}")
                few = key in counts or sum(k.startswith("column ") for k in counts) < _MAX_UNUSED
                counts[key if few else f"other columns {what}"] += 1


def has_content(value: Any) -> bool:
    """Whether a value says anything: null, an empty text, and a list of nothing but nulls do not."""
    if isinstance(value, list | tuple):
        return any(entry is not None for entry in value)
    return value is not None and value != "" and value != {}


def spelled(value: Any) -> str:
    """A value as a label, whatever its type: `1`, `1.0` and `"1"` are one, so are `True` and `"true"`."""
    text = str(value).strip()
    text = text.lower() if text in ("True", "False") else text
    return text[:-2] if re.fullmatch(r"-?\d+\.0", text) else text


class _Aligned(TreeInterpreter):
    """JMESPath, but a list keeps a null where a projection finds nothing: lists of one row stay aligned."""

    def visit_projection(self, node: dict[str, Any], value: Any) -> Any:
        base = self.visit(node["children"][0], value)
        return [self.visit(node["children"][1], entry) for entry in base] if isinstance(base, list) else None


def _readers(
    rows: Sequence[Values], columns: Mapping[str, str]
) -> tuple[dict[str, Callable[[Values], Any]], dict[str, set[str]]]:
    """How each of our columns is read, and which of theirs it reads."""
    names: dict[str, None] = {name: None for row in rows for name in row}
    readers: dict[str, Callable[[Values], Any]] = {}
    named = {"messages": {"messages", "conversations"}}
    for ours, theirs in columns.items():
        if theirs in names:
            readers[ours], named[ours] = (lambda row, name=theirs: row.get(name)), {theirs}  # type: ignore[misc]
            continue
        problem = ""
        try:
            parsed = jmespath.compile(theirs).parsed
            named[ours] = set(names) if (roots := _roots(parsed)) is None else roots
        except (ValueError, RecursionError) as error:  # those of jmespath are `ValueError`s
            problem = f" (nor is it JMESPath: {' '.join(str(error).split())[:120]})"
        if problem or not named[ours] <= names.keys():
            missing = theirs if problem else ", ".join(sorted(named[ours] - names.keys()))
            found = ", ".join(map(repr, names))
            raise ValueError(
                f"`columns` asks for a column {missing[:100]!r}{problem}, but its columns are {found:.500}."
            )
        readers[ours] = lambda row, parsed=parsed: _Aligned().visit(parsed, row)  # type: ignore[misc]
    return readers, named


_FIRST_CHILD = ("subexpression", "index_expression", "pipe", "projection", "value_projection", "filter_projection")


def _roots(node: dict[str, Any]) -> set[str] | None:
    """The columns that an expression reads; None for all of them."""
    if node["type"] == "field":
        return {node["value"]}
    if node["type"] in ("current", "identity"):
        return None
    if node["type"] == "expref":  # read from what the function is given beside it, as in max_by(answers, &score)
        return set()
    children = node["children"][:1] if node["type"] in _FIRST_CHILD else node["children"]
    found = [_roots(child) for child in children if isinstance(child, dict)]
    return None if None in found else set().union(*found)  # type: ignore[arg-type]


def _kind(present: set[str], rows: Sequence[Values], columns: Mapping[str, str]) -> tuple[str, set[str]]:
    """The first kind whose columns have content and that can use what `columns` names; and the columns that it uses."""
    beside = {"system", "tools", "weight"}
    for kind, needed, more in _KINDS:
        usable = needed | more | beside
        if not needed <= present or not (columns.keys() & present <= usable):
            continue
        if kind in ("pair", "group", "single") or not _ANSWERS & present:
            more = more & present - ({"messages"} if "prompt" in present else set())
            return kind, needed | more | ({"weight"} if kind == "text" else beside)
    empty_prompt = "completion" in present and any(row.get("prompt") == "" for row in rows)
    if empty_prompt and not present & {"chosen", "rejected", "completions"}:
        return "single", {"prompt", "completion", "label", "weight", "system", "tools"}
    names = list({name: None for row in rows for name, value in row.items() if has_content(value)})
    hint = ""
    for name, value in rows[0].items() if len(rows) == 1 else ():
        if name not in COLUMNS and isinstance(value, list) and value and isinstance(value[0], dict):
            hint = f" Its only row has a list of {len(value)} objects in {name!r}: write each as a row of its own."
    raise ValueError(
        f"its columns with content are {', '.join(map(repr, names))[:500] or 'none'}, "
        f"but needed are {_ACCEPTED}; `columns` renames (columns.prompt=question).{hint}"
    )


def _is_kept(value: Any) -> bool:
    """Whether a column that nothing is made of stays with the record, for reward functions: pictures do not."""
    inner = value.values() if isinstance(value, dict) else (value,)
    return has_content(value) and not any(isinstance(part, bytes) for part in inner)


def _is_chat(view: Values) -> bool:
    said = [view.get("prompt"), view.get("messages"), *_answers(view)]
    return any(isinstance(value, list | tuple | Mapping) for value in said)


def _answers(view: Values) -> list[Any]:
    several = view.get("completions")
    single = [view[name] for name in ("chosen", "rejected", "completion") if name in view]
    return [*single, *(several if isinstance(several, list | tuple) else ())]


def _answers_repeat_prompt(views: Sequence[Values]) -> bool:
    """Whether (nearly) every answer of the source begins with its prompt's text, which then stands there twice."""
    repeated = []
    for view in views:
        prompt, answers = view.get("prompt"), [answer for answer in _answers(view) if answer is not None]
        if isinstance(prompt, str) and answers:
            repeated.append(all(isinstance(answer, str) and answer.startswith(prompt) for answer in answers))
    return len(repeated) > 1 and sum(repeated) >= 0.95 * len(repeated)


def _needed(row: Values, name: str) -> Any:
    if name not in row:
        raise Dropped(f"rows_without_{name}")
    return row[name]


def _parsed(value: Any) -> Any:
    """What a text spells as JSON (or the text, where it spells nothing)."""
    with suppress(ValueError, RecursionError):
        return json.loads(value) if isinstance(value, str) else value
    return value


def _all_json(name: str, views: Sequence[Values]) -> bool:
    """Whether every text in a column is a list as JSON, or what somebody said as messages; there must be one.

    `ValueError` where half of the texts or more are messages, and others are not.
    """
    found = [_parsed(view[name]) for view in views if isinstance(view.get(name), str)]
    if name in _LISTED:
        return bool(found) and all(isinstance(value, list) for value in found)
    said = [[value] if isinstance(value, dict) else value for value in found]
    spelled = sum(map(_are_messages, said))
    if len(said) / 2 <= spelled < len(said):
        raise ValueError(
            f"`{name}` holds chat messages as JSON in {spelled} of the first {len(said)} rows and other text in the "
            "rest: write all of them alike."
        )
    return bool(said) and spelled == len(said)


def _are_messages(value: Any) -> bool:
    """Whether a list is of messages: answers that are JSON may have a `role` or a `from` of their own."""
    if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
        return False
    said = any(not {"content", "value", "tool_calls"}.isdisjoint(entry) for entry in value)
    return said and all(not {"role", "from"}.isdisjoint(entry) for entry in value)


def _list(value: Any, name: str) -> Sequence[Any]:
    value = _parsed(value)
    if not isinstance(value, list | tuple):
        raise ValueError(f"`{name}` must be a list, but is {type(value).__name__}.")
    return value


def _finite(value: Any) -> float | None:
    with suppress(TypeError, ValueError, OverflowError):
        return float(value) if math.isfinite(float(value)) else None
    return None


def _weight(value: Any) -> float | None:
    number = _finite(value)
    if value is not None and (number is None or number < 0):
        raise ValueError(f"`weight` must be a finite number that is not negative, but is {value!s:.40}.")
    return number


def _tools(value: Any, counts: Counter[str]) -> str | None:
    """The tools of a row as JSON, without the nulls by which a table fills its columns."""
    tools = _parsed(value)
    if tools is None:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise ValueError(f"`tools` must be a list of descriptions, or JSON text of one, but is {_said(value)}.")
    return json.dumps(_clean(tools, counts)) if tools else None


def _clean(value: Any, counts: Counter[str]) -> Any:
    """Nested values as JSON has them, without the nulls by which a table fills its columns, their texts as `clean_text`
    has them."""
    if isinstance(value, dict):
        return {_clean(key, counts): _clean(part, counts) for key, part in value.items() if part is not None}
    if isinstance(value, list | tuple):
        return [_clean(part, counts) for part in value]
    return value if value is None or isinstance(value, int | float) else without_surrogates(str(value), counts)


def clean_text(value: Any, name: str, counts: Counter[str]) -> str:
    """`value` as text that can be stored; `ValueError` where it is not text.

    Lone surrogates, which JSON can spell but UTF-8 cannot, become U+FFFD and are counted.

    >>> clean_text("a\\ud800b", "prompt", counts := Counter()), counts["lone_surrogates_replaced"]
    ('a\ufffdb', 1)
    """
    if not isinstance(value, str):
        raise ValueError(f"`{name}` must be text, but is {_said(value)}.")
    if _PYTHON_MESSAGES.match(value):
        raise ValueError(f"`{name}` holds messages as Python prints them, not as JSON: write it with json.dumps.")
    return without_surrogates(value, counts)


def without_surrogates(value: str, counts: Counter[str]) -> str:
    try:
        value.encode("utf-8")
    except UnicodeEncodeError:
        counts["lone_surrogates_replaced"] += 1
        return whole_characters(value)
    return value


def clean_messages(value: Any, name: str, counts: Counter[str]) -> tuple[Message, ...]:
    """A list of messages (or one) as `role`/`content` dicts; ShareGPT's `from`/`value` is understood.

    Tool calls, names and reasoning stay for the chat template; other keys of a message are left out and counted.
    """
    entries = [value] if isinstance(value, Mapping) else value
    if not isinstance(entries, Sequence) or isinstance(entries, str | bytes) or not any(map(has_content, entries)):
        texts = "" if isinstance(value, str | Sequence | Mapping) else "text or "
        raise ValueError(f"`{name}` must be {texts}a list of chat messages, but is {_said(value)}.")
    return tuple(_message(entry, name, counts) for entry in entries if entry is not None)


def _message(entry: Any, name: str, counts: Counter[str]) -> Message:
    if not isinstance(entry, Mapping):
        raise ValueError(f"`{name}` must hold messages with `role` and `content`, but holds {_said(entry)}.")
    role, content = entry.get("role"), entry.get("content")
    if role is None:
        role, content = entry.get("from"), entry.get("value")
    more = {key: _clean(entry[key], counts) for key in _MESSAGE_KEYS if has_content(entry.get(key))}
    if role == "function_call":
        role, content, more["tool_calls"] = "assistant", None, _calls(content, name)
    elif has_content(called := entry.get("function_call")):  # OpenAI's of old
        more["tool_calls"] = _calls(_clean(called, counts), name)
    if any(has_content(part) for key, part in entry.items() if key not in (*_KEYS, *_MESSAGE_KEYS)):
        counts["messages_with_other_keys"] += 1
    role = clean_text(role, f"{name}.role", counts)
    role = _ROLES.get(role, role)
    if content is None and ("tool_calls" in more or (role == "assistant" and {"content", "value"} & entry.keys())):
        content = ""  # an answer that is null is one that is empty
    return {"role": role, "content": _content(content, f"{name}.content", counts), **more}


def _calls(content: Any, name: str) -> list[Message]:
    found = _parsed(content)
    calls = found if isinstance(found, list) and found else [found]
    if not all(isinstance(call, dict) and isinstance(call.get("name"), str) for call in calls):
        raise ValueError(f"`{name}` has a function call that is no JSON object with a name, but {_said(content)}.")
    return [{"type": "function", "function": call} for call in calls]


def _content(value: Any, name: str, counts: Counter[str]) -> str:
    """The text of a message; content in parts is the text of all of them."""
    if not isinstance(value, list | tuple):
        return clean_text(value, name, counts)
    texts = []
    for part in value:
        is_text = isinstance(part, Mapping) and part.get("type", "text") == "text"
        if not is_text and not isinstance(part, str):
            kind = part.get("type") if isinstance(part, Mapping) else _said(part)
            raise ValueError(f"`{name}` has a part of type {str(kind)[:40]!r}, but only text can be read.")
        texts.append(clean_text(part.get("text") if is_text else part, name, counts))
    return "".join(texts)


def clean_prompt(value: Any, name: str, counts: Counter[str]) -> Prompt:
    return clean_text(value, name, counts) if isinstance(value, str) else clean_messages(value, name, counts)


def _text_of(message: Message, counts: Counter[str]) -> str:
    """What an answer says; the reasoning that stands beside it is no part of it, and counted."""
    if "tool_calls" in message:
        raise Dropped("answers_that_call_tools")
    if "reasoning_content" in message:
        counts["answers_without_their_reasoning"] += 1
    return str(message["content"])


def _past_of(messages: tuple[Message, ...]) -> tuple[Message, ...]:
    """All but the answer at the end, which stands behind no other one."""
    past = messages[:-1]
    if past and past[-1]["role"] == "assistant" and "tool_calls" not in past[-1]:
        raise Dropped("conversations_with_two_answers_in_a_row")
    return past


def _dialogue(value: Any, name: str, counts: Counter[str]) -> tuple[Message, ...]:
    if isinstance(value, str):
        return ({"role": "assistant", "content": clean_text(value, name, counts)},)
    messages = clean_messages(value, name, counts)
    if messages[-1]["role"] == "assistant":
        return messages
    if len(messages) > 1:
        raise Dropped("conversations_without_an_answer")
    raise ValueError(f"`{name}` must be an assistant message, but has the role {messages[0]['role'][:40]}.")


def _common_past(
    dialogues: Sequence[tuple[Message, ...]], counts: Counter[str]
) -> tuple[tuple[Message, ...], list[str]]:
    """Split conversations that differ in their last message only; one that parts before is dropped."""
    past = _past_of(dialogues[0])
    if any(dialogue[:-1] != past for dialogue in dialogues):
        raise Dropped("pairs_without_common_prompt")
    return past, [_text_of(dialogue[-1], counts) for dialogue in dialogues]


def _joined(given: Prompt | None, past: tuple[Message, ...]) -> Prompt:
    """The whole conversation of a given prompt and what the answers begin with, each turn once.

    The answers may repeat the prompt or its last turns, go on from it, or bring more than it (a system message). Where
    none holds, the two are different conversations, and the row is dropped.

    >>> user, model = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello."}
    >>> _joined((user,), (user,)) == (user,), _joined("Hi", (model, user)) == (user, model, user)
    (True, True)
    """
    if given is None:
        if not past:
            raise ValueError("it has no `prompt`, and its answers begin with none.")
        return past
    told = ({"role": "user", "content": given},) if isinstance(given, str) else given
    said, heard = ([(m["role"], m["content"].strip()) for m in messages] for messages in (told, past))
    goes_on = not heard or (heard[0][0] == "assistant" and said[-1][0] != "assistant")
    if not goes_on and any(heard[start : start + len(said)] == said for start in range(len(heard))):
        return past
    for overlap in range(min(len(said), len(heard)), 0, -1):
        if said[-overlap:] == heard[:overlap]:
            return told + past[overlap:]
    if goes_on:
        return told + past
    raise Dropped("pairs_without_common_prompt")


def shared_prompt(texts: Sequence[str]) -> tuple[str, list[str]]:
    """Split dialogues into their common prompt, up to its last `\\n\\nAssistant:`, and what each says after it.

    Dropped where the dialogues part before that: where none of their assistant turns has the same past, or where the
    person's side goes on after they part, which would make words of the person part of a completion.

    >>> shared_prompt(["\\n\\nHuman: Hi\\n\\nAssistant: Hello!", "\\n\\nHuman: Hi\\n\\nAssistant: Hey."])
    ('\\n\\nHuman: Hi\\n\\nAssistant:', [' Hello!', ' Hey.'])
    """
    position = os.path.commonprefix(list(texts)).rfind(ASSISTANT)  # noqa: RUF071 - by character is what is meant
    end = position + len(ASSISTANT)
    answers = [text[end:] for text in texts]
    if position < 0 or any(HUMAN in answer for answer in answers):
        raise Dropped("pairs_without_common_prompt")
    return texts[0][:end], answers


def as_messages(record: Record, counts: Counter[str]) -> Record:
    """A prompt that is text as chat messages: one of the user, or one for each turn of HH's (`HUMAN`, `ASSISTANT`).

    White space around turns goes, of their answers too; one message is the prompt as it is. What was read how is
    counted; turns out of order stay text.

    >>> record = Record("0", "\\n\\nHuman: Hi\\n\\nAssistant: Yes?\\n\\nHuman: Go on.\\n\\nAssistant:")
    >>> [f"{message['role']}: {message['content']}" for message in as_messages(record, Counter()).prompt]
    ['user: Hi', 'assistant: Yes?', 'user: Go on.']
    >>> as_messages(Record("0", "Go on."), Counter()).prompt
    ({'role': 'user', 'content': 'Go on.'},)
    """
    if not isinstance(record.prompt, str) or not record.prompt.strip():
        return record
    start, *turns = re.split(f"({HUMAN}|{ASSISTANT})", record.prompt)
    markers, said = turns[::2], [text.strip() for text in turns[1::2]]
    if not said:
        counts["prompts_read_as_a_message"] += 1
        return replace(record.as_texts(), prompt=({"role": "user", "content": record.prompt},))
    if start.strip() or markers != [HUMAN, ASSISTANT] * (len(said) // 2) or said[-1]:
        counts["prompts_of_turns_out_of_order"] += 1
        return record
    counts["prompts_read_as_dialogues"] += 1
    prompt = tuple({"role": ("user", "assistant")[n % 2], "content": text} for n, text in enumerate(said[:-1]))
    answers = tuple(replace(completion, text=completion.text.strip()) for completion in record.completions)
    return replace(record, prompt=prompt, completions=answers).as_texts()


def _tree(root: Any) -> Iterator[Values]:
    """A conversation with several answers to each turn, as rows: every turn of the person's with its ranked answers."""
    open_turns: list[tuple[Any, list[Message]]] = [(root, [])]
    while open_turns:
        node, past = open_turns.pop(0)
        if not isinstance(node, Mapping) or not isinstance(node.get("replies") or [], list):
            raise ValueError(f"`prompt` must be a tree of messages with `replies`, but holds {_said(node)}.")
        replies = [r for r in node.get("replies") or [] if isinstance(r, Mapping) and not r.get("deleted")]
        past = [*past, {"role": node.get("role"), "content": node.get("text")}]
        if replies and node.get("role") != "assistant":
            ranks = [reply.get("rank") for reply in replies]
            yield {"prompt": past, "completions": [reply.get("text") for reply in replies], "ranks": ranks}
        open_turns.extend((reply, past) for reply in replies)


def _said(value: Any) -> str:
    return "missing (null)" if value is None else f"{type(value).__name__} {str(value)[:40]!r}"
