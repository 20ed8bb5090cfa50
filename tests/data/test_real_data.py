"""The published data sets as they are: every row is a record or is counted."""

from collections import Counter

import pytest

from exalign.data.reading import DataSettings, read_source
from exalign.data.tokenization import TokenLimits, tokenize_records


def read(source, tokenizer=None, **settings):
    counts = Counter()
    return list(read_source(DataSettings(source=str(source), **settings), counts, tokenizer)), counts


@pytest.mark.parametrize(
    ("folder", "split", "num_completions", "rows"),
    [
        ("imdb", "test", 1, 25_000),
        ("hh_helpful", "train", 2, 2_000),
        ("hh_helpful", "test", 2, 352),
        ("tldr", "preferences", 2, 1_000),
        ("tldr", "sft_train", 1, 1_745),
        ("qa_feedback", None, 4, 500),
    ],
)
def test_every_row_is_a_record_or_is_counted(real_data, folder, split, num_completions, rows):
    records, counts = read(real_data / folder, split=split)
    dropped = sum(number for name, number in counts.items() if name not in ("rows", "records", "ties"))
    assert counts["rows"] == rows == len(records) + dropped
    assert dropped < rows / 100
    assert {len(record.completions) for record in records} == {num_completions}
    assert len({record.id for record in records}) == len(records)
    preferred = 0 if num_completions == 2 else None
    assert {record.preferred for record in records} == {preferred}


def test_dialogues_end_where_the_assistant_speaks(real_data):
    records, _ = read(real_data / "hh_helpful", split="train")
    assert all(record.prompt.endswith("\n\nAssistant:") for record in records)
    assert not any("\n\nHuman:" in c.text for record in records for c in record.completions)


def test_reviews_are_balanced_and_labelled(real_data):
    records, _ = read(real_data / "imdb", split="train")
    assert Counter(record.rewards[0] for record in records) == {0.0: 12_500, 1.0: 12_500}


def test_answers_carry_the_votes_of_people(real_data):
    """Wins minus losses over all pairs of answers sum to zero."""
    records, _ = read(real_data / "qa_feedback")
    assert all(sum(record.rewards) == 0 for record in records)


def test_the_beginning_of_a_review_is_its_prompt(real_data, tokenizer):
    whole, _ = read(real_data / "imdb", split="train", limit=100)
    split, counts = read(real_data / "imdb", tokenizer, split="train", limit=100, prompt_tokens=10)
    for text, record in zip(whole, split, strict=True):
        assert len(record.prompt_ids) == 10
        ids = record.prompt_ids + record.completions[0].token_ids
        assert tokenizer.decode(ids[:-1]) == text.completions[0].text
        assert ids[-1] == tokenizer.eos_token_id
    groups = list(tokenize_records(split, tokenizer, limits=TokenLimits(max_prompt_tokens=10), counts=counts))
    assert max(len(g.completion_ids[0]) for g in groups) == 512
    assert counts["completions_cut"] == sum(len(r.completions[0].token_ids) > 512 for r in split)
