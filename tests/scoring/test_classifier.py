"""Log-odds of causal and of encoder classifiers, whatever they are batched with."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from exalign.data.record import Completion, Record
from exalign.errors import InputError
from exalign.rollout.classifier_scorer import ClassifierScorer, log_odds

ENCODERS = ["bert", "roberta", "distilbert"]


def by_hand(model, tokenizer, record: Record, completion: Completion, positive: int) -> float:
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
def test_reward_is_the_log_odds(make_classifier, make_tokenizer, records, model_type, labels, positive):
    model = make_classifier(model_type, labels)
    tokenizer = make_tokenizer(encoder=model_type in ENCODERS)
    rewards = ClassifierScorer(model, tokenizer, positive).score(records)
    for record, found in zip(records, rewards, strict=True):
        wanted = [by_hand(model, tokenizer, record, c, positive) for c in record.completions]
        assert found == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize("model_type", ["gpt2", *ENCODERS])
@pytest.mark.parametrize("token_budget", [1, 30, 10_000])
def test_the_same_alone_and_in_a_batch(make_classifier, make_tokenizer, records, model_type, token_budget):
    model = make_classifier(model_type, 2)
    tokenizer = make_tokenizer(encoder=model_type in ENCODERS)
    together = ClassifierScorer(model, tokenizer, token_budget=token_budget).score(records)
    alone = ClassifierScorer(model, tokenizer)
    for record, rewards in zip(records, together, strict=True):
        singles = [alone.score([replace(record, completions=(c,))])[0][0] for c in record.completions]
        assert rewards == pytest.approx(singles, abs=1e-9)


@pytest.mark.parametrize("model_type", ENCODERS)
def test_a_text_too_long_for_an_encoder_keeps_its_end(make_classifier, make_tokenizer, model_type):
    model, tokenizer = make_classifier(model_type, 2), make_tokenizer(encoder=True)
    words = [f"w{i * i % 29}" for i in range(90)]  # its beginning differs from its end
    record = Record("long", " ".join(words[:80]), (Completion(" " + " ".join(words[80:])),))
    scorer = ClassifierScorer(model, tokenizer)
    assert words[:30] != words[-30:]
    kept = Record("kept", " ".join(words[-30:]), (Completion(""),))  # 32 positions less two special tokens
    assert scorer.score([record])[0][0] == pytest.approx(
        by_hand(model, tokenizer, kept, kept.completions[0], 1), abs=1e-9
    )
    assert scorer.counts == {"texts_cut": 1}
    assert tokenizer.truncation_side == "right"


def test_log_odds_stay_exact_where_the_probability_rounds_to_one():
    logits = torch.tensor([[-400.0, 400.0], [400.0, -400.0]], dtype=torch.float64)
    assert log_odds(logits, 1).tolist() == [800.0, -800.0]


def test_messages_are_read_line_by_line(make_classifier, make_tokenizer):
    model, tokenizer = make_classifier("bert", 2), make_tokenizer(encoder=True)
    chat = Record("chat", ({"role": "user", "content": "w1 w2"},), (Completion("w3"),))
    plain = Record("plain", "w1 w2\n", (Completion("w3"),))
    scorer = ClassifierScorer(model, tokenizer)
    assert scorer.score([chat]) == scorer.score([plain])


def test_one_label_and_an_unknown_label_are_refused(make_classifier, make_tokenizer):
    with pytest.raises(InputError, match="at least two labels"):
        ClassifierScorer(make_classifier("gpt2", 1), make_tokenizer(encoder=False))
    with pytest.raises(InputError, match="label 2 does not exist"):
        ClassifierScorer(make_classifier("gpt2", 2), make_tokenizer(encoder=False), positive_label=2)
