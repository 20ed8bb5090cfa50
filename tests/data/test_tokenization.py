"""Exact boundaries: the prompt's ids are the same for all K, and the end-of-sequence id stands where a text ended."""

import json
from collections import Counter
from dataclasses import replace
from datetime import datetime
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from tokenizers.normalizers import NFC
from tokenizers.processors import TemplateProcessing
from transformers import PreTrainedTokenizerFast

from exalign.data.record import Completion, Record
from exalign.data.tokenization import (
    TokenLimits,
    UnfitError,
    answer_lead,
    as_conversation,
    completion_text,
    end_ids,
    pin_date,
    render_chat,
    split_text,
    tokenize_record,
    tokenize_records,
)
from exalign.errors import InputError
from exalign.models.loading import load_tokenizer

same_tokenizer = settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])


LIMITS = TokenLimits(max_prompt_tokens=99, max_completion_tokens=99)


def tokenize(record, tokenizer, prompt=1000, completion=1000, counts=None):
    return tokenize_record(
        record,
        tokenizer,
        index=0,
        limits=TokenLimits(max_prompt_tokens=prompt, max_completion_tokens=completion),
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
    groups = tokenize_records(records, tokenizer, limits=LIMITS, counts=counts)
    assert [group.index for group in groups] == [1, 2]
    assert counts == {"pairs_equal_as_tokens": 1}


def test_completions_that_become_equal_by_cutting_are_dropped(tokenizer):
    counts = Counter()
    record = record_of("p", " was good. The plot", " was good. The cast", preferred=1)
    limits = TokenLimits(max_prompt_tokens=9, max_completion_tokens=2)
    assert not list(tokenize_records([record], tokenizer, limits=limits, counts=counts))
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
    with pytest.raises(InputError, match=r"Record r: the chat template of .* changes the prompt"):
        tokenize(record_of((USER,), "was good."), chat_tokenizer)


def test_a_template_that_refuses_the_messages_is_named(chat_tokenizer):
    chat_tokenizer.chat_template = "{{ raise_exception('no system role') }}"
    with pytest.raises(InputError, match=r"Record r: .*no system role"):
        tokenize(record_of((USER,), "x"), chat_tokenizer)


def test_a_conversation_needs_a_chat_template(tokenizer):
    with pytest.raises(InputError, match="no chat template"):
        tokenize(record_of((USER,), "x"), tokenizer)


CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
TRIMS = CHATML.replace("m.content", "m.content | trim")
INST = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}[INST] {{ m.content }} [/INST]{% elif m.role == "
    "'assistant' %} {{ m.content + eos_token }}{% else %}{{ raise_exception('No such role!') }}{% endif %}{% endfor %}"
)
HEADERS = "{% for m in messages %}### {{ m.role }}:\n{{ m.content }}\n\n{% endfor %}"
CUTS = CHATML.replace("m.content", "(m.content.split('</think>')[-1] if m.role == 'assistant' else m.content)")
OPENS = CUTS.replace("assistant\n{% endif %}", "assistant\n<think>\n{% endif %}")
EMPTY = CHATML.replace(
    "\n{{ m.content",
    "\n{{ '<think></think>' if m.role == 'assistant' and '</think>' not in m.content else '' }}{{ m.content",
)
ALTERNATES = (
    "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Alternate!') }}"
    "{% endif %}{% endfor %}" + CHATML
)
TEMPLATES = {"chatml": CHATML, "trims": TRIMS, "inst": INST, "headers": HEADERS, "cuts": CUTS, "opens": OPENS}
TEMPLATES |= {"empty": EMPTY, "alternates": ALTERNATES}
ANSWERS = ("42", "Yes.\n", " Oui, \u00e7a.", "<think>\nSix sevens.\n</think>\n\n42", "")


def byte_level(*, space=False):
    """Byte-level BPE, which may put a space in front of every text."""
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=space), decoders.ByteLevel()
    return trained(inner, pre_tokenizers.ByteLevel.alphabet(), "<|end|>", "<|im_start|>", "<|im_end|>")


def sentencepiece(*, every_segment=True):
    """BPE on words with `\u2581` in front, as Llama 2 has it (in each segment between special tokens) or Mistral 3."""
    inner = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    scheme = "always" if every_segment else "first"
    inner.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme=scheme)
    strip = [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    inner.decoder = decoders.Sequence(strip)
    made = trained(
        inner, list("aeimnorst42+=:?.,#[]/IN\u2581"), "</s>", "<unk>", "<s>", *map("<0x{:02X}>".format, range(256))
    )
    if every_segment:
        prepend = [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
        made.backend_tokenizer.normalizer, made.backend_tokenizer.pre_tokenizer = normalizers.Sequence(prepend), None
    begin = made.convert_tokens_to_ids("<s>")
    made.backend_tokenizer.post_processor = TemplateProcessing("<s> $A", special_tokens=[("<s>", begin)])
    made.bos_token = "<s>"
    return made


def trained(inner, alphabet, *special):
    texts = ["What is six times seven? Yes, it is 42. The answer is said.", "def f():\n    return 1", "Paris is it."]
    made = trainers.BpeTrainer(
        vocab_size=640, special_tokens=list(special), initial_alphabet=alphabet, show_progress=False
    )
    inner.train_from_iterator(texts * 4, made)
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token=special[0], clean_up_tokenization_spaces=False)


TOKENIZERS = {
    "byte level": byte_level,
    "byte level, space in front": lambda: byte_level(space=True),
    "SentencePiece, each segment": sentencepiece,
    "SentencePiece, first segment": lambda: sentencepiece(every_segment=False),
}


def text_of(tokenizer, ids):
    return tokenizer.decode(ids, clean_up_tokenization_spaces=False)


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize(
    ("prompt", "answer"),
    [
        ("The answer is", " 42."),
        ("2+2=", "4"),
        ("def f():\n", "    return 1"),
        ("It is ", "\u00e9\U0001f642"),
        ("", "Yes"),
    ],
)
def test_prompt_and_completion_decode_to_the_whole_text(kind, prompt, answer):
    """And what the ids of the completion add to the prompt's is its text, as a sampler would say."""
    tokenizer = TOKENIZERS[kind]()
    group = tokenize(record_of(prompt, answer), tokenizer)
    prompt_ids, ids = group.prompt_ids.tolist(), group.completion_ids[0].tolist()
    assert ids[-1] == tokenizer.eos_token_id
    whole = text_of(tokenizer, prompt_ids + ids[:-1])
    assert whole.removeprefix("<s>").removeprefix("<|end|>").lstrip() == (prompt + answer).lstrip()
    if prompt and "<0x0A>" not in tokenizer.get_vocab():  # there the bytes are special tokens, which have no text
        assert completion_text(tokenizer, prompt_ids, ids[:-1]) == answer
    assert prompt_ids.count(tokenizer.bos_token_id) == (tokenizer.bos_token_id is not None)


@pytest.mark.parametrize("kind", TOKENIZERS)
@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("answer", ANSWERS)
def test_every_template_s_answer_is_said_once_and_ended_once(kind, template, answer):
    """The law, for the product of tokenizers, templates and answers; a template that opens reasoning needs it."""
    tokenizer = TOKENIZERS[kind]()
    tokenizer.chat_template = TEMPLATES[template]
    record = record_of(({"role": "user", "content": "What is six times seven?"},), answer)
    counts = Counter()
    if template == "opens" and "</think>" not in answer:
        with pytest.raises(UnfitError, match="opens the answer with <think>"):
            tokenize(record, tokenizer)
        return
    group = tokenize(record, tokenizer, counts=counts)
    prompt_ids, ids = group.prompt_ids.tolist(), group.completion_ids[0].tolist()
    assert ids[-1] in end_ids(tokenizer)
    assert not end_ids(tokenizer) & set(ids[:-1])
    whole = text_of(tokenizer, prompt_ids + ids[:-1])
    joint = tokenizer(whole.removeprefix("<s>"), add_special_tokens=False)["input_ids"]
    assert text_of(tokenizer, joint).split() == whole.removeprefix("<s>").split()
    assert answer.strip() in whole
    assert whole.count("<think>") == max(answer.count("<think>"), template == "empty")
    assert counts["answers_changed_by_template"] == (template in ("cuts", "opens") and "<think>" in answer)
    if "byte" in kind:
        said = completion_text(tokenizer, prompt_ids, ids[:-1], answer_lead(record, tokenizer))
        assert said.strip() in answer
        assert said.strip() == answer.strip() or template == "opens"


def test_the_template_s_end_of_turn_ends_an_answer():
    """Qwen's base models: the end of a turn is not the end of sequence. Nothing but it is learnt behind the answer."""
    tokenizer = byte_level()
    tokenizer.chat_template = CHATML
    ids = tokenize(record_of((USER,), "Yes"), tokenizer).completion_ids[0]
    assert text_of(tokenizer, ids) == "Yes<|im_end|>"
    assert end_ids(tokenizer) == set(tokenizer.convert_tokens_to_ids(["<|end|>", "<|im_end|>"]))
    for written in ("Yes<|im_end|>", "Yes<|im_end|>\n", "Yes<|end|>"):
        assert tokenize(record_of((USER,), written), tokenizer).completion_ids[0].tolist() == ids.tolist()
    assert tokenize(record_of("p", "Yes"), tokenizer).completion_ids[0][-1] == tokenizer.eos_token_id


def test_a_template_without_a_generation_prompt_puts_the_answer_s_header_into_the_prompt():
    tokenizer = byte_level()
    tokenizer.chat_template = HEADERS
    group = tokenize(record_of((USER,), "Yes"), tokenizer)
    assert text_of(tokenizer, group.prompt_ids) == "### user:\nThis comedy?\n\n### assistant:\n"
    assert text_of(tokenizer, group.completion_ids[0]) == "Yes<|end|>"


@pytest.mark.parametrize("template", ["chatml", "trims", "inst", "headers", "cuts", "opens", "alternates"])
def test_a_prompt_that_begins_the_answer_is_continued(template):
    tokenizer = byte_level()
    tokenizer.chat_template = TEMPLATES[template]
    prompt = ({"role": "user", "content": "A colour?"}, {"role": "assistant", "content": "It is"})
    group = tokenize(record_of(prompt, " blue.", " no."), tokenizer)
    start = text_of(tokenizer, group.prompt_ids)
    assert start.endswith("It is")
    assert start.count("assistant") <= 1
    assert [text_of(tokenizer, ids[:-1]) for ids in group.completion_ids] == [" blue.", " no."]
    only = tokenize(record_of(prompt), tokenizer)
    assert only.prompt_ids.tolist() == group.prompt_ids.tolist()


def test_what_a_template_leaves_out_of_the_prompt_is_counted():
    tokenizer, counts = byte_level(), Counter()
    tokenizer.chat_template = CHATML.replace("{% for m in messages %}", "{% for m in messages if m.role != 'system' %}")
    tokenize(record_of(({"role": "system", "content": "Be kind."}, USER), "Yes"), tokenizer, counts=counts)
    assert counts["messages_left_out_by_template"] == 1


def test_a_call_at_the_end_of_the_prompt_is_a_turn_of_its_own():
    tokenizer, counts = byte_level(), Counter()
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "look"}}]}
    tokenizer.chat_template = CHATML.replace("{{ m.content }}", "{{ m.content }}{{ m.tool_calls or '' }}")
    assert tokenizer.chat_template != CHATML
    said = text_of(tokenizer, tokenize(record_of((USER, call), "Sunny."), tokenizer, counts=counts).prompt_ids)
    assert "look" in said and not counts
    tokenizer.chat_template = CHATML
    tokenize(record_of((USER, call), "Sunny."), tokenizer, counts=counts)
    assert counts == {"tool_calls_left_out_by_template": 1}


CALLS = {
    "as JSON": "{% for c in m.tool_calls or [] %}{{ c.function | tojson }}{% endfor %}",
    "joined": '{% for c in m.tool_calls or [] %}{"name": "{{ c.function.name }}", '
    """{{ '"arguments": ' + c.function.arguments + '}' }}{% endfor %}""",
    "printed": '{% for c in m.tool_calls or [] %}{"name": "{{ c.function.name }}", "arguments": '
    "{{ c.function.arguments }}}{% endfor %}",
    "by kind": '{% for c in m.tool_calls or [] %}{"name": "{{ c.function.name }}", "arguments": {% if '
    "c.function.arguments is string %}{{ c.function.arguments }}{% else %}{{ c.function.arguments | tojson }}"
    "{% endif %}}{% endfor %}",
}


@pytest.mark.parametrize("template", CALLS)
@pytest.mark.parametrize("arguments", [{"q": "caf\u00e9", "n": None, "in": {"day": True}}, {}])
def test_arguments_of_a_call_are_json_once_whichever_the_data_has_and_the_template_wants(template, arguments):
    tokenizer = byte_level()
    tokenizer.chat_template = CHATML.replace("{{ m.content }}", "{{ m.content }}" + CALLS[template])
    said = json.dumps({"name": "look", "arguments": arguments}, ensure_ascii=False)
    for told in (arguments, json.dumps(arguments, ensure_ascii=False)):
        call = {"type": "function", "function": {"name": "look", "arguments": told}}
        messages = [
            USER,
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "content": str(arguments)},
        ]
        assert f"<|im_start|>assistant\n{said}<|im_end|>" in render_chat(tokenizer, messages)
        counts = Counter()
        tokenize(record_of(tuple(messages), "Yes"), tokenizer, counts=counts)
        assert not counts


def test_arguments_of_a_call_that_are_no_object_stay_as_they_are():
    tokenizer = byte_level()
    tokenizer.chat_template = CHATML.replace("{{ m.content }}", CALLS["as JSON"])
    for told in ("", "Paris", "[1]", [1], "{", "9" * 5000):
        call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "look", "arguments": told}}]}
        assert f'"arguments": {json.dumps(told)}}}' in render_chat(tokenizer, [USER, call])


def test_text_of_arguments_goes_into_a_template_that_wants_text_as_the_data_has_it():
    tokenizer, told = byte_level(), '{ "q":1}'
    for template in ("joined", "printed"):
        tokenizer.chat_template = CHATML.replace("{{ m.content }}", CALLS[template])
        call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "look", "arguments": told}}]}
        assert f'"arguments": {told}}}' in render_chat(tokenizer, [USER, call])


def test_half_a_character_in_the_arguments_of_a_call_is_replaced():
    tokenizer = byte_level()
    tokenizer.chat_template = CHATML.replace("{{ m.content }}", "{{ m.content }}" + CALLS["as JSON"])
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"arguments": '{"q": "\\ud800"}'}}]}
    assert "\ufffd" in text_of(tokenizer, tokenize(record_of((USER, call), "Yes"), tokenizer).prompt_ids)


def test_broken_rows_are_dropped_and_counted_and_all_broken_ones_refused():
    tokenizer, counts = byte_level(), Counter()
    tokenizer.chat_template = INST
    records = [record_of(({"role": "system", "content": "Be kind."}, USER), "Yes"), record_of((USER,), "Yes")]
    assert [g.index for g in tokenize_records(records, tokenizer, counts=counts, limits=LIMITS)] == [1]
    assert counts["records_refused_by_template"] == 1
    with pytest.raises(InputError, match=r"^None of the 1 records can be used .* refuses it \(No such role!\)\.$"):
        list(tokenize_records(records[:1], tokenizer, counts=counts, limits=LIMITS))


def test_who_only_reads_gets_the_template_s_own_conversation():
    tokenizer = byte_level()
    tokenizer.chat_template = OPENS
    record = as_conversation(record_of((USER,), "Yes", "No"), tokenizer)
    prompt = text_of(tokenizer, record.prompt_ids)
    assert prompt == "<|im_start|>user\nThis comedy?<|im_end|>\n<|im_start|>assistant\n"
    assert [text_of(tokenizer, c.token_ids) for c in record.completions] == ["Yes<|im_end|>\n", "No<|im_end|>\n"]


def test_the_tokenizer_of_mistral_writes_answers_as_they_are():
    folder = Path(__file__).parents[2] / "../shared/field/mat/mistral-v1-fast"
    if not folder.is_dir():
        pytest.skip("the inputs from the field are not on this machine")
    tokenizer = load_tokenizer(str(folder))
    for prompt, answer, words in [
        ("The capital of France is", " Paris.", ["▁Paris", "."]),
        ("2+2=", "4", ["4"]),
        ("def f():\n", "    return 1", ["▁▁▁▁", "return", "▁", "1"]),
    ]:
        group = tokenize(record_of(prompt, answer), tokenizer)
        ids = group.completion_ids[0].tolist()
        assert tokenizer.convert_ids_to_tokens(ids) == [*words, "</s>"]
        assert completion_text(tokenizer, group.prompt_ids.tolist(), ids[:-1]) == answer


def test_a_text_that_is_split_joins_again_whatever_the_tokenizer():
    for make in TOKENIZERS.values():
        tokenizer, text = make(), "The answer is \U0001f642 42."
        for n in range(1, 8):
            record = split_text(record_of("", text), tokenizer, prompt_tokens=n, counts=Counter())
            assert (record.prompt + record.completions[0].text).lstrip() == text


def test_a_run_s_date_is_the_template_s_and_settings_reach_it():
    tokenizer = byte_level()
    tokenizer.chat_template = "{{ strftime_now('%d %b %Y, %H:%M') }}{{ 'dull' if dull }}" + CHATML
    tokenizer.chat_template_kwargs = {"dull": True}
    pin_date(datetime(2024, 7, 26, 9, 5))
    try:
        assert render_chat(tokenizer, [USER]).startswith("26 Jul 2024, 09:05dull<|im_start|>")
    finally:
        pin_date(None)
    assert datetime.now().strftime("%Y") in render_chat(tokenizer, [USER])


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
