"""Published human-labelled comparisons as `Comparison` records, so that a judge can be graded against people.

Each reader takes rows as dicts, as `datasets` yields them. Preference pairs in any format that `data/shapes.py`
reads come in through their `Record`s. None of these sets says which answer stood on the left; `left` stays None.
What is left out is counted in `counts`.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from exalign.data.record import Record
from exalign.errors import InputError
from exalign.judging.comparison import Comparison, Verdict

_MT_BENCH: dict[str, Verdict] = {"model_a": "first", "model_b": "second", "tie": "tie"}


def from_preference_records(records: Iterable[Record], *, judge: str, counts: Counter[str]) -> Iterator[Comparison]:
    """Records with a preferred completion: it against each of the others of its prompt.

    The systems are called `completion_i` after the position in the record. Records without a preference, and
    completions whose text equals the preferred one's, are left out: `no_preference`, `identical_pair`.

    >>> from exalign.data.record import Completion
    >>> pair = Record("0", "Hi", (Completion("Hello."), Completion("Go away.")), preferred=0)
    >>> [(c.first_text, c.second_text, c.verdict) for c in from_preference_records([pair], judge="p", counts=Counter())]
    [('Hello.', 'Go away.', 'first')]
    """
    for record in records:
        if record.preferred is None:
            counts["no_preference"] += 1
            continue
        best = record.completions[record.preferred]
        for i, other in enumerate(record.completions):
            if i == record.preferred:
                continue
            if other.text == best.text:
                counts["identical_pair"] += 1
                continue
            names = sorted([(record.preferred, best.text), (i, other.text)])
            (first, first_text), (second, second_text) = names
            yield Comparison(
                prompt_id=record.id,
                prompt=record.prompt,
                first=f"completion_{first}",
                second=f"completion_{second}",
                first_text=first_text,
                second_text=second_text,
                judge=judge,
                verdict="first" if record.preferred == first else "second",
            )


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
            verdicts: dict[int, Verdict] = {0: "first", 1: "second"}
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
                verdict=verdicts[choice],
                comment=row.get("note") or None,
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise InputError(f"Row {number} is not a comparison of two summaries ({error!r}).") from None
        if comparison.first_text == comparison.second_text:
            counts["identical_pair"] += 1
            continue
        yield comparison


def _answers(conversation: list[Mapping[str, str]], turn: int) -> str:
    """The model's answers up to the judged turn, in order."""
    answers = [message["content"] for message in conversation if message["role"] == "assistant"][:turn]
    if len(answers) < turn:
        raise ValueError(f"{len(answers)} answers, but turn {turn} was judged")
    return "\n\n".join(answers)
