"""A run with preferences and no scorer: what held-out pairs say, by hand and on a run whose truth is known."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path
from statistics import NormalDist

import numpy as np
import pytest
from typer.testing import CliRunner

from evaluation.synthetic_run import World, write_run
from exalign.cli import app
from exalign.data.record import Completion, Record
from exalign.data.store import Header, read_records, write_records
from exalign.errors import InputError
from exalign.evaluation.across_runs import read_runs
from exalign.evaluation.evidence import build_evidence
from exalign.evaluation.frontier import held_out, held_out_labels
from exalign.evaluation.sample_table import tabulate_labels, tabulate_pairs
from exalign.evaluation.schema import Evidence
from exalign.evaluation.statistics import Bootstrap
from exalign.evaluation.verdict import select
from exalign.report import write_report
from exalign.report.compare import tables
from exalign.report.wording import interval, percent

METHODS = {"exo-pref": (0.9, (0.5, 1.0)), "dpo-pref": (0.4, (0.5, 1.0))}
WORLD = World(methods=METHODS, num_prompts=20, pool=0, steps=20, scorer=False, pairs=400)


def pair(name: str, preferred: float, rejected: float, which: int | None = 0) -> Record:
    """Log-ratios of both texts; which of them is preferred."""
    ratios = (preferred, rejected)
    completions = tuple(Completion("text", logprob=ratio - 7, reference_logprob=-7.0) for ratio in ratios)
    return Record(name, f"prompt {name}", completions, preferred=which)


def answer(name: str, ratio: float, label: float) -> Record:
    completion = Completion("text", logprob=ratio - 7, reference_logprob=-7.0, reward=label)
    return Record(name, f"prompt {name}", (completion,))


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Evidence]:
    run = write_run(tmp_path_factory.mktemp("runs") / "preferences", WORLD)
    evidence = build_evidence(run, num_resamples=300)
    write_report(run)
    return run, evidence


def test_accuracy_and_margin_by_hand() -> None:
    """Wins 1, 0, ½ (a tie), 1 and margins 1, −1, 0, 3, whichever of the two texts stands first."""
    records = [pair("a", 1, 0), pair("b", 0, 1), pair("c", 2, 2), pair("d", 0, 3, which=1), pair("e", 9, 0, which=None)]
    table = tabulate_pairs(records, "pairs")
    found = held_out(table, Bootstrap(50))
    assert table.undecided == 1
    assert (found.accuracy.estimate, found.accuracy.num_prompts) == (2.5 / 4, 4)
    assert found.margin.estimate == pytest.approx(3 / 4)
    assert found.preferred.estimate == pytest.approx((1 + 0 + 2 + 3) / 4)
    assert found.rejected.estimate == pytest.approx((0 + 1 + 2 + 0) / 4)


def test_several_pairs_of_one_prompt_are_no_more_prompts() -> None:
    """Wins 1, 1, 1 on one prompt and 0 on another; and the same pairs many times over are no more certain."""
    records = [pair("a", 1, 0), pair("a", 2, 0), pair("a", 3, 0), pair("b", 0, 1)]
    found = held_out(tabulate_pairs(records, "pairs"), Bootstrap(50))
    assert (found.accuracy.estimate, found.accuracy.num_prompts) == (3 / 4, 2)
    assert found.margin.estimate == pytest.approx((1 + 2 + 3 - 1) / 4)
    drawn = np.random.default_rng(0).normal(0.3, 1, 40)
    once = [pair(str(number), ratio, 0) for number, ratio in enumerate(drawn)]
    few, many = (held_out(tabulate_pairs(pairs, "pairs")) for pairs in (once, once * 5))
    for name in ("accuracy", "margin", "preferred"):
        one, other = getattr(few, name), getattr(many, name)
        assert (one.low, one.high) == pytest.approx((other.low, other.high)) and one.num_prompts == 40


def test_every_answer_with_a_higher_label_meets_every_one_with_a_lower() -> None:
    """Ratios 2, 0 of good ones and 1, 0 of bad ones: wins 1, 1, 0, ½; and an interval that resamples both sides."""
    rows = [("a", 2.0, 1.0), ("b", 0.0, 1.0), ("c", 1.0, 0.0), ("d", 0.0, 0.0)]
    answers = tabulate_labels([answer(*row) for row in rows], "pairs")
    assert answers is not None
    found = held_out_labels(answers, Bootstrap(50))
    assert (found.accuracy.estimate, found.accuracy.num_prompts) == (2.5 / 4, 4)
    assert (found.margin.estimate, found.preferred.estimate, found.rejected.estimate) == (0.5, 1.0, 0.5)
    assert found.accuracy.low is None  # a resample may have answers of one label alone
    assert tabulate_labels([answer("a", 2.0, 1.0), answer("b", 0.0, 1.0)], "pairs") is None
    rng, covered = np.random.default_rng(0), 0
    for _ in range(100):  # scores N(1, 1) and N(0, 1): the area is Φ(1/√2)
        drawn = [answer(str(n), float(rng.normal(n % 2, 1)), float(n % 2)) for n in range(60)]
        answers = tabulate_labels(drawn, "pairs")
        assert answers is not None
        low, high = held_out_labels(answers, Bootstrap(200)).accuracy.ends
        covered += low <= NormalDist().cdf(1 / 2**0.5) <= high
    assert covered >= 89  # of 95 expected, less 2.8 standard deviations


def test_pairs_that_cannot_be_measured_are_an_error() -> None:
    with pytest.raises(InputError, match="none of its 1 pairs has a preferred text"):
        tabulate_pairs([pair("a", 1, 0, which=None)], "pairs")
    with pytest.raises(InputError, match="completion of 'a' lacks a finite logprob"):
        tabulate_pairs([pair("a", float("nan"), 0)], "pairs")


def test_the_truth_of_held_out_pairs_is_found(finished: tuple[Path, Evidence]) -> None:
    """Margins are N(m, 1) with m = efficiency · distance, so the accuracy is Φ(m)."""
    _, evidence = finished
    for method, (efficiency, distances) in zip(evidence.methods, METHODS.values(), strict=True):
        for point, distance in zip(method.points, distances, strict=True):
            mean = efficiency * distance
            assert point.reward is None and point.gain is None and point.held_out is not None
            for value, truth in ((point.held_out.margin, mean), (point.held_out.accuracy, NormalDist().cdf(mean))):
                assert value.low is not None and value.high is not None and value.num_prompts == 400
                assert abs(value.estimate - truth) < 3 * (value.high - value.low) / (2 * 1.96)
            assert point.held_out.rejected.estimate == pytest.approx(-distance)


def test_what_needs_rewards_is_absent_with_one_sentence(finished: tuple[Path, Evidence]) -> None:
    _, evidence = finished
    assert evidence.sft is not None and not evidence.scored
    assert (evidence.equal_kl, evidence.optimum, evidence.best_of_n, evidence.worst) == (None, None, [], [])
    assert all(not method.win_rates and method.gap is None for method in evidence.methods)
    assert [note for note in evidence.notes if "scorer" in note] == evidence.notes
    assert len(evidence.examples) == 8


def test_the_verdict_is_the_highest_lower_bound_within_the_budget(finished: tuple[Path, Evidence]) -> None:
    """The budget of 0.8 nats allows both steps (0.125 and 0.5 nats); exo-pref ranks most pairs right at its second."""
    run, evidence = finished
    verdict = evidence.verdict
    assert verdict is not None and verdict.certain
    assert (verdict.method, verdict.step, verdict.within) == ("exo-pref", 20, 0.8)
    assert verdict.folder == "align/exo-pref/policies/step-000020"
    assert verdict.example is not None and [a.source for a in verdict.example.answers][1:] == ["SFT", "exo-pref"]
    selected, without = select(run, 0.3)
    assert [(one.method, one.point.step) for one in selected] == [("exo-pref", 10), ("dpo-pref", 10)] and not without


def test_the_page_says_it_without_a_word_of_rewards(finished: tuple[Path, Evidence]) -> None:
    html = (finished[0] / "report" / "index.html").read_text()
    head = html[html.index("<header") : html.index("<nav")]
    assert "Ship" in head and "of held-out pairs right" in head and "align/exo-pref/policies/step-000020" in head
    assert "reward" not in head.replace("the reward that a method wants", "")
    assert "Held-out preferences against distance" in html and "below the optimum" not in html
    names = {path.name for path in (finished[0] / "report" / "figures").iterdir()}
    assert {"frontier.png", "margin.png", "checkpoints.png"} <= names and "accuracy.png" not in names


def test_commands_work_or_say_why_not(finished: tuple[Path, Evidence], tmp_path: Path) -> None:
    run = finished[0]
    result = CliRunner().invoke(app, ["select", str(run), "--kl-budget", "1"])
    assert result.exit_code == 0 and "accuracy on held-out pairs" in " ".join(result.stdout.split())
    found = read_runs([run], [1.0])
    (method,) = (m for m in found[0].evidence.methods if m.name == "exo-pref")
    held, told = method.points[-1].held_out, tables(found, [1.0])
    assert held is not None and f"| exo-pref | {percent(held.accuracy)}, margin {interval(held.margin)}, KL " in told
    again = Path(shutil.copytree(run, tmp_path / "again"))
    share = percent(replace(held.accuracy, low=held.accuracy.estimate, high=held.accuracy.estimate))
    assert f"| {share}, n = 2 |" in tables(read_runs([run, again], [1.0]), [1.0])
    result = CliRunner().invoke(app, ["figures", str(run), "--out", str(tmp_path)])
    assert result.exit_code == 0 and (tmp_path / "figure-2.png").exists()
    assert "Figure 8 needs rewards: this run has preferences and no scorer." in " ".join(result.stdout.split())
    assert "held-out pairs, of n = 400 prompts" in (tmp_path / "figures.md").read_text()


def test_rewards_on_one_side_only_are_an_error(finished: tuple[Path, Evidence], tmp_path: Path) -> None:
    run = Path(shutil.copytree(finished[0], tmp_path / "run"))
    folder = run / "evaluation" / "exo-pref" / "step-000020" / "samples"
    records = [r.with_rewards([1.0] * len(r.completions)) for r in read_records(folder)]
    write_records(folder, records, Header())
    with pytest.raises(InputError, match="only one side has rewards"):
        build_evidence(run, num_resamples=20)
    half = [replace(r, completions=(replace(r.completions[0], reward=None), *r.completions[1:])) for r in records]
    write_records(folder, half, Header())
    with pytest.raises(InputError, match="has reward None; score it again"):
        build_evidence(run, num_resamples=20)


def test_pairs_stand_beside_rewards_too(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", replace(WORLD, scorer=True, pairs=30))
    evidence = build_evidence(run, num_resamples=50)
    last = evidence.methods[0].points[-1]
    assert last.reward is not None and last.held_out is not None
    html = write_report(run).read_text()
    assert "Held-out preference pairs" in html and "Reward against distance" in html
