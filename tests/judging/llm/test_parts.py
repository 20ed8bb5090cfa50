"""Laws of the judge's parts: wording and reading, the store, waiting, the length-controlled win rate, kappa."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from itertools import product
from typing import get_args

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize

from exalign.errors import InputError
from exalign.evaluation.statistics import RIDGE, length_controlled_win_rate
from exalign.judging.askers import Endpoint, JudgeSettings, seconds_to_wait
from exalign.judging.comparisons import Pair, Verdict
from exalign.judging.exchanges import ExchangeStore, Reply, read_answers, request_key
from exalign.judging.instructions import BUILT_IN, load_instructions, prompt_text, read_verdict
from exalign.judging.summary import Judgement, agreed, summarise

CHAT = ({"role": "user", "content": "Say hi"}, {"role": "assistant", "content": "No"}, {"role": "user", "content": "?"})
PAIR = Pair("7", CHAT, "exo", "sft", "text of exo", "text of sft", reference="the reference")
GOOD = '{"choices": [{"message": {"content": "Verdict: A"}}]}'


@pytest.mark.parametrize("name", BUILT_IN)
def test_built_in_templates_differ_between_orders_only_in_the_places_of_the_answers(name):
    instructions = load_instructions(name)
    first, second = instructions.render(PAIR, left="first"), instructions.render(PAIR, left="second")
    swap = {"text of exo": "text of sft", "text of sft": "text of exo"}
    assert "".join(swap.get(part, part) for part in split(first)) == second
    assert first.index("text of exo") < first.index("text of sft")
    assert "User: Say hi\n\nAssistant: No\n\nUser: ?" in first
    assert first.endswith("Verdict: A")


def test_the_instruction_template_shows_the_reference_where_there_is_one_and_else_no_trace_of_it():
    instructions, alone = load_instructions("instruction"), replace(PAIR, reference=None)
    with_it, without = (instructions.render(pair, left="first") for pair in (PAIR, alone))
    assert "</request>\n\n<reference>\nthe reference\n</reference>\n\n<answer_a>" in with_it
    assert "eference" not in without
    assert "</request>\n\n<answer_a>" in without and "in them.\n\n<request>" in without


def split(text: str) -> list[str]:
    head, rest = text.split("text of exo")
    middle, tail = rest.split("text of sft")
    return [head, "text of exo", middle, "text of sft", tail]


def test_calls_of_tools_are_shown_to_who_judges():
    call = {"type": "function", "function": {"name": "search", "arguments": '{"q": "Paris"}'}}
    prompt = ({"role": "user", "content": "Where?"}, {"role": "assistant", "content": "", "tool_calls": [call]})
    assert prompt_text(prompt) == 'User: Where?\n\nAssistant: search({"q": "Paris"})'


def test_a_template_of_the_user(tmp_path):
    (tmp_path / "mine.jinja").write_text(
        "{% for m in messages %}{{ m.content }} {% endfor %}|{{ answer_a }}|{{ answer_b }}|{{ reference }}"
    )
    instructions = load_instructions(str(tmp_path / "mine.jinja"))
    assert instructions.name == "mine"
    assert instructions.render(PAIR, left="second") == "Say hi No ? |text of sft|text of exo|the reference"


def test_text_of_an_answer_is_never_a_template():
    pair = Pair("7", "{{ answer_b }}", "exo", "sft", "{{ prompt }} {% raw %}", "<b>&amp;</b>")
    question = load_instructions("instruction").render(pair, left="first")
    assert "{{ prompt }} {% raw %}" in question
    assert "<b>&amp;</b>" in question


def test_half_of_a_character_can_be_asked_about():
    pair = replace(PAIR, first_text="half \ud83d", prompt="\udc00")
    assert "half ?" in load_instructions("instruction").render(pair, left="first").encode("utf-8").decode()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("{{ answer_a }} {{ answer_b }} {{ answers }}", "uses answers"),
        ("{{ answer_a }} {{ prompt }}", "does not show answer_b"),
        ("{{ answer_a", "not valid Jinja"),
        ("{{ answer_a }}{{ answer_b }}{{ prompt.__class__.__mro__ }}", "fails on prompt 7"),
        ("{{ answer_a }}{{ answer_b }}{{ reference.nothing }}", "fails on prompt 7"),
    ],
)
def test_a_template_that_cannot_work_is_one_sentence(tmp_path, source, message):
    path = tmp_path / "bad.jinja"
    path.write_text(source)
    with pytest.raises(InputError, match=message):
        load_instructions(str(path)).render(PAIR, left="first")


@pytest.mark.parametrize(
    ("answer", "verdict"),
    [
        ("A is short.\nVerdict: A", "left"),
        ("verdict: b", "right"),
        ("**Verdict:** B", "right"),
        ("### Final verdict: `tie`.", "tie"),
        ("Verdict: [Answer A]", "left"),
        ("Verdict: Summary B!", "right"),
        ("<think>Verdict: B</think>\nVerdict: A", "left"),
        ("Verdict: A\nVerdict: A", "left"),
        ("Verdict: A\r\n", "left"),
        ("", "unreadable"),
        ("A", "unreadable"),
        ("Verdict:", "unreadable"),
        ("Verdict: A or B", "unreadable"),
        ("Verdict: A is not better", "unreadable"),
        ("Verdict: C", "unreadable"),
        ("Verdict: A\nVerdict: B", "unreadable"),
        ("Verdict: A\nVerdict: well", "unreadable"),
        ("My verdict is A", "unreadable"),
        ("<think>\nVerdict: B", "unreadable"),
    ],
)
def test_reading_a_verdict(answer, verdict):
    assert read_verdict(answer) == verdict


@settings(max_examples=30)
@given(st.text())
def test_any_answer_can_be_read_or_is_unreadable(answer):
    assert read_verdict(answer) in ("left", "right", "tie", "unreadable")


def test_verdicts_agree_symmetrically_and_never_guess():
    for a, b in product(get_args(Verdict), repeat=2):
        assert agreed(a, b) == agreed(b, a)
        assert (agreed(a, b) == "unreadable") == ("unreadable" in (a, b))
        assert agreed(a, b) not in ("first", "second") or a == b


def test_the_store_gives_back_what_it_was_given_and_drops_a_torn_line(tmp_path):
    path = tmp_path / "exchanges.jsonl"
    bodies = [{"model": "m", "messages": [{"role": "user", "content": f"é {i}\n"}]} for i in range(3)]
    with ExchangeStore(path) as store:
        store.append(request_key(bodies[0]), bodies[0], Reply("again", error="HTTP 500"))
        store.append(request_key(bodies[0]), bodies[0], Reply("answered", raw=GOOD))
        store.append(request_key(bodies[1]), bodies[1], Reply("answered", raw=GOOD))
        with pytest.raises(ValueError, match="already has"):
            store.append(request_key(bodies[0]), bodies[0], Reply("answered", raw=GOOD))
    whole = path.read_bytes()
    last = len(whole.splitlines(keepends=True)[-1])
    for cut in [1, 2, *range(3, last, 53), last - 1]:
        path.write_bytes(whole[:-cut])
        assert set(read_answers(path)) == {request_key(bodies[0])}
        with ExchangeStore(path) as store:
            assert store.torn == 1
            store.append(request_key(bodies[2]), bodies[2], Reply("answered", raw=GOOD))
        assert set(read_answers(path)) == {request_key(bodies[0]), request_key(bodies[2])}


def test_a_damaged_store_is_not_overwritten(tmp_path):
    path = tmp_path / "exchanges.jsonl"
    path.write_text('{"version": 1}\n')
    with pytest.raises(InputError, match="line 1 is not an exchange"):
        ExchangeStore(path)
    path.write_text('{"version": 2, "outcome": "answered"}\n')
    with pytest.raises(InputError, match="format 2"):
        ExchangeStore(path)
    assert path.read_text().startswith('{"version": 2')


def test_one_judge_at_a_time(tmp_path):
    with ExchangeStore(tmp_path / "x.jsonl"), pytest.raises(InputError, match="in use"):
        ExchangeStore(tmp_path / "x.jsonl")


def test_the_key_of_a_request_is_its_content():
    body = {"model": "m", "messages": [{"role": "user", "content": "x"}], "temperature": 0.0}
    assert request_key(body) == request_key(dict(reversed(body.items())))
    assert len({request_key({**body, name: "other"}) for name in body}) == 3


def test_request_fields_are_merged_and_null_removes():
    fields = {"max_tokens": None, "max_completion_tokens": 9, "seed": 1}
    endpoint = Endpoint("http://localhost/v1", "m", JudgeSettings(request_fields=fields))
    body = endpoint.body("Q")
    assert body == {
        "model": "m",
        "messages": [{"role": "user", "content": "Q"}],
        "temperature": 0.0,
        "max_completion_tokens": 9,
        "seed": 1,
    }


def test_retry_after_as_seconds_or_date():
    now = datetime(2026, 1, 1, tzinfo=UTC)
    later = format_datetime(now + timedelta(seconds=30), usegmt=True)
    assert seconds_to_wait({"retry-after": later}, now=now) == 30
    assert seconds_to_wait({"retry-after": later}, now=now + timedelta(hours=1)) == 0
    for unreadable in ("", "-3", "nan", "inf", "in a while"):
        assert seconds_to_wait({"retry-after": unreadable}) is None


def test_length_control_equals_a_plain_minimiser():
    generator = np.random.default_rng(0)
    differences = generator.normal(20, 100, 80)
    scores = generator.choice([0.0, 0.5, 1.0], 80, p=[0.3, 0.2, 0.5])
    x = np.tanh(differences / differences.std())

    def loss(parameters: np.ndarray) -> float:
        logits = parameters[0] + parameters[1] * x
        return float(np.sum(np.logaddexp(0, logits) - scores * logits) + RIDGE * parameters[1] ** 2 / 2)

    theta, phi = minimize(loss, np.zeros(2), tol=1e-12).x
    found = length_controlled_win_rate(scores, differences)
    assert found.rate.estimate == pytest.approx(1 / (1 + np.exp(-theta)), abs=1e-6)
    assert found.length_effect == pytest.approx(phi, abs=1e-5)
    assert found.rate.low < found.rate.estimate < found.rate.high


@settings(max_examples=25)
@given(st.lists(st.tuples(st.sampled_from([0.0, 0.5, 1.0]), st.integers(-500, 500)), min_size=1, max_size=12))
def test_length_control_is_antisymmetric_and_within_bounds(rows):
    scores, differences = np.array(rows, dtype=np.float64).T
    rate = length_controlled_win_rate(scores, differences).rate
    swapped = length_controlled_win_rate(1 - scores, -differences).rate
    assert rate.estimate + swapped.estimate == pytest.approx(1, abs=1e-6)
    assert all(0 <= value <= 1 for value in (rate.estimate, rate.low, rate.high) if value is not None)


def test_length_control_without_differences_is_the_win_rate_and_all_wins_stay_wins():
    scores = np.array([1, 1, 0, 0.5, 1])
    assert length_controlled_win_rate(scores, np.zeros(5)).rate.estimate == pytest.approx(0.7, abs=1e-9)
    assert length_controlled_win_rate(np.ones(5), np.arange(5.0)).rate.estimate == pytest.approx(1, abs=1e-6)


def judged(number: int, first: str, second: str, verdict: Verdict) -> Judgement:
    texts = ("long " * number, "short") if first == "exo" else ("short", "long " * number)
    pair = Pair(str(number), "Hi", first, second, *texts)
    return Judgement((), pair.judged("m", verdict))


def test_a_summary_is_the_same_however_a_pair_is_told():
    verdicts: list[Verdict] = ["first", "second", "first", "tie", "first", "second"]
    told = [judged(i, "exo", "sft", verdict) for i, verdict in enumerate(verdicts, start=1)]
    turned = [*told[:3], *(Judgement((), one.verdict.swapped()) for one in told[3:])]
    assert summarise(turned) == summarise(told)


def test_a_judge_of_several_match_ups_is_told_nothing_of_the_first():
    several = [judged(1, "exo", "sft", "first"), judged(2, "dpo", "sft", "second")]
    found = summarise(several)
    assert found["measured_pairs"] == 2
    assert {found[name] for name in ("win", "tie", "lose", "score", "length_controlled")} == {None}


def test_length_control_takes_out_what_length_explains():
    # Equal quality (θ = 0), but the first system is longer by one spread on average, and length wins.
    generator = np.random.default_rng(1)
    differences = generator.normal(100, 100, 800)
    x = np.tanh(differences / differences.std())
    scores = (generator.random(800) < 1 / (1 + np.exp(-2 * x))).astype(float)
    found = length_controlled_win_rate(scores, differences)
    assert scores.mean() > 0.7
    assert found.rate.low < 0.5 < found.rate.high
    assert found.length_effect == pytest.approx(2, abs=0.4)
