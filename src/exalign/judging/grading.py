"""The human-labelled sets that a judge is graded on.

Each reader of a published set takes rows as dicts, as `datasets` yields them. Preference pairs in any format that
training reads come in through their `Record`s. None of these sets says which answer stood on the left; `left` stays
None. What is left out is counted in `counts`.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from exalign.data.reading import DataSettings, read_rows, read_source
from exalign.data.record import Record
from exalign.errors import InputError
from exalign.judging.comparisons import Comparison, Verdict, read_comparisons

_CHOICES: dict[int, Verdict] = {0: "first", 1: "second"}
_MT_BENCH: dict[str, Verdict] = {"model_a": "first", "model_b": "second", "tie": "tie"}


def read_human(path: Path, counts: Counter[str]) -> list[Comparison]:
    """Comparisons by people, from whichever of these the file is: our own comparison records, MT-bench judgements,
    comparisons of summaries from feedback, or preference data in any format that training reads.

    Rows of a published set that a model judged are read too; the judge's name says whose they are. What is left
    out is counted. A file with nothing to compare is an `InputError`.
    """
    if not path.exists():
        raise InputError(f"{path} does not exist.")
    if _is_ours(path):
        return read_comparisons(path)
    settings = DataSettings.model_validate({"source": str(path)})
    first = next(read_rows(settings, Counter()), None)
    columns = set() if first is None else set(first.values)
    rows = (row.values for row in read_rows(settings, counts))
    if {"question_id", "winner", "conversation_a"} <= columns:
        found = list(from_mt_bench(rows, counts=counts))
    elif {"info", "summaries", "choice"} <= columns:
        found = list(from_summarize_from_feedback(rows, counts=counts))
    else:
        records = read_source(settings, counts)
        found = list(from_preference_records(records, judge=f"preferences of {path.name}", counts=counts))
    if not found:
        said = ", ".join(f"{value:,} {name.replace('_', ' ')}" for name, value in counts.items()) or "no rows"
        raise InputError(f"{path} holds no pair that somebody judged: {said}.")
    return found


def _is_ours(path: Path) -> bool:
    if not path.name.endswith(".jsonl"):
        return False
    try:
        with path.open(encoding="utf-8") as stream:
            row = json.loads(stream.readline() or "null")
    except (OSError, ValueError):
        return False
    return isinstance(row, dict) and {"version", "verdict", "prompt_id"} <= set(row)


def from_preference_records(records: Iterable[Record], *, judge: str, counts: Counter[str]) -> Iterator[Comparison]:
    """Records with a preferred completion: it against each of the others of its prompt.

    The two are called `one` and `other` by a hash of their texts. A preference set lists the winner first, row after
    row; told so, people would have said the same thing every time, and an agreement beyond chance (kappa, alpha) would
    not exist. Records without a preference, and completions whose text equals the preferred one's, are left out:
    `no_preference`, `identical_pair`.

    >>> from exalign.data.record import Completion
    >>> pair = Record("0", "Hi", (Completion("Hello."), Completion("Go away.")), preferred=0)
    >>> [(c.first_text, c.second_text, c.verdict) for c in from_preference_records([pair], judge="p", counts=Counter())]
    [('Go away.', 'Hello.', 'second')]
    """
    for record in records:
        if record.preferred is None:
            counts["no_preference"] += 1
            continue
        best = record.completions[record.preferred].text
        for i, completion in enumerate(record.completions):
            if completion.text != best:
                first, second = sorted(
                    [best, completion.text],
                    key=lambda text: hashlib.sha256(text.encode("utf-8", "surrogatepass")).digest(),
                )
                verdict: Verdict = "first" if first == best else "second"
                yield Comparison(record.id, record.prompt, "one", "other", first, second, judge, verdict)
            elif i != record.preferred:
                counts["identical_pair"] += 1


def from_mt_bench(rows: Iterable[Mapping[str, Any]], *, counts: Counter[str]) -> Iterator[Comparison]:
    """MT-bench judgements (`lmsys/mt_bench_human_judgments`): question_id, model_a, model_b, winner, judge, turn,
    conversation_a, conversation_b.

    Turn t judges the answers to the t-th question. The prompt is what both models were shown; in turn 2 the models' own
    first answers differ, so each stays in its answer's text. A `winner` of `tie (inconsistent)`, which the set uses
    where a model judge's two orders contradict each other, is a tie; an unknown one is unreadable and counted.
    """
    for number, row in enumerate(rows):
        try:
            turn = int(row.get("turn", 1))
            a, b = row["conversation_a"], row["conversation_b"]
            asked = [message["content"] for message in a if message["role"] == "user"][:turn]
            winner = "tie" if str(row["winner"]).startswith("tie") else str(row["winner"])
            judge = row["judge"]
            comparison = Comparison(
                prompt_id=f"{row['question_id']}-turn-{turn}",
                prompt=asked[0] if turn == 1 else tuple({"role": "user", "content": text} for text in asked),
                first=row["model_a"],
                second=row["model_b"],
                first_text=_answers(a, turn),
                second_text=_answers(b, turn),
                judge=judge if isinstance(judge, str) else "/".join(map(str, judge)),
                verdict=_MT_BENCH.get(winner, "unreadable"),
            )
        except (KeyError, IndexError, TypeError, ValueError) as error:
            raise InputError(f"Row {number} is not an MT-bench judgement ({error!r}).") from None
        if comparison.verdict == "unreadable":
            counts["unknown_winner"] += 1
        yield comparison


def from_summarize_from_feedback(rows: Iterable[Mapping[str, Any]], *, counts: Counter[str]) -> Iterator[Comparison]:
    """TL;DR comparisons (`openai/summarize_from_feedback`, `comparisons`): info.post (or info.article), two summaries
    with text and policy, choice (0 or 1), worker, note.

    Two summaries of one policy get its name with `#1` and `#2`; pairs of equal texts are left out: `identical_pair`.
    """
    for number, row in enumerate(rows):
        try:
            info, (a, b), choice = row["info"], row["summaries"], row["choice"]
            names = [a.get("policy") or "summary_0", b.get("policy") or "summary_1"]
            if names[0] == names[1]:
                names = [f"{names[0]}#1", f"{names[1]}#2"]
            comparison = Comparison(
                prompt_id=str(info["id"]),
                prompt=info.get("post") or info["article"],
                first=names[0],
                second=names[1],
                first_text=a["text"],
                second_text=b["text"],
                judge=str(row["worker"]),
                verdict=_CHOICES[choice],
                comment=row.get("note") or None,
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"Row {number} is not a comparison of two summaries ({error!r}).") from None
        if comparison.first_text == comparison.second_text:
            counts["identical_pair"] += 1
            continue
        yield comparison


def _answers(conversation: list[Mapping[str, str]], turn: int) -> str:
    answers = [message["content"] for message in conversation if message["role"] == "assistant"][:turn]
    if not 1 <= turn <= len(answers):
        raise ValueError(f"{len(answers)} answers, but turn {turn} was judged")
    return "\n\n".join(answers)
