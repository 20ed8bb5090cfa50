"""What is found out before any work, and what is only said."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from exalign.data.reading import looks_local
from exalign.data.record import Completion, Record
from exalign.data.store import Header, write_records
from exalign.errors import InputError
from exalign.models.loading import load_policy, load_tokenizer, save_model
from exalign.models.model_settings import ModelSettings
from exalign.run import carry_out
from exalign.run.carry_out import check_devices, check_inputs, check_room
from exalign.run.recipe import Recipe, make_recipe
from exalign.run.runner import Run
from exalign.run.stages import hold_out
from exalign.storage import read_json

CONFIG = {"model_type": "gpt2", "n_layer": 1, "n_embd": 16, "n_head": 2, "n_positions": 96}
NO_SYSTEM = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}"
    "{{ m['role'][0] }}: {{ m['content'] }}\n{% endfor %}{% if add_generation_prompt %}a: {% endif %}"
)
USER, SYSTEM = {"role": "user", "content": "Hi"}, {"role": "system", "content": "Be brief."}


@pytest.fixture(scope="module")
def model(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "chat"
    tokenizer = load_tokenizer(str(world / "tokenizer"))
    tokenizer.chat_template = NO_SYSTEM
    save_model(load_policy(ModelSettings(config=CONFIG), tokenizer), tokenizer, folder, card="")
    return folder


@pytest.fixture
def recipe(model: Path, tmp_path: Path) -> Any:
    """A recipe of preferences, these rows, with other settings changed."""

    def make(rows: list[Any], **changed: Any) -> Recipe:
        file = tmp_path / "pairs.jsonl"
        sides = {"chosen": "yes", "rejected": "no"}
        file.write_text("".join(json.dumps({"prompt": prompt, **sides}) + "\n" for prompt in rows))
        values = {
            "name": "it",
            "model": {"source": str(model)},
            "data": {
                "preferences": {"source": str(file), "chat": False},
                "max_prompt_tokens": 32,
                "max_completion_tokens": 32,
            },
            "sample": {"max_new_tokens": 8},
            "align": {"dpo": {"target": "preference"}},
        }
        for path, value in changed.items():
            *parents, last = path.split("__")
            section: Any = values
            for name in parents:
                section = section.setdefault(name, {})
            section[last] = value
        return make_recipe(values)

    return make


def test_roles_that_a_template_refuses_are_told_and_where_nothing_else_is_refused(recipe: Any) -> None:
    (said,) = check_inputs(recipe([[USER], [SYSTEM, USER], [USER], [SYSTEM, {**USER, "content": "Why?"}]]))
    assert "data.preferences: Record pairs.jsonl:2: the chat template of" in said
    assert "no system role" in said and "left out and counted" in said
    with pytest.raises(InputError, match=r"data\.preferences: no row can be used\. .*no system role"):
        check_inputs(recipe([[SYSTEM, USER]]))
    assert check_inputs(recipe([[USER], "Hi"])) == []


def test_a_name_on_the_hub_may_have_dots() -> None:
    for name in ("Qwen/Qwen2.5-7B-Instruct", "meta-llama/Llama-3.2-1B", "gpt2", "org/set-v1.0"):
        assert not looks_local(name)
    for name in ("./model", "/model", "~/model", "runs/a/model", "pairs.jsonl", "data/pairs.jsonl.gz"):
        assert looks_local(name)


def test_rows_without_an_answer_are_no_rows_of_sft(recipe: Any, tmp_path: Path) -> None:
    """A conversation that ends with the user is left out and counted; where all do, it is said before any work."""
    chats, answer = tmp_path / "chats.jsonl", {"role": "assistant", "content": "yes"}
    given = {"data__sft": {"source": str(chats)}, "sft": {"batch_prompts": 1}}
    chats.write_text("".join(json.dumps({"messages": rows}) + "\n" for rows in ([USER, answer], [USER])))
    assert check_inputs(recipe([[USER], "Why?"], **given)) == []
    run = Run(recipe([[USER], "Why?"], **given), tmp_path / "run")
    carry_out.carry_out(run, "sft")
    assert read_json(run.path("sft", "done.json"))["counts"]["rows_without_a_completion"] == 1
    chats.write_text(json.dumps({"messages": [USER]}) + "\n")
    with pytest.raises(InputError, match=r"data\.sft: no row of .*chats\.jsonl has a completion"):
        check_inputs(recipe([[USER], "Why?"], **given))


def test_a_named_prompt_is_looked_for_among_those_that_are_held_out(recipe: Any) -> None:
    prompts = [f"{number} apples" for number in range(40)]
    held = hold_out([Record(p, p, ()) for p in prompts], 0.05, 512, "it")[1][0].prompt
    other = next(prompt for prompt in prompts if prompt != held and not str(held).startswith(prompt))
    assert check_inputs(recipe(prompts, evaluate__first_prompt=held)) == []
    with pytest.raises(InputError, match="no prompt of the evaluation begins with"):
        check_inputs(recipe(prompts, evaluate__first_prompt=other))


def test_lengths_are_held_against_positions(recipe: Any) -> None:
    for name, part in (("data__max_completion_tokens", "data"), ("sample__max_new_tokens", "sample")):
        with pytest.raises(InputError, match=rf"max_prompt_tokens \+ {part}.* is 97, but the model has 96 positions"):
            check_inputs(recipe(["Hi"], **{name: 65}))
    with pytest.raises(InputError, match="is 64, but the model has 63 positions"):
        check_inputs(recipe(["Hi"], reward__model={"config": {**CONFIG, "n_positions": 63}}))


def test_weights_are_looked_at(recipe: Any, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str, content: bytes | None) -> str:
        folder = tmp_path / name
        shutil.copytree(model, folder)
        (folder / "SHA256SUMS").unlink()
        (folder / "model.safetensors").unlink()
        if content is not None:
            (folder / "model.safetensors").write_bytes(content)
        return str(folder)

    whole = (model / "model.safetensors").read_bytes()
    pointer = b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 9\n"
    for name, content, sentence in (
        ("pointer", pointer, "is a Git LFS pointer, not the file: run `git lfs pull`"),
        ("half", whole[: len(whole) // 2], "Cannot load the model .*half: "),
        ("none", None, "none has no model.safetensors"),
    ):
        source = broken(name, content)
        with pytest.raises(InputError, match=sentence):
            check_inputs(recipe(["Hi"], model__source=source))
        with pytest.raises(InputError, match=sentence):
            check_inputs(recipe(["Hi"], evaluate__scorer={"classifier": source}))
        adapter = tmp_path / f"{name}-adapter"
        adapter.mkdir()
        (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": source}))
        with pytest.raises(InputError, match=sentence):
            check_inputs(recipe(["Hi"], model__source=str(adapter), tokenizer__source=str(model)))
    with pytest.raises(InputError, match=r"model\.dtype = float16: gradients in float16 would be lost"):
        check_inputs(recipe(["Hi"], model__dtype="float16"))
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(
        InputError, match=r"model\.dtype = bfloat16: weights of 16 bits are trained by a single process"
    ):
        check_inputs(recipe(["Hi"], model__dtype="bfloat16"))
    monkeypatch.delenv("WORLD_SIZE")
    with pytest.raises(InputError, match="A t5 is no causal language model"):
        check_inputs(recipe(["Hi"], model={"config": {"model_type": "t5"}}, tokenizer__source=str(model), sft={}))


def test_epsilon_leaves_the_preferred_completion_the_most(recipe: Any) -> None:
    with pytest.raises(InputError, match=r"align\.dpo: of 2 completions .* epsilon = 0\.5; choose one below 0\.5"):
        check_inputs(recipe(["Hi"], align__dpo__epsilon=0.5))
    ranges = {"trials": 2, "kl": 1.0, "methods": {"dpo": {"epsilon": {"low": 0.01, "high": 0.6}}}}
    scored = {"evaluate__scorer": {"function": "exalign.data.synthetic:reward"}}
    with pytest.raises(InputError, match=r"epsilon = 0\.6"):
        check_inputs(recipe(["Hi"], search=ranges, data__validation={"source": "x"}, **scored))


def test_texts_that_a_chat_template_is_not_applied_to_are_told(recipe: Any, tmp_path: Path) -> None:
    """Unless they are messages, become some, or text is said to be meant."""
    pairs = tmp_path / "others.jsonl"
    pairs.write_text(json.dumps({"prompt": "Hi", "chosen": "yes", "rejected": "no"}) + "\n")
    (said,) = check_inputs(recipe(["Hi"], data__preferences={"source": str(pairs)}))
    assert said.startswith("data.preferences: prompts are text, and the model's chat template is not applied to them.")
    for meant in (True, False):
        assert check_inputs(recipe(["Hi"], data__preferences={"source": str(pairs), "chat": meant})) == []
    pairs.write_text(json.dumps({"prompt": [USER], "chosen": "yes", "rejected": "no"}) + "\n")
    assert check_inputs(recipe(["Hi"], data__preferences={"source": str(pairs)})) == []
    answers = (Completion("yes"), Completion("no"))
    write_records(tmp_path / "records", [Record("1", "Hi", answers, preferred=0)], Header())  # as another run meant it
    assert check_inputs(recipe(["Hi"], data__preferences={"source": str(tmp_path / "records")})) == []


def test_prompts_that_are_trained_on_are_told(recipe: Any, tmp_path: Path) -> None:
    held = tmp_path / "held.jsonl"
    held.write_text("".join(json.dumps({"prompt": prompt}) + "\n" for prompt in ("Hi ", "Why?", "Hi")))
    said = check_inputs(recipe(["Hi", "Ho"], data__evaluation={"source": str(held), "chat": False}))
    assert said == ["1 of the 2 prompts of data.evaluation are in data.preferences too, and may be trained on."]
    # Texts that are yet to be cut are told apart too.
    files = {"prompts": ("one text", "two texts"), "evaluation": ("two texts", "three texts", "four texts")}
    changed: dict[str, Any] = {}
    for name, texts in files.items():
        file = tmp_path / f"{name}.jsonl"
        file.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
        changed[f"data__{name}"] = {"source": str(file), "prompt_tokens": 1}
    scored = {"score__scorer": {"function": "exalign.data.synthetic:reward"}, "align": {"exo": {"target": "reward"}}}
    said = check_inputs(recipe(["Hi"], **scored, **changed))
    assert said == ["1 of the 3 prompts of data.evaluation are in data.prompts too, and may be trained on."]


def test_a_scorer_is_tried_on_what_it_will_score(recipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows with the column that it needs are the prompts; the pairs are for DPO alone."""
    monkeypatch.chdir(tmp_path)
    rewards = """def right(prompts, completions, answer):
    return [[float(a in text) for text in texts] for texts, a in zip(completions, answer)]"""
    (tmp_path / "answer_rewards.py").write_text(rewards)
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('{"prompt": "Two?", "answer": "2"}\n')
    more = {"data__prompts": {"source": str(prompts)}, "score__scorer": {"function": "answer_rewards:right"}}
    align = {"dpo": {"target": "preference"}, "exo": {"target": "reward", "beta_r": 0.5}}
    judged = {"data__evaluation": {"source": str(prompts)}}
    check_inputs(recipe(["Hi", "Ho"], **more, **judged, align=align))
    prompts.write_text('{"prompt": "Two?"}\n')
    with pytest.raises(InputError, match="asks for the column answer, which the data does not have"):
        check_inputs(recipe(["Hi", "Ho"], **more, **judged, align=align))


def test_policies_that_no_disk_could_hold_are_told_before_the_work(recipe: Any, model: Path, tmp_path: Path) -> None:
    """Each saved policy takes the weights' four bytes, and one checkpoint of all weights twelve more."""
    parameters = sum(
        p.numel() for p in load_policy(ModelSettings(source=str(model)), load_tokenizer(str(model))).parameters()
    )
    many = 10**12
    (said,) = check_room(Run(recipe(["Hi"], align__dpo__save_policies=many), tmp_path / "far" / "run"))
    assert f"run: align/dpo will keep up to {(4 * many + 12) * parameters / 1e9:,.1f} GB, and " in said
    assert "GB are free there: save fewer policies (save_policies)" in said
    scored = {"score__scorer": {"function": "exalign.data.synthetic:reward"}, "align__dpo__target": "reward"}
    swept = recipe(["Hi"], **scored, align__dpo__sweep={"beta_r": [1.0, 0.5]}, align__dpo__save_policies=1)
    assert not [*check_room(Run(swept, tmp_path))] and not [*check_room(Run(recipe(["Hi"]), tmp_path))]
    stopping = {"align__dpo__stop_after": 1, "align__dpo__sweep": {"beta_r": [1.0, 0.5]}}
    (said,) = check_room(Run(recipe(["Hi"], **scored, **stopping, align__dpo__save_policies=many), tmp_path))
    assert f"up to {2 * (4 * many + 12) * parameters / 1e9:,.1f} GB" in said
    adapters = {"model__lora": {"rank": 2, "save": "adapter"}, "align__dpo__save_policies": many}
    assert not [*check_room(Run(recipe(["Hi"], **adapters), tmp_path))]
    (tmp_path / "align" / "dpo").mkdir(parents=True)
    (tmp_path / "align" / "dpo" / "done.json").touch()
    assert not [*check_room(Run(recipe(["Hi"], align__dpo__save_policies=many), tmp_path))]


def test_what_the_evaluation_names_is_looked_for_before_the_work(recipe: Any, tmp_path: Path) -> None:
    held = tmp_path / "held.jsonl"
    held.write_text("".join(json.dumps({"prompt": prompt, "kind": "a"}) + "\n" for prompt in ("Hi", "Why?")))
    source = {"data__evaluation": {"source": str(held), "chat": False}}
    rows = [[USER]]
    assert check_inputs(recipe(rows, **source, evaluate__category="kind", evaluate__first_prompt="Wh")) == []
    for name, value, sentence in (
        ("category", "kid", r"evaluate\.category: data\.evaluation has no column 'kid'"),
        ("first_prompt", "How", r"evaluate\.first_prompt: no prompt of the evaluation begins with 'How'"),
    ):
        with pytest.raises(InputError, match=sentence):
            check_inputs(recipe(rows, **source, **{f"evaluate__{name}": value}))
    stopping = {"align__dpo__stop_after": 1, "align__dpo__save_policies": 4}
    with pytest.raises(InputError, match=r"align\.dpo\.stop_after looks at held-out preferences, and data\.evaluation"):
        check_inputs(recipe(rows, **source, **stopping))
    own = {"align__dpo__fresh_every": 1, "score__scorer": {"function": "exalign.data.synthetic:reward"}}
    with pytest.raises(InputError, match=r"align\.dpo: of 2 completions .* epsilon = 0\.5"):
        check_inputs(recipe(rows, **own, align__dpo__epsilon=0.5))


def test_one_process_beside_idle_gpus_is_told_how_to_use_them(recipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = recipe(["Hi"])
    assert not [*check_devices(plain)]
    monkeypatch.setattr(carry_out, "device", lambda: torch.device("cuda"))
    for count, told in ((1, 0), (8, 1)):
        monkeypatch.setattr(torch.accelerator, "device_count", lambda count=count: count)
        assert len([*check_devices(plain)]) == told
    (said,) = check_devices(plain)
    assert said.startswith("One of 8 GPUs is used") and "--num_processes 8" in said
    scored = {"score__scorer": {"function": "exalign.data.synthetic:reward"}, "align__dpo__target": "reward"}
    assert not [*check_devices(recipe(["Hi"], **scored, cluster={"workers": 8}))]
    divided = recipe(["Hi"], sample__engine="vllm", sample__vllm={"gpus": 2})
    assert not [*check_devices(divided)]
    monkeypatch.setenv("WORLD_SIZE", "8")
    assert not [*check_devices(plain)]
    with pytest.raises(InputError, match=r"sample.vllm.gpus: each process has an engine on its own GPU"):
        [*check_devices(divided)]
