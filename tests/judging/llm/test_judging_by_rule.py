"""`exalign judge` against a server whose verdicts follow a rule, so that every number is known."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path

import httpx
import pytest

from exalign.data.record import Completion, Record
from exalign.data.store import Header, write_records
from exalign.errors import InputError
from exalign.judging.comparisons import Comparison, read_comparisons, write_comparisons
from exalign.judging.judgements import read_judgements
from exalign.judging.pairing import match_ups
from exalign.judging.study import plan_study

PROMPTS = {str(i): f"Question {i}" for i in range(10)}
SFT = dict.fromkeys(PROMPTS, ("plain answer",))
# Of ten: six better than SFT's, two worse, one as good in other words, one the same text.
EXO = {
    **{str(i): ("good answer!", "ignored second sample") for i in range(6)},
    **{str(i): ("worse",) for i in (6, 7)},
    "8": ("other words",),
    "9": ("plain answer",),
}
SFT_BETTER = {**SFT, "6": ("good plain",), "7": ("good plain",)}
FAST = ("--retry-wait", 0.01, "--attempts", 3)
NOBODY = ("--endpoint", "http://localhost/v1", "--model", "m", "--dry-run")


def summary_of(run: Path, judge: str, match_up: str) -> dict:
    return json.loads((run / "judging" / "llm" / judge / match_up / "summary.json").read_text())


def exchanges_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "exchanges.jsonl").read_text().splitlines()]


@pytest.fixture
def run(make_run) -> Path:
    references = {str(i): "a reference that is good" for i in range(4)}
    return make_run("demo", PROMPTS, references, sft=SFT_BETTER, exo=EXO)


def test_win_tie_lose_by_hand(run, rules, invoke):
    result = invoke("judge", run, "--against", "sft", "--endpoint", f"{rules}/v1", "--model", "good", *FAST)
    assert result.exit_code == 0, result.output
    summary = summary_of(run, "good-instruction", "exo-vs-sft")
    assert [summary[name]["estimate"] for name in ("win", "tie", "lose", "score")] == [0.6, 0.2, 0.2, 0.7]
    assert (summary["pairs"], summary["identical"], summary["unreadable_pairs"], summary["unanswered"]) == (10, 1, 0, 0)
    # Nine pairs were asked about; the judge named the better answer wherever it stood.
    assert summary["flip_rate"]["estimate"] == 0.0
    assert summary["flip_rate"]["num_prompts"] == 9
    assert summary["shown_first"]["estimate"] == 0.5
    assert summary["asking"]["asked"] == 18
    assert "60.0 %" in result.output
    folder = run / "judging" / "llm" / "good-instruction" / "exo-vs-sft"
    questions = [row["request"]["messages"][0]["content"] for row in exchanges_of(folder)]
    assert summary["tokens"]["prompt"] == sum(len(question) for question in questions)


def test_records_say_who_stood_where(run, rules, invoke):
    invoke("judge", run, "--against", "sft", "--endpoint", f"{rules}/v1", "--model", "good", *FAST)
    folder = run / "judging" / "llm" / "good-instruction" / "exo-vs-sft"
    asked = {(c.prompt_id, c.left): c for c in read_comparisons(folder / "comparisons.jsonl")}
    assert len(asked) == 18
    assert (asked["0", "first"].shown_verdict, asked["0", "second"].shown_verdict) == ("left", "right")
    assert (asked["6", "first"].shown_verdict, asked["6", "second"].shown_verdict) == ("right", "left")
    assert asked["0", "first"].answer.endswith("**Verdict: A**")
    assert asked["0", "first"].reference == "a reference that is good"
    assert asked["0", "first"].first_text == "good answer!"
    assert len(read_comparisons(folder / "verdicts.jsonl")) == 10


def test_a_judge_that_always_says_a_gives_only_ties(run, rules, invoke):
    invoke("judge", run, "--against", "sft", "--endpoint", f"{rules}/v1", "--model", "always-a", *FAST)
    summary = summary_of(run, "always-a-instruction", "exo-vs-sft")
    assert summary["tie"]["estimate"] == 1.0
    assert summary["flip_rate"]["estimate"] == 1.0
    assert summary["shown_first"]["estimate"] == 1.0


@pytest.mark.parametrize(
    ("model", "options", "said"),
    [
        ("mumbles", (), "18 of 18 answers end in no line “Verdict: A”, .* like “I would rather not say.”"),
        ("brackets", (), "18 of 18 answers end in no line .* like “A is better. \\[\\[A\\]\\]”"),
        ("thinks-on", (), r"18 of 18 answers were cut off at 256 tokens \(finish_reason length\): raise --max-answer"),
        ("cut-off", ("--max-answer-tokens", 9), "18 of 18 answers were cut off at 9 tokens"),
        (
            "cut-off",
            ("--request-fields", '{"max_tokens": null}'),
            "18 of 18 answers were cut off .*: raise the limit in --request-fields",
        ),
        ("refuses", (), "18 of 18 answers were refused or filtered"),
        ("filtered", (), "18 of 18 answers were refused or filtered"),
    ],
)
def test_where_nothing_was_measured_there_is_no_win_rate_but_the_cause(run, rules, invoke, model, options, said):
    arguments = ("--endpoint", f"{rules}/v1", "--model", model, *options, *FAST)
    result = invoke("judge", run, "--against", "sft", *arguments)
    assert isinstance(result.exception, InputError)
    sentence = f"exo – sft: no pair has a readable verdict, so there is no win rate: {said}"
    assert re.search(sentence, str(result.exception))
    # The identical pair is a tie without asking, which measures nothing; the other nine are unreadable in both orders.
    summary = summary_of(run, f"{model}-instruction", "exo-vs-sft")
    assert (summary["unreadable_pairs"], summary["unreadable_answers"], summary["measured_pairs"]) == (9, 18, 0)
    found = (summary[name] for name in ("win", "tie", "lose", "score", "length_controlled", "flip_rate"))
    assert {None} == set(found)
    ((match_up,),) = (judge.match_ups for judge in read_judgements(run).judges)
    assert (match_up.tally.win, match_up.tally.score, match_up.tally.unreadable) == (None, None, 9)
    folder = run / "judging" / "llm" / f"{model}-instruction" / "exo-vs-sft"
    assert len({c.answer for c in read_comparisons(folder / "comparisons.jsonl")}) == 1  # kept as it came


def test_half_a_character_in_an_answer_is_kept_as_what_can_be_stored(run, rules, invoke):
    result = invoke("judge", run, "--against", "sft", "--endpoint", f"{rules}/v1", "--model", "half-character", *FAST)
    assert "but like “No idea \ufffd”" in str(result.exception)
    assert summary_of(run, "half-character-instruction", "exo-vs-sft")["unreadable_answers"] == 18


def test_same_answers_alone_make_no_win_rate(make_run, rules, invoke):
    run = make_run("same", PROMPTS, {}, sft=SFT, exo=SFT)
    result = invoke("judge", run, "--against", "sft", "--endpoint", f"{rules}/v1", "--model", "good", *FAST)
    assert "all 10 pairs hold the same answer twice" in str(result.exception)
    assert summary_of(run, "good-instruction", "exo-vs-sft")["score"] is None


def test_an_answer_in_parts_is_read_and_an_address_without_v1_is_named(run, rules, invoke):
    arguments = ("judge", run, "--against", "sft", "--model", "parts", *FAST, "--endpoint")
    result = invoke(*arguments, rules)
    assert f"(is the endpoint {rules}/v1?)" in str(result.exception)
    assert invoke(*arguments, f"{rules}/v1").exit_code == 0
    assert summary_of(run, "parts-instruction", "exo-vs-sft")["flip_rate"]["estimate"] == 1.0


def test_one_unreadable_order_makes_the_pair_unreadable(run, rules, invoke):
    invoke("judge", run, "--against", "sft", "--endpoint", f"{rules}/v1", "--model", "half-mute", *FAST)
    summary = summary_of(run, "half-mute-instruction", "exo-vs-sft")
    # Readable only where A says "good": one order of prompts 0–7, none of prompt 8.
    assert (summary["unreadable_pairs"], summary["unreadable_answers"]) == (9, 10)


def test_a_judge_of_length_is_neutral_at_equal_length(make_run, rules, invoke):
    # Length alone decides, and who is longer is balanced: σ(θ) is ½ by symmetry, however strong the effect.
    answers = {key: ("x" * (40 if int(key) % 2 else 10),) for key in PROMPTS}
    run = make_run("length", PROMPTS, {}, sft=dict.fromkeys(PROMPTS, ("y" * 25,)), exo=answers)
    invoke("judge", run, "--against", "sft", "--endpoint", f"{rules}/v1", "--model", "longer", *FAST)
    controlled = summary_of(run, "longer-instruction", "exo-vs-sft")["length_controlled"]
    assert controlled["rate"]["estimate"] == pytest.approx(0.5, abs=1e-9)
    assert controlled["length_effect"] > 1
    assert controlled["longer"] == 0.5


def test_a_second_run_asks_nothing_and_more_prompts_only_the_new_ones(run, rules, invoke):
    arguments = ("judge", run, "--against", "sft", "--endpoint", f"{rules}/v1", "--model", "good", *FAST)
    folder = run / "judging" / "llm" / "good-instruction" / "exo-vs-sft"
    invoke(*arguments, "--prompts", 4)
    few = exchanges_of(folder)
    invoke(*arguments, "--prompts", 10)
    more = exchanges_of(folder)
    assert more[: len(few)] == few
    assert len({row["key"] for row in more}) == len(more) == 18
    invoke(*arguments, "--prompts", 10)
    assert exchanges_of(folder) == more
    assert summary_of(run, "good-instruction", "exo-vs-sft")["asking"]["stored_before"] == 18


def test_dry_run_asks_and_writes_nothing(run, rules, invoke):
    before = httpx.get(f"{rules}/counts").json()
    result = invoke(
        "judge", run, "--against", "sft", "--endpoint", f"{rules}/v1", "--model", "good", "--dry-run", "--prompts", 10
    )
    assert result.exit_code == 0
    assert "10 pairs, 18 requests to make (0 answered before)" in " ".join(result.output.split())
    assert "at most 4,608 to write" in " ".join(result.output.split())
    assert httpx.get(f"{rules}/counts").json() == before
    assert not (run / "judging").exists()


@pytest.mark.parametrize(
    ("fields", "said"),
    [
        ('{"max_tokens": null, "max_completion_tokens": 4000}', "at most 72,000 to write"),
        ('{"max_tokens": null}', "any number to write"),
    ],
)
def test_a_dry_run_counts_by_the_limit_that_requests_have(run, invoke, fields, said):
    result = invoke("judge", run, "--against", "sft", *NOBODY, "--request-fields", fields)
    assert said in " ".join(result.output.split())


def test_against_the_reference_texts_where_they_are_known(run, rules, invoke):
    invoke("judge", run, "--against", "chosen", "--endpoint", f"{rules}/v1", "--model", "longer", *FAST)
    summary = summary_of(run, "longer-instruction", "exo-vs-reference")
    assert summary["pairs"] == 4
    assert summary["lose"]["estimate"] == 1.0
    assert summary["counts"] == {"no_reference_text": 6, "prompts_available": 4}


def test_against_another_run_takes_the_method_of_the_same_name(make_run, run, rules, invoke):
    changed = {**PROMPTS, "0": "Another question 0"}
    del changed["1"]
    other = make_run("other", changed, {}, exo=dict.fromkeys(changed, ("plain",)), dpo=SFT)
    arguments = ("--endpoint", f"{rules}/v1", "--model", "good", *FAST)
    result = invoke("judge", run, "--against", other, *arguments)
    assert result.exit_code == 0, result.output
    summary = summary_of(run, "good-instruction", "exo-vs-other-exo")
    assert summary["second"] == "other:exo"
    assert summary["counts"] == {
        "prompt_differs_at_opponent": 1,
        "prompt_missing_at_opponent": 1,
        "prompts_available": 8,
    }
    assert summary["win"]["estimate"] == 4 / 8


def test_every_method_of_a_run_is_judged(make_run, rules, invoke):
    dpo = dict.fromkeys(PROMPTS, ("worse",))
    run = make_run("two", PROMPTS, {}, sft=SFT_BETTER, exo=EXO, dpo=dpo)
    result = invoke("judge", run, "--against", "sft", "--endpoint", f"{rules}/v1", "--model", "good", *FAST)
    assert result.exit_code == 0, (result.output, result.exception)
    shares = {m: summary_of(run, "good-instruction", f"{m}-vs-sft")["win"]["estimate"] for m in ("exo", "dpo")}
    assert shares == {"exo": 0.6, "dpo": 0.0}


def pool_of(run: Path, samples: list[tuple[str, float | None]]) -> None:
    rows = [Record(key, PROMPTS[key], tuple(Completion(t, reward=r) for t, r in samples)) for key in ("0", "1", "2")]
    write_records(run / "evaluation" / "pool", rows, Header())


def test_the_best_of_n_of_the_pool_is_judged_like_a_method(make_run, rules, invoke):
    run = make_run("best", PROMPTS, {}, sft=dict.fromkeys(PROMPTS, ("plain",)), exo=EXO)
    pool_of(run, [("bad", 0.0), ("a good one", 2.0), ("plain too", 2.0), ("worse", 9.0)])
    arguments = ("--endpoint", f"{rules}/v1", "--model", "good", *FAST)
    result = invoke("judge", run, "--against", "sft", "--best-of", 3, *arguments)
    assert result.exit_code == 0, result.output
    summary = summary_of(run, "good-instruction", "best-of-3-vs-sft")  # its fourth sample does not count
    assert (summary["pairs"], summary["win"]["estimate"]) == (3, 1.0)
    verdicts = run / "judging" / "llm" / "good-instruction" / "best-of-3-vs-sft" / "verdicts.jsonl"
    assert {c.first_text for c in read_comparisons(verdicts)} == {"a good one"}  # of two equal rewards the first
    assert invoke("judge", run, "--against", "best-of-4", *arguments).exit_code == 0
    assert summary_of(run, "good-instruction", "exo-vs-best-of-4")["win"]["estimate"] == 1.0
    met = [(one.first, one.second) for one in match_ups(run, "best-of-2", 3)[1]]
    assert met == [("exo", "best-of-2"), ("best-of-3", "best-of-2")]
    assert [one.first for one in match_ups(run, "best-of-3", 3)[1]] == ["exo"]  # not against itself
    study = plan_study(run, [("best-of-3", "sft")], name="s", num_prompts=3, assessors=["a"])
    assert {item.first_text for item in study.items} == {"a good one"}
    assert read_judgements(run).judges[0].match_ups[0].outdated == 0
    too_many = invoke("judge", run, "--against", "sft", "--best-of", 5, *arguments)
    assert "best-of-5: the pool has 4 samples of the prompt 0" in str(too_many.exception)


@pytest.mark.parametrize("reward", [None, float("nan")])
def test_a_pool_without_rewards_has_no_best(make_run, invoke, reward):
    run = make_run("best", PROMPTS, {}, sft=SFT, exo=EXO)
    pool_of(run, [("bad", 0.0), ("a good one", reward)])
    result = invoke("judge", run, "--against", "sft", "--best-of", 2, *NOBODY)
    assert "best-of-2: a sample of the prompt 0 has no finite reward" in str(result.exception)


def test_one_step_of_one_method(run, rules, invoke):
    step = run / "evaluation" / "exo" / "step-000005"
    result = invoke("judge", step, "--against", "sft", "--endpoint", f"{rules}/v1", "--model", "good", *FAST)
    assert result.exit_code == 0, result.output
    summary = summary_of(run, "good-instruction", "exo@5-vs-sft")
    assert (summary["win"]["estimate"], summary["lose"]["estimate"]) == (0.0, 0.2)


def test_agreement_with_another_judge_and_with_exported_people(run, rules, invoke):
    arguments = ("judge", run, "--against", "sft", "--endpoint", f"{rules}/v1")
    invoke(*arguments, "--model", "good", *FAST)
    verdicts = read_comparisons(run / "judging" / "llm" / "good-instruction" / "exo-vs-sft" / "verdicts.jsonl")
    # One person sees it as the judge does except on two wins, and tells the match-up the other way round.
    changed = [replace(c, judge="ann", verdict="second" if c.prompt_id in "01" else c.verdict) for c in verdicts]
    (run / "assessment").mkdir()
    write_comparisons(run / "assessment" / "export.jsonl", [c.swapped() for c in changed])
    invoke(*arguments, "--model", "always-a", *FAST)
    result = invoke(*arguments, "--model", "good", *FAST)
    machine, ann = summary_of(run, "good-instruction", "exo-vs-sft")["agreement"]
    assert machine["with"] == ["always-a"]
    assert machine["raw"]["estimate"] == pytest.approx(1 / 9)  # of its nine ties, one is one
    # The identical pair was not asked about and does not count. Judge: 6 wins, 1 tie, 2 losses; person: 4, 1, 4.
    assert (ann["with"], ann["pairs"], ann["source"]) == (["ann"], 9, "assessment/export.jsonl")
    assert ann["raw"]["estimate"] == pytest.approx(7 / 9)
    expected = (6 * 4 + 1 * 1 + 2 * 4) / 81
    assert ann["kappa"] == pytest.approx((7 / 9 - expected) / (1 - expected))
    assert ann["without_ties"]["estimate"] == 6 / 8
    assert "agreement with ann on 9 pairs: 77.8 %" in result.output


def test_agreement_with_a_study_of_the_same_run(run, rules, invoke):
    store_module = pytest.importorskip("exalign.judging.study", reason="needs SQLAlchemy")
    from exalign.judging.study import plan_study

    study = plan_study(run, [("sft", "exo")], name="study", num_prompts=10, assessors=["ann", "bob"])
    (run / "assessment").mkdir()
    store = store_module.Store(str(run / "assessment" / "study.sqlite"))
    for token in store.create(study).values():
        assessor = store.assessor(token)
        while (position := store.next_open(assessor.id)) is not None:
            task = store.task(assessor.id, position)
            verdict = "left" if "good" in task.left_text else ("right" if "good" in task.right_text else "tie")
            store.submit(assessor.id, position, task.revision, {"verdict": verdict, "criteria": {}, "comment": ""})
    store.close()
    result = invoke("judge", run, "--against", "sft", "--endpoint", f"{rules}/v1", "--model", "good", *FAST)
    assert result.exit_code == 0, (result.output, result.exception)
    (entry,) = summary_of(run, "good-instruction", "exo-vs-sft")["agreement"]
    assert (entry["pairs"], entry["verdicts"], entry["with"]) == (9, 18, ["ann", "bob"])
    assert (entry["raw"]["estimate"], entry["theirs_among_themselves"]["estimate"]) == (1.0, 1.0)
    assert entry["kappa"] == pytest.approx(1)


def test_grading_on_comparisons_by_people(tmp_path, rules, invoke):
    def human(i: int, judge: str, verdict: str) -> Comparison:
        return Comparison(str(i), f"Question {i}", "x", "y", "good", f"bad {i}", judge, verdict)

    # Two people agree on the first three of four pairs; the judge finds x better everywhere.
    said = [("first", "first"), ("first", "first"), ("second", "second"), ("first", "second")]
    people = [human(i, judge, v) for i, both in enumerate(said) for judge, v in zip(("ann", "bob"), both, strict=True)]
    write_comparisons(tmp_path / "people.jsonl", people)
    result = invoke("grade-judge", tmp_path / "people.jsonl", "--endpoint", f"{rules}/v1", "--model", "good", *FAST)
    assert result.exit_code == 0, result.output
    summary = json.loads((tmp_path / "people-graded" / "good-instruction" / "summary.json").read_text())
    (entry,) = summary["agreement"]
    assert (entry["pairs"], entry["verdicts"], entry["with"]) == (4, 8, ["ann", "bob"])
    assert entry["raw"]["estimate"] == (1 + 1 + 0 + 0.5) / 4
    assert entry["theirs_among_themselves"]["estimate"] == 3 / 4
    assert entry["kappa"] == 0.0  # a judge that always says the same agrees no better than chance


def test_grading_on_a_preference_set(tmp_path, rules, invoke):
    rows = [{"prompt": f"Q{i}", "chosen": "good " * (i + 1), "rejected": f"bad {i}"} for i in range(15)]
    rows += [{"prompt": f"P{i}", "chosen": f"bad {i}", "rejected": f"good {i}"} for i in range(5)]
    rows.append({"prompt": "S", "chosen": "same", "rejected": "same"})
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = invoke("grade-judge", tmp_path / "pairs.jsonl", "--endpoint", f"{rules}/v1", "--model", "good", *FAST)
    assert result.exit_code == 0 and "1 pairs equal." in result.output, result.output
    summary = json.loads((tmp_path / "pairs-graded" / "good-instruction" / "summary.json").read_text())
    (entry,) = summary["agreement"]
    assert entry["raw"]["estimate"] == 0.75
    # The winner always stands first in such a file; which answer is called first here is a matter of its text, so that
    # chance agreement is about one half and kappa about 2 · 0.75 − 1.
    assert entry["kappa"] == pytest.approx(0.5, abs=0.1)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--against", "sft"), "Who judges"),
        (("--against", "sft", "--endpoint", "http://localhost/v1"), "Who judges"),
        (("--against", "sft", "--endpoint", "localhost:80", "--model", "m"), "not a web address"),
        (("--against", "sft", "--endpoint", "http://me:pw@localhost/v1", "--model", "m"), "must not carry a user"),
        (("--against", "dpo", "--endpoint", "http://localhost/v1", "--model", "m"), "neither one of sft, chosen, exo"),
        (
            ("--against", "sft", "--endpoint", "http://localhost/v1", "--model", "m", "--template", "essay"),
            "neither a file",
        ),
        (
            ("--against", "sft", "--endpoint", "http://localhost/v1", "--model", "m", "--concurrency", 0),
            "--concurrency",
        ),
        (("--against", "sft", "--endpoint", "http://localhost/v1", "--model", "m", "--request-fields", "{"), "JSON"),
        (("--against", "sft", "--model-path", "x", "--model", "m"), "either --endpoint"),
        (
            ("--against", "sft", "--model-path", "x", "--dry-run", "--request-fields", '{"seed": 1}'),
            "--model-path takes none",
        ),
        (("--against", "sft", *NOBODY, "--request-fields", '{"top_p": NaN}'), "not a JSON object"),
        (("--against", "sft", *NOBODY, "--request-fields", '{"messages": null}'), "must leave the messages"),
        (("--against", "sft", *NOBODY, "--request-fields", '{"model": null}'), "must leave the messages"),
        (("--against", "sft", *NOBODY, "--template", "{{ answer_a }} " * 30), "neither a file"),
        (("--against", "best-of-4", *NOBODY), "no pool of samples for best-of-4"),
    ],
)
def test_wrong_input_is_one_sentence(run, invoke, arguments, message):
    result = invoke("judge", run, *arguments)
    assert isinstance(result.exception, InputError)
    assert message in str(result.exception)
    assert not (run / "judging").exists()
