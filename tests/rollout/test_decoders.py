"""Every step of the shared decoder gives the logits of a plain forward pass over the whole text."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch.nn.attention import flex_attention as torchs

from exalign.data.record import Record
from exalign.models import attention
from exalign.rollout import sampler
from exalign.rollout.sampler import (
    Branches,
    GroupedSampler,
    PagedDecoder,
    PlainDecoder,
    SharedDecoder,
    decoder_for,
    why_not,
)
from exalign.rollout.settings import SampleSettings

ARCHITECTURES = ["gpt2", "gpt_neox", "llama", "qwen2", "qwen3", "mistral", "gemma", "gemma2", "gemma3_text"]


def full_logits(model, prompt, completion):
    return model(input_ids=torch.cat([prompt, completion])[None], use_cache=False).logits[0, -1]


def follow(model, decoder, *, steps: int, tolerance: float):
    """Groups enter at different steps and lose rows; each step is compared with full passes."""
    generator = torch.Generator().manual_seed(0)
    entering = {0: [(1, 1), (9, 3)], 2: [(4, 2)], 5: [(12, 16)]}  # step → (prompt length, K)
    leaving = {(3, 3): [0, 2], (6, 2): [1], (7, 16): [0, 3, 7, 15]}  # (step, K of the group) → rows that stay
    groups: list[Branches] = []
    texts: list[list[torch.Tensor]] = []
    for step in range(steps):
        new = [Branches(torch.randint(1, 23, (p,), generator=generator), k) for p, k in entering.get(step, [])]
        running = new + groups
        logits = decoder.step(running)
        expected = []
        for group in new:
            expected.append(full_logits(model, group.prompt_ids, torch.tensor([], dtype=torch.long)))
        for group, rows in zip(groups, texts, strict=True):
            expected += [full_logits(model, group.prompt_ids, row) for row in rows]
        torch.testing.assert_close(logits, torch.stack(expected), atol=tolerance, rtol=0)
        texts = [[torch.tensor([], dtype=torch.long)] * group.num_completions for group in new] + texts
        groups = running
        for group, rows in zip(groups, texts, strict=True):
            group.tokens = torch.randint(1, 23, (len(rows),), generator=generator)
            rows[:] = [torch.cat([row, token[None]]) for row, token in zip(rows, group.tokens, strict=True)]
        for (when, number), stay in leaving.items():
            if when == step:
                place = [group.num_completions for group in groups].index(number)
                decoder.keep(groups[place], stay)
                groups[place].tokens = groups[place].tokens[stay]
                texts[place] = [texts[place][row] for row in stay]


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_each_step_equals_a_full_forward_pass(make_model, model_type):
    model = make_model(model_type)
    with torch.inference_mode():
        # Gemma 2 computes its reference softmax in float32 whatever the weights are.
        follow(model, SharedDecoder(model), steps=10, tolerance=1e-5 if model_type == "gemma2" else 1e-10)


@pytest.fixture
def uncompiled(monkeypatch) -> None:
    monkeypatch.setattr(torchs, "_FLEX_ATTENTION_DISABLE_COMPILE_DEBUG", True)
    monkeypatch.setattr(attention, "_compiled_flex", lambda: torchs.flex_attention)
    monkeypatch.setattr(attention, "_NARROWEST", 1)  # this is the kernel's limit, not that of its definition


@pytest.mark.usefixtures("uncompiled")
@pytest.mark.parametrize("model_type", ARCHITECTURES)
@pytest.mark.parametrize("page", [128, 4])
def test_pages_hold_what_was_read(make_model, model_type, page, monkeypatch):
    """The way of an accelerator, by FlexAttention's definition; with pages so small that every text has several."""
    for module in (attention, sampler):
        monkeypatch.setattr(module, "BLOCK", page)
    model = make_model(model_type)
    with torch.inference_mode():
        follow(model, PagedDecoder(model), steps=10, tolerance=1e-5 if model_type == "gemma2" else 1e-10)


@pytest.mark.usefixtures("uncompiled")
def test_a_page_serves_again_once_nobody_has_it(make_model):
    model = make_model("llama")
    decoder, counts = PagedDecoder(model), set()
    with torch.inference_mode():
        for _ in range(9):  # groups that end are not told of, they only stay away
            group = Branches(torch.arange(1, 6), 2)
            decoder.step([group])
            group.tokens = torch.tensor([1, 2])
            decoder.step([group])
            counts.add(decoder._pages.count)
    assert len(counts) == 1


@pytest.mark.usefixtures("uncompiled")
def test_where_pages_run_out_fewer_groups_have_them(make_model, tokenizer, monkeypatch):
    """Room for 60 pages of one block: 36 completions ask for more, and what they had asked for is let go."""
    asked, whole = [], attention.pad

    def cramped(states, sizes):
        if len(sizes) == 4:
            asked.append((states.shape[2] + sizes[3]) // attention.BLOCK)
            if asked[-1] > 60:
                raise torch.OutOfMemoryError("Tried to allocate more than there is.")
        return whole(states, sizes)

    settings = SampleSettings(num_completions=3, max_new_tokens=6, max_prompt_tokens=20, batch_completions=36)
    prompts = [Record(f"p{i}", "w1 w2 w3") for i in range(12)]

    def drawn():
        sampler = GroupedSampler(make_model("llama"), tokenizer, settings, temperature=1.0, seed=0)
        sampler._decoder = PagedDecoder(sampler._model)
        return [[c.token_ids for c in record.completions] for record in sampler.sample(prompts)]

    expected = drawn()
    monkeypatch.setattr(attention, "pad", cramped)
    assert drawn() == expected and max(asked) > 60 >= asked[-1]


@pytest.mark.parametrize("model_type", ["gpt2", "llama"])
def test_each_step_equals_a_full_forward_pass_in_float32(make_model, model_type):
    model = make_model(model_type, dtype=torch.float32)
    with torch.inference_mode():
        follow(model, SharedDecoder(model), steps=10, tolerance=1e-4)


def test_completions_longer_than_the_first_capacity(make_model):
    model = make_model("llama")
    with torch.inference_mode():
        follow(model, SharedDecoder(model), steps=36, tolerance=1e-10)


@pytest.mark.parametrize("model_type", ["gpt2", "mistral", "gemma3_text"])
def test_the_plain_decoder_is_its_twin(make_model, model_type):
    model = make_model(model_type)
    with torch.inference_mode():
        follow(model, PlainDecoder(model), steps=10, tolerance=1e-10)


@pytest.mark.parametrize("model_type", ARCHITECTURES)
def test_the_architectures_of_the_field_are_shared(make_model, model_type):
    assert isinstance(decoder_for(make_model(model_type)), SharedDecoder)


def test_the_rounding_of_half_precision_is_no_other_logits(make_model, monkeypatch):
    """Where logits spread over tens of nats, as those of pretrained models, single ones are off by half a nat and more;
    the same rows with the first token of each prompt unseen are found out."""
    model = make_model("llama", dtype=torch.bfloat16)
    with torch.no_grad():
        model.lm_head.weight.mul_(60.0)
    assert isinstance(decoder_for(model), SharedDecoder)
    step = SharedDecoder.step

    def blind(self, groups):
        shorter = [replace(group, prompt_ids=group.prompt_ids[1:]) for group in groups]
        for group, one in zip(groups, shorter, strict=True):
            one.cache = group.cache
        logits = step(self, shorter)
        for group, one in zip(groups, shorter, strict=True):
            group.cache = one.cache
        return logits

    monkeypatch.setattr(SharedDecoder, "step", blind)
    assert why_not(SharedDecoder(model), model) == "its logits differ from those of whole texts"


@pytest.mark.parametrize(("dtype", "found_out"), [(torch.bfloat16, False), (torch.float32, True)])
def test_in_half_precision_one_text_decides_nothing(make_model, monkeypatch, dtype, found_out):
    model, step = make_model("llama", dtype=dtype), SharedDecoder.step
    first = model.get_input_embeddings().weight.shape[0] // 3

    def off_after_the_first(self, groups):
        return step(self, groups) * (2 if groups[0].prompt_ids[0] == first else 1)

    monkeypatch.setattr(SharedDecoder, "step", off_after_the_first)
    assert (why_not(SharedDecoder(model), model) is not None) == found_out


def test_the_model_computes_what_it_did_before(make_model):
    model = make_model("llama")
    ids = torch.arange(1, 8)[None]
    with torch.inference_mode():
        logits = model(ids).logits
        SharedDecoder(model).step([Branches(ids[0], 2)])
        assert torch.equal(model(ids).logits, logits)


@pytest.mark.parametrize("model_type", ["llama", "gemma2"])
def test_reading_whole_texts_is_the_slowest_twin(make_model, model_type):
    model = make_model(model_type)
    with torch.inference_mode():
        follow(model, PlainDecoder(model, cached=False), steps=10, tolerance=1e-10)


def test_a_model_outside_says_why(make_model, caplog):
    model = make_model("bloom", vocab_size=23, hidden_size=32, n_layer=1, n_head=2)
    assert isinstance(decoder_for(model), PlainDecoder)
    assert "without shared prompts, which is slower: its attention does not go through" in caplog.text


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_decoder_that_gives_other_logits_is_found_out(make_model, dtype):
    model, other = make_model("llama", dtype=dtype), make_model("llama", dtype=dtype, scale=2.0)
    assert why_not(SharedDecoder(model), model) is None
    assert why_not(SharedDecoder(other), model) == "its logits differ from those of whole texts"
    assert why_not(PlainDecoder(torch.nn.Linear(1, 1)), model).startswith("TypeError")
