"""A model and a data file and nothing else: what is chosen, written down and carried out."""

from __future__ import annotations

import io
import json
import shutil
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForSequenceClassification
from typer.testing import CliRunner

from exalign.cli import app
from exalign.data.reading import DataSettings, read_source
from exalign.data.store import read_records
from exalign.errors import InputError
from exalign.models.loading import load_policy, load_tokenizer, save_model
from exalign.models.model_settings import ModelSettings
from exalign.run.begin import EVALUATED, align, begin, write_down
from exalign.run.recipe import load_recipe
from exalign.storage import read_json, read_sealed
from training.tiny_world import read_metrics

CONFIG = {"model_type": "gpt2", "n_layer": 1, "n_embd": 16, "n_head": 2, "n_positions": 96}


@pytest.fixture(scope="module")
def model(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("model") / "small"
    tokenizer = load_tokenizer(str(world / "tokenizer"))
    save_model(load_policy(ModelSettings(config=CONFIG), tokenizer), tokenizer, folder, card="")
    return folder


@pytest.fixture(scope="module")
def pairs(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A preference file as people have it: the text of the next row is worse."""
    rows = [json.loads(line) for line in (world / "sft.jsonl").read_text().splitlines()]
    file = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    given = [
        {"prompt": f"{row['prompt']} {i}", "chosen": row["completion"], "rejected": other["completion"][:5] or "x"}
        for i, (row, other) in enumerate(pairwise(rows))
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in given))
    return file


def test_preferences_and_nothing_else_end_in_a_model_and_a_report(model: Path, pairs: Path, tmp_path: Path) -> None:
    printed, out = io.StringIO(), tmp_path / "first"
    run = align(str(model), str(pairs), out=out, console=Console(file=printed, width=200))
    (name,) = run.recipe.align
    assert (out / "align" / name / "model" / "model.safetensors").exists()
    assert (out / "report" / "index.html").exists()
    text = printed.getvalue()
    for said in (
        "data: 63 preference pairs",
        "lengths: prompts up to",
        "weights: all are trained",
        "method: EXO, preference target, β_π 0.5",
    ):
        assert said in text
    assert "13 of 63 pairs are held out" in text and str(tmp_path / "first.yaml") in text

    # The pairs that were held out were not trained on, and are what the evidence is about.
    trained, kept = (read_records(out / "preferences" / part) for part in ("records", "held-out"))
    assert (len(trained), len(kept)) == (50, 13)
    assert not {record.prompt for record in trained} & {record.prompt for record in kept}
    (method,) = read_json(out / "evaluation" / "evidence.json")["methods"]
    held_out: dict[str, Any] = method["points"][-1]["held_out"]
    assert 0 <= held_out["accuracy"]["estimate"] <= 1

    # The same command again does nothing but the report; a recipe that was edited is not written over.
    again = io.StringIO()
    align(str(model), str(pairs), out=out, console=Console(file=again, width=200))
    assert "▸ sft" not in again.getvalue() and f"align/{name}: done before, skipped" in again.getvalue()
    edited = tmp_path / "first.yaml"
    edited.write_text(edited.read_text().replace("beta_pi: 0.5", "beta_pi: 0.25"))
    with pytest.raises(InputError, match=r"first\.yaml is there already, edited or .*exalign run"):
        align(str(model), str(pairs), out=out)


def test_what_is_chosen_is_named_by_model_and_data(model: Path, pairs: Path, tmp_path: Path) -> None:
    for name in ("Tiny2.5-1B", "Tiny2.5-7B"):
        shutil.copytree(model, tmp_path / name)
        begun = begin(str(tmp_path / name), str(pairs))
        assert begun.values["name"] == f"{name}-pairs" and begun.file == Path(f"runs/{name}-pairs.yaml")
    for out in (".", "..", "/"):
        with pytest.raises(InputError, match=r"--out .* has no name"):
            begin(str(model), str(pairs), out=out)


def test_other_names_of_columns_come_in_with_the_command(model: Path, pairs: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in pairs.read_text().splitlines()]
    file = tmp_path / "odd.jsonl"
    file.write_text("".join(json.dumps({"q": r["prompt"], "a": r["chosen"], "b": r["rejected"]}) + "\n" for r in rows))
    with pytest.raises(InputError, match=r"its columns with content are 'q', 'a', 'b'.*columns\.prompt=question"):
        begin(str(model), str(file))
    names = ["columns.prompt=q", "columns.chosen=a", "columns.rejected=b"]
    begun = begin(str(model), str(file), [*names, "limit=40"])
    expected = {"source": str(file), "columns": {"prompt": "q", "chosen": "a", "rejected": "b"}, "limit": 40}
    assert begun.values["data"]["preferences"] == expected and begun.reasons[0].startswith("data: 40 preference pairs")
    with pytest.raises(InputError, match=r"epsilon = 0\.7"):  # what is not of the data changes the recipe
        align(str(model), str(file), out=tmp_path / "it", overrides=[*names, "align.exo-pref.epsilon=0.7"])
    assert not (tmp_path / "it.yaml").exists()  # so the corrected command is not held to what nobody edited
    with pytest.raises(InputError, match="Nothing is left to align"):
        align(str(model), str(file), out=tmp_path / "it", overrides=[*names, "align.exo-pref=null"])


@pytest.mark.parametrize("half", [True, False])
def test_a_gpu_computes_and_draws_in_bfloat16_where_it_can(
    model: Path, pairs: Path, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, half: bool
) -> None:
    """What is chosen alone: no such device is here."""
    monkeypatch.setattr("exalign.run.begin.device", lambda: torch.device("cuda"))
    monkeypatch.setattr("exalign.run.begin.device_memory", lambda device: 80e9)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation: half or including_emulation)
    for number, data in enumerate((pairs, world / "prompts.jsonl")):
        reward = "exalign.data.synthetic:reward" if number else None
        write_down(begin(str(model), str(data), reward=reward, out=tmp_path / str(number)), Console(quiet=True))
        recipe = load_recipe(tmp_path / f"{number}.yaml")
        (method,) = recipe.align.values()
        assert (method.precision == "bf16") == (recipe.sample.precision == "bf16") == half
        assert recipe.evaluate.pairs == (EVALUATED if number else 512)
    scoring = AutoModelForSequenceClassification.from_pretrained(model, num_labels=1, dtype=torch.bfloat16)
    for part in (scoring, load_tokenizer(str(model))):
        part.save_pretrained(tmp_path / "scoring")
    scorer = begin(str(model), str(world / "prompts.jsonl"), reward_model=str(tmp_path / "scoring")).values["score"]
    assert scorer["scorer"].get("dtype") == ("bfloat16" if half else None)


def test_prompts_need_to_know_what_is_good(model: Path, world: Path, tmp_path: Path) -> None:
    prompts = str(world / "prompts.jsonl")
    with pytest.raises(InputError, match=r"24 rows without a preference or rewards: say what is good with --reward"):
        begin(str(model), prompts)
    with pytest.raises(InputError, match=r"nowhere.py|nowhere:f cannot be imported"):
        begin(str(model), prompts, reward="nowhere:f")
    with pytest.raises(InputError, match="not both"):
        begin(str(model), prompts, reward="a:b", reward_model="c")
    begun = begin(str(model), prompts, reward="exalign.data.synthetic:reward", out=tmp_path / "it")
    write_down(begun, Console(quiet=True))
    recipe = load_recipe(tmp_path / "it.yaml")
    assert recipe.scoring is not None and recipe.scoring.function == "exalign.data.synthetic:reward"
    assert [method.trains_on for method in recipe.align.values()] == ["rewards"]
    assert recipe.data.prompts.skip == recipe.data.evaluation.limit == 5  # type: ignore[union-attr]
    few = begin(str(model), prompts, ["limit=20"], reward="exalign.data.synthetic:reward").values["data"]
    assert few["prompts"]["skip"] + few["prompts"]["limit"] == 20 and few["evaluation"]["limit"] == 4


def test_the_run_beside_a_recipe_is_taken_and_held_out_pairs_are_read_as_the_method_computes(
    model: Path, pairs: Path, tmp_path: Path
) -> None:
    """In bfloat16 a policy that did not move has log-ratios of 0, on held-out pairs too; and what is cut is told."""
    printed, out = io.StringIO(), tmp_path / "half"
    how = ["precision=bf16", "learning_rate=1e-12", "save_policies=1"]
    overrides = ["limit=30", "data.max_prompt_tokens=2", *(f"align.exo-pref.{setting}" for setting in how)]
    run = align(str(model), str(pairs), out=out, overrides=overrides, console=Console(file=printed, width=200))
    (row,) = [row for row in read_metrics(run.path("align", "exo-pref")) if "held_out_margin" in row]
    assert abs(row["held_out_margin"]) < 1e-6 and row["held_out_accuracy"] == 0.5
    assert "24 of 24 prompts are cut at 2 tokens (data.max_prompt_tokens)" in printed.getvalue()
    command = " ".join(["exalign run", f"{out}.yaml", "--run", str(out), *overrides[1:]])
    assert f"carry it out with {command}\n" in printed.getvalue()
    again = CliRunner().invoke(app, ["run", f"{out}.yaml", *overrides[1:]])
    assert f"run: {out}" in again.stdout.replace("\n", "") and "align/exo-pref: done before, skipped" in again.stdout


def test_where_the_run_will_be_is_in_the_command(model: Path, pairs: Path, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    printed = io.StringIO()
    for out in (None, "runs/foo", "here"):
        begun = begin(str(model), str(pairs), out=out)
        write_down(begun, Console(file=printed, width=400))
    said = [line for line in printed.getvalue().splitlines() if "carry it out" in line]
    assert "--run" not in said[0] and said[1].endswith("--run runs/foo") and said[2].endswith("--run here")
    begun.file.write_text("edited: true")
    with pytest.raises(InputError, match=r"exalign run here\.yaml --run here, remove it"):
        write_down(begun, Console(file=printed))


def test_labels_are_for_kto_and_prompts_that_come_twice_are_told(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"p {i % 30}", "completion": "a b", "label": i % 2 == 0} for i in range(60)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(InputError, match=r"one answer with a reward or label to each prompt, which --method kto takes"):
        begin(str(model), str(file))
    run = align(str(model), str(file), methods=["kto"], out=tmp_path / "kto", console=Console(quiet=True))
    assert read_sealed(run.path("scored", "done.json"))["counts"]["records"] == 48
    assert run.path("report", "index.html").exists()
    (method,) = read_json(run.path("evaluation", "evidence.json"))["methods"]
    assert method["points"][-1]["held_out"]["accuracy"]["num_prompts"] == 12
    reasons = begin(str(model), str(file), reward="exalign.data.synthetic:reward").reasons
    assert "the first 12 rows are held out for the evidence, but 12 later rows have their prompts" in reasons[0]


def test_one_prompt_is_too_few_and_nothing_is_left_behind(model: Path, pairs: Path, tmp_path: Path) -> None:
    (tmp_path / "one.jsonl").write_text(pairs.read_text().partition("\n")[0])
    with pytest.raises(InputError, match=r"one\.jsonl has one prompt, so none can be held out for the evidence"):
        align(str(model), str(tmp_path / "one.jsonl"), out=tmp_path / "out")
    assert [path.name for path in tmp_path.iterdir()] == ["one.jsonl"]


def test_methods_that_fit_the_data_are_compared(model: Path, pairs: Path, world: Path, tmp_path: Path) -> None:
    names = ["exo", "dpo", "simpo", "kto"]
    write_down(begin(str(model), str(pairs), methods=names, out=tmp_path / "pairs"), Console(quiet=True))
    found = load_recipe(tmp_path / "pairs.yaml").align
    assert list(found) == ["exo-pref", "dpo-pref", "simpo", "kto"]
    assert [method.trains_on for method in found.values()] == ["preferences"] * 4
    assert found["dpo-pref"].line == "DPO, preference target, β_π 0.5, ε 0"  # the usual loss, without smoothing
    reward = "exalign.data.synthetic:reward"
    begun = begin(
        str(model), str(world / "prompts.jsonl"), methods=["dpo", "grpo"], reward=reward, out=tmp_path / "own"
    )
    write_down(begun, Console(quiet=True))
    assert [method.trains_on for method in load_recipe(tmp_path / "own.yaml").align.values()] == ["rewards", "prompts"]
    with pytest.raises(
        InputError, match=r"--method grpo does not train on what the data gives; here there are exo, dpo,"
    ):
        begin(str(model), str(pairs), methods=["exo", "grpo"])
    begun = begin(str(model), str(pairs), methods=["grpo", "exo"], reward=reward)  # whose prompts these are
    assert {"prompts", "evaluation"} <= begun.values["data"].keys() and list(begun.values["align"]) == [
        "grpo",
        "exo-rw",
    ]
    with pytest.raises(InputError, match=r"--method dop is none; here there are exo, dpo, "):
        begin(str(model), str(pairs), methods=["dop"])


def test_joined_rows_are_held_out_by_the_prompt(model: Path, tmp_path: Path) -> None:
    """60 prompts of 5 rows each: 12 prompts are 60 rows, and no prompt is on both sides."""
    file = tmp_path / "joined.jsonl"
    rows = [{"prompt": f"p {i // 5}", "completion": f"a {i}", "label": i % 2 == 0} for i in range(300)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    begun = begin(str(model), str(file), ["join=true"], reward="exalign.data.synthetic:reward")
    data = begun.values["data"]
    used = next(name for name in ("rewards", "prompts") if name in data)
    assert (
        data["evaluation"]["limit"] == data[used]["skip"] == 60 and "the first 60 rows are held out" in begun.reasons[0]
    )


def test_scored_completions_are_pairs_unless_something_can_score_the_samples(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "scored.jsonl"
    rows = [{"prompt": f"p {i}", "completions": ["a b", "c"], "rewards": [1.0, 0.0]} for i in range(40)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert list(begin(str(model), str(file)).values["align"]) == ["exo-pref"]
    values = begin(str(model), str(file), reward="exalign.data.synthetic:reward").values
    assert list(values["align"]) == ["exo-rw"] and values["data"]["rewards"]["skip"] == 8


def test_dialogues_as_text_go_through_the_template_of_a_model_that_has_one(model: Path, tmp_path: Path) -> None:
    file = tmp_path / "hh.jsonl"
    past = "\n\nHuman: Hi\n\nAssistant: Yes?\n\nHuman: Go on {}.\n\nAssistant:"
    rows = [{"chosen": f"{past.format(i)} Well.", "rejected": f"{past.format(i)} No."} for i in range(40)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert "chat" not in begin(str(model), str(file)).values["data"]["preferences"]
    chat = tmp_path / "chat"
    tokenizer = load_tokenizer(str(model))
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['role'][0] }}: {{ m['content'] }}\n{% endfor %}"
        "{% if add_generation_prompt %}a: {% endif %}"
    )
    save_model(load_policy(ModelSettings(config=CONFIG), tokenizer), tokenizer, chat, card="")
    begun = begin(str(chat), str(file))
    assert begun.values["data"]["preferences"] == {"source": str(file), "chat": True}
    assert "through the model's chat template" in begun.reasons[0]
    plain = tmp_path / "plain.jsonl"
    plain.write_text(
        "".join(json.dumps({"prompt": f"Go on {i}.", "chosen": "Well.", "rejected": " No."}) + "\n" for i in range(40))
    )
    assert begin(str(chat), str(plain)).values["data"]["preferences"]["chat"] is True
    assert "chat" not in begin(str(model), str(plain)).values["data"]["preferences"]
    assert begin(str(chat), str(plain), ["chat=false"]).values["data"]["preferences"] == {
        "source": str(plain),
        "chat": False,
    }
    (row, *_) = read_source(DataSettings(source=str(plain), chat=True), Counter())
    assert row.prompt == ({"role": "user", "content": "Go on 0."},)
    assert [completion.text for completion in row.completions] == ["Well.", " No."]  # as they are: it may be code
    counts: Counter[str] = Counter()
    (first, *_) = read_source(DataSettings(source=str(file), chat=True), counts)
    assert [message["content"] for message in first.prompt] == ["Hi", "Yes?", "Go on 0."]  # type: ignore[index]
    assert [completion.text for completion in first.completions] == ["Well.", "No."]
    assert counts["prompts_read_as_dialogues"] == 40
