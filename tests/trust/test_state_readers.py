"""Checkpoints, metrics, evidence and recipes of any bytes: one sentence or a result, as in `test_readers`."""

from __future__ import annotations

import json
import tempfile
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from exalign.evaluation.schema import read_evidence
from exalign.run.recipe import load_recipe
from exalign.storage import fingerprint_path, write_json
from exalign.training.checkpoint import MetricsLog, Position, load_checkpoint, save_checkpoint
from trust.shapes import grafted, sentence, some

NESTED = b"[" * 100_000 + b"]" * 100_000


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("readers")


def small() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    model = torch.nn.Linear(2, 1)
    return model, torch.optim.AdamW(model.parameters())


@pytest.fixture(scope="module")
def checkpoint(place: Path) -> Path:
    """A checkpoint of one step."""
    model, optimizer = small()
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    save_checkpoint(place / "checkpoints", Position(1, 0, "run"), model, optimizer, writes=True)
    return place / "checkpoints" / "step-000001"


def continues_at(checkpoint: Path) -> int:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return load_checkpoint(checkpoint.parent, "run", *small()).step


@some
@given(st.data())
def test_checkpoints_of_any_shape(checkpoint: Path, data: st.DataObject) -> None:
    valid = (checkpoint / "checkpoint.json").read_text()
    values = json.loads(valid)
    del values["sealed"], values["seal"]  # they would catch every change before it can do anything
    try:
        (checkpoint / "checkpoint.json").write_text(json.dumps(data.draw(grafted(values))))
        sentence(lambda: continues_at(checkpoint))
    finally:
        (checkpoint / "checkpoint.json").write_text(valid)
    assert continues_at(checkpoint) == 1


@some
@given(st.lists(st.tuples(st.integers(0, 10**4), st.integers(0, 255)), min_size=1, max_size=6))
def test_damaged_tensors_that_are_vouched_for(checkpoint: Path, changes: list[tuple[int, int]]) -> None:
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder) / checkpoint.name
        copy.mkdir()
        content = bytearray((checkpoint / "state.pt").read_bytes())
        for position, byte in changes:
            content[position % len(content)] = byte
        (copy / "state.pt").write_bytes(bytes(content))
        state = fingerprint_path(copy / "state.pt")
        write_json(copy / "checkpoint.json", {"step": 1, "skipped_in_a_row": 0, "run": "run", "state": state})
        sentence(lambda: continues_at(copy))


def test_a_checkpoint_of_another_model_is_one_sentence(tmp_path: Path) -> None:
    """Found by fuzzing: a damaged name of a weight, under a hash that vouches for it."""
    model = torch.nn.Linear(3, 1)
    save_checkpoint(tmp_path, Position(1, 0, "run"), model, torch.optim.AdamW(model.parameters()), writes=True)
    assert "does not fit the model" in (sentence(lambda: continues_at(tmp_path / "step-000001")) or "")


@some
@given(st.lists(grafted({"step": 1, "loss": 0.5}).map(json.dumps) | st.text(max_size=9), max_size=4))
def test_metrics_of_any_shape(place: Path, lines: list[str]) -> None:
    (place / "metrics.jsonl").write_text("\n".join(lines), encoding="utf-8", errors="replace")
    with MetricsLog(place / "metrics.jsonl", step=3, writes=True) as log:
        log.append({"step": 4})
    assert json.loads((place / "metrics.jsonl").read_text().splitlines()[-1]) == {"step": 4}


@pytest.fixture(scope="module")
def evidence(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    from evaluation.synthetic_run import World, write_run
    from exalign.evaluation.evidence import build_evidence

    world = World({"exo": (0.9, (1.0,)), "dpo": (0.5, (1.0,))}, num_prompts=3, pool=4, steps=2)
    run = write_run(tmp_path_factory.mktemp("runs") / "run", world)
    build_evidence(run, num_resamples=10)
    found: dict[str, Any] = json.loads((run / "evaluation" / "evidence.json").read_text())
    return found


@some
@given(st.data())
def test_evidence_of_any_shape(place: Path, evidence: dict[str, Any], data: st.DataObject) -> None:
    (place / "evidence.json").write_text(json.dumps(data.draw(grafted(evidence))))
    sentence(lambda: read_evidence(place / "evidence.json"))


def test_numbers_that_are_not_finite_are_damage(place: Path) -> None:
    for number in ("NaN", "Infinity", "1e999", "9" * 5000):
        (place / "evidence.json").write_text(f'{{"version": 1, "temperature": {number}}}')
        assert "is not valid JSON" in (sentence(lambda: read_evidence(place / "evidence.json")) or "")
    (place / "evidence.json").write_bytes(NESTED)
    assert "is not valid JSON" in (sentence(lambda: read_evidence(place / "evidence.json")) or "")
    assert sentence(lambda: read_evidence(place)) is not None  # a folder


@some
@given(st.binary(max_size=60) | st.text("ab:[]{}&*!<-#'\"\n |>,.1e?%@", max_size=60).map(str.encode))
def test_recipes_of_any_bytes(place: Path, content: bytes) -> None:
    (place / "recipe.yaml").write_bytes(content)
    assert sentence(lambda: load_recipe(place / "recipe.yaml")) is not None
