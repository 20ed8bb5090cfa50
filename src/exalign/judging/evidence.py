"""What language models and people said about a run, as the part of its evidence that the report shows."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from exalign.errors import InputError
from exalign.evaluation.schema import (
    AssessorAgreement,
    Interval,
    JudgeAgreement,
    Judgements,
    ModelJudge,
    ModelMatchUp,
    PeopleStudy,
    Tally,
)
from exalign.judging.agreement import agreement
from exalign.judging.comparison import CRITERIA, Comparison, read_comparisons
from exalign.judging.llm.kappa import agreement_with
from exalign.judging.llm.others import Said, exported_studies, kept_elsewhere, stored_studies, study_file
from exalign.judging.llm.summary import SUMMARY_VERSION
from exalign.judging.people.study import first_answers
from exalign.judging.tally import OVERALL, tally
from exalign.storage import read_json

T = TypeVar("T")


def read_judgements(run: Path) -> Judgements:
    """Everything that `exalign judge` and `exalign assess` left in the folder `run`, counted.

    Models: `judging/llm/*/*/summary.json` and the `verdicts.jsonl` beside it. People: the studies of
    `assessment/study.sqlite` (where SQLAlchemy is installed), and what `assessment/*.jsonl` holds besides them. What
    cannot be read is left out, with a sentence in `notes`: it withholds no report.
    """
    run, notes = Path(run), list[str]()
    answers = _Answers(run)
    reads = (partial(_judged, run, folder, answers) for folder in _judged_folders(run))
    judged = [found for read in reads if (found := _kept(read, notes))]
    said = []
    for one in _said(run, notes):
        if one.comparisons:
            said.append(one)
        else:
            notes.append(f"The study {one.name} has no verdicts yet.")
    return Judgements(
        judges=_judges(judged),
        studies=[_study(one, answers) for one in said],
        agreement=list(_agreements(judged, said)),
        notes=notes,
    )


@dataclass(frozen=True)
class _Judged:
    """One judged match-up as its folder has it."""

    judge: str
    template: str
    match_up: ModelMatchUp
    verdicts: list[Comparison]

    @property
    def title(self) -> str:
        return f"{self.judge}, {self.template}"


def _kept(read: Callable[[], T], notes: list[str]) -> T | None:
    try:
        return read()
    except InputError as error:
        notes.append(f"Left out: {error}")
        return None


def _judged_folders(run: Path) -> list[Path]:
    return sorted({path.parent for path in (run / "judging" / "llm").glob("*/*/exchanges.jsonl")})


def _judged(run: Path, folder: Path, answers: _Answers) -> _Judged:
    where = folder.relative_to(run)
    if not (folder / "summary.json").is_file():
        raise InputError(f"judging into {where} was interrupted; run the same command again to end it.")
    summary = read_json(folder / "summary.json")
    if not isinstance(summary, dict) or summary.get("version") != SUMMARY_VERSION:
        raise InputError(f"{where / 'summary.json'} is not of a format that this exalign reads; judge again.")
    verdicts = read_comparisons(folder / "verdicts.jsonl")
    try:
        match_up = _match_up(summary, verdicts, outdated=answers.outdated(verdicts))
        return _Judged(summary["judge"], summary["template"], match_up, verdicts)
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(f"{where / 'summary.json'} is of no match-up of this run ({error!r}).") from None


def _said(run: Path, notes: list[str]) -> list[Said]:
    stored = _kept(lambda: stored_studies(run), notes) if study_file(run).is_file() else None
    exported = _kept(lambda: exported_studies(run), notes)
    return [*(stored or []), *kept_elsewhere(exported or [], stored or [])]


def _judges(judged: Sequence[_Judged]) -> list[ModelJudge]:
    by_judge: dict[tuple[str, str], list[ModelMatchUp]] = {}
    for one in judged:
        by_judge.setdefault((one.judge, one.template), []).append(one.match_up)
    return [ModelJudge(name, template, match_ups) for (name, template), match_ups in by_judge.items()]


def _match_up(summary: Mapping[str, Any], verdicts: Sequence[Comparison], *, outdated: int) -> ModelMatchUp:
    tokens = summary["tokens"]
    nothing = Tally(summary["first"], summary["second"], OVERALL, None, None, None, None, 0, 0)
    length_controlled = summary["length_controlled"] or {}
    return ModelMatchUp(
        tally=next(iter(tally(verdicts)), nothing),
        num_pairs=summary["pairs"],
        identical=summary["identical"],
        unanswered=summary["unanswered"],
        length_controlled=_interval(length_controlled.get("rate")),
        flip_rate=_interval(summary["flip_rate"]),
        half_ties=_interval(summary["half_ties"]),
        shown_first=_interval(summary["shown_first"]),
        prompt_tokens=tokens["prompt"],
        completion_tokens=tokens["completion"],
        answers_without_usage=tokens["answers_without_usage"],
        outdated=outdated,
    )


def _study(said: Said, answers: _Answers) -> PeopleStudy:
    comparisons = said.comparisons
    answered = [name for name in CRITERIA if any(name in c.criteria for c in comparisons)]
    agreements = []
    for criterion in (OVERALL, *answered):
        found = agreement(comparisons, criterion)
        agreements.append(
            AssessorAgreement(
                criterion,
                alpha=found.alpha,
                pairwise=found.pairwise,
                without_ties=found.without_ties,
                num_items=found.num_items,
                num_assessors=len(found.judges),
            )
        )
    return PeopleStudy(
        name=said.name,
        num_assessors=len({c.judge for c in comparisons}),
        num_prompts=len({c.prompt_id for c in comparisons}),
        num_verdicts=len(comparisons),
        num_asked=said.num_asked,
        outdated=answers.outdated(comparisons),
        tallies=[counted for criterion in (OVERALL, *answered) for counted in tally(comparisons, criterion)],
        agreement=agreements,
    )


def _agreements(judged: Sequence[_Judged], said: Sequence[Said]) -> Iterable[JudgeAgreement]:
    """Every judged match-up against each study, and against each judge after it."""
    for i, one in enumerate(judged):
        ours = [c for c in one.verdicts if c.first_text != c.second_text]
        others = [(study.name, True, study.comparisons) for study in said]
        others += [(other.title, False, other.verdicts) for other in judged[i + 1 :]]
        for name, by_people, theirs in others:
            found = agreement_with(ours, theirs)
            if found is not None:
                yield JudgeAgreement(
                    first=one.match_up.tally.first,
                    second=one.match_up.tally.second,
                    judge=one.title,
                    other=name,
                    by_people=by_people,
                    num_pairs=found["pairs"],
                    raw=_interval(found["raw"]),
                    without_ties=_interval(found["without_ties"]),
                    kappa=found["kappa"],
                    alpha=_interval(found["alpha"]),
                    among_others=_interval(found["theirs_among_themselves"]),
                )


class _Answers:
    """What the systems of a run answer now; each is read when it is first asked for."""

    def __init__(self, run: Path) -> None:
        self._run = run
        self._by_system: dict[str, dict[str, str] | None] = {}

    def outdated(self, comparisons: Iterable[Comparison]) -> int:
        """How many of the compared pairs hold an answer that is not the run's any more.

        Systems that are not of this run (of another one, or of a published set) cannot be checked.
        """
        pairs = {c.pair: c for c in comparisons}
        return sum(
            any(self._replaced(*side, c.prompt_id) for side in ((c.first, c.first_text), (c.second, c.second_text)))
            for c in pairs.values()
        )

    def _replaced(self, system: str, text: str, prompt_id: str) -> bool:
        if system not in self._by_system:
            self._by_system[system] = self._read(system)
        known = self._by_system[system]
        return known is not None and known.get(prompt_id) != text

    def _read(self, system: str) -> dict[str, str] | None:
        try:
            return {prompt_id: text for prompt_id, (_, text) in first_answers(self._run, system).items()}
        except InputError:
            return None


def _interval(value: Mapping[str, Any] | None) -> Interval | None:
    return None if value is None else Interval(**value)
