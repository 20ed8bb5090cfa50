"""A frontier by end points: a policy for each value of a setting, each trained as if it were alone."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from scipy.special import logsumexp, softmax

from exalign.data.store import read_records
from exalign.errors import InputError
from exalign.evaluation.across_runs import read_runs
from exalign.evaluation.run_folder import RunFolder, pool_rewards
from exalign.report.compare import tables
from exalign.run.carry_out import run_recipe
from exalign.run.demo import RECIPE
from exalign.run.recipe import Recipe, load_recipe
from exalign.run.stages import plan
from exalign.storage import read_sealed
from exalign.training.guards import NotFiniteError
from run.conftest import ALIGN, tiny_overrides
from run.searched_run import ALONE
from training.tiny_world import read_metrics

SWEPT = ALIGN.replace("save_policies: 2, ", "")
METHODS = (
    f"align={{exo: {SWEPT}sweep: {{kl: [0.1, 0.4]}}}}, "
    f"dpo: {SWEPT}divergence: forward_kl, sweep: {{beta_r: [0.5, 0.1]}}}}, "
    f"alone: {SWEPT}divergence: forward_kl, beta_r: 0.1}}, "
    f"single: {SWEPT}divergence: forward_kl, sweep: {{beta_r: [0.1]}}}}}}"
)
FEW = (
    f"align={{few: {ALIGN}sweep: {{beta_r: [0.5, 0.1]}}, num_completions: 2, epochs: 3, stop_after: 1}}, "
    f"all: {ALIGN}beta_r: 0.1}}}}"
)


@pytest.fixture(scope="module")
def swept(world: Path, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    settings = [*ALONE, "evaluate.pool_prompts=4", "evaluate.pool_samples=48", METHODS]
    folder = tmp_path_factory.mktemp("runs") / "swept"
    run_recipe(load_recipe(RECIPE, tiny_overrides(world, *settings)), folder=folder)
    return RunFolder(folder)


def test_each_policy_of_a_sweep_is_the_one_trained_alone(swept: RunFolder) -> None:
    one, other, alone, single = (
        (folder / "model.safetensors").read_bytes()
        for folder in (swept.policy("dpo", 2), swept.policy("dpo", 1), swept.model("alone"), swept.model("single"))
    )
    assert one == alone == single != other
    assert (swept.model("dpo") / "model.safetensors").read_bytes() == one


def test_steps_of_a_sweep_that_were_not_taken_are_told(world: Path, tmp_path: Path) -> None:
    wild = SWEPT.replace("learning_rate: 1e-3", "learning_rate: 1e30") + "max_grad_norm: 1e30, "
    few = f"align={{exo: {wild}epochs: 2, max_skipped_in_a_row: 99, sweep: {{beta_r: [0.5, 0.1]}}}}}}"
    run = run_recipe(load_recipe(RECIPE, tiny_overrides(world, *ALONE, few)), "align", folder=tmp_path / "run")
    rows = [row for place in (1, 2) for row in read_metrics(run.path("align", "exo", f"at-{place}"))]
    assert read_sealed(run.path("align", "exo", "done.json"))["counts"]["steps_not_taken"] == sum(
        row["skipped"] for row in rows
    )
    stops = few.replace("max_skipped_in_a_row: 99", "max_skipped_in_a_row: 1")
    with pytest.raises(NotFiniteError, match="and --redo trains the sweep anew"):
        run_recipe(load_recipe(RECIPE, tiny_overrides(world, *ALONE, stops)), "align", folder=tmp_path / "stops")


def kl_of_optimum(rewards: list[float], beta: float) -> float:
    log_w = np.array(rewards) / beta - logsumexp(np.array(rewards) / beta)
    return float(np.exp(log_w) @ (log_w + np.log(len(rewards))))


def test_the_beta_of_a_kl_is_that_of_the_optimum_so_far_away(swept: RunFolder) -> None:
    evidence = swept.read_evidence()
    exo, dpo = evidence.methods[0].sweep, evidence.methods[1].sweep
    assert exo is not None and dpo is not None and evidence.methods[2].sweep is None
    assert (exo.setting, exo.values) == ("kl", [0.1, 0.4])
    assert (dpo.setting, dpo.values, dpo.betas) == ("beta_r", [0.5, 0.1], [0.25, 0.05])
    pool = pool_rewards(swept.pool).values()
    for kl, beta in zip(exo.values, exo.betas, strict=True):
        assert beta is not None
        assert np.mean([kl_of_optimum(rewards, beta) for rewards in pool]) == pytest.approx(kl, rel=1e-4)
    assert [len(method.points) for method in evidence.methods] == [2, 2, 1, 1]
    told = tables(read_runs([swept.path], [0.1]), [0.1])
    assert told.count("| exo | kl 0.") == 2 and "| dpo | beta_r 0.5 | 0.250 |" in told and "2 trainings" in told
    page = swept.page.read_text(encoding="utf-8")
    assert "Each point of exo, dpo, single is the end of a training of its own." in page


def test_where_another_judges_beta_and_optimum_are_those_of_the_training_reward(world: Path, tmp_path: Path) -> None:
    settings = ["evaluate.pool_samples=48", f"align={{exo: {SWEPT}sweep: {{kl: [0.1, 0.4]}}}}}}"]
    run_recipe(load_recipe(RECIPE, tiny_overrides(world, *settings)), folder=tmp_path)
    run = RunFolder(tmp_path)
    (exo,), proxy = run.read_evidence().methods, run.read_evidence().proxy_optimum
    trained, judged = pool_rewards(run.proxy), pool_rewards(run.pool)
    assert list(trained) == list(judged) and trained != judged
    assert exo.sweep is not None and exo.aim is not None and exo.aim.kl.estimate == pytest.approx(0.4, rel=1e-4)
    for kl, beta in zip(exo.sweep.values, exo.sweep.betas, strict=True):
        assert beta is not None
        assert np.mean([kl_of_optimum(rewards, beta) for rewards in trained.values()]) == pytest.approx(kl, rel=1e-4)
    assert proxy is not None
    for point in proxy.points[::16]:
        weights = [softmax(np.array(rewards) / point.beta) for rewards in trained.values()]
        means = [w @ rewards for w, rewards in zip(weights, judged.values(), strict=True)]
        assert point.reward.estimate == pytest.approx(np.mean(means))
    told = tables(read_runs([run.path], [0.1]), [0.1])
    assert told.count("| optimum of the training reward |") == 2 and "how far that reward leads" in told
    assert "The dashed line is the best policy for the reward that methods were trained on" in run.page.read_text(
        encoding="utf-8"
    )
    assert "optimum of the training reward" in (run.figures / "optimum.csv").read_text(encoding="utf-8")


def test_a_method_takes_some_completions_and_ends_where_held_out_prompts_say(world: Path, tmp_path: Path) -> None:
    more = ["data.held_out=0.25", "sample.num_completions=4", "evaluate.pool_prompts=0", FEW]
    few = "align.few.save_policies=4"
    run_recipe(load_recipe(RECIPE, tiny_overrides(world, *ALONE, *more, few)), folder=tmp_path)
    run = RunFolder(tmp_path)
    drawn = {record.id: record for record in read_records(tmp_path / "reference" / "reward" / "records")}
    counts = {name: read_sealed(run.align(name) / "done.json")["counts"] for name in ("few", "all")}
    held_out = round(len(drawn) / 4)
    assert counts["all"] == {"prompts": len(drawn), "completions": 4 * len(drawn)}
    trained = len(drawn) - held_out
    assert counts["few"] == {"prompts": trained, "completions": 2 * trained, "prompts_held_out": held_out}
    for member in ("at-1", "at-2"):
        folder = run.align("few") / member
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        measured = {row["step"]: row["held_out_loss"] for row in rows if "held_out_loss" in row}
        best = min(measured, key=lambda step: measured[step])
        assert all(-1 <= row["held_out_reward_correlation"] <= 1 for row in rows if "held_out_loss" in row)
        assert len(rows) == max(measured) and sum(step > best for step in measured) <= 1
        kept = (folder / "policies" / f"step-{best:06d}" / "model.safetensors").read_bytes()
        assert (folder / "model" / "model.safetensors").read_bytes() == kept
        sentence = f"few {member}: the held-out loss is lowest after step {best} "
        assert sum(note.startswith(sentence) for note in run.read_evidence().notes) == 1


def test_an_aim_that_the_pool_does_not_show_is_said_and_a_nearer_one_then_goes_on(world: Path, tmp_path: Path) -> None:
    def run(kl: str) -> None:
        settings = [
            *ALONE,
            "evaluate.pool_prompts=4",
            "evaluate.pool_samples=48",
            f"align={{exo: {SWEPT}sweep: {kl}}}}}",
        ]
        run_recipe(load_recipe(RECIPE, tiny_overrides(world, *settings)), "align/exo", folder=tmp_path)

    with pytest.raises(InputError, match=r"at 3 nats cannot be told from 48 samples a prompt, .*aim nearer"):
        run("{kl: [0.1, 3]}")
    run("{kl: [0.1, 0.4]}")  # nothing was made, so nothing is made again
    with pytest.raises(InputError, match=r"align/exo was made by another recipe \(align.exo.sweep.kl was"):
        run("{kl: [0.1, 0.3]}")


def test_the_pool_comes_before_what_chooses_beta_from_it(tiny: Callable[..., Recipe]) -> None:
    names = [stage.name for stage in plan(tiny("align={exo: {sweep: {kl: [0.1, 0.4]}}}"))]
    order = [
        "evaluation/drawn/pool",
        "evaluation/proxy",
        "align/exo",
        "evaluation/sft",
        "evaluation/pool",
    ]  # judged last
    assert sorted(order, key=names.index) == order


@pytest.mark.parametrize(
    ("method", "problem"),
    [
        ("{sweep: {beta_r: [0.1, 0.1]}}", "sweep is one setting with its values, each once"),
        ("{sweep: {kl: []}}", "sweep is one setting with its values"),
        ("{sweep: {kl: [0.5, 1]}, save_policies: 2}", "sweep keeps the last policy of each training alone"),
        ("{sweep: {kl: [0.5, 1]}, target: preference}", "sweep: kl chooses the β of the optimum"),
        ("{sweep: {kl: [0, 1]}}", "an optimum lies at more than 0 nats, not at 0"),
        ("{sweep: {beta: [0.5, 1]}}", "sweep.beta is not a setting of the method; did you mean beta_r"),
        ("{sweep: {beta_r: [0.5, -1]}}", "sweep.beta_r reaches -1, which the setting does not allow"),
        ("{sweep: {alpha: [0.1, 0.2]}}", "sweep: alpha = 0.1: alpha has no effect"),
        ("{method: grpo, sweep: {kl: [0.5, 1]}}", "this one aims at none"),
        ("{method: rloo, beta: 0, sweep: {kl: [0.5, 1]}}", "this one aims at none"),
    ],
)
def test_a_sweep_that_cannot_be_is_refused(method: str, problem: str, tiny: Callable[..., Recipe]) -> None:
    with pytest.raises(InputError, match=problem):
        tiny(f"align={{exo: {method}}}")
