"""Exact boundaries: the prompt's ids are the same for all K, and the end-of-sequence id stands where a text ended."""

from collections import Counter
from dataclasses import replace

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers.normalizers import NFC
from tokenizers.processors import TemplateProcessing

from exalign.data.record import Completion, Record
from exalign.data.tokenization import split_text, tokenize_record, tokenize_records
from exalign.errors import InputError

same_tokenizer = settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


def tokenize(record, tokenizer, prompt=1000, completion=1000, counts=None):
    return tokenize_record(
        record,
        tokenizer,
        index=0,
        max_prompt_tokens=prompt,
        max_completion_tokens=completion,
        counts=Counter() if counts is None else counts,
    )


def record_of(prompt, *texts, **values):
    return Record("r", prompt, tuple(Completion(text) for text in texts), **values)


@same_tokenizer
@given(st.text(), st.lists(st.text(), max_size=3))
def test_prompt_and_completions_decode_to_what_they_were(tokenizer, prompt, texts):
    group = tokenize(record_of(prompt, *texts), tokenizer)
    assert tokenizer.decode(group.prompt_ids) == (prompt or "<bos>")
    for ids, text in zip(group.completion_ids, texts, strict=True):
        assert ids.dtype == torch.long
        assert int(ids[-1]) == tokenizer.eos_token_id
        assert tokenizer.decode(ids[:-1]) == text


@same_tokenizer
@given(st.text(min_size=1), st.text(), st.text(), st.integers(2, 8), st.integers(1, 8))
def test_limits_cut_the_prompt_from_the_left_and_completions_from_the_right(tokenizer, prompt, a, b, most, longest):
    counts = Counter()
    whole = tokenize(record_of(prompt, a, b), tokenizer)
    cut = tokenize(record_of(prompt, a, b), tokenizer, most, longest, counts)
    assert cut.prompt_ids.tolist() == whole.prompt_ids.tolist()[-most:]
    assert counts["prompts_cut"] == (len(whole.prompt_ids) > most)
    assert counts["completions_cut"] == sum(len(ids) > longest for ids in whole.completion_ids)
    for full, used in zip(whole.completion_ids, cut.completion_ids, strict=True):
        assert used.tolist() == full.tolist()[:longest]
        assert (int(used[-1]) == tokenizer.eos_token_id) == (len(full) <= longest)


def test_the_end_of_sequence_stands_once_and_only_on_finished_texts(tokenizer):
    eos = tokenizer.eos_token_id
    record = Record(
        "r",
        "p",
        (
            Completion("was good."),
            Completion("was good.<eos>"),
            Completion("was good.<eos>\n"),
            Completion("was good.<eos><eos>"),
            Completion("was good.", finish_reason="length"),
            Completion("", finish_reason="length"),
        ),
    )
    *finished, cut, empty = (ids.tolist() for ids in tokenize(record, tokenizer).completion_ids)
    assert all(ids == finished[0] for ids in finished)
    assert finished[0] == [*cut, eos]
    assert eos not in cut
    assert empty == [eos]


def test_ids_that_were_sampled_are_used_as_they_are(tokenizer):
    """Ids that no tokenizer would give for this text stay."""
    odd = tuple(tokenizer.convert_tokens_to_ids(list("good")))
    assert odd != tuple(tokenizer("good")["input_ids"])
    record = Record("r", "p", (Completion("good", odd, "length", logprob=-1.0),), prompt_ids=(9, 8))
    group = tokenize(record, tokenizer)
    assert group.prompt_ids.tolist() == [9, 8]
    assert group.completion_ids[0].tolist() == list(odd)
    assert group.proposal_logp.tolist() == [-1.0]


def test_sampled_ids_are_never_cut(tokenizer):
    record = Record("r", "p", (Completion("x", (5, 6, 7), "stop", logprob=-1.0),), prompt_ids=(1, 2, 3))
    with pytest.raises(InputError, match="Record r: its sampled prompt has 3 tokens, more than max_prompt_tokens = 2"):
        tokenize(record, tokenizer, prompt=2)
    with pytest.raises(InputError, match="max_completion_tokens = 2"):
        tokenize(record, tokenizer, completion=2)


def test_values_are_carried_when_every_completion_has_them(tokenizer):
    record = Record("r", "p", (Completion("a", reward=1.0, reference_logprob=-2.0), Completion("b", reward=2.0)))
    group = tokenize(replace(record, preferred=1), tokenizer)
    assert group.rewards.tolist() == [1.0, 2.0]
    assert group.rewards.dtype == torch.float32
    assert (group.reference_logp, group.proposal_logp, group.preferred) == (None, None, 1)


def test_a_prompt_without_completions_is_a_group_without_completions(tokenizer):
    assert tokenize(record_of("p"), tokenizer).num_completions == 0


def test_pairs_with_equal_tokens_are_dropped_and_counted_and_positions_stay(tokenizer):
    tokenizer.backend_tokenizer.normalizer = NFC()
    composed, decomposed = "caf\u00e9", "cafe\u0301"
    records = [
        record_of("p", composed, decomposed, preferred=0),
        record_of("p", composed, decomposed),
        record_of("p", "a", "b", preferred=0),
    ]
    counts = Counter()
    groups = tokenize_records(records, tokenizer, max_prompt_tokens=9, max_completion_tokens=99, counts=counts)
    assert [group.index for group in groups] == [1, 2]
    assert counts == {"pairs_equal_as_tokens": 1}


def test_completions_that_become_equal_by_cutting_are_dropped(tokenizer):
    counts = Counter()
    record = record_of("p", " was good. The plot", " was good. The cast", preferred=1)
    assert not list(tokenize_records([record], tokenizer, max_prompt_tokens=9, max_completion_tokens=2, counts=counts))
    assert counts == {"completions_cut": 2, "pairs_equal_as_tokens": 1}


def test_a_tokenizer_without_end_of_sequence_is_refused(tokenizer):
    tokenizer.eos_token = None
    with pytest.raises(InputError, match="end-of-sequence"):
        tokenize(record_of("p", "c"), tokenizer)


def test_a_begin_of_sequence_token_that_the_tokenizer_adds_stays_in_front(tokenizer):
    ids = [("<bos>", tokenizer.bos_token_id), ("<eos>", tokenizer.eos_token_id)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing("<bos> $A <eos>", special_tokens=ids)
    bos, plain = tokenizer.bos_token_id, tokenizer("This comedy about", add_special_tokens=False)["input_ids"]
    group = tokenize(record_of("This comedy about", " was good."), tokenizer)
    assert group.prompt_ids.tolist() == [bos, *plain]
    assert group.completion_ids[0].tolist().count(tokenizer.eos_token_id) == 1
    assert bos not in group.completion_ids[0].tolist()
    assert tokenize(record_of("This comedy about"), tokenizer, prompt=2).prompt_ids.tolist() == [bos, plain[-1]]
    assert tokenize(record_of(""), tokenizer).prompt_ids.tolist() == [bos]


# --- chat ---

USER = {"role": "user", "content": "This comedy?"}


def test_the_chat_template_draws_the_boundary(chat_tokenizer):
    group = tokenize(record_of((USER,), "was good.", "was dull."), chat_tokenizer)
    assert chat_tokenizer.decode(group.prompt_ids) == "<|user|>This comedy?\n<|assistant|>"
    assert [chat_tokenizer.decode(ids) for ids in group.completion_ids] == ["was good.<eos>", "was dull.<eos>"]


def test_a_cut_chat_completion_has_no_end(chat_tokenizer):
    record = Record("r", (USER,), (Completion("was good.", finish_reason="length"),))
    assert chat_tokenizer.decode(tokenize(record, chat_tokenizer).completion_ids[0]) == "was good."


def test_a_template_that_changes_the_prompt_is_refused(chat_tokenizer):
    chat_tokenizer.chat_template = "{{ messages | length }}" + chat_tokenizer.chat_template
    with pytest.raises(InputError, match=r"Record r: .*chat template changes the prompt"):
        tokenize(record_of((USER,), "was good."), chat_tokenizer)


def test_a_template_that_refuses_the_messages_is_named(chat_tokenizer):
    chat_tokenizer.chat_template = "{{ raise_exception('no system role') }}"
    with pytest.raises(InputError, match=r"Record r: .*no system role"):
        tokenize(record_of((USER,), "x"), chat_tokenizer)


def test_a_conversation_needs_a_chat_template(tokenizer):
    with pytest.raises(InputError, match="no chat template"):
        tokenize(record_of((USER,), "x"), tokenizer)


# --- plain text ---


@same_tokenizer
@given(st.text(), st.integers(1, 12))
def test_a_text_is_split_into_ids_that_join_again(tokenizer, text, prompt_tokens):
    counts = Counter()
    record = split_text(record_of("", text), tokenizer, prompt_tokens=prompt_tokens, counts=counts)
    ids = tokenizer(text)["input_ids"]
    if len(ids) <= prompt_tokens:
        assert record is None
        assert counts == {"texts_too_short": 1}
        return
    (completion,) = record.completions
    assert [*record.prompt_ids, *completion.token_ids] == [*ids, tokenizer.eos_token_id]
    assert len(record.prompt_ids) == prompt_tokens
    assert completion.finish_reason == "stop"
    group = tokenize(record, tokenizer, prompt=99, completion=4)
    assert group.completion_ids[0].tolist() == list(completion.token_ids)[:4]
