"""The sampler draws from the policy at τ, records what it drew, and nothing else matters."""

from __future__ import annotations

import itertools
import math
from copy import deepcopy
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import stats
from transformers import AutoModelForCausalLM, TopKLogitsWarper, TopPLogitsWarper

from exalign.data.batching import Group
from exalign.data.record import Record
from exalign.errors import InputError
from exalign.models.logprobs import plain_completion_logprobs
from exalign.rollout.sampler import GroupedSampler, PlainDecoder, SharedDecoder, prompt_uniforms
from exalign.rollout.settings import SampleSettings

ARCHITECTURES = ["gpt2", "gpt_neox", "llama", "qwen2", "mistral", "gemma", "gemma2"]
TAU = 0.8


def prompts(number: int = 6) -> list[Record]:
    return [
        Record(f"prompt-{i}", " ".join(f"w{1 + (i * 5 + j) % 22}" for j in range(1 + 3 * i % 11)))
        for i in range(number)
    ]


def sampler(model, tokenizer, *, seed: int = 0, temperature: float = TAU, **settings) -> GroupedSampler:
    defaults = {"num_completions": 3, "max_new_tokens": 12, "max_prompt_tokens": 40, "batch_completions": 7}
    chosen = SampleSettings(**{**defaults, **settings})
    return GroupedSampler(model, tokenizer, chosen, temperature=temperature, seed=seed)


def as_group(record: Record) -> Group:
    return Group(0, torch.tensor(record.prompt_ids), tuple(torch.tensor(c.token_ids) for c in record.completions))


def texts(records) -> dict[str, list[tuple[int, ...]]]:
    return {record.id: [c.token_ids for c in record.completions] for record in records}


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_logprob_is_that_of_the_training_path(make_model, tokenizer, model_type):
    model = make_model(model_type)
    for record in sampler(model, tokenizer).sample(prompts()):
        with torch.no_grad():
            expected = plain_completion_logprobs(model, [as_group(record)], temperature=TAU)[0]
        recorded = torch.tensor([c.logprob for c in record.completions], dtype=torch.float64)
        # Gemma 2 computes its reference softmax in float32 whatever the weights are.
        tolerance = 1e-5 if model_type == "gemma2" else 1e-9
        torch.testing.assert_close(recorded, expected, atol=tolerance, rtol=0)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_logprob_in_float32(make_model, tokenizer, model_type):
    model = make_model(model_type, dtype=torch.float32)
    for record in sampler(model, tokenizer, max_new_tokens=40).sample(prompts()):
        with torch.no_grad():
            expected = plain_completion_logprobs(model, [as_group(record)], temperature=TAU)[0]
        torch.testing.assert_close(torch.tensor([c.logprob for c in record.completions]), expected, atol=1e-4, rtol=0)


@pytest.mark.parametrize("batch_completions", [1, 3, 5, 100])
def test_a_completion_does_not_depend_on_its_neighbours(make_model, tokenizer, batch_completions):
    model = make_model("llama")
    together = texts(sampler(model, tokenizer).sample(prompts()))
    other = sampler(model, tokenizer, batch_completions=batch_completions)
    assert texts(other.sample(reversed(prompts()))) == together
    assert texts(other.sample(prompts()[2:3])) == {"prompt-2": together["prompt-2"]}


class Cramped:
    """A step of the decoder on memory that holds so many live completions, from the `late`-th token of any on."""

    def __init__(self, decoder, room: int, late: int) -> None:
        self.decoder, self.room, self.late = decoder, room, late
        self.keep = decoder.keep

    def step(self, groups):
        logits = self.decoder.step(groups)  # what ran out has changed the caches by then
        rows = sum(group.num_completions if group.tokens is None else len(group.tokens) for group in groups)
        if rows > self.room and max(group.length for group in groups) >= self.late:
            raise torch.OutOfMemoryError("Tried to allocate more than there is.")
        return logits


@pytest.mark.parametrize("late", [0, 3])
@pytest.mark.parametrize("decoder", [SharedDecoder, PlainDecoder])
def test_where_memory_runs_out_fewer_are_decoded_together_and_draw_the_same(
    make_model, tokenizer, caplog, decoder, late
):
    """Room for 7: at most 30 of the 36 completions are admitted, 27 or more fail, then 15, and 7 never do."""
    model = make_model("llama")
    usual = sampler(model, tokenizer)
    expected = texts(usual.sample(prompts(12)))
    cramped = sampler(model, tokenizer, batch_completions=30)
    cramped._decoder = Cramped(decoder(model), 7, late)
    found = list(cramped.sample(prompts(12)))
    assert [record.id for record in found] == [f"prompt-{i}" for i in range(12)]
    assert texts(found) == expected
    assert cramped.counts == usual.counts
    said = [record.getMessage() for record in caplog.records]
    assert [line.rsplit(" ", 1)[1] for line in said] == ["15.", "7."]
    assert all("completions together do not fit in memory; it goes on with at most" in line for line in said)


def test_one_prompt_that_does_not_fit_is_one_sentence(make_model, tokenizer):
    cramped = sampler(make_model("llama"), tokenizer)
    cramped._decoder = Cramped(cramped._decoder, 2, 0)
    with pytest.raises(InputError, match="The 3 completions of prompt prompt-0 do not fit in memory; lower sample"):
        list(cramped.sample(prompts(2)))


def test_a_model_of_nans_is_one_sentence(make_model, tokenizer):
    drawing = sampler(make_model("llama"), tokenizer)
    list(drawing.sample(prompts(1)))
    with torch.no_grad():
        drawing._model.get_input_embeddings().weight[3:] = torch.nan  # some prompts have none of these words
    with pytest.raises(InputError, match="The model gives no finite probabilities"):
        list(drawing.sample(prompts(4)))
    broken = make_model("gpt2")
    broken.transformer.wte.weight.data.fill_(torch.nan)
    with pytest.raises(InputError, match="its weights give no finite numbers"):
        list(sampler(broken, tokenizer).sample(prompts(1)))


@pytest.mark.parametrize("number", [1, 2, 5, 16])
def test_more_completions_and_longer_limits_only_add(make_model, tokenizer, number):
    model = make_model("gpt2")
    many = texts(sampler(model, tokenizer, num_completions=16).sample(prompts()))
    few = texts(sampler(model, tokenizer, num_completions=number, max_new_tokens=7).sample(prompts()))
    assert few == {name: [ids[:7] for ids in rows[:number]] for name, rows in many.items()}


@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
def test_the_slow_twin_draws_the_same(make_model, tokenizer, model_type):
    """Completion j alone, one full forward pass per token, its token found by its own stream of uniform numbers."""
    model = make_model(model_type)
    for record in sampler(model, tokenizer, num_completions=5).sample(prompts()):
        for uniforms, completion in zip(prompt_uniforms(0, record.id, 5, 12), record.completions, strict=True):
            ids: list[int] = []
            while len(ids) < 12 and ids[-1:] != [0]:
                with torch.no_grad():
                    logits = model(torch.tensor([[*record.prompt_ids, *ids]])).logits[0, -1]
                cumulative = (logits / TAU).softmax(-1).cumsum(-1).numpy()
                ids.append(int(np.searchsorted(cumulative, uniforms[len(ids)], side="right")))
            assert completion.token_ids == tuple(ids)


def test_records_come_in_order_while_completions_end_at_different_times(make_model, tokenizer):
    names = [record.id for record in prompts(20)]
    drawn = sampler(make_model("gpt2"), tokenizer, max_new_tokens=30)
    assert [record.id for record in drawn.sample(prompts(20))] == names
    lengths = {len(ids) for rows in texts(drawn.sample(prompts(20))).values() for ids in rows}
    assert len(lengths) > 5


def test_seeds_give_different_completions_and_repeat(make_model, tokenizer):
    model = make_model("gpt2")
    first, again, other = (texts(sampler(model, tokenizer, seed=seed).sample(prompts())) for seed in (0, 0, 1))
    assert first == again
    assert first != other


def test_completions_follow_the_exact_distribution(make_model, tokenizer):
    """All completions of up to two tokens over a vocabulary of 6 are enumerated and compared by χ²."""
    model = make_model("gpt2", vocab_size=6, scale=0.6)
    record = Record("x", "", prompt_ids=(1, 4, 2))
    records = [replace(record, id=str(i)) for i in range(1000)]
    drawing = sampler(model, tokenizer, num_completions=16, max_new_tokens=2, batch_completions=512)
    drawn = [c.token_ids for sampled in drawing.sample(records) for c in sampled.completions]
    possible = [(0,), *itertools.product(range(1, 6), range(6))]
    group = Group(0, torch.tensor(record.prompt_ids), tuple(torch.tensor(ids) for ids in possible))
    with torch.no_grad():
        probabilities = plain_completion_logprobs(model, [group], temperature=TAU)[0].exp()
    assert float(probabilities.sum()) == pytest.approx(1, abs=1e-9)
    expected = (probabilities * len(drawn)).numpy()
    assert expected.min() > 5
    observed = [drawn.count(ids) for ids in possible]
    assert stats.chisquare(observed, expected).pvalue > 1e-3


def test_the_end_is_recorded_exactly_when_it_was_drawn(make_model, tokenizer):
    drawn = sampler(make_model("gpt2"), tokenizer, num_completions=16, max_new_tokens=10)
    completions = [c for record in drawn.sample(prompts()) for c in record.completions]
    stopped = [c for c in completions if c.finish_reason == "stop"]
    cut = [c for c in completions if c.finish_reason == "length"]
    assert len(stopped) > 5
    assert len(cut) > 5
    assert len(stopped) + len(cut) == len(completions)
    assert all(c.token_ids[-1] == 0 and 0 not in c.token_ids[:-1] for c in stopped)
    assert all(0 not in c.token_ids and len(c.token_ids) == 10 for c in cut)
    assert all(c.text == "".join(f" w{i}" for i in c.token_ids if i) for c in completions)
    assert drawn.counts["completions_stopped"] == len(stopped)
    assert drawn.counts["completion_tokens"] == sum(len(c.token_ids) for c in completions)


def test_any_end_of_the_generation_settings_ends(make_model, tokenizer):
    model = make_model("gpt2")
    model.generation_config.eos_token_id = [5, 7]
    for record in sampler(model, tokenizer, num_completions=16).sample(prompts()):
        for completion in record.completions:
            ends = [token in (0, 5, 7) for token in completion.token_ids]
            assert not any(ends[:-1])
            assert (completion.finish_reason == "stop") == ends[-1]
            kept = record.prompt_ids + completion.token_ids[: -1 if ends[-1] else None]
            assert record.prompt + completion.text == tokenizer.decode(kept, skip_special_tokens=True)


@pytest.mark.parametrize(("top_k", "top_p"), [(3, None), (None, 0.6), (4, 0.5)])
def test_the_logprob_is_that_of_the_filtered_distribution(make_model, tokenizer, top_k, top_p):
    model = make_model("gpt2")
    for record in sampler(model, tokenizer, top_k=top_k, top_p=top_p).sample(prompts()):
        for completion in record.completions:
            ids = torch.tensor([record.prompt_ids + completion.token_ids])
            with torch.no_grad():
                logits = model(ids).logits[0, len(record.prompt_ids) - 1 : -1] / TAU
            logits = TopKLogitsWarper(top_k)(None, logits) if top_k else logits
            logits = TopPLogitsWarper(top_p)(None, logits) if top_p else logits
            logps = logits.log_softmax(-1)[torch.arange(len(completion.token_ids)), torch.tensor(completion.token_ids)]
            assert completion.logprob == pytest.approx(float(logps.sum()), abs=1e-9)


def test_a_low_temperature_finds_the_greedy_completion(make_model, tokenizer):
    model = make_model("llama")
    for record in sampler(model, tokenizer, temperature=1e-4).sample(prompts()):
        greedy = model.generate(
            torch.tensor([record.prompt_ids]), do_sample=False, max_new_tokens=12, eos_token_id=0, pad_token_id=0
        )[0, len(record.prompt_ids) :]
        assert {c.token_ids for c in record.completions} == {tuple(greedy.tolist())}


def test_the_plain_decoder_draws_the_same_and_says_so_once(make_model, tokenizer, caplog):
    model = make_model("bloom", vocab_size=23, hidden_size=32, n_layer=1, n_head=2)
    drawn = sampler(model, tokenizer)
    assert isinstance(drawn._decoder, PlainDecoder)
    records = list(drawn.sample(prompts()))
    assert len([m for m in caplog.messages if "without shared prompts" in m]) == 1
    for record in records:
        with torch.no_grad():
            expected = plain_completion_logprobs(model, [as_group(record)], temperature=TAU)[0]
        recorded = torch.tensor([c.logprob for c in record.completions], dtype=torch.float64)
        # Bloom computes its softmax in float32 whatever the weights are.
        torch.testing.assert_close(recorded, expected, atol=1e-5, rtol=0)


def test_recurrent_models_are_sampled_plainly(make_model, tokenizer):
    model = make_model("mamba", vocab_size=23, hidden_size=32, num_hidden_layers=1, dtype=torch.float32)
    drawn = sampler(model, tokenizer)
    assert isinstance(drawn._decoder, PlainDecoder)
    for record in drawn.sample(prompts(3)):
        for completion in record.completions:
            ids = torch.tensor([record.prompt_ids + completion.token_ids])
            with torch.no_grad():
                logps = (model(ids).logits[0, :-1] / TAU).log_softmax(-1)
            taken = logps.gather(1, ids[0, 1:, None])[len(record.prompt_ids) - 1 :].sum()
            assert completion.logprob == pytest.approx(float(taken), abs=1e-3)


def test_adapters_are_sampled_with(make_model, tokenizer):
    from peft import LoraConfig, get_peft_model

    plain = texts(sampler(make_model("llama"), tokenizer).sample(prompts()))
    model = get_peft_model(make_model("llama"), LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False))
    drawn = sampler(model, tokenizer)
    assert isinstance(drawn._decoder, SharedDecoder)
    records = list(drawn.sample(prompts()))
    assert texts(records) != plain
    with torch.no_grad():
        expected = plain_completion_logprobs(model, [as_group(records[0])], temperature=TAU)[0]
    assert [c.logprob for c in records[0].completions] == pytest.approx(expected.tolist(), abs=1e-4)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_float32_weights_can_draw_as_those_of_a_model_loaded_in_bfloat16(make_model, tokenizer, model_type, tmp_path):
    """As transformers loads them, and an engine that serves them: and at every opening as they then are."""
    model = make_model(model_type, dtype=torch.float32)

    def drawn_by_one_in_half_precision():
        model.save_pretrained(tmp_path)
        half = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
        return list(sampler(half, tokenizer).sample(prompts()))

    for _ in range(2):
        assert list(sampler(model, tokenizer, precision="bf16").sample(prompts())) == drawn_by_one_in_half_precision()
        assert {weight.dtype for weight in model.parameters()} == {torch.float32}
        with torch.no_grad():
            for weight in model.parameters():
                weight.mul_(1.5)


def test_adapters_draw_rounded_too_and_weights_of_other_types_as_they_are(make_model, tokenizer):
    from peft import LoraConfig, get_peft_model

    config = LoraConfig(task_type="CAUSAL_LM", init_lora_weights=False)
    model = get_peft_model(make_model("llama", dtype=torch.float32), config)
    half = deepcopy(model)
    for weight in half.parameters():  # of weights alone: the frequencies of the positions are computed in float32
        weight.data = weight.data.bfloat16()
    drawn = texts(sampler(model, tokenizer, precision="bf16").sample(prompts()))
    assert drawn == texts(sampler(half, tokenizer).sample(prompts()))
    assert drawn == texts(sampler(half, tokenizer, precision="bf16").sample(prompts()))


def test_a_model_in_training_mode_is_sampled_without_dropout_and_left_in_it(make_model, tokenizer):
    calm = texts(sampler(make_model("gpt2"), tokenizer).sample(prompts()))
    model = make_model("gpt2", resid_pdrop=0.5).train()
    assert texts(sampler(model, tokenizer).sample(prompts())) == calm
    assert model.training


def test_long_prompts_lose_their_left_and_are_counted(make_model, tokenizer):
    drawn = sampler(make_model("gpt2"), tokenizer, max_prompt_tokens=4)
    records = list(drawn.sample([Record("a", "w1 w2 w3 w4 w5 w6"), Record("b", "w1 w2"), Record("c", "")]))
    assert [record.prompt_ids for record in records] == [(3, 4, 5, 6), (1, 2), (0,)]
    assert drawn.counts["prompts_cut"] == 1


def test_ids_that_a_record_carries_are_kept(make_model, tokenizer):
    (record,) = sampler(make_model("gpt2"), tokenizer).sample([Record("a", "w1 w2", prompt_ids=(7, 8, 9))])
    assert record.prompt_ids == (7, 8, 9)


def test_no_prompts_no_completions(make_model, tokenizer):
    assert list(sampler(make_model("gpt2"), tokenizer).sample([])) == []


def test_bad_input_is_one_sentence(make_model, tokenizer):
    model = make_model("gpt2")
    with pytest.raises(InputError, match="128 positions"):
        sampler(model, tokenizer, max_prompt_tokens=100, max_new_tokens=29)
    for temperature in (0.0, -1.0, math.inf, math.nan):
        with pytest.raises(InputError, match="temperature"):
            sampler(model, tokenizer, temperature=temperature)
    endless = deepcopy(tokenizer)
    endless.eos_token = None
    with pytest.raises(InputError, match="end-of-sequence"):
        sampler(model, endless)
