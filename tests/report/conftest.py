"""A finished synthetic run with its report, and a real browser that refuses every request but for local files."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from evaluation.synthetic_run import World, write_run
from exalign.evaluation.evidence import build_evidence
from exalign.evaluation.schema import Evidence, Judgements
from exalign.judging.judgements import read_judgements
from exalign.report import write_report
from judging.judged_run import assess_run, first_letter, judge_run, longer, moody, shorter

CHROMIUM = Path("/usr/bin/chromium")

HOSTILE = (
    "</p></article><script>window.hacked = 1</script><img src=x onerror='window.hacked = 2'>"
    "<style>body{display:none}</style>\x00\x07\x1b[31m \u202edesrever\u2066 {{ 7 * 7 }} {% raw %} &lt; --> ]]> "
    "</svg><svg onload='window.hacked = 3'> \u05e9\u05dc\u05d5\u05dd " + "long" * 200
)


@pytest.fixture(scope="session")
def evidence_and_page(tmp_path_factory: pytest.TempPathFactory) -> tuple[Evidence, Path]:
    run = write_run(tmp_path_factory.mktemp("runs") / "synthetic", World(num_prompts=24, pool=64, steps=40))
    return build_evidence(run, num_resamples=200), write_report(run)


@pytest.fixture(scope="session")
def hostile_page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    world = World(
        methods={"exo-rw": (0.9, (1.0,))}, num_prompts=6, pool=0, steps=4, hostile_text=HOSTILE, reference_texts=False
    )
    run = write_run(tmp_path_factory.mktemp("runs") / "hostile", world)
    build_evidence(run, num_resamples=50)
    return write_report(run)


@pytest.fixture(scope="session")
def judged_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Judgements]:
    """A run with its report that two models and three people have judged; all who name themselves are hostile."""
    methods = {"exo-rw": (0.9, (1.0,)), "dpo-pref": (0.5, (1.0,))}
    run = write_run(tmp_path_factory.mktemp("runs") / "judged", World(methods, num_prompts=16, pool=0, steps=4))
    judge_run(run, "plain judge", moody)
    judge_run(run, HOSTILE, longer, against="chosen")
    people = {HOSTILE[:40]: longer, "bob": shorter, "cho": first_letter}
    matches = [("exo-rw", "dpo-pref"), ("exo-rw", "reference")]
    assess_run(run, HOSTILE[:200], matches, rules=people, prompts=10, verdicts=18, comment="a private remark")
    judgements = read_judgements(run)
    build_evidence(run, num_resamples=50, judgements=judgements)
    write_report(run)
    return run, judgements


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    playwright = pytest.importorskip("playwright.sync_api")
    if not CHROMIUM.exists():
        pytest.skip(f"{CHROMIUM} is not installed (Debian's package chromium)")
    with playwright.sync_playwright() as session:
        options = ["--no-sandbox", "--disable-gpu", "--disable-background-networking", "--no-first-run"]
        browser = session.chromium.launch(executable_path=str(CHROMIUM), args=options)
        yield browser
        browser.close()
