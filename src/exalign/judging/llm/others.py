"""Who else has judged the answers of a run: other models, and people."""

from __future__ import annotations

from pathlib import Path

from exalign.errors import InputError
from exalign.judging.comparison import Comparison, read_comparisons


def other_judgements(root: Path, folder: Path) -> dict[str, list[Comparison]]:
    """Comparisons by other judges than the one that writes to `folder`, by where below `root` they were found.

    Models: `judging/**/verdicts.jsonl`. People: the studies of `assessment/study.sqlite`, or, where the study is
    kept in another database, what was exported to `assessment/*.jsonl`.
    """
    models = sorted(path for path in (root / "judging").rglob("verdicts.jsonl") if path.parent != folder)
    study = root / "assessment" / "study.sqlite"
    exported = [] if study.is_file() else sorted((root / "assessment").glob("*.jsonl"))
    found = {str(path.relative_to(root)): read_comparisons(path) for path in [*models, *exported]}
    return {**found, **_studies(study)} if study.is_file() else found


def _studies(path: Path) -> dict[str, list[Comparison]]:
    try:
        from exalign.judging.people.store import Store
    except ImportError:
        raise InputError(f"Reading {path} needs SQLAlchemy: pip install 'exalign[people]'.") from None
    store = Store(str(path))
    try:
        return {f"assessment: {name}": list(store.comparisons(name)) for name in store.check()}
    finally:
        store.close()
