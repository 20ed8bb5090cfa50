"""From a run folder to its evidence: what is there is used, what is missing is said."""

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import yaml

from evaluation.synthetic_run import World, write_run
from exalign.data.store import Header, read_header, read_records, write_records
from exalign.errors import InputError
from exalign.evaluation.evidence import build_evidence, collect_evidence
from exalign.evaluation.run_folder import RunFolder
from exalign.evaluation.schema import Evidence, Interval, read_evidence, write_evidence
from exalign.report import write_report

SMALL = World(
    methods={"exo-rw": (0.9, (0.7, 1.4)), "dpo-rw": (0.5, (0.8, 1.6))}, num_prompts=40, pool=64, steps=40, ragged=True
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> tuple[Path, Evidence]:
    run = write_run(tmp_path_factory.mktemp("runs") / "synthetic", SMALL)
    return run, build_evidence(run, num_resamples=300)


@pytest.fixture
def run(finished, tmp_path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(finished[0], tmp_path / "run"))


def within_three_standard_errors(interval: Interval, truth: float) -> bool:
    return abs(interval.estimate - truth) < 3 * (interval.high - interval.low) / (2 * 1.96)


def test_the_truth_of_the_synthetic_world_is_found(finished):
    _, evidence = finished
    for method, (efficiency, distances) in zip(evidence.methods, SMALL.methods.values(), strict=True):
        assert [p.step for p in method.points] == [20, 40]
        for point, distance in zip(method.points, distances, strict=True):
            assert within_three_standard_errors(point.kl, distance**2 / 2)
        assert within_three_standard_errors(method.gain, efficiency * distances[-1])
        assert method.points[-1].win_vs_sft == method.win_rates[0]
    assert [standing.method for standing in evidence.equal_kl.standings] == ["exo-rw", "dpo-rw"]
    assert evidence.methods[0].gap.gap.estimate < evidence.methods[1].gap.gap.estimate


def test_the_pools_samples_are_in_the_supervised_policys_mean_reward_and_in_what_is_gained_over_it(run):
    folder = RunFolder(run)
    pooled, header = read_records(folder.pool), read_header(folder.pool)
    shutil.rmtree(folder.pool)
    write_records(folder.pool, pooled[:10], header)  # of a part of the prompts, as in real runs
    own = {record.id: list(record.rewards) for record in read_records(folder.supervised)}
    pool = {record.id: list(record.rewards) for record in pooled[:10]}
    means = {name: np.mean(rewards + pool.get(name, [])) for name, rewards in own.items()}
    evidence = build_evidence(run, num_resamples=100)
    assert evidence.sft.reward.estimate == pytest.approx(np.mean(list(means.values())))
    (last,) = (m.points[-1] for m in evidence.methods if m.name == "exo-rw")
    drawn = {record.id: np.mean(record.rewards) for record in read_records(folder.samples("exo-rw", last.step))}
    assert last.gain.estimate == pytest.approx(np.mean([drawn[name] - means[name] for name in drawn]))


def test_what_the_recipe_says_is_used(finished):
    _, evidence = finished
    assert (evidence.name, evidence.temperature, evidence.kl_budget) == ("synthetic", 0.8, 0.8)
    assert [(m.family, m.target) for m in evidence.methods] == [("exo", "reward"), ("dpo", "reward")]
    assert [m.selected_step for m in evidence.methods] == [20, 20]
    assert evidence.sft.accuracy is not None


def test_every_category_has_the_win_rate_of_its_prompts(run):
    folder = RunFolder(run)
    kinds = {f"p{i}": "poem" if i % 3 else "quiz" for i in range(40)}
    rows = [replace(record, columns={"kind": kinds[record.id]}) for record in read_records(folder.prompts)]
    shutil.rmtree(folder.prompts)
    write_records(folder.prompts, rows, Header())
    folder.recipe.write_text(folder.recipe_text().replace("evaluate:", "evaluate:\n  category: kind"))
    evidence = build_evidence(run, num_resamples=50)
    theirs = {record.id: record.rewards for record in read_records(folder.supervised)}
    for method in evidence.methods:
        shares = {"poem": [], "quiz": []}
        for record in read_records(folder.samples(method.name, method.points[-1].step)):
            pairs = [(a > b) + (a == b) / 2 for a in record.rewards for b in theirs[record.id]]
            shares[kinds[record.id]].append(sum(pairs) / len(pairs))
        assert list(method.by_category) == ["poem", "quiz"]
        for kind, (against_sft, against_texts) in method.by_category.items():
            assert against_sft.rate.estimate == pytest.approx(sum(shares[kind]) / len(shares[kind]))
            assert (against_sft.opponent, against_texts.opponent) == ("SFT", "reference texts")
            assert against_sft.rate.num_prompts == against_texts.rate.num_prompts == len(shares[kind])
            assert against_sft.missing_prompts == 0
    page = write_report(run).read_text()
    assert page.count("<b>poem</b> <small>") == page.count("<b>quiz</b> <small>") == 2


def test_prompts_whose_category_is_null_or_missing_have_none(run):
    folder = RunFolder(run)
    columns = [{"kind": "quiz"}, {"kind": None}, {}]
    rows = [replace(record, columns=columns[i % 3]) for i, record in enumerate(read_records(folder.prompts))]
    shutil.rmtree(folder.prompts)
    write_records(folder.prompts, rows, Header())
    folder.recipe.write_text(folder.recipe_text().replace("evaluate:", "evaluate:\n  category: kind"))
    by_category = collect_evidence(run, num_resamples=20).methods[0].by_category
    assert {kind: rates[0].rate.num_prompts for kind, rates in by_category.items()} == {"none": 26, "quiz": 14}


def test_examples_show_the_first_sample_of_every_policy(finished):
    run, evidence = finished
    assert len(evidence.examples) == 8
    last = {record.id: record for record in read_records(run / "evaluation" / "exo-rw" / "step-000040" / "samples")}
    for example in evidence.examples:
        assert [answer.source for answer in example.answers] == ["reference text", "SFT", "exo-rw", "dpo-rw"]
        first = last[example.id].completions[0]
        assert example.answers[2].text == first.text
        assert example.answers[2].reward == first.reward
        assert example.answers[2].log_ratio == first.logprob - first.reference_logprob


def test_where_nothing_was_lost_nothing_is_shown_as_lost(finished, run):
    _, evidence = finished
    assert len(evidence.worst) == 3
    for sft, ours in (example.answers for example in evidence.worst):
        assert sft.source == "SFT" and ours.reward is not None
    folder = run / "evaluation" / evidence.verdict.method / "step-000020" / "samples"
    records = read_records(folder)
    better = [r.with_each("reward", [c.reward + 100 for c in r.completions]) for r in records[1:]]
    write_records(folder, [records[0], *better], read_header(folder))
    found = collect_evidence(run, num_resamples=20)
    assert (found.verdict.method, found.verdict.step) == (evidence.verdict.method, 20)
    assert {example.id for example in found.worst} <= {records[0].id}


def test_courses_show_the_first_samples_of_some_checkpoints_in_their_order(finished):
    run, evidence = finished
    assert [course.method for course in evidence.courses] == ["exo-rw", "dpo-rw"]
    steps = sorted(int(path.name[5:]) for path in (run / "evaluation" / "exo-rw").glob("step-*"))
    for example in evidence.courses[0].examples:
        assert [answer.source for answer in example.answers] == ["SFT", *(f"step {step}" for step in steps)]
        for step, answer in zip(steps, example.answers[1:], strict=True):
            samples = {r.id: r for r in read_records(run / f"evaluation/exo-rw/step-{step:06d}/samples")}
            assert answer.text == samples[example.id].completions[0].text


def test_counts_and_times_are_carried(finished):
    _, evidence = finished
    stages = {stage.name: stage for stage in evidence.stages}
    assert stages["preferences"].counts == {"rows": 400, "pairs_equal": 7}
    assert stages["sft"].seconds == 45.2
    assert evidence.record_counts["evaluation/sft/samples"] == {"prompts_cut": 3, "unfinished": 11}
    assert {curve.stage for curve in evidence.curves} == {"sft", "reward", "align/exo-rw", "align/dpo-rw"}


def test_the_file_is_the_evidence(finished):
    run, evidence = finished
    path = run / "evaluation" / "evidence.json"
    assert read_evidence(path) == evidence
    json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_it_is_reproducible(finished):
    run, evidence = finished
    assert build_evidence(run, num_resamples=300) == evidence


def test_missing_pieces_are_said(run):
    for name in ("evaluation/pool", "evaluation/prompts", "align/dpo-rw/model", "evaluation/dpo-rw"):
        shutil.rmtree(run / name)
    for name in ("recipe.yaml", "environment.json"):
        (run / name).unlink()
    evidence = build_evidence(run, num_resamples=50)
    assert evidence.optimum is None
    assert evidence.best_of_n == []
    assert [m.finished for m in evidence.methods] == [False, True]
    assert [m.name for m in evidence.methods] == ["dpo-rw", "exo-rw"]
    assert [rate.opponent for rate in evidence.methods[1].win_rates] == ["SFT"]
    assert len(evidence.equal_kl.standings) == 1
    notes = " ".join(evidence.notes)
    for part in ("no pool", "no scored reference texts", "dpo-rw has no evaluated checkpoint"):
        assert part in notes


def test_what_an_earlier_recipe_left_in_the_folder_is_no_evidence(run):
    """A method, and a pool, that the recipe's stages do not have."""
    whole = collect_evidence(run, num_resamples=20)
    recipe = yaml.safe_load((run / "recipe.yaml").read_text())
    left, *others = recipe["align"]
    del recipe["align"][left]
    (run / "recipe.yaml").write_text(yaml.safe_dump(recipe, sort_keys=False))
    stages = [f"evaluation/{name}" for name in ("prompts", "sft", *others)]
    found = collect_evidence(run, num_resamples=20, stages=stages)
    assert [method.name for method in whole.methods] == [left, *others] and whole.optimum is not None
    assert [method.name for method in found.methods] == others
    assert found.optimum is None and found.best_of_n == [] and found.density is None
    assert {curve.stage for curve in whole.curves} - {curve.stage for curve in found.curves} == {f"align/{left}"}


def test_an_incomplete_checkpoint_is_left_out_and_said(run):
    (run / "evaluation" / "exo-rw" / "step-000040" / "samples" / "header.json").unlink()
    evidence = build_evidence(run, num_resamples=50)
    assert [p.step for p in evidence.methods[0].points] == [20]
    assert "evaluation/exo-rw/step-000040/samples is incomplete and left out." in evidence.notes


def test_only_the_supervised_policy(run):
    shutil.rmtree(run / "align")
    for method in SMALL.methods:
        shutil.rmtree(run / "evaluation" / method)
    evidence = build_evidence(run, num_resamples=50)
    assert evidence.methods == []
    assert evidence.equal_kl is None
    assert evidence.sft is not None


def test_without_supervised_samples_there_is_no_evidence(run):
    shutil.rmtree(run / "evaluation" / "sft")
    with pytest.raises(InputError, match="run the evaluate stage first"):
        build_evidence(run)


def test_damaged_metrics_are_counted(run):
    path = run / "align" / "exo-rw" / "metrics.jsonl"
    rows = path.read_text().splitlines()
    values = json.loads(rows[3])
    rows[3] = json.dumps({**values, "loss": None, "skipped": 1})
    rows[4] = rows[4].replace('"loss": ', '"loss": NaN, "old": ')
    # A resumed run logs some steps again, and a kill leaves half a line.
    path.write_text("\n".join([*rows, rows[-1], rows[-1][:20]]))
    evidence = build_evidence(run, num_resamples=50)
    curve = next(c for c in evidence.curves if c.stage == "align/exo-rw")
    assert curve.num_rows == 40
    assert curve.values["loss"][3:5] == [None, None]
    assert {"unreadable metric rows: 1", "skipped training steps: 1", "non finite metric values: 2"} <= set(
        evidence.notes
    )


def test_long_curves_are_averaged(run):
    path = run / "sft" / "metrics.jsonl"
    path.write_text("".join(json.dumps({"step": i + 1, "loss": float(i)}) + "\n" for i in range(1000)))
    curve = next(c for c in build_evidence(run, num_resamples=50).curves if c.stage == "sft")
    assert len(curve.steps) <= 150
    assert curve.num_rows == 1000
    for step, loss in zip(curve.steps, curve.values["loss"], strict=True):
        assert loss == pytest.approx(step - 1)


def test_evidence_of_another_version_or_damaged_is_refused(finished, tmp_path):
    _, evidence = finished
    path = tmp_path / "evidence.json"
    write_evidence(path, replace(evidence, version=99))
    with pytest.raises(InputError, match="format 99"):
        read_evidence(path)
    write_evidence(path, evidence)
    damaged = path.read_text().replace('"sft": {', '"sft": 3, "x": {', 1)
    path.write_text(damaged)
    with pytest.raises(InputError, match="not those that were written"):
        read_evidence(path)
    path.write_text(damaged.replace('"seal"', '"no-seal"').replace('"sealed"', '"no-sealed"'))
    with pytest.raises(InputError, match="damaged at sft"):
        read_evidence(path)


def test_chat_prompts_are_shown_by_role(tmp_path):
    run = write_run(tmp_path / "chat", replace(SMALL, chat=True, num_prompts=6, pool=0, steps=4))
    prompt = build_evidence(run, num_resamples=50).examples[0].prompt
    assert prompt.startswith("[system]\nBe kind.\n\n[user]\n")


def test_a_method_whose_samples_lack_log_probabilities_is_an_error(run):
    folder = run / "evaluation" / "exo-rw" / "step-000040" / "samples"
    bare = [
        replace(record, completions=tuple(replace(c, logprob=None) for c in record.completions))
        for record in read_records(folder)
    ]
    write_records(folder, bare, Header())
    with pytest.raises(InputError, match="evaluation/exo-rw/step-000040/samples: samples have no logprob"):
        build_evidence(run)


def test_an_aim_beyond_the_pool_is_warned_of(run):
    """Rewards of π_sft are N(m, 1) here, so π*_β is a shift by 1/β, at a KL of 1/(2 β²) = 0.5 nats for β = 1.

    64 samples show a tenth less.
    """
    for method, beta in (("exo-rw", 1.0), ("dpo-rw", 0.01)):
        described = {"label": "", "family": "exo", "target": "reward", "settings": {}, "beta": beta}
        (run / "align" / method / "method.json").write_text(json.dumps(described))
    other = run / "recipe.yaml"
    assert build_evidence(run, num_resamples=300).methods[0].aim is None  # nothing says what methods were trained on
    other.write_text(other.read_text() + "score: {scorer: {stage: oracle}}\n")
    found = build_evidence(run, num_resamples=300)
    near, far = (method.aim for method in found.methods)
    assert near is not None and near.reliable and near.kl.estimate == pytest.approx(0.5, abs=0.1)
    assert far is not None and not far.reliable and far.kl.estimate > 3
    (said,) = [text for text in found.warnings if "out of reach" in text]
    assert "dpo-rw (β = 0.01" in said and "exo-rw" not in said and "log 64 = 4.2 nats" in said
