"""Adapters through a whole run: saved alone, evaluated, talked to, and what the next run starts from."""

from __future__ import annotations

import json
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from peft import AutoPeftModelForCausalLM, get_peft_model
from torch import nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig
from typer.testing import CliRunner

from exalign.cli import app
from exalign.data.batching import Group
from exalign.data.store import read_records
from exalign.errors import InputError
from exalign.evaluation.run_folder import RunFolder
from exalign.models.flops import matrices
from exalign.models.loading import load_policy, load_tokenizer, read_config, save_model
from exalign.models.logprobs import completion_logprobs
from exalign.models.model_settings import LoraSettings, ModelSettings
from exalign.run.carry_out import check_inputs, run_recipe
from exalign.run.demo import RECIPE
from exalign.run.publish import publish
from exalign.run.recipe import Recipe, load_recipe, make_recipe
from run.conftest import ALIGN, tiny_overrides
from run.searched_run import ALONE

DORA = "model.lora={rank: 2, dora: true, save: adapter}"
SCORED = "evaluate.scorer={function: exalign.data.synthetic:reward}"


@pytest.fixture(scope="module")
def trained(world: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    folder = tmp_path_factory.mktemp("runs") / "dora"
    run_recipe(load_recipe(RECIPE, tiny_overrides(world, *ALONE, DORA)), folder=folder)
    return RunFolder(folder)


def logprob(model: nn.Module, prompt: tuple[int, ...], answer: tuple[int, ...]) -> float:
    """log π(y|x) by one plain pass."""
    ids = torch.tensor([[*prompt, *answer]])
    with torch.no_grad():
        logp = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].double().log_softmax(-1)
    return float(logp.gather(1, torch.tensor(answer)[:, None]).sum())


def test_a_policys_folder_holds_its_adapter_and_is_sampled_as_peft_has_it(trained: RunFolder) -> None:
    whole = trained.path / "sft" / "model"
    assert (whole / "model.safetensors").exists()
    (first, last) = (point.step for point in trained.read_evidence().methods[0].points)
    for step in (first, last):
        folder = trained.policy("exo-rw", step)
        assert not (folder / "config.json").exists() and not (folder / "model.safetensors").exists()
        said = json.loads((folder / "adapter_config.json").read_text())
        assert said["use_dora"] and said["base_model_name_or_path"] == str(whole)
        plain = AutoPeftModelForCausalLM.from_pretrained(folder).eval()
        for record in read_records(trained.samples("exo-rw", step)):
            assert record.prompt_ids is not None
            for drawn in record.completions:
                expected = logprob(plain, record.prompt_ids, drawn.token_ids or ())
                assert drawn.logprob == pytest.approx(expected, abs=1e-4)
    assert (trained.model("exo-rw") / "adapter_model.safetensors").read_bytes() == (
        trained.policy("exo-rw", last) / "adapter_model.safetensors"
    ).read_bytes()


def test_it_is_talked_to_and_not_pushed_without_its_base(trained: RunFolder) -> None:
    source = str(trained.model("exo-rw"))
    ended = CliRunner().invoke(app, ["chat", source, "--max-new-tokens", "4"], input="A film\n")
    assert ended.exit_code == 0, ended.output
    with pytest.raises(InputError, match=r"is an adapter on .*model, which nobody else has; align again"):
        publish(trained.path, "exo-rw", "somebody/adapter")


def test_the_next_run_starts_from_the_adapter_on_its_base(trained: RunFolder, world: Path, tmp_path: Path) -> None:
    source = str(trained.model("exo-rw"))
    start = ["sft=null", "data.sft=null", f"model={{source: {source}}}", "tokenizer.source=null"]
    run = run_recipe(load_recipe(RECIPE, tiny_overrides(world, *ALONE, *start)), "align", folder=tmp_path / "next")
    reference = AutoPeftModelForCausalLM.from_pretrained(source).eval()
    for record in read_records(run.path("reference/reward", "records")):
        assert record.prompt_ids is not None
        for drawn in record.completions:
            expected = logprob(reference, record.prompt_ids, drawn.token_ids or ())
            assert drawn.reference_logprob == pytest.approx(expected, abs=1e-4)
    begun, ended = (
        dict(load_policy(ModelSettings(source=name), load_tokenizer(source)).named_parameters())
        for name in (source, str(run.path("align", "exo-rw", "model")))
    )
    assert not [name for name in begun if torch.equal(begun[name], ended[name])]  # without lora all weights are trained


def test_what_cannot_be_is_said_before_any_work(trained: RunFolder, tiny: Callable[..., Recipe]) -> None:
    source = str(trained.model("exo-rw"))
    alone = f"model={{source: {source}, lora: {{save: adapter}}}}"
    with pytest.raises(InputError, match="model is an adapter itself"):
        check_inputs(tiny(*ALONE, "sft=null", "data.sft=null", alone, "tokenizer.source=null"))
    with pytest.raises(InputError, match=r"model\.lora\.save = adapter is for .*, and this recipe trains none; remove"):
        make_recipe({"name": "x", "model": {"source": "x", "lora": {"save": "adapter"}}})
    with pytest.raises(InputError, match=r"reward\.model\.lora\.save = adapter is for policies of the alignment; rem"):
        tiny(f"reward.model={{source: {source}, lora: {{save: adapter}}}}", f"align={{a: {ALIGN}target: reward}}}}")


@pytest.fixture
def in_4_bits(world: Path, tmp_path: Path) -> Path:
    """A model stored in 4 bits, as transformers writes it."""
    pytest.importorskip("bitsandbytes")
    tokenizer, config = load_tokenizer(str(world / "tokenizer")), {"model_type": "llama", "hidden_size": 64}
    config |= {"intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2, "max_position_embeddings": 96}
    save_model(load_policy(ModelSettings(config=config), tokenizer), tokenizer, tmp_path / "whole", card="")
    how = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    packed = AutoModelForCausalLM.from_pretrained(tmp_path / "whole", quantization_config=how, device_map={"": "cpu"})
    packed.save_pretrained(tmp_path / "4-bits")
    tokenizer.save_pretrained(tmp_path / "4-bits")
    return tmp_path / "4-bits"


def test_a_model_in_4_bits_is_aligned_by_adapters(in_4_bits: Path, world: Path, tmp_path: Path) -> None:
    model = f"model={{source: {in_4_bits}, lora: {{rank: 2, save: adapter}}}}"
    start = ["sft=null", "data.sft=null", model, "tokenizer.source=null"]
    run = run_recipe(load_recipe(RECIPE, tiny_overrides(world, *ALONE, *start)), folder=tmp_path / "run")
    done = RunFolder(run.folder)
    policy = AutoPeftModelForCausalLM.from_pretrained(done.model("exo-rw")).train()  # else a CPU rounds as bf16 does
    base = AutoModelForCausalLM.from_pretrained(in_4_bits).train()
    for record in read_records(done.samples("exo-rw", done.read_evidence().methods[0].points[-1].step)):
        assert record.prompt_ids is not None
        for drawn in record.completions:
            ids = drawn.token_ids or ()
            assert drawn.logprob == pytest.approx(logprob(policy, record.prompt_ids, ids), abs=1e-4)
            assert drawn.reference_logprob == pytest.approx(logprob(base, record.prompt_ids, ids), abs=1e-4)
    whole = load_policy(ModelSettings(source=str(in_4_bits.parent / "whole")), load_tokenizer(str(in_4_bits)))
    assert [weight.shape for _, weight in matrices(base)] == [weight.shape for _, weight in matrices(whole)]
    with pytest.raises(InputError, match=r"model: .*4-bits has quantised weights, .*: set model.lora.save: adapter"):
        check_inputs(load_recipe(RECIPE, tiny_overrides(world, *ALONE, *start, "model.lora.save=merged")))


def test_steps_on_4_bits_are_those_on_the_weights_that_they_stand_for(in_4_bits: Path) -> None:
    lora = LoraSettings(rank=2, save="adapter")
    model = load_policy(ModelSettings(source=str(in_4_bits), lora=lora), load_tokenizer(str(in_4_bits)))
    groups = [Group(0, torch.tensor([3, 4, 5]), (torch.tensor([6, 7, 0]), torch.tensor([8])))]
    completion_logprobs(model, groups, temperature=1.0)  # the first pass chooses the way
    whole = AutoModelForCausalLM.from_pretrained(in_4_bits).dequantize()
    twin = get_peft_model(whole, model.peft_config["default"])
    for own, other in zip(trained_of(model), trained_of(twin), strict=True):
        other.data = own.data.copy_(torch.randn_like(own)).clone()
    found, expected = (completion_logprobs(one, groups, temperature=1.0) for one in (model, twin))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=0)
    for value in (found, expected):
        value.sum().backward()
    for own, other in zip(trained_of(model), trained_of(twin), strict=True):
        torch.testing.assert_close(own.grad, other.grad, atol=1e-5, rtol=1e-4)


def trained_of(model: nn.Module) -> list[nn.Parameter]:
    return [weights for weights in model.parameters() if weights.requires_grad]


def test_quantised_weights_without_what_reads_them_are_one_sentence(tmp_path: Path) -> None:
    if find_spec("bitsandbytes"):
        pytest.skip("bitsandbytes is installed")
    said = {"model_type": "llama", "quantization_config": {"quant_method": "bitsandbytes", "load_in_4bit": True}}
    (tmp_path / "config.json").write_text(json.dumps(said))
    with pytest.raises(InputError, match=r"has quantised weights: Using `bitsandbytes` .* requires bitsandbytes: `pip"):
        read_config(ModelSettings(source=str(tmp_path)), None)
