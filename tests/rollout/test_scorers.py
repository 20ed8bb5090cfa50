"""A reward is what the model, the classifier or the function says of each text, alone or in a batch."""

from __future__ import annotations

import json
import sys
from collections import Counter
from dataclasses import replace

import pytest
import torch
from pydantic import ValidationError
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedConfig,
    PreTrainedTokenizerFast,
)

from exalign.data.record import Completion, Record
from exalign.data.tokenization import TokenLimits
from exalign.errors import InputError
from exalign.models.loading import load_reward_model, save_model
from exalign.models.model_settings import ModelSettings
from exalign.rollout.scorers import (
    ClassifierScorer,
    FunctionScorer,
    RewardModelScorer,
    check_scorer,
    keep_limits,
    log_odds,
    open_scorer,
    part_means,
    part_names,
    positive_label,
    scored,
)
from exalign.rollout.settings import ScorerSettings, WeightedScorer

WORDS = 30
_HEADS = {"vocab_size": WORDS + 4, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
CONFIGS = {
    "gpt2": {"n_embd": 16, "n_layer": 2, "n_head": 2, "n_positions": 64, "eos_token_id": 0, "bos_token_id": 0},
    "llama": {"intermediate_size": 24, "num_key_value_heads": 1, "max_position_embeddings": 64, "eos_token_id": 0},
    "bert": {"intermediate_size": 24, "max_position_embeddings": 32, "pad_token_id": 1},
    "roberta": {"intermediate_size": 24, "max_position_embeddings": 34, "pad_token_id": 1},
    "distilbert": {"dim": 16, "hidden_dim": 24, "n_layers": 2, "n_heads": 2, "max_position_embeddings": 32},
}


def tiny_classifier(model_type: str, num_labels: int):
    torch.manual_seed(0)
    base = {} if model_type in ("gpt2", "distilbert") else _HEADS
    values = {"vocab_size": WORDS + 4, **base, **CONFIGS[model_type], "pad_token_id": 1, "num_labels": num_labels}
    model = AutoModelForSequenceClassification.from_config(AutoConfig.for_model(model_type, **values)).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0, 0.5)
    return model


def word_tokenizer(*, encoder: bool, reverse: bool = False) -> PreTrainedTokenizerFast:
    """`</s>` 0, `<pad>` 1, `<s>` 2, `<unk>` 3, then the words w0…; `reverse` numbers the words the other way round."""
    order = reversed(range(WORDS)) if reverse else range(WORDS)
    vocabulary = {"</s>": 0, "<pad>": 1, "<s>": 2, "<unk>": 3, **{f"w{word}": 4 + i for i, word in enumerate(order)}}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if encoder:
        inner.post_processor = processors.TemplateProcessing(
            single="<s> $A </s>", special_tokens=[("<s>", 2), ("</s>", 0)]
        )
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="</s>", pad_token="<pad>", unk_token="<unk>")


def word_records() -> list[Record]:
    """Ragged prompts and completions; the second record was sampled with another model's ids."""

    def words(first: int, number: int) -> str:
        return " ".join(f"w{(first + 7 * i) % WORDS}" for i in range(number))

    return [
        Record("a", words(1, 3), (Completion(" " + words(2, 4)), Completion(" " + words(5, 1)))),
        Record(
            "b",
            words(8, 9),
            (Completion(" " + words(3, 6), token_ids=(9, 9), finish_reason="length", logprob=-1.0),),
            prompt_ids=(9, 9, 9),
        ),
        Record("c", words(4, 1), tuple(Completion(" " + words(i, 2 + i)) for i in range(4))),
    ]


@pytest.fixture
def records() -> list[Record]:
    return word_records()


DECODERS = ["gpt2", "llama"]
ENCODERS = ["bert", "roberta", "distilbert"]


def by_hand(model, tokenizer, prompt: str, completion: Completion) -> float:
    ids = tokenizer(prompt)["input_ids"] + tokenizer(completion.text)["input_ids"]
    ids = ids if completion.finish_reason == "length" else [*ids, tokenizer.eos_token_id]
    with torch.no_grad():
        hidden = model.base_model(torch.tensor([ids])).last_hidden_state
    return float(model.score(hidden[0, -1])[0])


@pytest.mark.parametrize("model_type", DECODERS)
@pytest.mark.parametrize("reverse", [False, True])
def test_reward_is_the_head_at_the_last_token_of_its_own_tokens(records, model_type, reverse):
    model, tokenizer = tiny_classifier(model_type, 1), word_tokenizer(encoder=False, reverse=reverse)
    rewards = RewardModelScorer(model, tokenizer).score(records)
    expected = [[by_hand(model, tokenizer, record.prompt, c) for c in record.completions] for record in records]
    for found, wanted in zip(rewards, expected, strict=True):
        assert found == pytest.approx(wanted, abs=1e-9)


@pytest.mark.parametrize("model_type", [*DECODERS, *ENCODERS])
@pytest.mark.parametrize("num_labels", [1, 2])
def test_weights_in_bfloat16_score_with_their_head_in_float32(records, model_type, num_labels, tmp_path):
    tokenizer = word_tokenizer(encoder=model_type in ENCODERS)
    tiny_classifier(model_type, num_labels).float().save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    kind = {"reward_model": str(tmp_path)} if num_labels == 1 else {"classifier": str(tmp_path), "positive": 1}
    exact, rounded = (open_scorer(ScorerSettings(**kind, dtype=dtype)) for dtype in ("float32", "bfloat16"))
    assert rounded._model.dtype == torch.bfloat16
    found, wanted = (
        torch.tensor([reward for row in scorer.score(records) for reward in row], dtype=torch.float64)
        for scorer in (rounded, exact)
    )
    assert torch.allclose(found, wanted, rtol=0.2, atol=0.2) and (found != wanted).all()
    assert (found.bfloat16() != found).all()  # 8 bits would make ties of different rewards


@pytest.mark.parametrize("model_type", DECODERS)
@pytest.mark.parametrize("token_budget", [1, 40, 10_000])
def test_the_same_alone_and_in_a_batch(records, model_type, token_budget):
    model, tokenizer = tiny_classifier(model_type, 1), word_tokenizer(encoder=False)
    several, alone = RewardModelScorer(model, tokenizer), RewardModelScorer(model, tokenizer)
    several.token_budget = token_budget
    for record, rewards in zip(records, several.score(records), strict=True):
        singles = [alone.score([replace(record, completions=(c,))])[0][0] for c in record.completions]
        assert rewards == pytest.approx(singles, abs=1e-9)


def test_a_prompt_is_cut_once_for_all_its_completions():
    model, tokenizer = tiny_classifier("gpt2", 1), word_tokenizer(encoder=False)
    words = [f"w{i % 30}" for i in range(100)]
    record = Record("long", " ".join(words), (Completion("w1 w2 w3"), Completion(" w5")))
    scorer = RewardModelScorer(model, tokenizer)
    (rewards,) = scorer.score([record])
    kept = " ".join(words[-(64 - 4) :])
    assert rewards == pytest.approx([by_hand(model, tokenizer, kept, c) for c in record.completions], abs=1e-9)
    assert scorer.counts["prompts_cut"] == 1


def test_limits_are_those_of_training():
    model, tokenizer = tiny_classifier("gpt2", 1), word_tokenizer(encoder=False)
    record = Record("a", "w1 w2 w3 w4", (Completion(" w5 w6 w7 w8"),))
    keep_limits(model, TokenLimits(max_prompt_tokens=2, max_completion_tokens=3))
    scorer = RewardModelScorer(model, tokenizer)
    cut = Completion(" w5 w6 w7", finish_reason="length")
    assert scorer.score([record])[0][0] == pytest.approx(by_hand(model, tokenizer, "w3 w4", cut), abs=1e-9)
    assert scorer.counts == {"prompts_cut": 1, "completions_cut": 1}


def test_what_is_cut_in_scoring_is_counted():
    model = tiny_classifier("gpt2", 1)
    keep_limits(model, TokenLimits(max_prompt_tokens=2, max_completion_tokens=3))
    scorer = RewardModelScorer(model, word_tokenizer(encoder=False))
    long = Record("a", "w1 w2 w3", (Completion(" w5 w6 w7 w8"), Completion(" w5")))
    short = Record("b", "w1", (Completion(" w5"), Completion(" w6")))
    counts = Counter({"prompts": 2})
    records = scored(scorer, [long, short], counts)
    assert counts == {"prompts": 2, "prompts_cut_in_scoring": 1, "completions_cut_in_scoring": 1}
    scored(scorer, [long], counts)
    assert counts["prompts_cut_in_scoring"] == 2 and counts["completions_cut_in_scoring"] == 2
    assert records == [r.with_rewards(row) for r, row in zip([long, short], scorer.score([long, short]), strict=True)]
    scored(FunctionScorer("exalign.data.synthetic:reward"), [long], counts)
    assert counts["prompts_cut_in_scoring"] == 2


def test_a_model_carries_the_limits_of_its_training(tmp_path):
    """Saved and loaded, it cuts as it was trained."""
    model, tokenizer = tiny_classifier("gpt2", 1), word_tokenizer(encoder=False)
    record = Record("a", "w1 w2 w3 w4", (Completion(" w5 w6 w7 w8"),))
    limits = TokenLimits(max_prompt_tokens=2, max_completion_tokens=3)
    whole = RewardModelScorer(model, tokenizer).score([record])
    keep_limits(model, limits)
    expected = RewardModelScorer(model, tokenizer).score([record])
    save_model(model.float(), tokenizer, tmp_path / "model", card="")
    loaded = load_reward_model(ModelSettings(source=str(tmp_path / "model")), tokenizer).double()
    assert RewardModelScorer(loaded, tokenizer).score([record])[0] == pytest.approx(expected[0], abs=1e-6)
    assert abs(expected[0][0] - whole[0][0]) > 1e-3
    loaded.config.exalign_limits = {"max_prompt_tokens": "many"}
    with pytest.raises(InputError, match="exalign_limits that are no limits"):
        RewardModelScorer(loaded, tokenizer)


def test_two_labels_are_refused():
    with pytest.raises(InputError, match="one label, but this one has 2"):
        RewardModelScorer(tiny_classifier("gpt2", 2), word_tokenizer(encoder=False))


@pytest.mark.parametrize("model_type", ENCODERS)
def test_an_encoder_with_one_label_is_a_reward_model(records, model_type):
    model, tokenizer = tiny_classifier(model_type, 1), word_tokenizer(encoder=True)
    for record, found in zip(records, RewardModelScorer(model, tokenizer).score(records), strict=True):
        texts = [tokenizer(record.prompt + c.text, return_tensors="pt")["input_ids"] for c in record.completions]
        with torch.no_grad():
            assert found == pytest.approx([model(input_ids=ids).logits.item() for ids in texts], abs=1e-9)


def test_a_classifier_s_tokenizer_needs_no_token_that_ends_a_text(records, tmp_path):
    """As BERT's has none."""
    model, tokenizer = tiny_classifier("bert", 2), word_tokenizer(encoder=True)
    tokenizer.eos_token = None
    for part in (model, tokenizer):
        part.save_pretrained(tmp_path)
    found = open_scorer(ScorerSettings(classifier=str(tmp_path), positive=1)).score(records)
    for record, rewards in zip(records, found, strict=True):
        expected = [log_odds_by_hand(model, tokenizer, record, c, 1) for c in record.completions]
        assert rewards == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("model_type", DECODERS)
def test_padding_that_ends_a_text_is_read_as_transformers_reads_it(records, model_type):
    """Makers who pad with the end of a text trained on the token before it."""
    model, tokenizer = tiny_classifier(model_type, 1), word_tokenizer(encoder=False)
    model.config.pad_token_id, tokenizer.pad_token = 0, "</s>"
    records = [*records, Record("empty", "w1 w2", (Completion(""), Completion("w3")))]
    for record, found in zip(records, RewardModelScorer(model, tokenizer).score(records), strict=True):
        for completion, reward in zip(record.completions, found, strict=True):
            ids = tokenizer(record.prompt)["input_ids"] + tokenizer(completion.text)["input_ids"]
            ended = ids if completion.finish_reason == "length" else [*ids, 0]
            with torch.no_grad():
                assert reward == pytest.approx(model(input_ids=torch.tensor([ended])).logits.item(), abs=1e-9)


def test_a_reward_that_is_not_finite_names_its_record(records):
    model = tiny_classifier("gpt2", 1)
    model.score.weight.data.fill_(float("nan"))
    with pytest.raises(InputError, match="completion 0 of record a"):
        RewardModelScorer(model, word_tokenizer(encoder=False)).score(records)


@pytest.mark.parametrize("model_type", ["gpt2", "bert"])
def test_no_records_no_rewards(model_type):
    tokenizer = word_tokenizer(encoder=model_type in ENCODERS)
    assert RewardModelScorer(tiny_classifier(model_type, 1), tokenizer).score([]) == []


def log_odds_by_hand(model, tokenizer, record: Record, completion: Completion, positive: int) -> float:
    """log p − log(1 − p) from the model's own forward pass on one unpadded text."""
    if hasattr(model, "score"):
        ids = tokenizer(record.prompt)["input_ids"] + tokenizer(completion.text)["input_ids"]
        ids = ids if completion.finish_reason == "length" else [*ids, tokenizer.eos_token_id]
        with torch.no_grad():
            logits = model.score(model.base_model(torch.tensor([ids])).last_hidden_state[0, -1])
    else:
        ids = tokenizer(record.prompt + completion.text)["input_ids"]
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([ids])).logits[0]
    p = logits.softmax(-1)[positive]
    return float(p.log() - (1 - p).log())


@pytest.mark.parametrize("model_type", ["gpt2", "llama", *ENCODERS])
@pytest.mark.parametrize(("labels", "positive"), [(2, 1), (2, 0), (3, 1)])
def test_reward_is_the_log_odds(records, model_type, labels, positive):
    model = tiny_classifier(model_type, labels)
    tokenizer = word_tokenizer(encoder=model_type in ENCODERS)
    rewards = ClassifierScorer(model, tokenizer, positive).score(records)
    for record, found in zip(records, rewards, strict=True):
        wanted = [log_odds_by_hand(model, tokenizer, record, c, positive) for c in record.completions]
        assert found == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize("model_type", ["gpt2", *ENCODERS])
@pytest.mark.parametrize("token_budget", [1, 30, 10_000])
def test_log_odds_are_the_same_alone_and_in_a_batch(records, model_type, token_budget):
    model = tiny_classifier(model_type, 2)
    tokenizer = word_tokenizer(encoder=model_type in ENCODERS)
    several, alone = ClassifierScorer(model, tokenizer), ClassifierScorer(model, tokenizer)
    several.token_budget = token_budget
    for record, rewards in zip(records, several.score(records), strict=True):
        singles = [alone.score([replace(record, completions=(c,))])[0][0] for c in record.completions]
        assert rewards == pytest.approx(singles, abs=1e-9)


def test_an_encoder_reads_less_at_once_where_memory_runs_out(records, monkeypatch):
    model, room = tiny_classifier("bert", 2), [6]
    scorer = ClassifierScorer(model, word_tokenizer(encoder=True))
    whole, forward = scorer.score(records), model.forward

    def cramped(input_ids, **others):
        if len(input_ids) > room[0]:
            raise torch.OutOfMemoryError("Tried to allocate more than there is.")
        return forward(input_ids=input_ids, **others)

    monkeypatch.setattr(model, "forward", cramped)
    for room[0] in (6, 3, 2, 1):
        for found, wanted in zip(scorer.score(records), whole, strict=True):
            assert found == pytest.approx(wanted, abs=1e-9)
    room[0] = 0
    with pytest.raises(InputError, match="A text of 5 tokens alone does not fit in memory"):
        scorer.score(records)


@pytest.mark.parametrize("model_type", ENCODERS)
def test_a_text_too_long_for_an_encoder_keeps_its_end(model_type):
    model, tokenizer = tiny_classifier(model_type, 2), word_tokenizer(encoder=True)
    words = [f"w{i * i % 29}" for i in range(90)]  # its beginning differs from its end
    record = Record("long", " ".join(words[:80]), (Completion(" " + " ".join(words[80:])),))
    scorer = ClassifierScorer(model, tokenizer)
    assert words[:30] != words[-30:]
    kept = Record("kept", " ".join(words[-30:]), (Completion(""),))  # 32 positions less two special tokens
    assert scorer.score([record])[0][0] == pytest.approx(
        log_odds_by_hand(model, tokenizer, kept, kept.completions[0], 1), abs=1e-9
    )
    assert scorer.counts == {"texts_cut": 1}
    assert tokenizer.truncation_side == "right"


def test_log_odds_stay_exact_where_the_probability_rounds_to_one():
    logits = torch.tensor([[-400.0, 400.0], [400.0, -400.0]], dtype=torch.float64)
    assert log_odds(logits, 1).tolist() == [800.0, -800.0]


def test_messages_are_read_line_by_line():
    model, tokenizer = tiny_classifier("bert", 2), word_tokenizer(encoder=True)
    chat = Record("chat", ({"role": "user", "content": "w1 w2"},), (Completion("w3"),))
    plain = Record("plain", "w1 w2\n", (Completion("w3"),))
    scorer = ClassifierScorer(model, tokenizer)
    assert scorer.score([chat]) == scorer.score([plain])


@pytest.mark.parametrize(
    ("names", "wanted", "found"),
    [
        (["NEGATIVE", "POSITIVE"], None, 1),
        (["POSITIVE", "NEGATIVE"], None, 0),
        (["bad", "good"], None, 1),
        (["neg", "neutral", "pos"], None, 2),
        (["0", "1"], None, 1),
        (["LABEL_0", "LABEL_1"], None, 1),
        (["POSITIVE", "NEGATIVE"], "negative", 1),
        (["POSITIVE", "NEGATIVE"], 1, 1),
        (["1", "0"], 1, 0),  # a name before a place
        (["joy", "anger", "fear"], "fear", 2),
    ],
)
def test_the_positive_label_is_the_one_that_is_named(names, wanted, found):
    assert positive_label(PreTrainedConfig(id2label=dict(enumerate(names))), wanted) == found


@pytest.mark.parametrize(
    ("names", "wanted", "message"),
    [
        (["joy", "anger"], None, "Which label .* 0 joy, 1 anger"),
        (["LABEL_0", "LABEL_1", "LABEL_2"], None, "Which label"),
        (["1", "2", "3"], None, "Which label"),
        (["good", "positive"], None, "Which label"),
        (["bad", "good"], "fine", "label fine does not exist; .* 0 bad, 1 good"),
        (["bad", "good"], 2, "label 2 does not exist"),
        (["one"], None, "at least two labels"),
    ],
)
def test_labels_that_leave_it_open_are_asked_for(names, wanted, message):
    with pytest.raises(InputError, match=message):
        positive_label(PreTrainedConfig(id2label=dict(enumerate(names))), wanted)


def test_which_label_was_taken_is_told_once(caplog):
    for _ in range(2):
        positive_label(PreTrainedConfig(id2label={0: "POSITIVE", 1: "NEGATIVE"}, name_or_path="told"), None)
    assert caplog.text.count("label 0, POSITIVE") == 1
    caplog.clear()
    positive_label(PreTrainedConfig(id2label={0: "POSITIVE", 1: "NEGATIVE"}), "POSITIVE")
    assert caplog.text == ""


MODULE = """
def length(prompts, completions):
    return [[len(text) + 100 * len(prompt) for text in texts] for prompt, texts in zip(prompts, completions)]

def too_few(prompts, completions):
    return [[0.0] for _ in completions]

def too_few_prompts(prompts, completions):
    return [[0.0, 0.0]]

def not_finite(prompts, completions):
    return [[float("inf") if len(text) > 15 else 0.0 for text in texts] for texts in completions]

def words(prompts, completions):
    return [["good" for _ in texts] for texts in completions]

def nothing(prompts, completions):
    return None

def fails(prompts, completions):
    if any("w8" in prompt.split()[0] for prompt in prompts):
        raise KeyError("the author's own mistake")
    return [[0.0 for _ in texts] for texts in completions]

def fails_together(prompts, completions):
    if len(prompts) > 1:
        raise ValueError("too many")
    return [[0.0 for _ in completions[0]]]

def right(prompts, completions, answer, bonus=0):
    bonus = bonus or [0] * len(prompts)
    return [[b + (a in text) for text in texts] for texts, a, b in zip(completions, answer, bonus)]

def named(prompts, completions, **columns):
    return [[len(columns)] * len(texts) for texts in completions]

def constant_two(prompts, completions):
    return [[2 for _ in texts] for texts in completions]

def prompts_alone(prompts):
    return [[0.0]]

constant = 3


def flat_right(prompts, completions, answer):
    return [1.0 if text.count(right) else 0.0 for text, right in zip(completions, answer, strict=True)]

ASKED = []

def flat_counted(prompts, completions):
    ASKED.extend(completions)
    return [float(len(text.strip())) for text in completions]

def flat_named(completions, answer, **kwargs):
    assert len(kwargs["prompts"]) == len(completions)
    return [float(right in text.strip()) for text, right in zip(completions, answer)]

def flat_contains(prompts, completions, answer, **kwargs):
    return [float(right in text) for text, right in zip(completions, answer)]

def flat_chat(completions, answer, **kwargs):
    return [float(right in message["content"]) for (message,), right in zip(completions, answer)]

def flat_fails(prompts, completions):
    return [len(text.strip()) / 0 for text in completions]

def flat_too_few(prompts, completions):
    return [1.0]

def lazy(prompts, completions):
    import a_neighbour
    yield from ([1 / 0] for _ in prompts)

def enormous(prompts, completions):
    return [[10**400 for _ in texts] for texts in completions]

def leaves(prompts, completions):
    raise SystemExit(3)

def by_number(prompts, completions):
    return {i: [0.0] * len(completions[i]) for i in range(len(prompts))}

def flat_by_number(prompts, completions, **columns):
    return dict(enumerate(len(text) for text in completions))

def unordered(prompts, completions):
    return [{float(i) for i, _ in enumerate(texts)} for texts in completions]

def digits(prompts, completions):
    return ["1" * len(texts) for texts in completions if isinstance(texts, list)]
"""


@pytest.fixture(autouse=True)
def _working_directory(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text(MODULE)
    (tmp_path / "my_broken_rewards.py").write_text("import a_module_that_is_not_there")
    (tmp_path / "my_leaving_rewards.py").write_text("raise SystemExit(3)")
    (tmp_path / "a_neighbour.py").write_text("")
    monkeypatch.chdir(tmp_path)
    yield
    for name in ("my_rewards", "my_broken_rewards"):
        sys.modules.pop(name, None)


def test_rewards_come_from_the_function(records):
    path = list(sys.path)
    rewards = FunctionScorer("my_rewards:length").score(records)
    assert rewards == [[len(c.text) + 100 * len(r.prompt) for c in r.completions] for r in records]
    assert all(isinstance(value, float) for row in rewards for value in row)
    assert sys.path == path


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("my_rewards", "module:function"),
        (":length", "module:function"),
        ("my_rewards:", "module:function"),
        ("no_such_module:length", "no_such_module"),
        ("my_broken_rewards:length", "a_module_that_is_not_there"),
        ("my_rewards:absent", "no function absent"),
        ("my_rewards:constant", "no function constant"),
    ],
)
def test_a_function_that_cannot_be_had(name, message):
    with pytest.raises(InputError, match=message):
        FunctionScorer(name)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("too_few", "1 rewards to record a, which has 2"),
        ("too_few_prompts", "1 prompts, but there are 3"),
        ("not_finite", "the reward inf to completion 0 of record b"),
        ("words", "the reward good to completion 0 of record a"),
        ("nothing", "returned None"),
        ("by_number", "one list of rewards per prompt"),
        ("flat_by_number", "one number per completion"),
        ("unordered", "one list of rewards per prompt"),
        ("digits", "one list of rewards per prompt"),
    ],
)
def test_rewards_that_cannot_be_used(records, name, message):
    with pytest.raises(InputError, match=message):
        FunctionScorer(f"my_rewards:{name}").score(records)


def test_what_the_function_raises_names_file_line_and_row(records):
    with pytest.raises(
        InputError, match=r"my_rewards.py\) failed on record b, at my_rewards.py, line 2\d: KeyError: .*own"
    ):
        FunctionScorer("my_rewards:fails").score(records)
    with pytest.raises(InputError, match=r"fails_together .* on record a to c"):
        FunctionScorer("my_rewards:fails_together").score(records)


def test_whatever_a_function_does_is_one_sentence(records):
    with pytest.raises(InputError, match=r"lazy .*my_rewards.py, line \d+: ZeroDivisionError"):
        FunctionScorer("my_rewards:lazy").score(records)
    with pytest.raises(InputError, match=r"enormous .* gave the reward 10+ to completion 0 of record a"):
        FunctionScorer("my_rewards:enormous").score(records)
    with pytest.raises(InputError, match=r"leaves .*my_rewards.py, line \d+: SystemExit: 3"):
        FunctionScorer("my_rewards:leaves").score(records)
    with pytest.raises(InputError, match=r"cannot be imported .*SystemExit: 3"):
        FunctionScorer("my_leaving_rewards:any")


def test_a_function_gets_the_columns_it_asks_for(records):
    rows = [replace(r, columns={"answer": f"w{2 + i}", "level": i}) for i, r in enumerate(records)]
    found = FunctionScorer("my_rewards:right").score(rows)
    assert found == [[float(f"w{2 + i}" in c.text) for c in r.completions] for i, r in enumerate(records)]
    rows = [replace(r, columns={**r.columns, "bonus": 5}) for r in rows]
    assert FunctionScorer("my_rewards:right").score(rows) == [[5 + value for value in row] for row in found]
    assert {v for row in FunctionScorer("my_rewards:named").score(rows) for v in row} == {3.0}
    with pytest.raises(InputError, match=r"asks for the column answer, .* there are level"):
        FunctionScorer("my_rewards:right").check_columns([replace(r, columns={"level": 1}) for r in records])
    # A batch may have none of the rows that have it; a name of ours is no column's.
    rows = [replace(r, columns={"prompts": 1, "level": 2}) for r in records]
    assert FunctionScorer("my_rewards:named").score(rows) == [[1.0] * len(r.completions) for r in records]
    with pytest.raises(InputError, match="prompts and completions as its first two"):
        FunctionScorer("my_rewards:prompts_alone")


@pytest.mark.parametrize("name", ["flat_right", "flat_named", "flat_contains"])
def test_a_function_written_for_trl_gets_one_text_at_a_time(records, name):
    rows = [replace(r, columns={"answer": f"w{2 + i}"}) for i, r in enumerate(records)]
    scorer = FunctionScorer(f"my_rewards:{name}")
    expected = [[float(f"w{2 + i}" in c.text) for c in r.completions] for i, r in enumerate(records)]
    assert scorer.score(rows) == expected and scorer.score(rows[1:]) == expected[1:]
    chat = [replace(rows[0], prompt=({"role": "user", "content": "Hi"},))]
    assert FunctionScorer("my_rewards:flat_chat").score(chat) == expected[:1]


def test_the_form_of_a_function_is_found_on_one_prompt(records):
    """All of a batch in the wrong form would cost a paid judge as much again."""
    scorer, texts = FunctionScorer("my_rewards:flat_counted"), [c.text for r in records for c in r.completions]
    scorer.score(records)
    asked = [text for text in sys.modules["my_rewards"].ASKED if isinstance(text, str)]
    in_vain = [text for text in sys.modules["my_rewards"].ASKED if not isinstance(text, str)]
    assert len(in_vain) == 1 and len(asked) == len(texts) + len(records[0].completions)


def test_where_a_function_fails_in_both_forms_both_are_told(records):
    with pytest.raises(InputError, match=r"AttributeError.*With one text at a time instead: .*ZeroDivisionError"):
        FunctionScorer("my_rewards:flat_fails").score(records)
    with pytest.raises(InputError, match="one list of rewards per prompt, or one per completion"):
        FunctionScorer("my_rewards:flat_too_few").score(records)


def test_a_sum_is_weighted_and_keeps_its_parts(records):
    settings = ScorerSettings.model_validate_json(
        '[{"function": "my_rewards:length", "weight": 2.0}, {"function": "my_rewards:constant_two"}]'
    )
    length = [[len(c.text) + 100 * len(r.prompt) for c in r.completions] for r in records]
    done = scored(open_scorer(settings), records, Counter())
    assert [r.rewards for r in done] == [[2 * value + 2 for value in row] for row in length]
    assert [[c.parts["my_rewards:length"] for c in r.completions] for r in done] == length
    flat = [value for row in length for value in row]
    assert part_means(done) == pytest.approx({"my_rewards:length": sum(flat) / 7, "my_rewards:constant_two": 2.0})
    assert part_means(records) == {}


def test_parts_of_a_sum_have_names_of_their_own():
    parts = [{"reward_model": "runs/a/reward/model"}, {"reward_model": "org/a"}, {"classifier": "other/reward/"}]
    assert part_names([WeightedScorer(**part) for part in parts]) == ["a", "a#2", "other"]


def test_a_scorer_is_one_thing():
    for values in ({}, {"function": "a:b", "classifier": "c"}, {"function": "a:b", "positive": "good"}, []):
        with pytest.raises(ValidationError):
            ScorerSettings.model_validate_json(json.dumps(values))


class TestBeforeAnySampling:
    """What scoring would refuse is refused: every scorer is opened, and scores a row of each kind."""

    def saved(self, folder, model, tokenizer):
        model.float().save_pretrained(folder)
        tokenizer.save_pretrained(folder)
        return str(folder)

    def test_labels(self, records, tmp_path):
        one = self.saved(tmp_path / "one", tiny_classifier("gpt2", 1), word_tokenizer(encoder=False))
        three = self.saved(tmp_path / "three", tiny_classifier("bert", 3), word_tokenizer(encoder=True))
        check_scorer(ScorerSettings(reward_model=one), records)
        check_scorer(ScorerSettings(classifier=three, positive=2), records)
        with pytest.raises(InputError, match=r"one label, but .*three has 3"):
            check_scorer(ScorerSettings(reward_model=three), records)
        with pytest.raises(InputError, match=r"Which label of .*three"):
            check_scorer(ScorerSettings(classifier=three), records)
        with pytest.raises(InputError, match="at least two labels"):
            check_scorer(ScorerSettings(classifier=one), records)
        with pytest.raises(InputError, match="does not exist"):
            check_scorer(ScorerSettings(reward_model=str(tmp_path / "none")), records)

    def test_a_conversation_without_a_template(self, tmp_path):
        source = self.saved(tmp_path / "model", tiny_classifier("llama", 1), word_tokenizer(encoder=False))
        chat = Record("chat", ({"role": "user", "content": "w1"},))
        with pytest.raises(InputError, match="no chat template"):
            check_scorer(ScorerSettings(reward_model=source), [chat])

    def test_a_model_without_a_head_or_with_code(self, records, tmp_path):
        config = AutoConfig.for_model("gpt2", **CONFIGS["gpt2"], vocab_size=WORDS + 4, num_labels=1)
        source = self.saved(tmp_path / "lm", AutoModelForCausalLM.from_config(config), word_tokenizer(encoder=False))
        with pytest.raises(InputError, match=r"lacks weights .*score"):
            check_scorer(ScorerSettings(reward_model=source), records)
        path = tmp_path / "lm" / "config.json"
        code = {"auto_map": {"AutoModelForSequenceClassification": "own.Head"}}
        path.write_text(json.dumps({**json.loads(path.read_text()), **code}))
        with pytest.raises(InputError, match="Python code of its own"):
            check_scorer(ScorerSettings(reward_model=source), records)

    def test_a_reward_that_is_no_number(self, records, tmp_path):
        model = tiny_classifier("gpt2", 1)
        model.score.weight.data.fill_(float("nan"))
        source = self.saved(tmp_path / "nan", model, word_tokenizer(encoder=False))
        with pytest.raises(InputError, match="gave the reward nan to completion 0 of record"):
            check_scorer(ScorerSettings(reward_model=source), records)

    def test_a_function(self, records):
        check_scorer(ScorerSettings(function="my_rewards:length"), records)
        with pytest.raises(InputError, match="on record b"):
            check_scorer(ScorerSettings(function="my_rewards:fails"), records)
