"""The trials of a search in the evidence and on the page."""

from __future__ import annotations

import re
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from evaluation.synthetic_run import World, write_run
from exalign.errors import InputError
from exalign.evaluation.evidence import build_evidence
from exalign.evaluation.schema import Search, Trial, read_evidence
from exalign.report import write_report
from exalign.storage import write_json, write_sealed

TRIALS = [
    Trial(0, {"learning_rate": 1e-4, "divergence": "reverse_kl"}, {}, 0.25, 1.5, [], 61.0),
    Trial(1, {"learning_rate": 0.5, "divergence": "<b>"}, {}, failed="Loss was <not> finite.", seconds=2.0),
    Trial(2, {"learning_rate": 1e-3, "divergence": "forward_kl"}, {}, 0.75, 1.25, [{"step": 3, "kl": 1.0}], 62.0),
    Trial(3, {"learning_rate": 1e-3, "divergence": "forward_kl"}, {}, 0.75, 1.25, [], same_as=2),
]


def searched(folder: Path) -> Path:
    world = World({"exo-rw": (0.9, (1.0,)), "dpo-rw": (0.5, (1.0,))}, num_prompts=8, pool=0, steps=4)
    run = write_run(folder / "run", world)
    write_sealed(run / "search/exo-rw/trials.json", {"trials": [asdict(trial) for trial in TRIALS]})
    write_json(
        run / "search/exo-rw/best.json", {"trial": 2, "value": 0.75, "kl": 1.25, "ranked_at": 2.0, "settings": {}}
    )
    return run


def test_the_evidence_holds_the_trials(tmp_path: Path) -> None:
    run = searched(tmp_path)
    build_evidence(run, num_resamples=20)
    evidence = read_evidence(run / "evaluation" / "evidence.json")
    assert evidence.searches == [Search("exo-rw", 2.0, 2, TRIALS)]


def test_the_page_lists_every_trial(tmp_path: Path) -> None:
    run = searched(tmp_path)
    build_evidence(run, num_resamples=20)
    page = write_report(run).read_text(encoding="utf-8")
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", page[page.index("Searches for settings") :]))
    assert "exo-rw: trial 2 of 4 was best" in text
    assert "learning rate divergence reward at KL ≤ 2.00" in text
    assert "Loss was &lt;not&gt; finite." in text and "&lt;b&gt;" in text
    assert "0 0.000100 reverse_kl 0.250 1.50 1 min 1 s" in text
    assert "2 (best) 0.00100 forward_kl 0.750" in text and "3 the same as 2" in text


@pytest.mark.parametrize(("file", "values"), [("best.json", {"trial": 2}), ("trials.json", {"trials": [{"no": 0}]})])
def test_a_damaged_search_is_one_sentence(tmp_path: Path, file: str, values: dict[str, Any]) -> None:
    run = searched(tmp_path)
    write_json(run / "search/exo-rw" / file, values)
    with pytest.raises(InputError, match="does not hold a search; make search/exo-rw again"):
        build_evidence(run, num_resamples=20)


def test_without_a_search_the_page_says_nothing_of_one(tmp_path: Path) -> None:
    run = write_run(tmp_path / "run", World({"exo-rw": (0.9, (1.0,))}, num_prompts=8, pool=0, steps=4))
    assert build_evidence(run, num_resamples=20).searches == []
    assert "Searches for settings" not in write_report(run).read_text(encoding="utf-8")
