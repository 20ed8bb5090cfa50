"""Which file of human judgements is which, and what a pair of them becomes."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest

from exalign.errors import InputError
from exalign.judging.comparisons import Comparison, write_comparisons
from exalign.judging.grading import read_human


def write_rows(path: Path, *rows: dict) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def talk(answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": "Q"}, {"role": "assistant", "content": answer}]


def test_published_sets_are_known_by_their_columns(tmp_path):
    bench = {"question_id": 81, "model_a": "m1", "model_b": "m2", "winner": "model_b", "judge": "expert_1", "turn": 1}
    bench |= {"conversation_a": talk("one"), "conversation_b": talk("two")}
    (found,) = read_human(write_rows(tmp_path / "bench.jsonl", bench), Counter())
    assert (found.first, found.second, found.verdict, found.judge) == ("m1", "m2", "second", "expert_1")

    summaries = [{"text": "one", "policy": "ppo"}, {"text": "two", "policy": "ref"}]
    row = {"info": {"id": "t3", "post": "P"}, "summaries": summaries, "choice": 0, "worker": "w", "note": ""}
    (found,) = read_human(write_rows(tmp_path / "feedback.jsonl", row), Counter())
    assert (found.first, found.second, found.verdict, found.judge) == ("ppo", "ref", "first", "w")

    ours = Comparison("1", "P", "exo", "sft", "one", "two", "ann", "tie")
    write_comparisons(tmp_path / "ours.jsonl", [ours])
    assert read_human(tmp_path / "ours.jsonl", Counter()) == [ours]


def test_the_winner_of_a_preference_set_does_not_always_come_first(tmp_path):
    rows = [{"prompt": f"Q{i}", "chosen": f"yes {i}", "rejected": f"no {i}"} for i in range(40)]
    found = read_human(write_rows(tmp_path / "pairs.jsonl", *rows), Counter())
    assert 10 <= sum(c.verdict == "first" for c in found) <= 30
    assert {(c.first, c.second) for c in found} == {("one", "other")}
    winners = [c.first_text if c.verdict == "first" else c.second_text for c in found]
    assert winners == [row["chosen"] for row in rows]


def test_a_file_without_judged_pairs_is_one_sentence(tmp_path):
    path = write_rows(tmp_path / "rollouts.jsonl", {"prompt": "Q", "completions": ["a", "b"], "rewards": [1.0, 0.0]})
    with pytest.raises(InputError, match="no pair that somebody judged: 1 rows"):
        read_human(path, Counter())
    with pytest.raises(InputError, match="does not exist"):
        read_human(tmp_path / "absent.jsonl", Counter())
