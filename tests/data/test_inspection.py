"""An inspection shows the very tokens that training uses, and nothing that could steer a terminal."""

import io
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console

from exalign.data.inspection import escape_controls, inspect_records, render_inspection
from exalign.data.reading import DataSettings, read_source
from exalign.data.record import Completion, Record
from exalign.data.tokenization import TokenLimits, tokenize_record


def inspect(records, tokenizer, prompt=512, completion=512, **options):
    limits = TokenLimits(max_prompt_tokens=prompt, max_completion_tokens=completion)
    return inspect_records(records, tokenizer, limits=limits, counts=Counter(), **options)


def printed(inspection):
    stream = io.StringIO()
    Console(file=stream, width=200).print(render_inspection(inspection))
    return stream.getvalue()


RECORD = Record(
    "file:1",
    "This comedy about a shy baker",
    (Completion(" was very good.", reward=1.5), Completion(" was dull. The plot was weak.")),
    preferred=1,
)


@pytest.mark.parametrize(("prompt", "completion"), [(512, 512), (3, 4), (2, 2)])
def test_the_tokens_that_are_not_cut_are_those_of_the_group(tokenizer, prompt, completion):
    counts = Counter()
    limits = TokenLimits(max_prompt_tokens=prompt, max_completion_tokens=completion)
    group = tokenize_record(RECORD, tokenizer, index=0, limits=limits, counts=counts)
    inspection = inspect([RECORD], tokenizer, prompt, completion)
    (row,) = inspection.rows
    assert [token.id for token in row.prompt if not token.cut] == group.prompt_ids.tolist()
    for shown, ended, ids in zip(row.completions, row.ended, group.completion_ids, strict=True):
        assert [token.id for token in shown if not token.cut] == ids.tolist()
        assert ended == (int(ids[-1]) == tokenizer.eos_token_id)
    assert inspection.counts == counts
    whole = "".join(token.text for token in row.prompt)
    assert whole == RECORD.prompt


def test_counts_and_lengths_are_of_all_rows_though_few_are_shown(tokenizer):
    records = [Record(str(n), "x" * n, (Completion("y" * n),)) for n in range(1, 10)]
    inspection = inspect(records, tokenizer, prompt=4, num_rows=2)
    assert [row.record.id for row in inspection.rows] == ["1", "2"]
    assert inspection.counts == {"prompts_cut": 5}
    assert inspection.prompt_lengths == list(range(1, 10))
    assert inspection.completion_lengths == list(range(2, 11))


def test_the_picture_names_what_matters(tokenizer):
    text = printed(inspect([RECORD], tokenizer, prompt=3, completion=4))
    assert "prompt, 3 tokens, 3 cut" in text
    assert "completion 1 (reward 1.5) (no end-of-sequence), 4 tokens, 1 cut" in text
    assert "completion 2 (preferred) (no end-of-sequence), 4 tokens" in text
    assert "prompts cut" in text


def test_weight_and_tools_are_shown(tokenizer):
    text = printed(inspect([Record("r", "p", (Completion("c"),), weight=0.5, tools="[{}]")], tokenizer))
    assert "r, weight 0.5, with tools" in text


def test_a_pair_of_equal_tokens_is_shown_as_dropped(tokenizer):
    record = Record("r", "p", (Completion("same"), Completion("same")), preferred=0)
    inspection = inspect([record], tokenizer)
    assert inspection.rows[0].dropped
    assert inspection.counts == {"pairs_equal_as_tokens": 1}
    assert "dropped" in printed(inspection)


def test_long_runs_are_shortened_in_the_picture_only(tokenizer):
    inspection = inspect([Record("r", "p", (Completion("q " * 2000),))], tokenizer)
    assert len(inspection.rows[0].completions[0]) > 2000
    assert " more … " in printed(inspection)
    assert len(printed(inspection)) < 5000


@given(st.text())
def test_escaped_text_has_no_control_characters(text):
    assert all(character.isprintable() or character.isspace() for character in escape_controls(text))
    assert not set(escape_controls(text)) & set("\x00\x1b\r\n\t\u202e\u2028\x9b")


def test_controls_and_markup_in_data_stay_text(tokenizer):
    record = Record("\x1b]0;title\x07", "[red]a\x1b[31m\u202e", (Completion("[/]\x9b2J"),))
    text = printed(inspect([record], tokenizer))
    assert "\x1b" not in text
    assert "\x9b" not in text
    assert "[red]" in text.replace("·", "")


def test_an_empty_source_is_an_empty_inspection(tokenizer):
    inspection = inspect([], tokenizer)
    assert inspection.rows == []
    assert "prompts" in printed(inspection)


def test_the_counts_of_reading_and_of_tokenisation_are_shown_together(tokenizer, write_jsonl):
    pair = {"prompt": "a long prompt", "chosen": "yes", "rejected": "no"}
    path = write_jsonl([pair, {**pair, "rejected": "yes"}, pair])
    counts = Counter()
    records = read_source(DataSettings(source=str(path), limit=2), counts)
    limits = TokenLimits(max_prompt_tokens=2, max_completion_tokens=9)
    inspection = inspect_records(records, tokenizer, limits=limits, counts=counts, num_rows=5)
    assert inspection.counts == {"rows": 2, "records": 1, "pairs_equal": 1, "prompts_cut": 1}
    assert [row.record.id for row in inspection.rows] == ["data.jsonl:1"]
