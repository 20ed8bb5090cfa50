"""What the ecosystem writes becomes records; what is wrong with a row is said with its file and number."""

import csv
import datetime
import gzip
import io
import json
import subprocess
import sys
import tracemalloc
from collections import Counter
from decimal import Decimal
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from exalign.data.reading import DataSettings, prompt_digest, read_source, settings_of
from exalign.data.record import Completion, Record, pairs_from_rewards
from exalign.data.shapes import Shape
from exalign.data.store import Header, read_records, write_records
from exalign.data.tokenization import build_tokenizer
from exalign.errors import InputError

USER = {"role": "user", "content": "Hi"}
HELLO, HEY, FINE, BAD = ({"role": "assistant", "content": text} for text in ("Hello!", "Hey.", "Fine.", "Bad."))
ASK = {"role": "user", "content": "How are you?"}
PIRATE = {"role": "system", "content": "Answer as a pirate."}
DIALOGUE = "\n\nHuman: Hi\n\nAssistant:"


def read(source, counts=None, **settings):
    return list(read_source(DataSettings(source=str(source), **settings), Counter() if counts is None else counts))


def convert(values, counts=None, among=(), columns=None, labels=None):
    shape = Shape([*among, values], columns or {}, labels or {})
    records = list(shape.records("file:3", values, Counter() if counts is None else counts))
    assert len(records) <= 1
    return records[0] if records else None


SHAPES = [
    ({"prompt": "p", "completion": " c"}, "p", [" c"], None),
    ({"prompt": [USER], "completion": [HELLO]}, (USER,), ["Hello!"], None),
    ({"messages": [USER, HELLO]}, (USER,), ["Hello!"], None),
    ({"messages": [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello!"}]}, (USER,), ["Hello!"], None),
    ({"messages": [HELLO, USER]}, (HELLO, USER), [], None),
    ({"prompt": "p", "chosen": "a", "rejected": "b"}, "p", ["a", "b"], 0),
    ({"prompt": [USER], "chosen": [HELLO], "rejected": [HEY]}, (USER,), ["Hello!", "Hey."], 0),
    ({"chosen": [USER, HELLO], "rejected": [USER, HEY]}, (USER,), ["Hello!", "Hey."], 0),
    ({"prompt": "Hi", "chosen": [USER, HELLO], "rejected": [USER, HEY]}, (USER,), ["Hello!", "Hey."], 0),
    ({"chosen": DIALOGUE + " Hello!", "rejected": DIALOGUE + " Hey."}, DIALOGUE, [" Hello!", " Hey."], 0),
    ({"prompt": None, "chosen": DIALOGUE + " a", "rejected": DIALOGUE + " b"}, DIALOGUE, [" a", " b"], 0),
    ({"prompt": "p", "completions": ["a", "", "a"]}, "p", ["a", "", "a"], None),
    ({"completions": [[USER, HELLO], [USER, HEY]]}, (USER,), ["Hello!", "Hey."], None),
    ({"completions": [DIALOGUE + " a", DIALOGUE + " b"]}, DIALOGUE, [" a", " b"], None),
    ({"prompt": "Hi", "completions": [HELLO, "Hey."]}, (USER,), ["Hello!", "Hey."], None),
    ({"prompt": "p"}, "p", [], None),
    ({"prompt": "", "completion": "c"}, "", ["c"], None),
    ({"prompt": "p", "completions": ["a", None]}, "p", ["a"], None),
    (
        {"conversations": [{"from": "human", "value": "Hi"}], "chosen": HELLO, "rejected": HEY},
        (USER,),
        ["Hello!", "Hey."],
        0,
    ),
    # what a side is says whether the prompt is a turn of a chat
    ({"prompt": "Hi", "chosen": HELLO, "rejected": HEY}, (USER,), ["Hello!", "Hey."], 0),
    ({"prompt": [USER], "chosen": "Hello!", "rejected": "Hey."}, (USER,), ["Hello!", "Hey."], 0),
    # the prompt and what the sides begin with: each turn once, none lost
    (
        {"prompt": [USER], "chosen": [HELLO, ASK, FINE], "rejected": [HELLO, ASK, BAD]},
        (USER, HELLO, ASK),
        ["Fine.", "Bad."],
        0,
    ),
    (
        {"prompt": "Hi", "chosen": [HELLO, ASK, FINE], "rejected": [HELLO, ASK, BAD]},
        (USER, HELLO, ASK),
        ["Fine.", "Bad."],
        0,
    ),
    (
        {"prompt": [PIRATE, USER], "chosen": [USER, HELLO], "rejected": [USER, HEY]},
        (PIRATE, USER),
        ["Hello!", "Hey."],
        0,
    ),
    (
        {"prompt": [USER], "chosen": [PIRATE, USER, HELLO], "rejected": [PIRATE, USER, HEY]},
        (PIRATE, USER),
        ["Hello!", "Hey."],
        0,
    ),
    (
        {"prompt": [USER, HELLO, ASK], "chosen": [ASK, FINE], "rejected": [ASK, BAD]},
        (USER, HELLO, ASK),
        ["Fine.", "Bad."],
        0,
    ),
    ({"system": PIRATE["content"], "prompt": "Hi", "completion": "Hello!"}, (PIRATE, USER), ["Hello!"], None),
    ({"system": "", "prompt": "Hi", "completion": "Hello!"}, "Hi", ["Hello!"], None),
    ({"system": PIRATE["content"], "messages": [USER, HELLO]}, (PIRATE, USER), ["Hello!"], None),
    # JSON text, whatever the column
    (
        {"prompt": json.dumps([USER]), "chosen": json.dumps(HELLO), "rejected": json.dumps([HEY])},
        (USER,),
        ["Hello!", "Hey."],
        0,
    ),
    ({"prompt": "Hi", "completion": json.dumps([USER, HELLO])}, (USER,), ["Hello!"], None),
    ({"prompt": "[1]", "completion": "{}"}, "[1]", ["{}"], None),
    # content in parts
    (
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]},
                HELLO,
            ]
        },
        (USER,),
        ["Hello!"],
        None,
    ),
    ({"text": "t"}, "", ["t"], None),
]


@pytest.mark.parametrize(("values", "prompt", "texts", "preferred"), SHAPES)
def test_each_shape_becomes_its_record(values, prompt, texts, preferred):
    record = convert(values)
    assert record == Record("file:3", prompt, tuple(Completion(text) for text in texts), preferred=preferred)


ANSWERED = {"prompt": "p", "completions": ["a", "b"]}


@pytest.mark.parametrize(
    ("values", "labels", "rewards", "preferred"),
    [
        ({**ANSWERED, "rewards": [1, -0.5]}, {}, [1.0, -0.5], None),
        ({**ANSWERED, "rewards": ["1", True]}, {}, [1.0, 1.0], None),
        ({**ANSWERED, "rewards": ["good", "bad"]}, {"good": 1, "bad": -1}, [1.0, -1.0], None),
        ({**ANSWERED, "ranks": [1, 2]}, {}, [-1.0, -2.0], None),
        ({**ANSWERED, "ranks": [1.0, 0.0]}, {}, [-1.0, 0.0], None),
        ({**ANSWERED, "preferred": 1}, {}, None, 1),
        ({**ANSWERED, "preferred": "1.0"}, {}, None, 1),
        ({**ANSWERED, "preferred": "model_b"}, {"model_a": 0, "model_b": 1}, None, 1),
        ({**ANSWERED, "preferred": 1}, {"1": 0, "2": 1}, None, 0),
        ({**ANSWERED, "preferred": True}, {"true": 0, "false": 1}, None, 0),
        ({**ANSWERED, "preferred": "tie"}, {"tie": "tie"}, [0.0, 0.0], None),
        ({"text": "t", "label": 1}, {}, [1.0], None),
        ({"text": "t", "label": "0"}, {}, [0.0], None),
        ({"text": "t", "label": "1.0"}, {}, [1.0], None),
        ({"messages": [USER, HELLO], "label": False}, {}, [0.0], None),
        ({"text": "t", "label": "pos"}, {"pos": 1, "neg": 0}, [1.0], None),
    ],
)
def test_what_says_which_is_better(values, labels, rewards, preferred):
    record = convert(values, labels=labels)
    assert (record.rewards, record.preferred) == (rewards, preferred)


def test_a_tie_is_counted_and_never_a_side():
    counts = Counter()
    labels = {"a": 0, "b": 1, "tie": "tie", "both bad": "tie"}
    for winner in ("tie", "both bad"):
        record = convert({**ANSWERED, "preferred": winner}, counts, labels=labels)
        assert list(pairs_from_rewards([record], counts)) == []
    convert({**ANSWERED, "rewards": [2, 2.0]}, counts)
    assert counts == {"ties": 3, "pairs_tied": 2}


@pytest.mark.parametrize("winner", ["model_a", "tie", 2, -1, "1.5", "9" * 30])
def test_a_winner_without_a_meaning_is_an_error(winner):
    with pytest.raises(ValueError, match=r"no place among 2 completions.*labels"):
        convert({**ANSWERED, "preferred": winner})


def test_labels_without_a_meaning_are_counted():
    counts = Counter()
    assert convert({"text": "t", "label": -1}, counts).rewards is None
    assert counts == {"labels_left_out": 1}


PAIR = {"prompt": "p", "chosen": "a", "rejected": "b"}
CALL = {"role": "assistant", "content": None, "tool_calls": [{"type": "function", "function": {"name": "f"}}]}
DROPPED = [
    ({"prompt": "p", "chosen": "a", "rejected": "a "}, "pairs_equal"),
    ({"prompt": "p", "chosen": "a", "rejected": " \n"}, "pairs_with_empty_side"),
    ({"chosen": DIALOGUE, "rejected": DIALOGUE + " Hey."}, "pairs_with_empty_side"),
    ({"chosen": DIALOGUE + " a", "rejected": "\n\nHuman: Ho\n\nAssistant: a"}, "pairs_without_common_prompt"),
    (
        {
            "chosen": DIALOGUE + " a\n\nHuman: x\n\nAssistant: c",
            "rejected": DIALOGUE + " b\n\nHuman: y\n\nAssistant: d",
        },
        "pairs_without_common_prompt",
    ),
    ({"chosen": [USER, HELLO], "rejected": [{**USER, "content": "Ho"}, HELLO]}, "pairs_without_common_prompt"),
    ({"prompt": "Bye", "chosen": [USER, HELLO], "rejected": [USER, HEY]}, "pairs_without_common_prompt"),
    ({"prompt": [PIRATE, ASK], "chosen": [USER, HELLO], "rejected": [USER, HEY]}, "pairs_without_common_prompt"),
    ({"chosen": [USER, HELLO, ASK], "rejected": [USER, HEY]}, "conversations_without_an_answer"),
    ({"text": "  "}, "empty_completions"),
    ({"messages": [USER, CALL]}, "answers_that_call_tools"),
    ({"messages": [USER, HELLO, FINE]}, "conversations_with_two_answers_in_a_row"),
    ({"chosen": [USER, HELLO, FINE], "rejected": [USER, HELLO, BAD]}, "conversations_with_two_answers_in_a_row"),
    # null is absence, as an empty text is, where other rows of the source have something
    ({**PAIR, "chosen": None}, "pairs_with_empty_side"),
    ({**PAIR, "rejected": ""}, "pairs_with_empty_side"),
    ({"chosen": [USER, HELLO], "rejected": [USER, {**HEY, "content": None}]}, "pairs_with_empty_side"),
    ({"messages": [USER, {"from": "gpt", "value": None}]}, "empty_completions"),
    ({"prompt": "p"}, "pairs_with_empty_side"),
    ({**PAIR, "prompt": None}, "rows_without_prompt"),
    ({**PAIR, "prompt": ""}, "rows_without_prompt"),
]
DROPPED_BESIDE = [
    ({"prompt": "p", "completion": None}, {"prompt": "p", "completion": "c"}, "empty_completions"),
    ({"prompt": None, "completion": "c"}, {"prompt": "p", "completion": "c"}, "rows_without_prompt"),
    ({"messages": None}, {"messages": [USER, HELLO]}, "rows_without_messages"),
    ({"prompt": None}, {"prompt": "p"}, "rows_without_prompt"),
    ({"text": None}, {"text": "t"}, "empty_completions"),
    ({"prompt": "p", "completions": None}, ANSWERED, "rows_without_completions"),
    ({"prompt": "p", "completions": [None, None]}, ANSWERED, "rows_without_completions"),
    ({**ANSWERED, "preferred": None}, {**ANSWERED, "preferred": 1}, "rows_without_preference"),
    (ANSWERED, {**ANSWERED, "rewards": [1, 2]}, "rows_without_rewards"),
]


@pytest.mark.parametrize(
    ("values", "among", "name"),
    [*((v, [PAIR] if "prompt" in v and v.get("chosen") != [USER, HELLO] else [], n) for v, n in DROPPED)]
    + [(v, [beside], n) for v, beside, n in DROPPED_BESIDE],
)
def test_rows_that_say_nothing_are_dropped_and_counted(values, among, name):
    counts = Counter()
    assert convert(values, counts, among=among) is None
    assert counts == {name: 1}


def test_a_completion_that_is_null_goes_with_its_reward():
    counts = Counter()
    record = convert({"prompt": "p", "completions": ["a", None, "c", "d"], "rewards": [1, 2, 3, None]}, counts)
    assert [(c.text, c.reward) for c in record.completions] == [("a", 1.0), ("c", 3.0)]
    assert counts == {"completions_left_out": 2}
    assert convert({**ANSWERED, "rewards": [1, None]}, counts) is None
    with_winner = {"prompt": "p", "completions": ["a", None, "c"], "preferred": 1}
    assert convert(with_winner, counts) is None
    assert counts == {
        "completions_left_out": 4,
        "rows_with_one_completion_left": 1,
        "rows_without_preference": 1,
    }
    labels = {"first": 0, "third": 2}
    kept = convert({"prompt": "p", "completions": ["a", None, "c"], "preferred": "third"}, labels=labels)
    assert (kept.preferred, kept.completions[1].text) == (1, "c")


WRONG = [
    ({"question": "q", "answer": "a"}, "'question', 'answer'.*prompt\\+completion"),
    ({}, "none"),
    ({"prompt": None}, "none"),
    ({"prompt": "p", "chosen": "a"}, "'chosen'"),
    ({"prompt": "p", "chosen": None, "rejected": "b"}, "'rejected'"),
    ({"prompt": 7, "completion": "c"}, "`prompt`.*7"),
    ({"chosen": "plain", "rejected": "texts"}, "Assistant:"),
    ({"prompt": "p", "completions": "a"}, "must be a list"),
    ({"prompt": "p", "completions": ["a"], "rewards": [1, 2]}, "1 completions but 2 rewards"),
    ({"prompt": "p", "completions": ["a", "b"], "rewards": [1.0, float("nan")]}, "reward 2.*nan"),
    ({"prompt": "p", "completions": ["a"], "rewards": [float("inf")]}, "inf"),
    ({"prompt": "p", "completions": ["a"], "ranks": ["first"]}, "rank 1.*first"),
    ({"prompt": [], "completion": "c"}, "'completion'"),
    ({"prompt": [{"role": "user", "content": None}], "completion": "c"}, "content.*missing"),
    ({"prompt": [USER], "completion": [USER]}, "assistant"),
    ({"messages": "Hi"}, "`messages`"),
    ({"messages": ["Hi"]}, "role"),
    ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "u"}]}]}, "image_url.*only text"),
    ({"messages": [USER, HELLO], "chosen": "a", "rejected": "b"}, "ends with an answer"),
    ({"prompt": ["p"], "chosen": ["a"], "rejected": ["b"]}, "a list for each column"),
    ({"prompt": "p", "chosen": str([HELLO]), "rejected": "b"}, "as Python prints them.*json"),
    ({"data": [PAIR, PAIR]}, "list of 2 objects in 'data'"),
    ({"prompt": "p", "weight": "heavy"}, "`weight`.*heavy"),
    ({"prompt": "p", "weight": -1}, "`weight`.*-1"),
    ({"prompt": "p", "tools": "a hammer"}, "`tools`.*hammer"),
    ({"system": "Be brief.", "messages": [PIRATE, USER]}, "another system message"),
    ({"messages": [{"from": "function_call", "value": "f()"}]}, "function call"),
]


@pytest.mark.parametrize(("values", "message"), WRONG)
def test_a_wrong_row_is_named_with_what_is_wrong(values, message):
    with pytest.raises(ValueError, match=message):
        convert(values)


def test_a_row_of_another_kind_than_the_first_is_named(write_jsonl):
    path = write_jsonl([{"prompt": "p"}] * 100 + [{"prompt": "p", "completion": "c"}])
    with pytest.raises(InputError, match="row 101: it has 'completion', which the first rows of its source have not"):
        read(path)


# --- what stands beside prompt and answers ---


def test_columns_that_nothing_is_made_of_stay_with_the_record():
    """For reward functions that ask for them; pictures do not, and what was used is not there twice."""
    row = {"question": "p", "answer": "4", "tests": ["a", "b"], "image": {"bytes": b"x"}, "empty": None}
    assert convert(row, columns={"prompt": "question"}).columns == {"answer": "4", "tests": ["a", "b"]}
    assert convert({"prompt": "p", "completion": "c"}).columns is None


def test_other_columns_are_the_same_before_and_after_they_are_stored(tmp_path):
    rows = [{"prompt": "p", "day": datetime.date(2024, 1, 2), "price": Decimal("4.20"), "seen": {"n": 1, "at": None}}]
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    records = read(tmp_path / "rows.parquet")
    assert records[0].columns == {"day": "2024-01-02", "price": "4.20", "seen": {"n": 1, "at": None}}
    write_records(tmp_path / "stored", records, Header())
    assert read_records(tmp_path / "stored") == records


def test_every_column_with_content_is_used_or_counted():
    counts = Counter()
    row = {"id": "x", "margin": 0.5, "empty": None, "none": [], **PAIR}
    convert(row, counts)
    assert counts == {"column id kept beside": 1, "column margin kept beside": 1}
    counts = Counter()
    convert({**PAIR, "question": "q"}, counts, columns={"prompt": "question"})
    assert counts == {"column prompt kept beside": 1}
    counts = Counter()
    convert({f"more {i}\ud800\n": 1 for i in range(150)} | PAIR, counts)
    assert counts.total() == 150
    assert counts["other columns kept beside"] == 50
    assert all(name.isprintable() for name in counts)


def test_weights_and_tools_come_along():
    tool = {"type": "function", "function": {"name": "f", "parameters": None}}
    record = convert({"prompt": "p", "completion": "c", "weight": "0.5", "tools": json.dumps([tool])})
    assert record.weight == 0.5
    assert json.loads(record.tools) == [{"type": "function", "function": {"name": "f"}}]
    assert record.prompt == ({"role": "user", "content": "p"},)
    assert convert({"prompt": "p", "weight": None, "tools": "[]"}).tools is None


def test_tool_calls_stay_in_the_conversation():
    call, result = CALL, {"role": "tool", "content": "sunny", "tool_call_id": "1"}
    record = convert({"messages": [USER, call, result, FINE]})
    assert record.prompt == (USER, {**call, "content": ""}, result)
    turns = [
        {"from": "human", "value": "Hi"},
        {"from": "function_call", "value": '{"name": "f", "arguments": {"x": 1}}'},
        {"from": "observation", "value": "sunny"},
        {"from": "gpt", "value": "Fine."},
    ]
    record = convert({"conversations": turns, "tools": ""})
    assert record.prompt[1]["tool_calls"] == [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]
    assert record.prompt[2] == {"role": "tool", "content": "sunny"}
    turns[1]["value"] = '[{"name": "f", "arguments": {}}, {"name": "g", "arguments": {}}]'
    calls = convert({"conversations": turns}).prompt[1]["tool_calls"]
    assert [call["function"]["name"] for call in calls] == ["f", "g"]
    old = {"role": "assistant", "content": None, "function_call": {"name": "f", "arguments": "{}"}}
    told = {"role": "function", "name": "f", "content": "sunny"}
    counts = Counter()
    record = convert({"messages": [USER, old, told, FINE]}, counts)
    assert record.prompt[1] == {
        **call,
        "content": "",
        "tool_calls": [{"type": "function", "function": old["function_call"]}],
    }
    assert record.prompt[2] == {**told, "role": "tool"} and not counts


def test_the_reasoning_beside_an_answer_is_counted():
    counts = Counter()
    thought = {**HELLO, "reasoning_content": "Be friendly."}
    assert convert({"messages": [USER, thought]}, counts).completions == (Completion("Hello!"),)
    assert convert({"prompt": [USER], "chosen": [thought], "rejected": [HELLO]}, counts) is None
    assert counts == {"answers_without_their_reasoning": 2, "pairs_equal": 1}


def test_texts_inside_calls_and_tools_can_be_stored_too():
    counts = Counter()
    call = {**CALL, "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"a": "\ud800"}}}]}
    record = convert({"messages": [USER, call, HELLO], "tools": [{"name": "f\ud800"}]}, counts)
    assert counts == {"lone_surrogates_replaced": 2}
    assert json.loads(record.tools) == [{"name": "f\ufffd"}]
    assert record.prompt[1]["tool_calls"][0]["function"]["arguments"] == {"a": "\ufffd"}


def test_dates_and_decimals_inside_calls_and_tools_are_texts(tmp_path):
    call = {"function": {"name": "f", "arguments": {"on": datetime.date(2024, 1, 2), "n": 1, "x": True}}}
    tools = [{"name": "f", "parameters": {"least": Decimal("1.5")}}]
    record = convert({"messages": [USER, {**CALL, "tool_calls": [call]}, HELLO], "tools": tools})
    assert record.prompt[1]["tool_calls"][0]["function"]["arguments"] == {"on": "2024-01-02", "n": 1, "x": True}
    assert json.loads(record.tools)[0]["parameters"] == {"least": "1.5"}
    write_records(tmp_path / "stored", [record], Header())
    assert read_records(tmp_path / "stored") == [record]


def test_messages_as_json_stand_in_all_rows_or_in_none():
    spelled, plain = {**PAIR, "chosen": json.dumps([USER, HELLO])}, {**PAIR, "chosen": "sorry"}
    with pytest.raises(
        ValueError, match="`chosen` holds chat messages as JSON in 2 of the first 3 rows and other text"
    ):
        convert(plain, among=[spelled, spelled])
    assert convert(spelled, among=[plain, plain]).completions[0].text == spelled["chosen"]  # a text about messages


@pytest.mark.parametrize("answer", [{"from": "Oslo", "to": "Bergen"}, {"role": "engineer"}, [{"role": "cook"}]])
def test_answers_that_are_objects_are_texts_though_they_have_a_role_or_a_from(answer):
    for text in (json.dumps(answer), str(answer)):
        record = convert({"prompt": "Who goes where?", "completion": text})
        assert record.prompt == "Who goes where?" and record.completions == (Completion(text),)


def test_a_setting_or_column_without_effect_beside_another_is_told():
    with pytest.raises(ValueError, match="`labels` says what values of a preference, label or reward mean"):
        convert(PAIR, labels={"model_a": 0})
    record = convert(
        {"prompt": "p", "completions": ["a", "b"], "rewards": [0, 1], "ranks": [1, 2]}, counts := Counter()
    )
    assert record.rewards == [0, 1] and record.columns == {"ranks": [1, 2]}
    assert any("ranks" in name for name in counts)


def test_a_source_is_a_chat_or_it_is_not():
    """A row without a system message, among rows with one, is a turn of a chat all the same."""
    among = [{"system": "Be brief.", **PAIR}]
    assert convert(PAIR, among=among).prompt == ({"role": "user", "content": "p"},)
    assert convert(PAIR).prompt == "p"


@pytest.mark.parametrize("number_without", [0, 1, 2])
def test_answers_that_repeat_their_prompt_lose_it_where_nearly_all_do(number_without):
    """At least 95% of the rows, so of 20 all but one."""
    rows = [{"prompt": f"{i}:", "chosen": f"{i}: a", "rejected": f"{i}: b"} for i in range(20)]
    rows[:number_without] = [{"prompt": f"{i}:", "chosen": "a", "rejected": "b"} for i in range(number_without)]
    counts = Counter()
    last = convert(rows[-1], counts, among=rows[:-1])
    taken_off = number_without < 2
    assert [c.text for c in last.completions] == ([" a", " b"] if taken_off else ["19: a", "19: b"])
    assert counts == {"prompts_taken_off_answers" if taken_off else "answers_that_begin_with_their_prompt": 1}
    if number_without == 1:
        convert(rows[0], counts, among=rows[1:])
        assert counts["answers_without_their_prompt"] == 1
    assert convert(rows[-1]).completions[0].text == "19: a"  # one row agrees with nothing


@given(st.text(), st.text(alphabet=st.characters(categories=["Cs", "Lu"]), min_size=1))
def test_any_text_is_kept_and_only_lone_surrogates_are_replaced(prompt, completion):
    counts = Counter()
    record = convert({"prompt": prompt, "completion": completion}, counts)
    assert record.prompt == prompt
    record.completions[0].text.encode("utf-8")
    try:
        completion.encode("utf-8")
    except UnicodeEncodeError:
        assert counts["lone_surrogates_replaced"] == 1
    else:
        assert record.completions[0].text == completion


@given(st.text(), st.text(), st.text())
def test_an_implicit_prompt_and_its_sides_rebuild_the_dialogues(past, left, right):
    chosen, rejected = (f"\n\nHuman: {past}\n\nAssistant:{side}" for side in (left, right))
    record = convert({"chosen": chosen, "rejected": rejected})
    if record is not None:
        assert [record.prompt + c.text for c in record.completions] == [chosen, rejected]
        assert record.prompt.endswith("\n\nAssistant:")


def test_other_keys_of_messages_are_counted():
    counts = Counter()
    convert({"messages": [{**USER, "train": False, "name": "Ann"}, HELLO]}, counts)
    assert counts == {"messages_with_other_keys": 1}


# --- files ---

ROWS = [{"prompt": f"p{i}", "completion": f"line one\nline two, {i} “ü”"} for i in range(5)]


def as_csv(rows):
    stream = io.StringIO()
    writer = csv.DictWriter(stream, fieldnames=rows[0])
    writer.writeheader()
    writer.writerows(rows)
    return stream.getvalue().encode()


def as_parquet(rows):
    stream = io.BytesIO()
    pq.write_table(rows if isinstance(rows, pa.Table) else pa.Table.from_pylist(rows), stream)
    return stream.getvalue()


def as_lines(rows):
    return "\n".join(json.dumps(row, ensure_ascii=False) for row in rows).encode()


FILES = {
    "data.jsonl": as_lines(ROWS),
    "data.JSONL": b"\xef\xbb\xbf" + as_lines(ROWS) + b"\r\n",
    "data.jsonl.gz": gzip.compress(as_lines(ROWS)),
    "lines.json": as_lines(ROWS),
    "array.json": json.dumps(ROWS, indent=1).encode(),
    "objects.json": "\n\n".join(json.dumps(row, indent=2) for row in ROWS).encode(),
    "objects.jsonl": b"\xef\xbb\xbf\n" + "\n".join(json.dumps(row, indent=2) for row in ROWS).encode(),
    "data.ndjson": as_lines(ROWS),
    "array.json.gz": gzip.compress(json.dumps(ROWS).encode()),
    "data.csv": as_csv(ROWS),
    "bom.csv": b"\xef\xbb\xbf" + as_csv(ROWS),
    "data.csv.gz": gzip.compress(as_csv(ROWS)),
    "data.parquet": as_parquet(ROWS),
}


@pytest.mark.parametrize("name", FILES)
def test_every_file_type_gives_the_same_records(tmp_path, name):
    (tmp_path / name).write_bytes(FILES[name])
    counts = Counter()
    records = read(tmp_path / name, counts)
    assert [(r.prompt, r.completions[0].text) for r in records] == [(r["prompt"], r["completion"]) for r in ROWS]
    assert [r.id for r in records] == [f"{name}:{i}" for i in range(1, 6)]
    assert counts == {"rows": 5, "records": 5}


def test_lists_in_csv_cells_are_json(tmp_path):
    (tmp_path / "d.csv").write_bytes(as_csv([{"prompt": "p", "completions": '["a", "b"]', "rewards": "[1, 2.5]"}]))
    assert read(tmp_path / "d.csv")[0].rewards == [1.0, 2.5]


POINTER = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 5\n"
BROKEN = {
    "bad.jsonl": (b'{"prompt": "p"}\n\n{"prompt": \n', "row 3: not valid JSON"),
    "list.jsonl": (b'{"prompt": "p"}\n["p"]\n', "row 2: expected an object"),
    "utf8.jsonl": (b'{"prompt": "p"}\n{"prompt": "\xff"}\n', "row 2: not valid UTF-8"),
    "deep.jsonl": (b'{"prompt": ' + b"[" * 200_000 + b"\n", "row 1: "),
    "cut.jsonl.gz": (gzip.compress(as_lines(ROWS * 500))[:-40], "stopped after row"),
    "not.jsonl.gz": (b"plain", "stopped after row 0"),
    "array.json": (b'[{"prompt": "p"},\n{"prompt" "q"}]', "line 2: not valid JSON"),
    "numbers.json": (b"[1, 2]", "row 1: expected an object"),
    "cells.csv": (b"prompt,completion\na,b\nc\n", "row 2: 1 cells"),
    "twice.csv": (b"prompt,prompt\na,b\n", "first line must name the columns"),
    "quote.csv": (b'prompt,completion\na,"b', "row 1: not valid CSV"),
    "utf8.csv": (b"prompt,completion\na,b\nc,\xff\n", "line 3: not valid UTF-8"),
    "bad.parquet": (b"PAR1 not really", "Parquet"),
    "twice.parquet": (as_parquet(pa.table([["p"], ["q"]], names=["prompt", "prompt"])), "columns of one name"),
    "data.text": (b"hello", "must end in"),
    "utf8.txt": (b"a\n\xff\n", "row 2: not valid UTF-8"),
    "half.json": (b'{"prompt": "p"\n}\n{"prompt":\n', "line 4: not valid JSON"),
    "mixed.json": (b'{\n"prompt": "p"}\n7', "row 2: expected an object"),
    "columns.json": (b'{"prompt": ["p"],\n "completion": ["c"]}', "a list for each column"),
    "nested.json": (b'{"version": 1,\n "data": [{"prompt": "p"}]}', "list of 1 objects in 'data'"),
    "pointer.jsonl": (POINTER, "Git LFS pointer"),
    "pointer.jsonl.gz": (POINTER, "Git LFS pointer"),
    "pointer.parquet": (POINTER, "Git LFS pointer"),
    "null.jsonl": (b'{"prompt": "p", "completions": ["a"], "rewards": [NaN]}\n', "row 1: reward 1"),
}


@pytest.mark.parametrize("name", BROKEN)
def test_a_broken_file_is_named_with_its_row(tmp_path, name):
    data, message = BROKEN[name]
    (tmp_path / name).write_bytes(data)
    with pytest.raises(InputError) as error:
        read(tmp_path / name)
    assert name in str(error.value)
    assert message in str(error.value)
    assert "\n" not in str(error.value)


def test_a_missing_file_names_the_nearest(tmp_path, write_jsonl):
    path = write_jsonl(ROWS, "train.jsonl")
    for wrong in (tmp_path / "tarin.jsonl", tmp_path / "train.json"):
        with pytest.raises(InputError, match=f"did you mean {path}"):
            read_source(DataSettings(source=str(wrong)), Counter())
    with pytest.raises(InputError, match=f"did you mean {tmp_path}"):
        read_source(DataSettings(source=f"{tmp_path}x/train.jsonl"), Counter())


def test_a_folder_that_may_not_be_listed_names_none(tmp_path, monkeypatch):
    def refuse(*_):
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "iterdir", refuse)
    with pytest.raises(InputError, match=r"There is no file or folder .*train\.jsonl\.$"):
        read_source(DataSettings(source=str(tmp_path / "train.jsonl")), Counter())


def test_splits_of_a_folder(tmp_path, write_jsonl):
    write_jsonl(ROWS[:1], "sft_train.jsonl")
    write_jsonl(ROWS[1:3], "test-00000-of-00001.jsonl.gz")
    (tmp_path / "README.md").write_text("not data")
    (tmp_path / "notes.txt").write_text("about the data")
    assert [r.prompt for r in read(tmp_path, split="train")] == ["p0"]
    assert [r.id for r in read(tmp_path, split="test")] == [f"test-00000-of-00001.jsonl.gz:{i}" for i in (1, 2)]
    assert len(read(tmp_path, split="sft_train")) == 1
    write_jsonl(ROWS[:2], "train_prefs-00000-of-00001.jsonl")
    (tmp_path / "train.jsonl.zst").write_bytes(b"")
    records = read(tmp_path, counts := Counter(), split="train_prefs")
    assert [record.prompt for record in records] == ["p0", "p1"]
    assert counts["files_not_read"] == 1
    with pytest.raises(InputError, match=r"several splits \(test, train\)"):
        read(tmp_path)
    with pytest.raises(InputError, match="no split 'dev'; found test, train"):
        read(tmp_path, split="dev")
    (tmp_path / "empty").mkdir()
    with pytest.raises(InputError, match="holds no data files"):
        read(tmp_path / "empty")


@pytest.mark.parametrize(
    ("word", "split"),
    [
        *((word, "train") for word in ("train", "training")),
        *((word, "validation") for word in ("validation", "valid", "val", "dev")),
        *((word, "test") for word in ("test", "testing", "eval", "evaluation")),
    ],
)
def test_the_words_of_the_hub_name_a_split(tmp_path, word, split):
    (tmp_path / word).mkdir()
    for name in (f"{word}.jsonl", f"my-{word}_2.jsonl", f"{word}/part.jsonl"):
        (tmp_path / name).write_bytes(as_lines(ROWS[:1]))
    assert len(read(tmp_path, split=split)) == len(read(tmp_path, split=word)) == len(read(tmp_path)) == 3
    (tmp_path / "rest.jsonl").write_bytes(as_lines(ROWS[:2]))
    with pytest.raises(InputError, match=f"files of the split {split} and others without one, as rest.jsonl"):
        read(tmp_path)
    assert len(read(tmp_path, split="rest")) == 2
    (tmp_path / f"{word}/{'test' if split == 'train' else 'train'}.jsonl").write_bytes(as_lines(ROWS))
    assert len(read(tmp_path, split=split)) == 3  # a file's own name says more than its folder's


def test_a_folder_saved_by_datasets(tmp_path):
    import datasets

    data = datasets.Dataset.from_list(ROWS)
    datasets.DatasetDict({"train": data, "test": data.select([4])}).save_to_disk(tmp_path / "saved")
    assert [r.prompt for r in read(tmp_path / "saved", split="test")] == ["p4"]
    assert len(read(tmp_path / "saved" / "train")) == 5
    with pytest.raises(InputError, match="train, test"):
        read(tmp_path / "saved")
    (table,) = (tmp_path / "saved" / "train").glob("*.arrow")
    table.write_bytes(table.read_bytes().replace(b"line one", b"line \xff\xff\xff"))
    with pytest.raises(InputError, match="cannot be read by datasets"):
        read(tmp_path / "saved" / "train")


def test_windows_are_disjoint_and_shuffling_keeps_ids(write_jsonl):
    path = write_jsonl([{"prompt": f"p{i}"} for i in range(20)])
    plain = read(path)
    assert read(path, skip=3, limit=5) == plain[3:8]
    shuffled = read(path, shuffle_seed=1)
    assert shuffled != plain
    assert sorted(shuffled, key=lambda r: int(r.prompt[1:])) == plain
    assert read(path, shuffle_seed=1, skip=0, limit=12) + read(path, shuffle_seed=1, skip=12) == shuffled
    assert read(path, shuffle_seed=2) != shuffled


def test_a_line_of_a_text_file_is_a_text(tmp_path):
    (tmp_path / "data.txt").write_bytes(b"\xef\xbb\xbfone\r\n\n two \n")
    counts = Counter()
    assert [(r.id, r.completions[0].text) for r in read(tmp_path, counts)] == [
        ("data.txt:1", "one"),
        ("data.txt:3", " two "),
    ]
    assert counts == {"blank_lines": 1, "rows": 2, "records": 2}
    assert [r.prompt for r in read(tmp_path / "data.txt", columns={"prompt": "text"})] == ["one", " two "]
    (tmp_path / "data.txt").write_bytes(b"[1] a note, no JSON\n")
    assert len(read(tmp_path / "data.txt", streaming=True)) == 1


def test_columns_are_renamed(write_jsonl):
    path = write_jsonl([{"question": "q", "an answer": "a", "prompt": "unused"}])
    (record,) = read(path, columns={"prompt": "question", "completion": "an answer"})
    assert (record.prompt, record.completions[0].text) == ("q", "a")


NESTED = {
    "instruction": "Translate.",
    "input": "Hallo",
    "answers": [
        {"text": "Hello", "score": {"overall": 2}},
        {"text": None, "score": {"overall": 5}},
        {"text": "No"},
        {"text": "Hi", "score": {"overall": 0.5}},
    ],
    "meta": {"by": "x"},
}


def test_columns_may_be_expressions(write_jsonl):
    """A projection keeps its nulls, so that answers and scores stay side by side; JMESPath itself drops them."""
    counts = Counter()
    path = write_jsonl([NESTED, {**NESTED, "input": ""}])
    joined = r'join(`"\n"`, [instruction, input][?@])'
    columns = {"prompt": joined, "completions": "answers[].text", "rewards": "answers[].score.overall"}
    first, second = read(path, counts, columns=columns)
    assert (first.prompt, second.prompt) == ("Translate.\nHallo", "Translate.")
    assert [(c.text, c.reward) for c in first.completions] == [("Hello", 2.0), ("Hi", 0.5)]
    assert counts == {"rows": 2, "records": 2, "completions_left_out": 4, "column meta kept beside": 2}
    (last, _) = read(path, columns={**columns, "completions": "[answers[-1].text]", "rewards": "[`3`]"})
    assert last.rewards == [3.0]
    best = "max_by(answers[?score.overall], &score.overall).text || 'none'"  # `score` is read from an answer
    assert read(path, columns={"prompt": joined, "completion": best})[0].completions[0].text == "none"


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"completion": "anwser"}, "`columns` asks for a column 'anwser', but its columns are 'instruction'"),
        ({"completion": "anwser.text"}, "asks for a column 'anwser'"),
        ({"completion": "answers[.text"}, "asks for a column 'answers\\[.text'.*nor is it JMESPath"),
        ({"completion": "join(input, answers)"}, "`columns` cannot read completion"),
        ({"completion": "answers[::0].text"}, "`columns` cannot read completion .slice step cannot be zero"),
        ({"completion": "[" * 3_000}, r"asks for a column '\[{100}' \(nor is it JMESPath: maximum recursion"),
        ({"prompt": "instruction", "label": "meta.none"}, "names label, which has no content here or no use"),
    ],
)
def test_columns_that_are_not_there(write_jsonl, columns, message):
    with pytest.raises(InputError, match=message):
        read(write_jsonl([NESTED]), columns=columns)


def test_a_column_that_nothing_reads_is_no_setting():
    with pytest.raises(ValueError, match="did you mean rejected"):
        DataSettings(source="x", columns={"rejcted": "x"})
    with pytest.raises(ValueError, match=r"'question' is no column.*ours: theirs"):
        DataSettings(source="x", columns={"question": "prompt"})


def test_an_empty_answer_in_a_list_is_kept_and_counted(write_jsonl):
    counts: Counter[str] = Counter()
    rows = [{"prompt": "p", "completions": ["a", " "], "rewards": [1.0, 0.0]}]
    (record,) = read_source(DataSettings(source=str(write_jsonl(rows))), counts)
    assert [completion.text for completion in record.completions] == ["a", " "]
    assert counts == {"rows": 1, "records": 1, "answers_that_end_at_once": 1}


def test_the_settings_of_a_command_line():
    more = ["labels.model_a=0", "labels.tie (bothbad)=tie", "labels.2=1", "join=true", "limit=5"]
    settings = settings_of("x", ["prompt=a[?b=='c'].d", "completions=x"], more, "test")
    assert settings.columns == {"prompt": "a[?b=='c'].d", "completions": "x"}
    assert settings.labels == {"model_a": 0.0, "tie (bothbad)": "tie", "2": 1.0}
    assert (settings.join, settings.limit, settings.split) == (True, 5, "test")
    for columns, more, message in [
        (["prompt"], [], "'columns.prompt' is not KEY=VALUE"),
        ([], ["labels.a=b"], "labels"),
        ([], ["limti=5"], "'limti' is no setting of a data source; did you mean limit"),
        ([], ["align.exo.epochs=2"], r"'align.exo.epochs' is no setting of a data source"),
        (["promt=a"], [], r"columns: 'promt' is no column.*did you mean prompt"),
        ([], ["labels=5", "labels.a=1"], r"'labels.a=1': labels is a single value"),
    ]:
        with pytest.raises(InputError, match=message):
            settings_of("x", columns, more)


def test_a_share_is_the_same_rows_every_time_in_their_order(write_jsonl):
    """Of 2,000 rows a quarter, give or take four standard deviations (of 19.4 rows each)."""
    path = write_jsonl([{"prompt": f"p{i}"} for i in range(2_000)])
    counts = Counter()
    kept = [int(r.prompt[1:]) for r in read(path, counts, share=0.25)]
    assert abs(len(kept) - 500) < 78
    assert kept == sorted(kept)
    assert counts == {"rows": len(kept), "records": len(kept), "rows_beyond_the_share": 2_000 - len(kept)}
    assert kept == [int(r.prompt[1:]) for r in read(path, share=0.25)]
    assert set(kept) <= {int(r.prompt[1:]) for r in read(path, share=0.5)}
    assert sorted(int(r.prompt[1:]) for r in read(path, share=0.25, shuffle_seed=0)) == kept
    assert {int(r.prompt[1:]) for r in read(path, share=0.25, shuffle_seed=1)} != set(kept)


def test_several_sources_are_one_and_each_is_counted(tmp_path, write_jsonl):
    write_jsonl([{"prompt": "p", "completion": "c"}, {"prompt": "p", "completion": ""}], "a.jsonl")
    write_jsonl([{"question": "q", "answer": "a", "weight": 0.5, "id": 1}], "b.jsonl")
    first = DataSettings(source=str(tmp_path / "a.jsonl"))
    second = DataSettings(
        source=str(tmp_path / "b.jsonl"), columns={"prompt": "question", "completion": "answer"}, weight=3.0
    )
    counts = Counter()
    records = list(read_source([first, second], counts))
    assert [(r.id, r.prompt, r.weight) for r in records] == [("1/a.jsonl:1", "p", None), ("2/b.jsonl:1", "q", 1.5)]
    assert counts == {
        "rows": 3, "records": 2, "empty_completions": 1, "column id kept beside": 1,
        "source 1: rows": 2, "source 1: records": 1, "source 1: empty_completions": 1,
        "source 2: rows": 1, "source 2: records": 1, "source 2: column id kept beside": 1,
    }  # fmt: skip
    assert list(read_source([first], Counter())) == list(read_source(first, Counter()))


def test_what_was_read_of_several_sources_is_counted_where_reading_ends_early(write_jsonl):
    paths = [
        write_jsonl([{"prompt": str(i), "completion": "x"} for i in range(4)], name) for name in ("a.jsonl", "b.jsonl")
    ]
    counts = Counter()
    rows = read_source([DataSettings(source=str(path)) for path in paths], counts)
    assert [next(rows).id for _ in range(5)][-1] == "2/b.jsonl:1"
    rows.close()
    assert counts["records"] == 5 and counts["source 1: records"] == 4 and counts["source 2: records"] == 1


@pytest.mark.parametrize(("name", "mark"), [("a.csv", ","), ("b.csv", ";"), ("c.tsv", "\t")])
def test_tables_by_commas_semicolons_and_tabs(tmp_path, name, mark):
    rows = [["prompt", "completion"], ["one, two; three", 'say "four"'], ["five", "six\nseven"]]
    with (tmp_path / name).open("w", newline="") as stream:
        csv.writer(stream, delimiter=mark).writerows(rows)
    with (tmp_path / name).open("a") as stream:
        stream.write("\n")
    records = read(tmp_path / name, counts := Counter())
    assert [[r.prompt, r.completions[0].text] for r in records] == rows[1:]
    assert counts["blank_lines"] == 1


def test_a_table_that_ends_in_tsv_has_tabs(tmp_path):
    (tmp_path / "y.tsv").write_text("text\nHello, you; there\n")
    assert [record.completions[0].text for record in read(tmp_path / "y.tsv")] == ["Hello, you; there"]


def test_messages_that_are_text_are_a_prompt(write_jsonl):
    path = write_jsonl([{"messages": "Hi there", "chosen": "a", "rejected": "b"}])
    (record,) = read_source(DataSettings(source=str(path)), Counter())
    assert record.prompt == "Hi there" and [c.text for c in record.completions] == ["a", "b"]


def test_rows_of_one_prompt_are_joined(write_jsonl):
    rows = [
        {"prompt": p, "completions": [c], "rewards": [r]} for p, c, r in [("p", "a", 1), ("p", "b", 2), ("q", "c", 3)]
    ]
    counts = Counter()
    records = read(write_jsonl([*rows, rows[0]]), counts, join=True)
    assert [(r.id, len(r.completions), r.rewards) for r in records] == [
        ("data.jsonl:1", 2, [1.0, 2.0]),
        ("data.jsonl:3", 1, [3.0]),
        ("data.jsonl:4", 1, [1.0]),
    ]
    assert counts == {"rows": 4, "records": 3}
    (one,) = read(
        write_jsonl([{**rows[0], "by": "Ann"}, {**rows[1], "by": "Bo"}, {**rows[1], "by": "Ann"}]), counts, join=True
    )
    assert one.columns == {"by": "Ann"} and counts["joined_rows_with_other_columns_than_the_first"] == 1
    for wrong in ([PAIR, PAIR], [{**rows[0], "weight": 1}, {**rows[1], "weight": 2}]):
        with pytest.raises(InputError, match=r"`join` cannot take effect on row data.jsonl:1"):
            read(write_jsonl(wrong), join=True)


def test_prompts_that_two_sources_share(write_jsonl):
    """Once each, however often and with whatever white space around."""
    first = [Record("1", "p"), Record("2", "q"), Record("3", (USER,))]
    second = [Record("4", " p\n"), Record("5", "p"), Record("6", ({**USER, "content": "Hi "},)), Record("7", "r")]
    known, asked = ({prompt_digest(record) for record in records} for records in (first, second))
    assert (len(known & asked), len(known), len(asked)) == (2, 3, 3)


def test_a_tilde_is_expanded_once(tmp_path, monkeypatch, write_jsonl):
    write_jsonl(ROWS)
    monkeypatch.setenv("HOME", str(tmp_path))
    settings = DataSettings(source="~/data.jsonl")
    assert settings.source == str(tmp_path / "data.jsonl")
    assert len(read("~/data.jsonl")) == 5


def test_settings_that_cannot_take_effect_are_errors(tmp_path, write_jsonl):
    path = write_jsonl(ROWS)
    (tmp_path / "array.json").write_bytes(FILES["array.json"])
    write_records(tmp_path / "records", [Record("1", "p")], Header())
    for source, settings, message in [
        (path, {"name": "x"}, "`name`"),
        (path, {"split": "train"}, "`split`"),
        (path, {"prompt_tokens": 3}, "`prompt_tokens`"),
        (path, {"streaming": True, "shuffle_seed": 1}, "`shuffle_seed`"),
        (tmp_path / "records", {"split": "train"}, "`split`"),
        (tmp_path / "records", {"columns": {"prompt": "x"}}, "`columns`"),
        (tmp_path / "records", {"shuffle_seed": 0}, "`shuffle_seed`"),
    ]:
        with pytest.raises(InputError, match=message):  # before anything is read
            read_source(DataSettings(source=str(source), **settings), Counter())
    with pytest.raises(InputError, match="cannot be streamed"):
        read(tmp_path / "array.json", streaming=True)


def test_only_plain_texts_are_split_by_tokens(write_jsonl, tokenizer):
    path = write_jsonl([{"text": "This comedy was good."}])
    (record,) = read_source(DataSettings(source=str(path), prompt_tokens=2), Counter(), tokenizer)
    assert len(record.prompt_ids) == 2
    path = write_jsonl([{"text": "t", "prompt": "p", "completion": "c"}])
    with pytest.raises(InputError, match=r"`prompt_tokens`.*their own prompt"):
        list(read_source(DataSettings(source=str(path), prompt_tokens=2), Counter(), tokenizer))


def test_our_own_records_come_back_whole_or_not_at_all(tmp_path):
    records = [Record(str(i), "p", (Completion("c", (1, 2), "length", -1.0, -2.0, 0.5),), (3,), 0) for i in range(3)]
    write_records(tmp_path / "records", records, Header(), shard_size=2)
    assert read(tmp_path / "records") == records
    assert read(tmp_path / "records", skip=1, limit=1) == records[1:2]
    (tmp_path / "records/header.json").unlink()
    with pytest.raises(InputError, match="not finished"):
        read(tmp_path / "records")


def test_token_ids_of_another_tokenizer_are_left_out(tmp_path):
    """A run's samples keep what is known of them for whoever reads their texts in the ids; others get the texts."""
    texts = ["A good film, seen twice.", "Never again would I watch it"]
    ours, theirs = (build_tokenizer(texts * 4 + more, vocab_size=320) for more in ([], ["zzz qqq", *"jkxvw"] * 9))
    ids = [tuple(ours.encode(text, add_special_tokens=False)) for text in texts]
    completions = tuple(Completion(text, one, logprob=-1.0) for text, one in zip(texts, ids, strict=True))
    cut = Completion(f"{texts[0]} {texts[1]}", ids[0], logprob=-1.0)
    records = [Record("1", "p", completions, prompt_ids=(9,)), Record("2", "q", (cut,), prompt_ids=(9,))]
    write_records(tmp_path / "records", records, Header())
    source, counts = DataSettings(source=str(tmp_path / "records")), Counter()
    assert list(read_source(source, counts, ours)) == records == list(read_source(source, counts))
    assert not counts["rows_with_ids_of_another_tokenizer"]
    bare = tuple(Completion(text) for text in texts)
    assert list(read_source(source, counts, theirs)) == [
        Record("1", "p", bare),
        Record("2", "q", (Completion(cut.text),)),
    ]
    assert counts["rows_with_ids_of_another_tokenizer"] == 2


def test_a_file_is_never_held_in_memory(write_jsonl):
    path = write_jsonl([{"prompt": "x" * 10_000} for _ in range(2_000)])
    tracemalloc.start()
    number = sum(1 for _ in read_source(DataSettings(source=str(path), streaming=True), Counter()))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert number == 2_000
    assert peak < path.stat().st_size / 10


@pytest.mark.parametrize("data_dir", ["part", "part/", "/part/"])
def test_a_folder_of_a_hub_data_set(tmp_path, monkeypatch, data_dir):
    def download(name, *, repo_type, allow_patterns):
        assert (name, repo_type, allow_patterns) == ("somebody/some-data", "dataset", "part/*")
        return str(tmp_path)

    (tmp_path / "part").mkdir()
    (tmp_path / "part/train.jsonl").write_bytes(as_lines(ROWS))
    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    assert [r.id for r in read("somebody/some-data", data_dir=data_dir, limit=1)] == ["train.jsonl:1"]


HUB = """
from collections import Counter
from exalign.data.reading import DataSettings, read_rows
from exalign.errors import InputError
for streaming in (False, True):
    try:
        next(read_rows(DataSettings(source="somebody/some-data", streaming=streaming), Counter()))
    except InputError as error:
        print(error)
"""


def test_an_unreachable_hub_is_one_sentence(tmp_path):
    done = subprocess.run(
        [sys.executable, "-c", HUB],
        env={"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path), "PATH": "", "PYTHONPATH": ":".join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
        cwd=tmp_path,
    )
    lines = done.stdout.splitlines()
    assert len(lines) == 2
    assert all("hub did not deliver the data set somebody/some-data" in line for line in lines)
