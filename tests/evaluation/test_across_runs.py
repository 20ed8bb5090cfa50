"""Several runs side by side, on run folders whose truth is known."""

from __future__ import annotations

import math
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure

from evaluation.synthetic_run import World, write_run
from exalign.errors import InputError
from exalign.evaluation.across_runs import (
    OPTIMUM,
    PROXY_OPTIMUM,
    RunResults,
    contrasts,
    difference_at,
    differing_sections,
    differing_settings,
    over_runs,
    read_runs,
)
from exalign.evaluation.evidence import build_evidence
from exalign.evaluation.schema import Interval, MethodEvidence, Sweep
from exalign.report.compare import draw_differences, tables, write_differences
from exalign.report.wording import interval

KLS = (0.5, 1.0, 3.0)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    folder = tmp_path_factory.mktemp("runs")
    folders = [write_run(folder / f"seed-{seed}", World(seed=seed)) for seed in range(4)]
    for run in folders:
        build_evidence(run, num_resamples=200)
    return folders


@pytest.fixture(scope="module")
def results(runs: list[Path]) -> list[RunResults]:
    return read_runs(runs, KLS)


def test_the_mean_over_runs_is_the_true_reward_within_its_error(results: list[RunResults]) -> None:
    """Reward above π_sft is e √(2 KL); a run's error is at most that of its 48 prompts, about 0.12."""
    base = [run.evidence.sft.reward.estimate for run in results if run.evidence.sft]
    for method, efficiency in (("exo-rw", 0.92), ("dpo-rw", 0.70)):
        for kl in KLS[:2]:
            found = [run.rewards[method][kl] for run in results]
            gains = [value.estimate - start for value, start in zip(found, base, strict=True) if value is not None]
            assert len(gains) == 4
            assert np.mean(gains) == pytest.approx(efficiency * math.sqrt(2 * kl), abs=0.15)


def test_the_share_of_the_optimum_s_gain_is_a_method_s_efficiency(results: list[RunResults]) -> None:
    """The optimum of normal rewards gains √(2 KL); what a run's 48 prompts and its pool leave open is under 0.2."""
    for method, efficiency in (("exo-rw", 0.92), ("dpo-rw", 0.70)):
        found = [run.shares[method][1.0] for run in results]
        assert all(v is not None and v.low is not None and v.low < v.estimate < v.high for v in found)
        assert np.mean([v.estimate for v in found if v is not None]) == pytest.approx(efficiency, abs=0.12)
    assert results[0].shares["exo-pref"][1.0] is None and OPTIMUM not in results[0].shares
    text = tables(results, KLS).split("## Share of the optimum's gain")[1]
    assert text.split("## ")[0].count("| exo-rw |") == len(KLS)


def test_the_difference_of_two_methods_is_paired_by_run(results: list[RunResults]) -> None:
    """The truth is 0.22 √2; with four runs Student's 95 % interval is 3.2 standard errors to each side."""
    found = difference_at(results, ("exo-rw", "dpo-rw"), 1.0)
    assert found is not None and found.low is not None and found.high is not None and found.runs == 4
    assert found.low < 0.22 * math.sqrt(2) < found.high
    assert found.low > 0
    assert difference_at(results, ("exo-rw", "dpo-rw"), 3.0) is None  # exo-rw ends at 1.28 nats


def test_methods_of_different_k_are_not_compared(results: list[RunResults]) -> None:
    methods = results[0].evidence.methods
    assert ("exo-rw", "dpo-rw") in contrasts(methods)
    with_k = [replace(m, settings={"num_completions": 4} if m.name == "dpo-rw" else {}) for m in methods]
    assert {*contrasts(with_k)} == {*contrasts(methods)} - {("exo-rw", "dpo-rw")}


def test_within_a_run_the_difference_is_paired_by_prompt(results: list[RunResults]) -> None:
    """A prompt's level has a spread of 0.8 and drops out; of each reward 1/√4 is left, so √0.5 against √1.78: 0.53."""
    for run in results:
        difference = run.differences["exo-rw", "dpo-rw"][1.0]
        both = [run.rewards[name][1.0] for name in ("exo-rw", "dpo-rw")]
        assert difference is not None and both[0] is not None and both[1] is not None
        assert difference.estimate == pytest.approx(both[0].estimate - both[1].estimate)
        apart = math.hypot(*(value.high - value.low for value in both if value is not None))
        assert difference.high - difference.low < 0.7 * apart
        assert run.differences["exo-rw", "dpo-rw"][3.0] is None


def test_exo_is_set_against_dpo_on_its_target_and_against_ppo_where_it_learns_from_rewards() -> None:
    methods = [
        MethodEvidence(name, name.split("-")[0], target, True, [], [])
        for name, target in {
            "exo-rw": "reward", "dpo-rw": "reward", "exo-pref": "preference", "dpo-pref": "preference", "ppo": "reward"
        }.items()
    ]  # fmt: skip
    assert contrasts(methods) == [("exo-rw", "dpo-rw"), ("exo-rw", "ppo"), ("exo-pref", "dpo-pref")]


def test_beyond_a_methods_reach_there_is_no_reward(results: list[RunResults]) -> None:
    assert all(run.rewards["exo-pref"][1.0] is None for run in results)  # its last checkpoint is at 0.72 nats
    assert all(run.rewards[OPTIMUM][0.5] is not None for run in results)


def test_the_tables_hold_every_run_of_every_method(results: list[RunResults]) -> None:
    text = tables(results, KLS)
    equal, rest = text.split("## Differences at equal KL")
    for method in ("exo-rw", "dpo-rw", "exo-pref", "dpo-pref", OPTIMUM):
        assert equal.count(f"| {method} |") == len(KLS)
    ends = rest.split("## Last checkpoints")[1]
    for run in results:
        assert ends.count(f"| {run.name} | ") == 6  # SFT, four methods, best of N
    assert "exo-rw − dpo-rw" in rest and "exo-rw − dpo-pref" not in rest


def test_of_a_single_run_kls_stand_beside_each_other(runs: list[Path]) -> None:
    one = read_runs(runs[:1], KLS)
    text = tables(one, KLS)
    assert "| method | 0.5 nats | 1 nat | 3 nats |" in text and "over runs" not in text
    equal, rest = text.split("## Differences at equal KL")
    rewards = [one[0].rewards["exo-rw"][kl] for kl in KLS]
    (row,) = [line for line in equal.splitlines() if line.startswith("| exo-rw |")]
    assert row == "| exo-rw | " + " | ".join("–" if v is None else f"**{interval(v)}**" for v in rewards) + " |"
    assert "| **" not in "".join(line for line in text.splitlines() if f"| {OPTIMUM} |" in line)
    assert sum(line.startswith("| exo-rw − dpo-rw |") for line in rest.splitlines()) == 1


def lines_of(figure: Figure, panel: int) -> dict[str, np.ndarray]:
    return {str(line.get_label()): np.array(line.get_xydata()) for line in figure.axes[panel].lines}


def test_the_figure_draws_each_runs_difference_and_their_mean_where_all_reach(results: list[RunResults]) -> None:
    figure = draw_differences(results, width=8.8)
    assert figure is not None
    assert [axes.get_title() for axes in figure.axes] == ["exo-rw − dpo-rw", "exo-pref − dpo-pref"]
    drawn = lines_of(figure, 0)
    for run in results:
        values = run.differences["exo-rw", "dpo-rw"]
        expected = [(kl, value.estimate) for kl in KLS if (value := values[kl]) is not None]
        assert drawn[run.name].tolist() == pytest.approx(np.array(expected))
    mean = np.mean([drawn[run.name][:2] for run in results], axis=0)  # all reach 1 nat, none 3
    assert drawn["mean over runs"].tolist() == pytest.approx(mean)
    (band,) = figure.axes[0].collections
    found = difference_at(results, ("exo-rw", "dpo-rw"), 1.0)
    assert found is not None
    heights = {y for x, y in band.get_paths()[0].vertices if x == 1.0}
    assert (min(heights), max(heights)) == pytest.approx((found.low, found.high))


def test_of_a_single_run_the_figure_has_its_interval_over_prompts(results: list[RunResults], tmp_path: Path) -> None:
    figure = draw_differences(results[:1], width=8.8)
    assert figure is not None and set(lines_of(figure, 0)) - {results[0].name} == {"_child0"}  # the line at 0
    (band,) = figure.axes[0].collections
    value = results[0].differences["exo-rw", "dpo-rw"][1.0]
    assert value is not None and band.get_paths()[0].get_extents().x1 == 1.0
    assert write_differences(results[:1], tmp_path) == tmp_path / "differences.png"
    assert (tmp_path / "differences.svg").read_text().startswith("<?xml")
    assert write_differences([replace(run, differences={}) for run in results], tmp_path / "none") is None
    unsure = replace(results[0], differences={("exo-rw", "dpo-rw"): {1.0: Interval(0.5, None, None, 1)}})  # one prompt
    assert write_differences([unsure], tmp_path / "one") == tmp_path / "one" / "differences.png"


def test_settings_that_differ_are_named_and_the_seed_is_not(results: list[RunResults]) -> None:
    def with_rate(run: RunResults, rate: float, seed: int, **more: float) -> RunResults:
        methods = [
            replace(method, settings={**method.settings, "seed": seed, "learning_rate": rate, **more})
            if method.name == "exo-rw"
            else method
            for method in run.evidence.methods
        ]
        return replace(run, evidence=replace(run.evidence, methods=methods))

    alike = [with_rate(run, 1e-4, seed) for seed, run in enumerate(results)]
    assert differing_settings(alike) == {}
    assert "different settings" not in tables(alike, KLS)
    mixed = [*alike[:-1], with_rate(alike[-1], 5e-5, 3)]
    assert differing_settings(mixed) == {"exo-rw": {"learning_rate": [1e-4, 1e-4, 1e-4, 5e-5]}}
    assert "exo-rw's learning_rate (0.0001, 0.0001, 0.0001, 5e-05)." in tables(mixed, KLS)
    follows = [with_rate(run, 1e-4, 0, beta_r_std=0.7, beta_r=0.4 + seed / 100) for seed, run in enumerate(results)]
    assert differing_settings(follows) == {}  # a β_r that follows from the samples is no other setting
    last = alike[-1].evidence
    other = replace(alike[-1], evidence=replace(last, recipe=last.recipe + "\nmodel: {source: another}\n"))
    assert differing_sections(alike) == [] and differing_sections([*alike[:-1], other]) == ["model"]
    assert "different settings too**: the recipes' model." in tables([*alike[:-1], other], KLS)


def test_runs_of_one_name_in_several_folders_are_told_apart(runs: list[Path], tmp_path: Path) -> None:
    for experiment, run in zip(("one", "other"), runs, strict=False):
        shutil.copytree(run, tmp_path / experiment / "seed-0")
    places = [tmp_path / experiment / "seed-0" for experiment in ("one", "other")]
    assert [run.name for run in read_runs(places, KLS)] == [place.as_posix() for place in places]


def test_a_pool_too_small_for_any_optimum_is_as_none(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", World({"exo-rw": (0.9, (1.0,))}, num_prompts=6, pool=8, steps=4))
    build_evidence(run, num_resamples=20)
    (found,) = read_runs([run], KLS)
    assert OPTIMUM not in found.rewards and found.shares == {}
    assert "Share of the optimum" not in tables([found], KLS)


def test_a_run_whose_recipe_is_gone_is_compared(results: list[RunResults]) -> None:
    bare = replace(results[0], evidence=replace(results[0].evidence, recipe=""))
    assert differing_sections([bare]) == [] and "different settings" not in tables([bare], KLS)
    assert differing_sections([results[1], bare]) == ["temperature", "oracle", "evaluate"]


def test_the_ends_of_a_sweep_keep_their_values_where_one_is_left_out(results: list[RunResults]) -> None:
    """Of three trainings at kl = 1, 2 and 3 nats the samples of the second are incomplete."""
    first, *others = results[0].evidence.methods
    points = [replace(point, step=step) for point, step in zip(first.points, (1, 3), strict=False)]
    swept = replace(first, points=points, sweep=Sweep("kl", [1.0, 2.0, 3.0], [0.5, 0.25, 0.125]))
    run = replace(results[0], evidence=replace(results[0].evidence, methods=[swept, *others]))
    (table,) = [part for part in tables([run], KLS).split("\n\n") if part.startswith("| run | method | trained for")]
    assert [line.split(" | ")[2:4] for line in table.splitlines()[2:]] == [["kl 1", "0.500"], ["kl 3", "0.125"]]


def test_a_checkpoint_that_the_evidence_leaves_out_is_compared_by_none(runs: list[Path], tmp_path: Path) -> None:
    run = Path(shutil.copytree(runs[0], tmp_path / "run"))
    first, *_ = build_evidence(run, num_resamples=20).methods
    (run / "evaluation" / first.name / f"step-{first.points[-1].step:06d}" / "samples" / "header.json").unlink()
    assert len(build_evidence(run, num_resamples=20).methods[0].points) == len(first.points) - 1
    (found,) = read_runs([run], KLS)
    kept = [kl for kl in KLS if found.rewards[first.name][kl] is not None]
    assert kept and max(kept) < max(point.nats for point in first.points)


def test_a_pool_of_an_earlier_recipe_is_compared_by_none(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", World({"exo-rw": (0.9, (1.0,))}, num_prompts=6, steps=4))
    shutil.copytree(run / "evaluation" / "pool", run / "evaluation" / "proxy")
    for stages, known in ((None, {PROXY_OPTIMUM, OPTIMUM}), (["evaluation/prompts", "evaluation/exo-rw"], set())):
        evidence = build_evidence(run, num_resamples=20, stages=stages)
        (found,) = read_runs([run], KLS)
        assert (evidence.optimum is not None) == bool(known) == bool(found.shares)
        assert found.rewards.keys() - {"exo-rw"} == known


def test_student_by_hand() -> None:
    """Of 1, 2, 3: mean 2, s = 1, half-width 4.303/√3."""
    found = over_runs([1.0, 2.0, 3.0])
    assert found is not None and found.low == pytest.approx(2 - 4.302653 / math.sqrt(3), abs=1e-5)


def test_what_cannot_be_compared_is_one_sentence(runs: list[Path], tmp_path: Path) -> None:
    with pytest.raises(InputError, match="given twice"):
        read_runs([runs[0], runs[0]], KLS)
    with pytest.raises(InputError, match="has no evidence"):
        read_runs([tmp_path], KLS)
    with pytest.raises(InputError, match="above 0 nats"):
        read_runs(runs, [0.0])
