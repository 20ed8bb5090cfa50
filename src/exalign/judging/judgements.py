"""What language models and people have said about the answers of a run: for other judges, and for its evidence."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from exalign.errors import InputError
from exalign.evaluation.evidence import REFERENCE_TEXT, SFT
from exalign.evaluation.run_folder import REFERENCE, SUPERVISED, RunFolder
from exalign.evaluation.schema import (
    Interval,
    JudgeAgreement,
    Judgements,
    ModelJudge,
    ModelMatchUp,
    PeopleStudy,
    Remark,
    Tally,
)
from exalign.judging.agreement import OVERALL, agreement, agreement_with, tally
from exalign.judging.comparisons import CRITERIA, OTHER, Comparison, read_comparisons
from exalign.judging.pairing import system
from exalign.judging.summary import SUMMARY_VERSION, num_measured
from exalign.storage import read_json

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Said:
    """What the people of one study said. `num_asked` verdicts were asked for; None where only an export is there."""

    source: str
    name: str
    comparisons: list[Comparison]
    num_asked: int | None = None


def other_judgements(run: RunFolder, folder: Path) -> dict[str, list[Comparison]]:
    """Comparisons by other judges than the one that writes to `folder`, by where in the run they were found: those of
    models, and of people the stored studies and what was exported from studies that are kept elsewhere.
    """
    models = sorted(path for path in run.judgements.rglob("verdicts.jsonl") if path.parent != folder)
    stored = stored_studies(run) if run.studies.is_file() else []
    exported = [_exported_study(run, path) for path in sorted(run.assessment.glob("*.jsonl"))]
    people = [*stored, *_kept_elsewhere(exported, stored)]
    found = {run.relative(path): read_comparisons(path) for path in models}
    return {**found, **{said.source: said.comparisons for said in people}}


def stored_studies(run: RunFolder) -> list[Said]:
    """The studies of the run's own database; `InputError` where SQLAlchemy is not installed."""
    path = run.studies
    try:
        from exalign.judging.study import Store
    except ImportError:
        raise InputError(f"Reading {path} needs SQLAlchemy: pip install 'exalign[people]'.") from None
    store = Store(str(path))
    try:
        totals = {name: sum(total for _, total in store.standing(name).values()) for name in store.check()}
        return [Said(f"assessment: {name}", name, store.comparisons(name), totals[name]) for name in totals]
    finally:
        store.close()


def _exported_study(run: RunFolder, path: Path) -> Said:
    return Said(run.relative(path), path.stem, read_comparisons(path))


def _kept_elsewhere(exported: Iterable[Said], stored: Iterable[Said]) -> list[Said]:
    """The exports that hold a verdict that is in no stored study: the others repeat one."""
    known = {_verdict(comparison) for said in stored for comparison in said.comparisons}
    return [said for said in exported if not known or any(_verdict(c) not in known for c in said.comparisons)]


def _verdict(said: Comparison) -> tuple[Any, ...]:
    """What tells a verdict from that of somebody else with the same name: another group's assessor-1."""
    return said.key, said.verdict, said.time


def read_judgements(path: Path) -> Judgements:
    """Everything that `exalign judge` and `exalign assess` left in the run directory `path`, counted.

    Models: every judged match-up's `summary.json` and the `verdicts.jsonl` beside it. People: the run's own studies
    (where SQLAlchemy is installed), and what was exported to it besides them. What cannot be read is left out, with a
    sentence in `notes`: it withholds no report.
    """
    run, notes = RunFolder(path), list[str]()
    answers = _Answers(run)
    folders = sorted(path.parent for path in run.judgements.glob("*/*/exchanges.jsonl"))
    judged = _kept(lambda folder: _judged(run, folder, answers), folders, notes)
    databases = _kept(lambda _: stored_studies(run), [run.studies] if run.studies.is_file() else [], notes)
    stored = [one for studies in databases for one in studies]
    exported = _kept(partial(_exported_study, run), sorted(run.assessment.glob("*.jsonl")), notes)
    said = [*stored, *_kept_elsewhere(exported, stored)]
    notes += [f"The study {one.name} has no verdicts yet." for one in said if not one.comparisons]
    said = [one for one in said if one.comparisons]
    by_judge: dict[tuple[str, str], list[ModelMatchUp]] = {}
    for one in judged:
        by_judge.setdefault((one.judge, one.template), []).append(one.match_up)
    return Judgements(
        judges=[ModelJudge(name, template, match_ups) for (name, template), match_ups in by_judge.items()],
        studies=[_study(one, answers) for one in said],
        agreement=list(_agreements(judged, said)),
        notes=notes,
        remarks=[remark for one in judged for remark in one.remarks],
    )


@dataclass(frozen=True)
class _Judged:
    judge: str
    template: str
    match_up: ModelMatchUp
    verdicts: list[Comparison]
    remarks: list[Remark]


def _kept(read: Callable[[Path], T], paths: Iterable[Path], notes: list[str]) -> list[T]:
    found = []
    for path in paths:
        try:
            found.append(read(path))
        except InputError as error:
            notes.append(f"Left out: {error}")
    return found


def _judged(run: RunFolder, folder: Path, answers: _Answers) -> _Judged:
    where = run.relative(folder / "summary.json")
    if not (folder / "summary.json").is_file():
        raise InputError(f"judging into {run.relative(folder)} was interrupted; run the same command again to end it.")
    summary = read_json(folder / "summary.json")
    if not isinstance(summary, dict) or summary.get("version") != SUMMARY_VERSION:
        raise InputError(f"{where} is not of a format that this exalign reads; judge again.")
    verdicts = read_comparisons(folder / "verdicts.jsonl")
    try:
        shares = {name: summary[name] for name in ("flip_rate", "half_ties", "shown_first")}
        shares["length_controlled"] = (summary["length_controlled"] or {}).get("rate")
        match_up = ModelMatchUp(
            tally=_tally(summary["first"], summary["second"], verdicts),
            num_pairs=summary["pairs"],
            identical=summary["identical"],
            unanswered=summary["unanswered"],
            prompt_tokens=summary["tokens"]["prompt"],
            completion_tokens=summary["tokens"]["completion"],
            answers_without_usage=summary["tokens"]["answers_without_usage"],
            outdated=answers.outdated(verdicts),
            **{name: None if share is None else Interval(**share) for name, share in shares.items()},
        )
        asked = (order for order in read_comparisons(folder / "comparisons.jsonl") if not answers.outdated([order]))
        remarks = [_remark(f"{summary['judge']}, {summary['template']}", order) for order in asked]
        return _Judged(summary["judge"], summary["template"], match_up, verdicts, remarks)
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{where} is of no match-up of this run ({error!r}).") from None


def _remark(judge: str, order: Comparison) -> Remark:
    known = {SUPERVISED: SFT, REFERENCE: REFERENCE_TEXT}
    names = {"first": known.get(order.first, order.first), "second": known.get(order.second, order.second)}
    left = order.left or "first"
    favour = names.get(order.verdict, order.verdict)
    said = (order.answer or "").rpartition("</think>")[2].strip()
    return Remark(order.prompt_id, judge, names[left], names[OTHER[left]], said, favour)


def _tally(first: str, second: str, verdicts: Sequence[Comparison]) -> Tally:
    if num_measured(verdicts):
        return tally(verdicts)[0]
    unreadable = sum(verdict.verdict == "unreadable" for verdict in verdicts)
    return Tally(first, second, OVERALL, None, None, None, None, num_judgements=0, unreadable=unreadable)


def _study(said: Said, answers: _Answers) -> PeopleStudy:
    opponents, comparisons = (SUPERVISED, REFERENCE), said.comparisons
    # Whoever a study names first, the page tells of a policy against what it is measured by.
    told = [c.swapped() if c.first in opponents and c.second not in opponents else c for c in comparisons]
    asked = [OVERALL, *(name for name in CRITERIA if any(name in c.criteria for c in comparisons))]
    return PeopleStudy(
        name=said.name,
        num_assessors=len({c.judge for c in comparisons}),
        num_prompts=len({c.prompt_id for c in comparisons}),
        num_verdicts=len(comparisons),
        num_asked=said.num_asked,
        outdated=answers.outdated(comparisons),
        tallies=[counted for criterion in asked for counted in tally(told, criterion)],
        agreement=[agreement(comparisons, criterion) for criterion in asked],
    )


def _agreements(judged: Sequence[_Judged], said: Sequence[Said]) -> Iterable[JudgeAgreement]:
    """Every judged match-up against each study, and against each judge after it."""
    for i, one in enumerate(judged):
        ours = [verdict for verdict in one.verdicts if not verdict.identical]
        others = [(study.name, True, study.comparisons) for study in said]
        others += [(f"{other.judge}, {other.template}", False, other.verdicts) for other in judged[i + 1 :]]
        for name, by_people, theirs in others:
            if (found := agreement_with(ours, theirs)) is not None:
                yield JudgeAgreement(
                    one.match_up.tally.first,
                    one.match_up.tally.second,
                    judge=f"{one.judge}, {one.template}",
                    other=name,
                    by_people=by_people,
                    num_pairs=found["pairs"],
                    among_others=found["theirs_among_themselves"],
                    **{share: found[share] for share in ("raw", "without_ties", "kappa", "alpha")},
                )


class _Answers(dict[str, dict[str, str] | None]):
    """What the systems of a run answer now; read when first asked for; None of one that is not of the run."""

    def __init__(self, run: RunFolder) -> None:
        self._run = run

    def __missing__(self, name: str) -> dict[str, str] | None:
        try:
            self[name] = system(self._run, name).answers
        except InputError:
            self[name] = None
        return self[name]

    def outdated(self, comparisons: Iterable[Comparison]) -> int:
        """How many of the compared pairs hold an answer that is not the run's any more.

        Systems that are not of this run (of another one, or of a published set) cannot be checked.
        """
        pairs = {c.pair: ((c.first, c.first_text), (c.second, c.second_text), c.prompt_id) for c in comparisons}
        return sum(
            any((known := self[name]) is not None and known.get(prompt) != text for name, text in sides)
            for *sides, prompt in pairs.values()
        )
