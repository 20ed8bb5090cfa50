"""vLLM's engine itself draws: what it says of its tokens is compared with the model's own numbers."""

from __future__ import annotations

import copy
import math
import threading
from collections import Counter
from collections.abc import Callable
from contextlib import suppress

import psutil
import pytest
import torch
from peft import LoraConfig, get_peft_model
from scipy.stats import chi2
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from exalign.data.record import Record
from exalign.errors import InputError
from exalign.rollout import vllm
from exalign.rollout.rollout import Numerics, open_sampler, with_logprobs
from exalign.rollout.settings import SampleSettings
from exalign.rollout.vllm import VLLMSampler
from vllm_cpu.conftest import CACHE, TAU, tiny

Open = Callable[..., VLLMSampler]
PROMPTS = [Record(f"r{i}", "a film that is" + " not" * i) for i in range(9)]
ROUNDING = 1e-4  # nats of a sequence, float32


def gap(records: list[Record], policy: PreTrainedModel) -> float:
    """The largest difference in nats between log-probabilities of the engine and of the training path."""
    known = with_logprobs(records, policy, "reference_logprob", Numerics(TAU))
    return max(abs(c.logprob - c.reference_logprob) for record in known for c in record.completions)


def ids_of(records: list[Record]) -> list[list[tuple[int, ...]]]:
    return [[c.token_ids for c in record.completions] for record in records]


def changed(policy: PreTrainedModel) -> PreTrainedModel:
    other = copy.deepcopy(policy)
    torch.manual_seed(1)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return other


def kill_engines() -> int:
    """Kill what runs under vLLM's names; how many those were."""
    killed = 0
    for child in psutil.Process().children(recursive=True):
        with suppress(psutil.Error):
            if "VLLM" in " ".join(child.cmdline()):
                child.kill()
                killed += 1
    return killed


def test_log_probabilities_are_those_of_the_training_path(opened: Open, policy, tokenizer) -> None:
    sampler = opened(policy, max_new_tokens=20)
    records = list(sampler.sample(PROMPTS))
    assert [record.id for record in records] == [record.id for record in PROMPTS]
    assert gap(records, policy) < ROUNDING
    completions = [c for record in records for c in record.completions]
    for c in completions:
        assert c.finish_reason == ("stop" if c.token_ids[-1] == tokenizer.eos_token_id else "length")
        assert c.finish_reason == "stop" or len(c.token_ids) == 20
        assert tokenizer.eos_token_id not in c.token_ids[:-1]
        assert c.text == tokenizer.decode(c.token_ids, skip_special_tokens=True)
    assert {c.finish_reason for c in completions} == {"stop", "length"}
    assert sampler.counts == Counter(
        prompts=9,
        prompts_cut=0,
        prompt_tokens=sum(len(record.prompt_ids) for record in records),
        completions=36,
        completions_stopped=sum(c.finish_reason == "stop" for c in completions),
        completion_tokens=sum(len(c.token_ids) for c in completions),
        logprobs_checked=32,
        logprobs_that_differ=0,
    )


def test_float32_weights_draw_in_bfloat16_where_that_is_asked_for(opened: Open, policy) -> None:
    for one in (policy, changed(policy)):  # the engine that runs takes float32 weights over as well
        sampler = opened(one, max_new_tokens=20, precision="bf16")
        assert ROUNDING < gap(list(sampler.sample(PROMPTS)), one) < 20 * 0.1
        assert (sampler.counts["logprobs_checked"], sampler.counts["logprobs_that_differ"]) == (32, 0)


def test_seeds_and_ids_decide_and_nothing_else(opened: Open, policy) -> None:
    drawn = ids_of(list(opened(policy, max_new_tokens=12).sample(PROMPTS)))
    assert all(len(set(group)) == 4 for group in drawn)
    alone = opened(policy, max_new_tokens=12)
    assert [ids_of(list(alone.sample([record])))[0] for record in PROMPTS[::-1]] == drawn[::-1]
    other = ids_of(list(opened(policy, max_new_tokens=12, seed=1).sample(PROMPTS)))
    assert all(set(one).isdisjoint(two) for one, two in zip(drawn, other, strict=True))


@pytest.mark.parametrize("cut", [{}, {"top_k": 5}, {"top_p": 0.7}])
def test_tokens_come_as_often_as_they_are_probable(opened: Open, policy, cut: dict[str, float]) -> None:
    """3,000 first tokens against softmax(logits/τ), cut and renormalised by hand: χ² below its 1 − 10⁻⁶ quantile."""
    sampler = opened(policy, max_new_tokens=1, num_completions=3000, **cut)
    (record,) = sampler.sample(PROMPTS[:1])
    with torch.no_grad():
        p = (policy(torch.tensor([record.prompt_ids])).logits[0, -1].double() / TAU).softmax(-1)
    order = p.argsort(descending=True)
    kept = order[: cut.get("top_k", len(p))]
    if "top_p" in cut:
        kept = order[: int((p[order].cumsum(0) < cut["top_p"]).sum()) + 1]
    q = torch.zeros_like(p).index_copy_(0, kept, p[kept] / p[kept].sum())
    drawn = Counter(c.token_ids[0] for c in record.completions)
    assert set(drawn) <= set(kept.tolist())
    for c in record.completions:
        assert c.logprob == pytest.approx(math.log(q[c.token_ids[0]]), abs=ROUNDING)
    expected = 3000 * q
    often = expected >= 10
    observed = torch.tensor([float(drawn[i]) for i in range(len(q))], dtype=torch.float64)
    parts = [*zip(observed[often], expected[often], strict=True), (observed[~often].sum(), expected[~often].sum())]
    parts = [(float(n), float(e)) for n, e in parts if e > 0]
    assert sum((n - e) ** 2 / e for n, e in parts) < chi2.ppf(1 - 1e-6, len(parts) - 1)
    assert sampler.counts["logprobs_that_differ"] == 0


def test_whatever_the_model_ends_a_text_with_ends_it(opened: Open, policy, tokenizer) -> None:
    other = copy.deepcopy(policy)
    ends = tokenizer.convert_tokens_to_ids(["e", "t"])
    other.generation_config.eos_token_id = [*ends, len(tokenizer)]  # the last is none of the model's tokens
    for record in opened(other, max_new_tokens=30).sample(PROMPTS):
        for c in record.completions:
            assert not {*ends, tokenizer.eos_token_id} & {*c.token_ids[:-1]}
            assert (c.finish_reason == "stop") == (c.token_ids[-1] in {*ends, tokenizer.eos_token_id})


def test_a_long_prompt_is_cut_on_its_left_and_read_once(opened: Open, policy) -> None:
    """Of 130 tokens, 128 are four whole parts; all completions but the first find them computed."""
    sampler = opened(policy, max_new_tokens=20)
    (record,) = sampler.sample([Record("long", "a film that is" * 60)])
    assert len(record.prompt_ids) == 130 and sampler.counts["prompts_cut"] == 1
    engine = vllm._engine_for(policy, sampler._settings)
    arguments = vllm.sampling_arguments(sampler._settings, TAU, 7, [])
    other = [(i + 1) % 200 + 5 for i in record.prompt_ids]  # nothing of it is known yet
    (found,) = engine.generate(sampler, policy, [other], [arguments])
    assert found.num_cached_tokens == 128


def test_the_next_sampler_draws_from_the_weights_of_then(opened: Open, policy) -> None:
    """Tied weights and all, by the engine that runs; nothing that was computed before is used again."""
    first = opened(policy, max_new_tokens=20)
    drawn = list(first.sample(PROMPTS))
    engine, moved = vllm._engine_for(policy, first._settings), changed(policy)
    second = opened(moved, max_new_tokens=20)
    other = list(second.sample(PROMPTS))
    assert gap(drawn, policy) < ROUNDING and gap(other, moved) < ROUNDING
    assert gap(drawn, moved) > 0.1  # so the weights are others
    assert second.counts["logprobs_that_differ"] == 0
    assert vllm._engine_for(moved, second._settings) is engine
    # The first one is still a sampler of the first policy.
    assert ids_of(list(first.sample(PROMPTS))) == ids_of(drawn)


def test_adapters_are_merged_before_the_engine_gets_them(opened: Open, policy) -> None:
    torch.manual_seed(2)
    adapted = get_peft_model(copy.deepcopy(policy), LoraConfig(r=4, target_modules="all-linear")).eval()
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.2)
    before = copy.deepcopy(adapted.state_dict())
    sampler = opened(adapted, max_new_tokens=20)
    records = list(sampler.sample(PROMPTS))
    assert gap(records, adapted) < ROUNDING < 0.1 < gap(records, policy)
    assert sampler.counts["logprobs_that_differ"] == 0
    assert all(torch.equal(value, before[name]) for name, value in adapted.state_dict().items())


def test_a_policy_that_changes_behind_the_engine_s_back_is_told(
    opened: Open, policy, caplog: pytest.LogCaptureFixture
) -> None:
    moving = copy.deepcopy(policy)
    sampler = opened(moving, max_new_tokens=20)
    list(sampler.sample([]))
    sampler._generated([[5, 6]], [vllm.sampling_arguments(sampler._settings, TAU, 0, [])])
    moving.load_state_dict(changed(policy).state_dict())
    list(sampler.sample(PROMPTS))
    assert sampler.counts["logprobs_that_differ"] > 0
    assert "differ from the training path's" in caplog.text


def test_an_engine_that_is_killed_is_started_again(opened: Open, policy, caplog: pytest.LogCaptureFixture) -> None:
    sampler = opened(policy, max_new_tokens=20)
    drawn = list(sampler.sample(PROMPTS))
    engine = vllm._engine_for(policy, sampler._settings)
    assert kill_engines() == 2
    again = list(sampler.sample(PROMPTS))
    assert ids_of(again) == ids_of(drawn)
    assert "vLLM's process ended" in caplog.text
    assert vllm._engine_for(policy, sampler._settings) is not engine


def test_one_that_is_killed_again_and_again_is_an_error(opened: Open, policy) -> None:
    sampler, done = opened(policy, max_new_tokens=100, num_completions=64), threading.Event()
    list(opened(policy, max_new_tokens=2).sample(PROMPTS[:1]))

    def kill() -> None:
        while not done.wait(0.1):
            if vllm._running:  # not while it starts
                kill_engines()

    killer = threading.Thread(target=kill)
    killer.start()
    try:
        with pytest.raises(InputError, match="ended twice over the same prompts"):
            list(sampler.sample([Record(f"{i}", "a film that is") for i in range(64)]))
    finally:
        done.set()
        killer.join()


def test_too_small_a_cache_is_told_in_one_sentence(tokenizer: PreTrainedTokenizerFast, policy) -> None:
    settings = SampleSettings(engine="vllm", max_prompt_tokens=200, max_new_tokens=50, vllm={"cache_gib": 1e-5})
    sampler = open_sampler(policy, tokenizer, settings, temperature=1.0, seed=0)
    with pytest.raises(InputError, match=r"^sample.vllm.cache_gib = 1e-05 does not hold a text of 250 tokens") as told:
        list(sampler.sample(PROMPTS))
    assert "\n" not in str(told.value)


def test_an_architecture_that_it_does_not_know_is_told_in_one_sentence(tokenizer: PreTrainedTokenizerFast) -> None:
    unknown = tiny(tokenizer, "xglm", d_model=32, ffn_dim=32, num_layers=1, attention_heads=2)
    settings = SampleSettings(engine="vllm", max_prompt_tokens=50, max_new_tokens=50, vllm=CACHE)
    sampler = open_sampler(unknown, tokenizer, settings, temperature=1.0, seed=0)
    with pytest.raises(InputError, match=r"^vLLM cannot draw from this model: .*XGLMForCausalLM") as told:
        list(sampler.sample(PROMPTS))
    assert "\n" not in str(told.value)
