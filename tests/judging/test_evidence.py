"""What is read out of a judged run is what its records say; what cannot be read is said."""

from __future__ import annotations

import json
import shutil
import sqlite3
import sys
from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest

from evaluation.synthetic_run import World, write_run
from exalign.data.record import Completion
from exalign.data.store import Header, read_records, write_records
from exalign.evaluation.evidence import build_evidence
from exalign.evaluation.run_folder import RunFolder
from exalign.evaluation.schema import Interval, Judgements, Tally, read_evidence
from exalign.judging.agreement import OVERALL, agreement, agreement_between, tally
from exalign.judging.comparisons import CRITERIA, Comparison, read_comparisons, write_comparisons
from exalign.judging.judgements import read_judgements, stored_studies
from judging.judged_run import assess_run, first_letter, judge_run, longer, moody, shorter

WORLD = World(methods={"exo-rw": (0.9, (1.0,)), "dpo-rw": (0.5, (1.0,))}, num_prompts=20, pool=0, steps=4)
PEOPLE = {"ann": longer, "bob": shorter, "cho": first_letter}


@pytest.fixture(scope="module")
def judged(tmp_path_factory: pytest.TempPathFactory) -> Path:
    run = write_run(tmp_path_factory.mktemp("runs") / "judged", WORLD)
    judge_run(run, "machine", longer)
    judge_run(run, "a moody one", moody)
    assess_run(run, "study one", [("exo-rw", "dpo-rw"), ("sft", "exo-rw")], rules=PEOPLE, prompts=12, verdicts=20)
    return run


@pytest.fixture
def run(judged: Path, tmp_path: Path) -> Path:
    """A copy to damage."""
    return Path(shutil.copytree(judged, tmp_path / "run"))


def folders(run: Path, judge: str) -> list[Path]:
    found = [path.parent for path in sorted(run.glob("judging/llm/*/*/summary.json"))]
    return [folder for folder in found if json.loads((folder / "summary.json").read_text())["judge"] == judge]


def people(run: Path) -> list[Comparison]:
    (said,) = stored_studies(RunFolder(run))
    return said.comparisons


def test_a_models_numbers_are_those_of_its_records(judged: Path) -> None:
    found = {judge.name: judge for judge in read_judgements(judged).judges}
    assert set(found) == {"machine", "a moody one"}
    for name, judge in found.items():
        assert judge.template == "instruction"
        assert len(judge.match_ups) == len(folders(judged, name)) == 2
        for folder, match_up in zip(folders(judged, name), judge.match_ups, strict=True):
            verdicts, orders = (read_comparisons(folder / f"{file}.jsonl") for file in ("verdicts", "comparisons"))
            assert [match_up.tally] == tally(verdicts)
            summary = json.loads((folder / "summary.json").read_text())
            for key in ("flip_rate", "half_ties", "shown_first"):
                assert getattr(match_up, key) == Interval(**summary[key])
            assert match_up.length_controlled == Interval(**summary["length_controlled"]["rate"])
            assert match_up.num_pairs == len(verdicts) == 20
            assert (match_up.prompt_tokens, match_up.completion_tokens) == (7 * len(orders), 2 * len(orders))
            assert (match_up.unanswered, match_up.outdated, match_up.answers_without_usage) == (0, 0, 0)


def test_flips_and_unreadable_answers_are_carried(judged: Path) -> None:
    moods, steady = [], []
    for judge in read_judgements(judged).judges:
        (moods if judge.name == "a moody one" else steady).extend(judge.match_ups)
    assert all(match_up.flip_rate.estimate == 0 and match_up.tally.unreadable == 0 for match_up in steady)
    assert all(match_up.flip_rate.estimate > 0 and match_up.tally.unreadable > 0 for match_up in moods)


def test_the_numbers_of_people_are_those_of_their_records(judged: Path) -> None:
    (study,) = read_judgements(judged).studies
    said = people(judged)
    assert {(c.first, c.second) for c in said} >= {("exo-rw", "dpo-rw"), ("sft", "exo-rw")}
    told = [c.swapped() if c.first == "sft" else c for c in said]  # a policy against what it is measured by
    expected = [counted for criterion in (OVERALL, *CRITERIA) for counted in tally(told, criterion)]
    assert study.tallies == expected
    assert {(t.first, t.second) for t in expected} == {("exo-rw", "dpo-rw"), ("exo-rw", "sft")}
    for row in study.agreement:
        found = agreement(said, row.criterion)
        assert row == found
    assert (study.num_verdicts, study.num_asked, study.num_assessors, study.num_prompts) == (60, 72, 3, 12)
    assert study.outdated == 0


def test_judges_are_compared_with_people_and_once_with_each_other(judged: Path) -> None:
    found = read_judgements(judged).agreement
    by_people = [one for one in found if one.by_people]
    # People judged SFT against exo-rw, and the models the same pairs the other way round; dpo-rw met SFT only there.
    assert {(one.first, one.second, one.judge) for one in by_people} == {
        ("exo-rw", "sft", "machine, instruction"),
        ("exo-rw", "sft", "a moody one, instruction"),
    }
    machine = next(one for one in by_people if one.judge.startswith("machine"))
    files = [read_comparisons(folder / "verdicts.jsonl") for folder in folders(judged, "machine")]
    verdicts = next(file for file in files if file[0].first == "exo-rw")
    assert machine.raw == agreement_between(verdicts, people(judged))
    assert machine.among_others is not None
    others = [one for one in found if not one.by_people]
    assert len({frozenset((one.judge, one.other)) for one in others}) == 1
    assert sorted(one.first for one in others) == ["dpo-rw", "exo-rw"]


def test_nobody_is_named(run: Path) -> None:
    build_evidence(run, num_resamples=20, judgements=read_judgements(run))
    text = (run / "evaluation" / "evidence.json").read_text()
    assert "study one" in text
    assert not any(f'"{name}"' in text for name in PEOPLE)


def test_it_is_part_of_the_evidence_and_comes_back(run: Path) -> None:
    judgements = read_judgements(run)
    evidence = build_evidence(run, num_resamples=20, judgements=replace(judgements, notes=["A sentence."]))
    assert "A sentence." in evidence.notes
    assert read_evidence(run / "evaluation" / "evidence.json") == evidence
    assert evidence.judgements.studies == judgements.studies


def test_nothing_judged_is_nothing(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", replace(WORLD, num_prompts=4))
    assert read_judgements(run) == Judgements()
    assert build_evidence(run, num_resamples=20).judgements == Judgements()


def test_what_cannot_be_read_is_left_out_and_said(run: Path) -> None:
    interrupted, damaged = folders(run, "machine")
    foreign = folders(run, "a moody one")[0]
    (interrupted / "summary.json").unlink()
    (foreign / "summary.json").write_text('{"version": 1, "graded_on": "people.jsonl"}')
    (damaged / "summary.json").write_text("{")
    RunFolder(run).studies.write_text("this is not a database, though it is long enough to be looked at" * 9)
    found = read_judgements(run)
    assert [(judge.name, len(judge.match_ups)) for judge in found.judges] == [("a moody one", 1)]
    assert found.studies == []
    text = "\n".join(found.notes)
    assert len(found.notes) == 4
    assert "is of no match-up of this run" in text
    assert f"{interrupted.relative_to(run)} was interrupted" in text
    assert "summary.json is not valid JSON" in text
    assert "cannot be used as a study database" in text


def test_a_study_without_verdicts_is_said(run: Path) -> None:
    RunFolder(run).studies.unlink()
    assess_run(run, "nobody came", [("exo-rw", "sft")], rules={"ann": longer}, prompts=3, verdicts=0)
    found = read_judgements(run)
    assert found.studies == []
    assert found.notes == ["The study nobody came has no verdicts yet."]


def test_without_sqlalchemy_an_export_is_read(run: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    stored = read_judgements(run).studies[0]
    write_comparisons(run / "assessment" / "study one.jsonl", people(run))
    # None in sys.modules makes an import of that name fail, as it does where the extra is not installed.
    monkeypatch.setitem(sys.modules, "exalign.judging.study", None)
    found = read_judgements(run)
    assert found.studies == [replace(stored, num_asked=None)]
    assert "pip install 'exalign[people]'" in found.notes[0]


def test_an_export_repeats_no_stored_study_but_adds_one_kept_elsewhere(run: Path) -> None:
    stored = read_judgements(run).studies
    write_comparisons(run / "assessment" / "again.jsonl", people(run)[:30])
    assert read_judgements(run).studies == stored
    write_comparisons(run / "assessment" / "elsewhere.jsonl", [replace(c, judge="dan") for c in people(run)[:18]])
    here, elsewhere = read_judgements(run).studies
    assert [here] == stored
    other = [
        replace(c, time="2026-01-02T03:04:05+00:00") for c in people(run)[:18]
    ]  # of people who have the same names
    write_comparisons(run / "assessment" / "elsewhere.jsonl", other)
    assert [study.name for study in read_judgements(run).studies] == [here.name, "elsewhere"]
    write_comparisons(run / "assessment" / "elsewhere.jsonl", [replace(c, judge="dan") for c in people(run)[:18]])
    assert (elsewhere.name, elsewhere.num_verdicts, elsewhere.num_asked) == ("elsewhere", 18, None)


def test_a_damaged_export_takes_no_other_with_it(run: Path) -> None:
    write_comparisons(run / "assessment" / "good.jsonl", people(run))
    RunFolder(run).studies.unlink()
    (run / "assessment" / "damaged.jsonl").write_text("{")
    found = read_judgements(run)
    assert [study.name for study in found.studies] == ["good"]
    assert len(found.notes) == 1
    assert "damaged.jsonl, line 1" in found.notes[0]


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        ("DROP TABLE assignment", "cannot be used as a study database: no such table"),
        ("UPDATE assignment SET answer = '{' WHERE decided_at IS NOT NULL", "holds what exalign did not write"),
        ("UPDATE assignment SET answer = '{}' WHERE decided_at IS NOT NULL", "holds what exalign did not write"),
        ("UPDATE assignment SET decided_at = 'x' WHERE decided_at IS NOT NULL", "holds what exalign did not write"),
    ],
)
def test_a_damaged_study_withholds_no_report(run: Path, damage: str, said: str) -> None:
    with closing(sqlite3.connect(RunFolder(run).studies)) as connection, connection:
        connection.execute(damage)
    found = read_judgements(run)
    assert len(found.judges) == 2
    assert found.studies == []
    assert said in found.notes[0]


def test_verdicts_on_answers_that_were_replaced_are_counted(run: Path) -> None:
    samples = run / "evaluation" / "exo-rw" / "step-000004" / "samples"
    records = read_records(samples)
    changed = [replace(r, completions=(Completion("new"), *r.completions[1:])) for r in records[:5]] + records[5:]
    shutil.rmtree(samples)
    write_records(samples, changed, Header(temperature=0.8))
    found = read_judgements(run)
    for judge in found.judges:
        assert {m.tally.first: m.outdated for m in judge.match_ups} == {"exo-rw": 5, "dpo-rw": 0}
    replaced = {c.pair for c in people(run) if c.prompt_id in {r.id for r in records[:5]}}
    assert found.studies[0].outdated == len(replaced) > 0


def test_a_published_set_beside_the_run_is_not_called_outdated(run: Path) -> None:
    RunFolder(run).studies.unlink()
    human = [Comparison(str(i), "Hi", "gpt-4", "llama", "a", "b", "someone", "first") for i in range(3)]
    write_comparisons(run / "assessment" / "published.jsonl", human)
    (study,) = read_judgements(run).studies
    assert (study.name, study.outdated, study.num_asked) == ("published", 0, None)
    assert [t.win.estimate for t in study.tallies] == [1.0]
    assert isinstance(study.tallies[0], Tally)
