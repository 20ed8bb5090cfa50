"""Who else has judged the answers of a run: other models, and people."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from exalign.errors import InputError
from exalign.judging.comparison import Comparison, read_comparisons


@dataclass(frozen=True, slots=True)
class Said:
    """What the people of one study said. `num_asked` verdicts were asked for; None where only an export is there."""

    source: str
    name: str
    comparisons: list[Comparison]
    num_asked: int | None = None


def other_judgements(root: Path, folder: Path) -> dict[str, list[Comparison]]:
    """Comparisons by other judges than the one that writes to `folder`, by where below `root` they were found.

    Models: `judging/**/verdicts.jsonl`. People: the studies of `assessment/study.sqlite`, and what was exported to
    `assessment/*.jsonl` from studies that are kept elsewhere.
    """
    models = sorted(path for path in (root / "judging").rglob("verdicts.jsonl") if path.parent != folder)
    found = {str(path.relative_to(root)): read_comparisons(path) for path in models}
    stored = stored_studies(root) if study_file(root).is_file() else []
    people = [*stored, *kept_elsewhere(exported_studies(root), stored)]
    return {**found, **{said.source: said.comparisons for said in people}}


def study_file(root: Path) -> Path:
    """Where a run keeps its studies, unless they are in another database."""
    return root / "assessment" / "study.sqlite"


def exported_studies(root: Path) -> list[Said]:
    """What was exported to `assessment/*.jsonl`."""
    paths = sorted((root / "assessment").glob("*.jsonl"))
    return [Said(str(path.relative_to(root)), path.stem, read_comparisons(path)) for path in paths]


def kept_elsewhere(exported: Iterable[Said], stored: Iterable[Said]) -> list[Said]:
    """The exports that hold a verdict that is in no stored study: the others repeat one."""
    keys = {comparison.key for said in stored for comparison in said.comparisons}
    return [said for said in exported if not keys or any(c.key not in keys for c in said.comparisons)]


def stored_studies(root: Path) -> list[Said]:
    """The studies of `assessment/study.sqlite`; `InputError` where SQLAlchemy is not installed."""
    path = study_file(root)
    try:
        from exalign.judging.people.store import Store
    except ImportError:
        raise InputError(f"Reading {path} needs SQLAlchemy: pip install 'exalign[people]'.") from None
    store = Store(str(path))
    try:
        return [
            Said(
                f"assessment: {name}",
                name,
                list(store.comparisons(name)),
                sum(total for _, total in store.standing(name).values()),
            )
            for name in store.check()
        ]
    finally:
        store.close()
