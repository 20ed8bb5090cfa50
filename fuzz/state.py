"""Fuzzes what a run reads of itself: checkpoint.json and state.pt of a training, and evidence.json."""

from __future__ import annotations

import json
import tempfile
import warnings
from pathlib import Path
from typing import Any

import atheris

with atheris.instrument_imports(
    include=["exalign.training.checkpoint", "exalign.storage", "exalign.evaluation.schema"]
):
    import torch

    from exalign.evaluation.schema import (
        Answer,
        Curve,
        EqualKL,
        Evidence,
        Example,
        FrontierPoint,
        Interval,
        Judgements,
        MethodEvidence,
        ModelJudge,
        ModelMatchUp,
        Stage,
        Standing,
        Tally,
        WinRate,
        read_evidence,
        write_evidence,
    )
    from exalign.storage import fingerprint_path, write_json
    from exalign.training.checkpoint import MetricsLog, Position, load_checkpoint, save_checkpoint

from fuzz.contract import fuzz
from fuzz.grafting import choices, grafted

FOLDER = Path(tempfile.mkdtemp(prefix="exalign-fuzz-"))
STEP = FOLDER / "checkpoints" / "step-000001"
warnings.simplefilter("ignore")


def small() -> tuple[torch.nn.Module, torch.optim.Optimizer]:
    """A model and its optimizer."""
    model = torch.nn.Linear(2, 1)
    return model, torch.optim.AdamW(model.parameters())


def write_valid() -> tuple[bytes, bytes]:
    """A checkpoint; the bytes of its two files."""
    model, optimizer = small()
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    save_checkpoint(FOLDER / "checkpoints", Position(1, 0, "run"), model, optimizer, writes=True)
    values = json.loads((STEP / "checkpoint.json").read_text())
    del values["sealed"], values["seal"]  # they would catch every change before it can do anything
    return json.dumps(values).encode(), (STEP / "state.pt").read_bytes()


def valid_evidence() -> dict[str, Any]:
    """Evidence with something in most of its parts, as JSON values."""
    span = Interval(1.0, None, 2.0, 3)
    point = FrontierPoint(1, span, span, 1.0, 4)
    tally = Tally("exo", "sft", "overall", span, span, span, span, 3, 0)
    match_up = ModelMatchUp(tally, 3, 0, 0, span, span, None, span, 5, 6, 0, 0)
    method = MethodEvidence("exo", "exo", "reward", True, [point], [WinRate("sft", span, 0.5, 3, 0)], settings={"a": 1})
    evidence = Evidence(
        name="x",
        policy=None,
        temperature=1.0,
        kl_budget=None,
        confidence=0.95,
        num_resamples=10,
        seed=0,
        num_prompts=3,
        sft=point,
        methods=[method],
        equal_kl=EqualKL(1.0, [Standing("exo", span, None)]),
        comparisons=[],
        optimum=None,
        best_of_n=[],
        examples=[Example("0", "a", [Answer("exo", "b", 1.0)])],
        curves=[Curve("align", 1, [1.0], {"loss": [None]})],
        stages=[Stage("sft", 1.0, {"rows": 3})],
        record_counts={"a": {"b": 1}},
        notes=["a"],
        environment={"python": "3"},
        recipe="name: x",
        judgements=Judgements([ModelJudge("j", "instruction", [match_up])]),
    )
    write_evidence(FOLDER / "evidence.json", evidence)
    values: dict[str, Any] = json.loads((FOLDER / "evidence.json").read_text())
    return values


CHECKPOINT, STATE = write_valid()
EVIDENCE = valid_evidence()


def read(data: bytes) -> None:
    """The first byte says which file is damaged. A damaged state.pt gets a checkpoint.json that vouches for it."""
    if not data:
        return
    kind, rest = data[0] % 7, data[1:]
    if kind == 5:
        kind, rest = 0, grafted(json.loads(CHECKPOINT), rest)
    elif kind == 6:
        kind, rest = 3, grafted(EVIDENCE, rest)
    if kind == 0:
        (STEP / "checkpoint.json").write_bytes(rest)
        (STEP / "state.pt").write_bytes(STATE)
        continued()
    elif kind in (1, 2):
        content = bytearray(STATE)
        for at in range(0, len(rest) - 2, 3):
            content[int.from_bytes(rest[at : at + 2], "big") % len(content)] = rest[at + 2]
        (STEP / "state.pt").write_bytes(rest if kind == 1 else bytes(content))
        state = fingerprint_path(STEP / "state.pt")
        write_json(STEP / "checkpoint.json", {"step": 1, "skipped_in_a_row": 0, "run": "run", "state": state})
        continued()
    elif kind == 3:
        (FOLDER / "evidence.json").write_bytes(rest)
        evidence = read_evidence(FOLDER / "evidence.json")
        write_evidence(FOLDER / "again.json", evidence)
        assert read_evidence(FOLDER / "again.json") == evidence
    else:
        (FOLDER / "metrics.jsonl").write_bytes(rest)
        with MetricsLog(FOLDER / "metrics.jsonl", step=3, writes=True) as log:
            log.append({"step": 4})


def continued() -> None:
    """Where a training would continue: at the checkpoint, or at the start where it is damaged."""
    assert load_checkpoint(FOLDER / "checkpoints", "run", *small()).step in (0, 1)


def seeds() -> list[bytes]:
    """A valid input of each kind."""
    rows = b'{"step": 1, "loss": 0.5}\n{"step": 2, "loss": null}\n{"step": 4}\n'
    damaged = [b"\1" + STATE, b"\2\1\1\1\3\7\5"]
    grown = [*choices(5), *choices(6)]
    return [b"\0" + CHECKPOINT, *damaged, b"\3" + json.dumps(EVIDENCE).encode(), b"\4" + rows, *grown]


if __name__ == "__main__":
    fuzz("state", read, seeds())
