"""The comparison record: what it says does not depend on the order shown, and its file survives a kill."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from itertools import permutations
from typing import get_args

import numpy as np
import pytest
from datasets import load_dataset
from hypothesis import given
from hypothesis import strategies as st

from exalign.data.record import Completion, Record
from exalign.errors import InputError
from exalign.judging.agreement import (
    agreement,
    agreement_between,
    cohen_kappa,
    coincidences,
    krippendorff_alpha,
    pairwise_agreement,
    tally,
)
from exalign.judging.comparisons import (
    CRITERIA,
    Comparison,
    Verdict,
    read_comparisons,
    verdict_from_shown,
    write_comparisons,
)
from exalign.judging.grading import from_mt_bench, from_preference_records, from_summarize_from_feedback

TEXT = st.text(max_size=20)
COMPARISONS = st.builds(
    Comparison,
    prompt_id=st.text("ab12", max_size=4),
    prompt=TEXT | st.lists(st.fixed_dictionaries({"role": TEXT, "content": TEXT}), max_size=3).map(tuple),
    first=st.just("exo"),
    second=st.just("dpo"),
    first_text=TEXT,
    second_text=TEXT,
    judge=TEXT,
    verdict=st.sampled_from(get_args(Verdict)),
    left=st.sampled_from(["first", "second", None]),
    criteria=st.dictionaries(st.sampled_from(CRITERIA), st.sampled_from(get_args(Verdict))),
    reference=st.none() | TEXT,
    comment=st.none() | TEXT,
    answer=st.none() | TEXT,
    prompt_tokens=st.none() | st.integers(0, 10**6),
    seconds=st.none() | st.floats(0, 1e6),
)


def judged(verdict, *, prompt="p", judge="ann", first="exo", second="dpo", **rest) -> Comparison:
    texts = {"first_text": f"{first} {prompt}", "second_text": f"{second} {prompt}"}
    return Comparison(prompt, "Hi", first, second, **texts, judge=judge, verdict=verdict, **rest)


@given(COMPARISONS)
def test_swapping_twice_is_nothing_and_once_changes_no_fact(comparison):
    swapped = comparison.swapped()
    assert swapped.swapped() == comparison
    assert (swapped.key, swapped.pair, swapped.shown_verdict) == (
        comparison.key,
        comparison.pair,
        comparison.shown_verdict,
    )
    assert comparison.oriented("dpo", "exo") == swapped


@pytest.mark.parametrize("left", ["first", "second"])
@pytest.mark.parametrize("shown", ["left", "tie", "right", "unreadable"])
def test_shown_verdict_is_the_inverse_of_verdict_from_shown(shown, left):
    assert judged(verdict_from_shown(shown, left=left), left=left).shown_verdict == shown


def test_key_tells_judges_and_orders_apart_but_not_verdicts():
    base = judged("first", left="first")
    others = [dataclasses.replace(base, judge="bob"), dataclasses.replace(base, left="second")]
    assert len({base.key, *(other.key for other in others)}) == 3
    assert dataclasses.replace(base, verdict="tie", comment="x").key == base.key


def test_a_verdict_that_is_none_of_ours_is_refused(tmp_path):
    for name, wrong in (("verdict", judged("left")), ("fluent", judged("first", criteria={"fluent": "A"}))):
        write_comparisons(tmp_path / "c.jsonl", [wrong])
        with pytest.raises(InputError, match=f"line 1 .*{name}"):
            read_comparisons(tmp_path / "c.jsonl")
    with pytest.raises(InputError, match="must be left, tie, right or unreadable"):
        verdict_from_shown("A", left="first")
    with pytest.raises(InputError, match="exo with dpo"):
        judged("first").oriented("exo", "sft")


@given(st.lists(COMPARISONS, max_size=5))
def test_files_give_back_what_was_written(tmp_path_factory, comparisons):
    path = tmp_path_factory.mktemp("c") / "c.jsonl"
    write_comparisons(path, comparisons)
    assert read_comparisons(path) == comparisons


def test_datasets_reads_the_file(tmp_path):
    write_comparisons(tmp_path / "c.jsonl", [judged("first"), judged("tie", prompt="q", criteria={"fluent": "second"})])
    rows = load_dataset("json", data_files=str(tmp_path / "c.jsonl"), split="train", cache_dir=str(tmp_path / "cache"))
    assert rows["verdict"] == ["first", "tie"]


def test_a_damaged_line_and_another_version_are_named(tmp_path):
    path = tmp_path / "c.jsonl"
    write_comparisons(path, [judged("first")])
    row = json.loads(path.read_text())
    for torn in ("{broken\n", path.read_text()[:-2], path.read_text()[:50]):
        path.write_text(json.dumps(row) + "\n" + torn)
        with pytest.raises(InputError, match="line 2"):
            read_comparisons(path)
    path.write_text(json.dumps({**row, "version": 99}) + "\n")
    with pytest.raises(InputError, match="format 99"):
        read_comparisons(path)
    with pytest.raises(InputError, match="absent"):
        read_comparisons(tmp_path / "absent.jsonl")


def test_tally_is_the_same_whichever_side_is_called_first():
    comparisons = [judged(v, prompt=str(i)) for i, v in enumerate(["first", "first", "tie", "second", "unreadable"])]
    mixed = [c if i % 2 == 0 else c.swapped() for i, c in enumerate(comparisons)]
    assert tally(comparisons) == tally(mixed)
    (row,) = tally(comparisons)
    assert (row.win.estimate, row.tie.estimate, row.lose.estimate) == (0.5, 0.25, 0.25)
    assert row.score.estimate == 0.5 + 0.25 / 2
    assert (row.num_judgements, row.unreadable, row.win.num_prompts) == (4, 1, 4)
    assert row.win.low < row.win.estimate < row.win.high


def test_tally_weighs_prompts_alike_however_many_judged_them():
    comparisons = [judged("first", judge=name) for name in "abcd"] + [judged("second", prompt="q")]
    assert tally(comparisons)[0].win.estimate == 0.5


def test_tally_of_a_criterion_leaves_out_who_left_it_open():
    comparisons = [judged("first", criteria={"safe": "second"}), judged("first", prompt="q")]
    (row,) = tally(comparisons, "safe")
    assert (row.num_judgements, row.lose.estimate) == (1, 1.0)
    assert tally([judged("first")], "safe")[0].win is None


# Krippendorff (2011), "Computing Krippendorff's Alpha-Reliability", example C: four observers, twelve units, gaps.
_MISSING = None
_EXAMPLE_C = [
    [1, 2, 3, 3, 2, 1, 4, 1, 2, _MISSING, _MISSING, _MISSING],
    [1, 2, 3, 3, 2, 2, 4, 1, 2, 5, _MISSING, 3],
    [_MISSING, 3, 3, 3, 2, 3, 4, 2, 2, 5, 1, _MISSING],
    [1, 2, 3, 3, 2, 4, 4, 1, 2, 5, 1, _MISSING],
]


def alpha_of(items):
    return krippendorff_alpha(coincidences(items, sorted({value for item in items for value in item})))


def test_alpha_is_the_published_one():
    items = [[row[i] for row in _EXAMPLE_C if row[i] is not _MISSING] for i in range(12)]
    assert alpha_of(items) == pytest.approx(0.815, abs=5e-4)
    # Example A of the same paper: two observers, binary data.
    observers = [0, 1, 0, 0, 0, 0, 0, 0, 1, 0], [1, 1, 1, 0, 0, 1, 0, 0, 0, 0]
    assert alpha_of(list(zip(*observers, strict=True))) == pytest.approx(0.095, abs=5e-4)


def _slow_alpha(items: list[list[float]]) -> float:
    """Ordinal alpha from its definition: mean squared distance within items over that of any two judgements."""
    items = [item for item in items if len(item) > 1]
    everything = [value for item in items for value in item]
    n = len(everything)

    def squared(c: float, k: float) -> float:
        low, high = min(c, k), max(c, k)
        between = sum(low <= g <= high for g in everything)
        return (between - (everything.count(c) + everything.count(k)) / 2) ** 2 if c != k else 0.0

    observed = sum(squared(a, b) / (len(item) - 1) for item in items for a, b in permutations(item, 2))
    expected = sum(squared(a, b) for a, b in permutations(everything, 2)) / (n - 1)
    return 1 - observed / expected


@given(st.lists(st.lists(st.sampled_from([0.0, 1.0, 2.0]), max_size=4), min_size=1, max_size=6))
def test_alpha_equals_its_definition(items):
    alpha = alpha_of(items)
    paired = [value for item in items if len(item) > 1 for value in item]
    if len(set(paired)) < 2:
        assert alpha is None
    else:
        assert alpha == pytest.approx(_slow_alpha(items), abs=1e-12)


def test_pairwise_agreement_counts_pairs():
    assert pairwise_agreement([1, 1, 2]) == pytest.approx(1 / 3)
    assert pairwise_agreement([1]) is None


def test_agreement_of_comparisons_uses_one_orientation_and_items_judged_twice():
    votes = {"p": ["first", "first"], "q": ["tie", "second"], "r": ["second", "second"], "s": ["first"]}
    comparisons = [judged(v, prompt=p, judge=f"j{i}") for p, vs in votes.items() for i, v in enumerate(vs)]
    mixed = [c if i % 2 else c.swapped() for i, c in enumerate(comparisons)]
    found = agreement(comparisons)
    assert (found.num_items, found.num_assessors) == (3, 2)
    assert found.pairwise.estimate == pytest.approx(2 / 3)
    assert found.without_ties.estimate == 1.0
    assert found.alpha.estimate == pytest.approx(_slow_alpha([[2, 2], [1, 0], [0, 0]]))
    assert agreement(mixed).alpha.estimate == pytest.approx(found.alpha.estimate)
    assert agreement(comparisons[-1:]).alpha is None


def test_random_judges_have_alpha_near_zero_and_an_interval_around_it():
    rng = np.random.default_rng(0)
    votes = rng.choice(["first", "tie", "second"], size=(300, 3))
    found = agreement(judged(v, prompt=str(p), judge=f"j{j}") for p, row in enumerate(votes) for j, v in enumerate(row))
    assert abs(found.alpha.estimate) < 0.08
    assert found.alpha.low < 0 < found.alpha.high


def test_alpha_is_never_above_1_and_of_equal_verdicts_alone_no_interval_is_known():
    votes = [["first", "first"], ["second", "second"], ["tie", "tie"]] * 3
    found = [
        agreement(judged(v, prompt=str(p), judge=f"j{j}") for p, row in enumerate(rows) for j, v in enumerate(row))
        for rows in (votes, [*votes, ["first", "tie"]])
    ]
    assert (found[0].alpha.estimate, found[0].alpha.low, found[0].alpha.high) == (1.0, None, None)
    assert found[1].alpha.low < found[1].alpha.estimate < found[1].alpha.high == 1.0


def test_agreement_between_a_model_and_people():
    people = [judged(v, prompt=p, judge="ann") for p, v in [("p", "first"), ("q", "tie"), ("r", "second")]]
    model = [judged("first", judge="gpt"), judged("second", prompt="q", judge="gpt").swapped()]
    found = agreement_between(model, people)
    assert (found.estimate, found.num_prompts) == (0.5, 2)
    assert agreement_between(people, model).estimate == 0.5
    assert agreement_between(model, []) is None


def test_preference_records_become_comparisons_of_the_winner_with_each_other():
    counts: Counter[str] = Counter()
    texts = tuple(Completion(t) for t in ("bad", "good", "good"))
    records = [Record("0", "Hi", texts, preferred=1), Record("1", "Hi", texts)]
    (only,) = from_preference_records(records, judge="people", counts=counts)
    assert (only.first, only.second, {only.first_text, only.second_text}) == ("one", "other", {"bad", "good"})
    assert only.text(only.verdict) == "good"
    assert counts == {"identical_pair": 1, "no_preference": 1}


def _mt_bench(**changes):
    def chat(name):
        return [
            {"role": role, "content": f"{role} {name if role == 'assistant' else ''} {turn}"}
            for turn in (1, 2)
            for role in ("user", "assistant")
        ]

    row = {"question_id": 81, "model_a": "alpaca-13b", "model_b": "gpt-4", "winner": "model_b", "judge": "author_2"}
    return {**row, "conversation_a": chat("a"), "conversation_b": chat("b"), "turn": 1, **changes}


def test_mt_bench_rows_of_both_turns():
    counts: Counter[str] = Counter()
    rows = [
        _mt_bench(),
        _mt_bench(turn=2, winner="tie"),
        _mt_bench(winner="tie (inconsistent)", judge=["gpt4", "pair"]),
    ]
    one, two, three = from_mt_bench(rows, counts=counts)
    assert (one.prompt, one.first_text, one.second, one.verdict) == ("user  1", "assistant a 1", "gpt-4", "second")
    assert (two.prompt_id, len(two.prompt), two.verdict) == ("81-turn-2", 2, "tie")
    assert two.second_text == "assistant b 1\n\nassistant b 2"
    assert (three.verdict, three.judge) == ("tie", "gpt4/pair")
    assert [c.verdict for c in from_mt_bench([_mt_bench(winner="?")], counts=counts)] == ["unreadable"]
    assert counts == {"unknown_winner": 1}
    for wrong in ({"question_id": 1}, _mt_bench(turn=0), _mt_bench(turn=3)):
        with pytest.raises(InputError, match="Row 0"):
            list(from_mt_bench([wrong], counts=counts))


def _feedback(**changes):
    summaries = [
        {"text": "Short.", "policy": "sup4"},
        {"text": "Shorter.", "policy": "ref"},
    ]
    info = {"id": "t3_1", "post": "A long post.", "title": "T", "subreddit": "s", "site": None, "article": None}
    return {"info": info, "summaries": summaries, "choice": 1, "worker": "w1", "note": None, **changes}


def test_summarize_from_feedback_rows():
    counts: Counter[str] = Counter()
    same = [{"text": t, "policy": "sup4"} for t in ("a", "b")]
    equal = [{"text": "a", "policy": "x"}, {"text": "a", "policy": "y"}]
    rows = [_feedback(), _feedback(summaries=same, choice=0), _feedback(summaries=equal)]
    one, two = from_summarize_from_feedback(rows, counts=counts)
    assert (one.prompt, one.first, one.second_text, one.verdict, one.judge) == (
        "A long post.",
        "sup4",
        "Shorter.",
        "second",
        "w1",
    )
    assert (two.first, two.second, two.verdict) == ("sup4#1", "sup4#2", "first")
    assert counts == {"identical_pair": 1}
    with pytest.raises(InputError, match="Row 0"):
        list(from_summarize_from_feedback([_feedback(choice=None)], counts=counts))


def test_kappa_by_hand():
    # Cohen (1960)'s form on a 2 × 2 table 20 / 5 / 10 / 15: p_o = 0.7, p_e = 0.5·0.6 + 0.5·0.4 = 0.5.
    pairs = [("y", "y")] * 20 + [("y", "n")] * 5 + [("n", "y")] * 10 + [("n", "n")] * 15
    assert cohen_kappa(pairs) == pytest.approx(0.4)
    assert cohen_kappa([("y", "y")] * 3) is None
    assert cohen_kappa([]) is None
    assert cohen_kappa([("a", "b"), ("b", "a")]) == pytest.approx(-1)
