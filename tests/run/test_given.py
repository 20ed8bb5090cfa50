"""Policies that were trained elsewhere get the evidence of a run, each against plain transformers."""

from __future__ import annotations

import io
import json
import math
import shutil
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from statistics import mean, stdev

import pytest
import torch
from peft import AutoPeftModelForCausalLM, LoraConfig, get_peft_model
from rich.console import Console
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from exalign import evidence
from exalign.cli import app
from exalign.data.store import read_records
from exalign.data.tokenization import build_tokenizer
from exalign.errors import InputError
from exalign.evaluation.evidence import build_evidence
from exalign.evaluation.run_folder import RunFolder, pool_rewards
from exalign.models.loading import load_policy, load_tokenizer, save_model
from exalign.models.model_settings import ModelSettings
from exalign.report import write_report
from exalign.report.wording import number
from exalign.run.benchmark import benchmark_run, find_tasks
from exalign.run.recipe import make_recipe

CONFIG = {"model_type": "gpt2", "n_layer": 1, "n_embd": 16, "n_head": 2, "n_positions": 96}
REWARDS = """
def brevity(prompts, completions):
    return [[-len(text) for text in texts] for texts in completions]
"""


@pytest.fixture(scope="module")
def models(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A reference, a copy of it, one moved away, an adapter on it without a tokenizer, and one with other tokens."""
    place = tmp_path_factory.mktemp("models")
    tokenizer = load_tokenizer(str(world / "tokenizer"))
    torch.manual_seed(0)
    model = load_policy(ModelSettings(config=CONFIG), tokenizer)
    for name in ("reference", "copy"):
        save_model(model, tokenizer, place / name, card="")
    with torch.no_grad():
        for weights in model.parameters():
            weights += 0.02 * torch.randn_like(weights)
    save_model(model, tokenizer, place / "moved", card="")
    base = AutoModelForCausalLM.from_pretrained(place / "reference")
    adapted = get_peft_model(base, LoraConfig(r=2, target_modules=["c_attn"], task_type="CAUSAL_LM"))
    for name, weights in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weights, std=0.5)
    adapted.save_pretrained(place / "adapter")
    own = build_tokenizer(["other words than those", "of the world"], vocab_size=260)
    torch.manual_seed(1)
    save_model(load_policy(ModelSettings(config=CONFIG), own), own, place / "other", card="")
    return place


@pytest.fixture(scope="module")
def given(models: Path, world: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    place = tmp_path_factory.mktemp("evidence")
    (place / "brief_rewards.py").write_text(REWARDS)
    policies = {
        "line": [models / "copy", models / "moved"],
        "adapter": [models / "adapter"],
        "other": [models / "other"],
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(place)
        evidence(
            str(models / "reference"),
            {name: [str(folder) for folder in folders] for name, folders in policies.items()},
            str(world / "test.jsonl"),
            out=place / "run",
            reward="brief_rewards:brevity",
            console=Console(file=io.StringIO()),
        )
    return RunFolder(place / "run")


def logprob(model: torch.nn.Module, prompt: tuple[int, ...], answer: tuple[int, ...]) -> float:
    """log π(y|x) by one plain pass."""
    ids = torch.tensor([[*prompt, *answer]])
    with torch.no_grad():
        logp = model(input_ids=ids).logits[0, len(prompt) - 1 : -1].double().log_softmax(-1)
    return float(logp.gather(1, torch.tensor(answer)[:, None]).sum())


def test_samples_have_the_log_probabilities_of_plain_transformers(given: RunFolder, models: Path) -> None:
    reference = AutoModelForCausalLM.from_pretrained(models / "reference").eval()
    plain = {
        ("line", 1): reference,
        ("line", 2): AutoModelForCausalLM.from_pretrained(models / "moved").eval(),
        ("adapter", 1): AutoPeftModelForCausalLM.from_pretrained(models / "adapter").eval(),
        ("other", 1): AutoModelForCausalLM.from_pretrained(models / "other").eval(),
    }
    for (name, step), model in plain.items():
        for record in read_records(given.samples(name, step))[:3]:
            assert record.prompt_ids is not None
            for drawn in record.completions:
                assert drawn.token_ids is not None and drawn.logprob is not None
                assert drawn.logprob == pytest.approx(logprob(model, record.prompt_ids, drawn.token_ids), abs=1e-4)
                if name == "other":
                    assert drawn.reference_logprob is None
                    continue
                expected = logprob(reference, record.prompt_ids, drawn.token_ids)
                assert drawn.reference_logprob == pytest.approx(expected, abs=1e-4)


def test_the_evidence_is_that_of_a_run(given: RunFolder, models: Path) -> None:
    found = given.read_evidence()
    by_name = {method.name: method for method in found.methods}
    assert {method.target for method in found.methods} == {None}  # nobody knows what they were trained on
    same, moved = by_name["line"].points
    assert same.kl is not None and abs(same.kl.estimate) < 1e-4  # it is the reference
    assert moved.kl is not None and moved.kl.estimate > 0.01
    (adapter,) = by_name["adapter"].points
    assert adapter.kl is not None and adapter.kl.estimate > 0.01
    assert found.optimum is not None and found.density is not None and found.equal_kl is not None
    assert all(method.win_rates and method.points[-1].reward for method in found.methods)
    assert {curve.policy for prompt in found.density.prompts for curve in prompt.curves} >= {"line", "adapter"}


def test_other_tokens_have_rewards_and_no_kl(given: RunFolder, models: Path) -> None:
    found = given.read_evidence()
    (point,) = next(method.points for method in found.methods if method.name == "other")
    assert point.kl is None and point.reward is not None and point.win_vs_sft is not None
    assert any("other writes in other tokens than the supervised policy: no KL" in note for note in found.notes)
    assert found.equal_kl is not None and "other" not in [s.method for s in found.equal_kl.standings]
    assert not given.density("other").exists()
    page = given.page.read_text()
    assert "no KL" in page and "{{" not in page
    compared = CliRunner().invoke(app, ["compare", str(given.path)]).stdout
    assert "Without a KL, and so not here: other." in compared and "| other |" not in compared.split("## Last")[0]


def test_ends_of_trainings_of_their_own_have_shares_of_their_own_objectives(
    given: RunFolder, models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(given.path.parent)
    run = RunFolder(shutil.copytree(given.path, tmp_path / "run"))
    command = ["run", str(given.path.with_suffix(".yaml")), "--run", str(run.path), "--redo"]
    ended = CliRunner().invoke(app, [*command, "align.other=null", "align.line.betas=[200, 100]"])
    assert ended.exit_code == 0, ended.output
    line = next(method for method in run.read_evidence().methods if method.name == "line")
    assert line.sweep is not None and line.sweep.betas == [200, 100]
    rewards = pool_rewards(run.pool).values()
    for point, beta in zip(line.points, line.sweep.betas, strict=True):
        best = mean(beta * math.log(mean(math.exp(r / beta) for r in some)) - mean(some) for some in rewards)
        assert point.objective is not None and point.gain is not None and point.kl is not None
        assert point.objective.estimate == pytest.approx(
            (point.gain.estimate - beta * point.kl.estimate) / best, abs=1e-6
        )
    assert "Each point of line is the end of a training of its own." in run.page.read_text()
    assert "## Ends of the sweeps" in CliRunner().invoke(app, ["compare", str(run.path)]).output


CHOICES = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{{{question}}}}"
doc_to_choice: "{{{{choices}}}}"
doc_to_target: answer
target_delimiter: ""
metric_list: [{{metric: acc, aggregation: mean, higher_is_better: true}}]
"""
QUESTIONS = [
    {"question": f"Part {number} was", "choices": [f" {word}" for word in "abcdefghijklmnopqrstuvwxyz"[number:][:3]],
     "answer": number % 3} for number in range(24)
]  # fmt: skip
FIRST = QUESTIONS[:7]


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Tasks of lm-eval from local files, of 7 and of all questions, and groups: by document, and each task alike."""
    found = pytest.importorskip("lm_eval.tasks", reason="the harness is in the extra 'lm-eval'")
    folder = tmp_path_factory.mktemp("tasks")
    for group, by_size in (("documents", "true"), ("alike", "false")):
        for name, rows in ((f"first_{group}", FIRST), (f"all_{group}", QUESTIONS)):
            (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
            (folder / f"{name}.yaml").write_text(CHOICES.format(name=name, file=folder / f"{name}.jsonl"))
        how = f"[{{metric: acc, weight_by_size: {by_size}}}]"
        both = f"group: {group}\ntask: [first_{group}, all_{group}]\naggregate_metric_list: {how}\n"
        (folder / f"{group}.yaml").write_text(both)
    with pytest.MonkeyPatch.context() as patch:  # reading the names of its own 14,000 tasks takes ten seconds
        patch.setattr(found, "TaskManager", partial(found.TaskManager, include_defaults=False))
        yield folder


@pytest.fixture(scope="module")
def right(models: Path) -> dict[str, list[float]]:
    """For each question whether the right choice is the likeliest, by one plain pass for every choice."""
    found: dict[str, list[float]] = {}
    for name in ("reference", "copy", "moved", "adapter", "other"):
        auto = AutoPeftModelForCausalLM if name == "adapter" else AutoModelForCausalLM
        model = auto.from_pretrained(models / name).eval()
        tokenizer = AutoTokenizer.from_pretrained(models / ("reference" if name == "adapter" else name))
        for row in QUESTIONS:
            prompt = tokenizer(row["question"])["input_ids"]
            whole = [tokenizer(row["question"] + choice)["input_ids"] for choice in row["choices"]]
            values = [logprob(model, prompt, tuple(ids[len(prompt) :])) for ids in whole]
            found.setdefault(name, []).append(float(values.index(max(values)) == row["answer"]))
    return found


def test_what_was_lost_is_what_a_plain_count_says(given: RunFolder, tasks: Path, right: dict[str, list[float]]) -> None:
    found = benchmark_run(given, None, lambda: find_tasks("documents, alike", tasks))
    assert found == given.read_benchmark()  # as it stands in the run
    policies = {f"{name}@{step}" for name, step in (("line", 1), ("line", 2), ("adapter", 1), ("other", 1))}
    assert {row.policy for row in found.rows} <= policies and len({row.policy for row in found.rows}) == 3
    before = right["reference"]
    assert len({sum(values) for values in right.values()}) > 2  # the models differ in what they know
    for row in found.rows:
        after = right[{"line@1": "copy", "line@2": "moved"}.get(row.policy, row.policy.partition("@")[0])]
        assert row.before is not None and row.difference is not None and row.higher_is_better and row.metric == "acc"
        if row.task == "alike":  # every task weighs the same: no mean over documents, so the standard errors are added
            each = [(mean(values[:7]) + mean(values)) / 2 for values in (before, after)]
            error = math.hypot(*(value[1] or 0.0 for value in (row.before, row.after)))
        else:
            kept = {"first": [*range(7)], "all": [*range(24)]}.get(row.task.partition("_")[0], [*range(7), *range(24)])
            each = [mean(values[place] for place in kept) for values in (before, after)]
            error = stdev(after[place] - before[place] for place in kept) / len(kept) ** 0.5
            assert row.difference.num_prompts == len(kept)
        assert [row.before[0], row.after[0]] == pytest.approx(each)
        ends = [each[1] - each[0] + sign * 1.96 * error for sign in (-1, 1)]
        assert row.paired == (row.task != "alike")
        assert [row.difference.low, row.difference.high] == pytest.approx(ends)
    assert {row.task for row in found.rows} >= {"documents", "alike", "first_documents", "all_alike"}


def test_what_was_lost_is_in_the_report(given: RunFolder, tasks: Path, models: Path, tmp_path: Path) -> None:
    run = RunFolder(shutil.copytree(given.path, tmp_path / "run"))
    run.benchmark.unlink(missing_ok=True)
    command = ["benchmark", str(run.path), "--tasks", "documents", "--include-path", str(tasks)]
    ended = CliRunner().invoke(app, [*command, "--method", "adapter"])
    assert ended.exit_code == 0 and "What was lost" in ended.output and "adapter@1" in ended.output, ended.output
    build_evidence(run.path, num_resamples=50)
    page = write_report(run.path).read_text()
    assert 'id="benchmark"' in page and page.count("first_documents") == 1 and "has since replaced" not in page
    sums = models / "reference" / "SHA256SUMS"
    written = sums.read_text()
    try:
        sums.write_text(written + "\n")
        again = build_evidence(run.path, num_resamples=50).benchmark
    finally:
        sums.write_text(written)
    assert again is not None and again.outdated == ["SFT"]
    ended = CliRunner().invoke(app, [*command, "--against", "x"])
    assert isinstance(ended.exception, InputError) and "--against is for a model" in str(ended.exception)


def test_any_model_can_be_measured(models: Path, tasks: Path, right: dict[str, list[float]]) -> None:
    command = ["benchmark", str(models / "moved"), "--tasks", "all_alike", "--include-path", str(tasks), "--limit", "9"]
    alone = CliRunner().invoke(app, command)
    assert alone.exit_code == 0, alone.output
    assert (
        f"{number(mean(right['moved'][:9]))}\N{NO-BREAK SPACE}±" in alone.output and "What was lost" not in alone.output
    )
    assert " 0 examples before each question" in " ".join(alone.output.split())
    shown = CliRunner().invoke(app, [*command, "--num-fewshot", "2"])
    assert " 2 examples before each question" in " ".join(shown.output.split()), shown.output
    templated = CliRunner().invoke(app, [*command, "--chat-template"])
    assert "moved has no chat template; leave out --chat-template." in str(templated.exception)
    with pytest.raises(InputError, match=r"'all_alik' is no task of lm-eval or of .*, where there is all_alike.*; --"):
        find_tasks("all_alik", tasks)
    (tasks / "all_alike.jsonl").unlink()
    with pytest.raises(InputError, match=r"all_alike cannot be read: .*all_alike\.jsonl"):
        find_tasks("all_alike", tasks)


def test_without_the_harness_it_says_what_to_install(models: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval", None)
    ended = CliRunner().invoke(app, ["benchmark", str(models / "copy"), "--tasks", "arc_easy"])
    assert isinstance(ended.exception, InputError)
    assert str(ended.exception) == "benchmark needs lm_eval: pip install 'exalign[lm-eval]'."


def test_its_recipe_can_be_planned(given: RunFolder) -> None:
    planned = CliRunner().invoke(app, ["plan", str(given.path.with_suffix(".yaml"))])
    assert planned.exit_code == 0, planned.output
    assert "evaluation/drawn/line" in planned.output and "align/line" not in planned.output


def test_what_to_ship_is_where_it_was_trained(given: RunFolder, models: Path) -> None:
    assert given.ships("line", 2) == str(models / "moved")
    verdict = given.read_evidence().verdict
    assert verdict is not None and verdict.folder == given.ships(verdict.method, verdict.step)
    listed = CliRunner().invoke(app, ["select", str(given.path), "--kl-budget", "9"])
    assert "(gone)" not in listed.output and "models" in "".join(listed.output.split())


def test_pairs_are_enough_without_a_scorer(models: Path, world: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (world / "test.jsonl").read_text().splitlines()]
    pairs = [{"prompt": row["prompt"], "chosen": " yes", "rejected": " no"} for row in rows]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    policies = {"copy": [str(models / "copy")], "moved": [str(models / "moved")], "other": [str(models / "other")]}
    run = evidence(
        str(models / "reference"),
        policies,
        str(tmp_path / "pairs.jsonl"),
        out=tmp_path / "run",
        console=Console(file=io.StringIO()),
    )
    found = {method.name: method.points[0].held_out for method in RunFolder(run.folder).read_evidence().methods}
    assert found["copy"] is not None and found["moved"] is not None and found["other"] is None
    assert (found["copy"].accuracy.estimate, found["copy"].margin.estimate) == (0.5, 0.0)
    loaded = [AutoModelForCausalLM.from_pretrained(models / name).eval() for name in ("moved", "reference")]
    margins = []
    for record in read_records(RunFolder(run.folder).pairs("moved", 1)):
        assert record.prompt_ids is not None
        moved, before = (
            [logprob(model, record.prompt_ids, text.token_ids or ()) for text in record.completions] for model in loaded
        )
        margins.append((moved[0] - before[0]) - (moved[1] - before[1]))
    assert found["moved"].margin.estimate == pytest.approx(sum(margins) / len(margins), abs=1e-4)


def test_models_that_memory_would_not_hold_twice_in_float32_are_compared_in_bfloat16(
    models: Path, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("exalign.run.begin.device_memory", lambda device: 1e5)
    (tmp_path / "brief_rewards.py").write_text(REWARDS)
    monkeypatch.chdir(tmp_path)
    printed = io.StringIO()
    policies = {"copy": [str(models / "copy")], "moved": [str(models / "moved")]}
    prompts, how = str(world / "test.jsonl"), {"out": tmp_path / "run", "reward": "brief_rewards:brevity"}
    run = evidence(str(models / "reference"), policies, prompts, console=Console(file=printed, width=200), **how)
    assert run.recipe.model.dtype == "bfloat16" and "weights: in bfloat16, which rounds KLs" in printed.getvalue()
    kl = {method.name: method.points[0].kl for method in RunFolder(run.folder).read_evidence().methods}
    assert abs(kl["copy"].estimate) < 0.1 < kl["moved"].estimate


def test_what_cannot_be_is_one_sentence(
    models: Path, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "brief_rewards.py").write_text(REWARDS)
    prompts, reference = str(world / "test.jsonl"), str(models / "reference")
    values = {"name": "x", "model": {"source": reference}, "data": {"evaluation": {"source": prompts}}}
    with pytest.raises(InputError, match="learning_rate has no effect on policies that were trained elsewhere"):
        make_recipe({**values, "align": {"a": {"method": "given", "policies": [reference], "learning_rate": 1.0}}})
    with pytest.raises(InputError, match=r"align\.a: betas are 2 for 1 policies; give one for each"):
        make_recipe({**values, "align": {"a": {"method": "given", "policies": [reference], "betas": [1.0, 0.1]}}})
    with pytest.raises(InputError, match="no preference pairs: say what is good with --reward"):
        evidence(reference, {"a": [reference]}, prompts, out=tmp_path / "a")
    gone, quiet = {"a": [str(tmp_path / "gone")]}, Console(quiet=True)
    with pytest.raises(InputError, match="gone does not exist"):
        evidence(reference, gone, prompts, reward="brief_rewards:brevity", out=tmp_path / "b", console=quiet)
    for text in ("nothing", "a="):
        ended = CliRunner().invoke(app, ["evidence", text, "--reference", reference, "--prompts", prompts])
        assert isinstance(ended.exception, InputError) and "NAME=MODEL" in str(ended.exception)
