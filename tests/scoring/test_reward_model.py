"""A reward is the head at the last token of the reward model's own tokens, alone or in a batch."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch

from exalign.data.record import Completion, Record
from exalign.data.tokenization import TokenLimits
from exalign.errors import InputError
from exalign.models.loading import load_reward_model, save_model
from exalign.models.model_settings import ModelSettings
from exalign.rollout.function_scorer import FunctionScorer
from exalign.rollout.limits import keep_limits
from exalign.rollout.reward_model_scorer import RewardModelScorer
from exalign.rollout.scorer import scored

DECODERS = ["gpt2", "llama"]


def by_hand(model, tokenizer, prompt: str, completion: Completion) -> float:
    ids = tokenizer(prompt)["input_ids"] + tokenizer(completion.text)["input_ids"]
    ids = ids if completion.finish_reason == "length" else [*ids, tokenizer.eos_token_id]
    with torch.no_grad():
        hidden = model.base_model(torch.tensor([ids])).last_hidden_state
    return float(model.score(hidden[0, -1])[0])


@pytest.mark.parametrize("model_type", DECODERS)
@pytest.mark.parametrize("reverse", [False, True])
def test_reward_is_the_head_at_the_last_token_of_its_own_tokens(
    make_classifier, make_tokenizer, records, model_type, reverse
):
    model, tokenizer = make_classifier(model_type, 1), make_tokenizer(encoder=False, reverse=reverse)
    rewards = RewardModelScorer(model, tokenizer).score(records)
    expected = [[by_hand(model, tokenizer, record.prompt, c) for c in record.completions] for record in records]
    for found, wanted in zip(rewards, expected, strict=True):
        assert found == pytest.approx(wanted, abs=1e-9)


@pytest.mark.parametrize("model_type", DECODERS)
@pytest.mark.parametrize("token_budget", [1, 40, 10_000])
def test_the_same_alone_and_in_a_batch(make_classifier, make_tokenizer, records, model_type, token_budget):
    model, tokenizer = make_classifier(model_type, 1), make_tokenizer(encoder=False)
    together = RewardModelScorer(model, tokenizer, token_budget=token_budget).score(records)
    alone = RewardModelScorer(model, tokenizer)
    for record, rewards in zip(records, together, strict=True):
        singles = [alone.score([replace(record, completions=(c,))])[0][0] for c in record.completions]
        assert rewards == pytest.approx(singles, abs=1e-9)


def test_a_prompt_is_cut_once_for_all_its_completions(make_classifier, make_tokenizer):
    model, tokenizer = make_classifier("gpt2", 1), make_tokenizer(encoder=False)
    words = [f"w{i % 30}" for i in range(100)]
    record = Record("long", " ".join(words), (Completion("w1 w2 w3"), Completion("w5")))
    scorer = RewardModelScorer(model, tokenizer)
    (rewards,) = scorer.score([record])
    kept = " ".join(words[-(64 - 4) :])
    assert rewards == pytest.approx([by_hand(model, tokenizer, kept, c) for c in record.completions], abs=1e-9)
    assert scorer.counts["prompts_cut"] == 1


def test_limits_are_those_of_training(make_classifier, make_tokenizer):
    model, tokenizer = make_classifier("gpt2", 1), make_tokenizer(encoder=False)
    record = Record("a", "w1 w2 w3 w4", (Completion("w5 w6 w7 w8"),))
    scorer = RewardModelScorer(model, tokenizer, limits=TokenLimits(max_prompt_tokens=2, max_completion_tokens=3))
    cut = Completion("w5 w6 w7", finish_reason="length")
    assert scorer.score([record])[0][0] == pytest.approx(by_hand(model, tokenizer, "w3 w4", cut), abs=1e-9)
    assert scorer.counts == {"prompts_cut": 1, "completions_cut": 1}


def test_what_is_cut_in_scoring_is_counted(make_classifier, make_tokenizer):
    limits = TokenLimits(max_prompt_tokens=2, max_completion_tokens=3)
    scorer = RewardModelScorer(make_classifier("gpt2", 1), make_tokenizer(encoder=False), limits=limits)
    long = Record("a", "w1 w2 w3", (Completion("w5 w6 w7 w8"), Completion("w5")))
    short = Record("b", "w1", (Completion("w5"), Completion("w6")))
    counts = Counter({"prompts": 2})
    records = scored(scorer, [long, short], counts)
    assert counts == {"prompts": 2, "prompts_cut_in_scoring": 1, "completions_cut_in_scoring": 1}
    scored(scorer, [long], counts)
    assert counts["prompts_cut_in_scoring"] == 2 and counts["completions_cut_in_scoring"] == 2
    assert records == [r.with_rewards(row) for r, row in zip([long, short], scorer.score([long, short]), strict=True)]
    scored(FunctionScorer("exalign.data.synthetic:reward"), [long], counts)
    assert counts["prompts_cut_in_scoring"] == 2


def test_a_model_carries_the_limits_of_its_training(make_classifier, make_tokenizer, tmp_path):
    """Saved and loaded, it cuts as it was trained, and as `limits` say where they are given."""
    model, tokenizer = make_classifier("gpt2", 1), make_tokenizer(encoder=False)
    record = Record("a", "w1 w2 w3 w4", (Completion("w5 w6 w7 w8"),))
    limits = TokenLimits(max_prompt_tokens=2, max_completion_tokens=3)
    expected = RewardModelScorer(model, tokenizer, limits=limits).score([record])
    whole = RewardModelScorer(model, tokenizer).score([record])
    keep_limits(model, limits)
    save_model(model.float(), tokenizer, tmp_path / "model", card="")
    loaded = load_reward_model(ModelSettings(source=str(tmp_path / "model")), tokenizer).double()
    assert RewardModelScorer(loaded, tokenizer).score([record])[0] == pytest.approx(expected[0], abs=1e-6)
    more = TokenLimits(max_prompt_tokens=9, max_completion_tokens=9)
    assert RewardModelScorer(loaded, tokenizer, limits=more).score([record])[0] == pytest.approx(whole[0], abs=1e-6)
    assert abs(expected[0][0] - whole[0][0]) > 1e-3
    loaded.config.exalign_limits = {"max_prompt_tokens": "many"}
    with pytest.raises(InputError, match="exalign_limits that are no limits"):
        RewardModelScorer(loaded, tokenizer)


def test_two_labels_are_refused(make_classifier, make_tokenizer):
    with pytest.raises(InputError, match="one label, but this one has 2"):
        RewardModelScorer(make_classifier("gpt2", 2), make_tokenizer(encoder=False))


def test_an_encoder_is_refused(make_classifier, make_tokenizer):
    with pytest.raises(InputError, match="causal"):
        RewardModelScorer(make_classifier("bert", 1), make_tokenizer(encoder=True))


def test_a_reward_that_is_not_finite_names_its_record(make_classifier, make_tokenizer, records):
    model = make_classifier("gpt2", 1)
    model.score.weight.data.fill_(float("nan"))
    with pytest.raises(InputError, match="completion 0 of record a"):
        RewardModelScorer(model, make_tokenizer(encoder=False)).score(records)


def test_no_records_no_rewards(make_classifier, make_tokenizer):
    assert RewardModelScorer(make_classifier("gpt2", 1), make_tokenizer(encoder=False)).score([]) == []
