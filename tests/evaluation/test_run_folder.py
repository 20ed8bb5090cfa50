"""Where things stand in a run, and what a method says of itself there."""

from __future__ import annotations

import json

import pytest

from evaluation.synthetic_run import World, write_run
from exalign.errors import InputError
from exalign.evaluation.evidence import build_evidence
from exalign.evaluation.run_folder import RunFolder
from exalign.report import write_report


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    methods = {"exo-rw": (0.9, (0.5, 1.0)), "mine": (0.5, (0.5, 1.0))}
    world = World(methods, num_prompts=6, pool=0, steps=20, reference_texts=False)
    return RunFolder(write_run(tmp_path_factory.mktemp("runs") / "run", world))


def test_the_answers_of_a_system_are_those_of_its_last_step(run: RunFolder) -> None:
    assert run.answers("sft") == run.path / "evaluation" / "sft" / "samples"
    assert run.answers("reference") == run.path / "evaluation" / "prompts"
    assert run.answers("mine") == run.samples("mine", 20) == run.path / "evaluation/mine/step-000020/samples"
    assert run.answers("mine@10") == run.answers("mine@000010") == run.samples("mine", 10)
    for name in ("mine@15", "nobody", "pool", "prompts"):
        with pytest.raises(InputError, match=f"no evaluation samples of {name}; evaluated there: sft, exo-rw, mine"):
            run.answers(name)


def test_a_method_is_what_it_says_of_itself(run: RunFolder) -> None:
    said = {
        "label": "MINE",
        "family": "mine",
        "target": "reward",
        "settings": {"strength": 3.0},
        "line": "MINE, which <nobody> else has.",
        "further": 1,
    }
    exo, gone = (run.describe(name)[0] for name in ("exo-rw", "gone"))
    assert (exo.family, exo.target) == ("exo", "reward")
    assert (gone.label, gone.settings) == ("gone", {})
    run.description("mine").write_text(json.dumps(said), encoding="utf-8")
    evidence = build_evidence(run.path, num_resamples=20)
    assert [method.name for method in evidence.methods] == ["exo-rw", "mine"]
    mine = evidence.methods[1]
    assert (mine.called, mine.family, mine.target, mine.settings) == ("MINE", "mine", "reward", {"strength": 3.0})
    assert "MINE, which &lt;nobody&gt; else has." in write_report(run.path).read_text()
    run.description("mine").write_text('{"label": "MINE"}', encoding="utf-8")
    with pytest.raises(InputError, match="does not describe a method"):
        run.describe("mine")
