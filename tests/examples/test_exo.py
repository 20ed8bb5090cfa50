"""The example in one file is the library's own algorithm, and it works."""

from __future__ import annotations

import importlib.util
import json
import re
from functools import partial
from pathlib import Path
from types import ModuleType

import pytest

from training.tiny_world import by_formula, make_groups, make_policy

ROOT = Path(__file__).parents[2]
GOLDEN = ROOT / "tests" / "training" / "golden_align.json"


def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("exo_example", ROOT / "examples" / "exo.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_its_losses_are_the_golden_trace_of_the_library() -> None:
    """The same model, groups and settings as `test_golden_trace` of alignment with reverse KL to a reward target."""
    exo, policy = example(), by_formula(make_policy())
    groups = exo.with_reference(policy, make_groups(10), temperature=0.8)
    loss = partial(exo.exo_loss, beta_pi=0.5, beta_r=0.1, temperature=0.8)
    losses = list(exo.steps(loss, policy, groups, learning_rate=1e-3, epochs=6, batch_prompts=4))
    assert losses == pytest.approx(json.loads(GOLDEN.read_text())["reverse_kl reward"]["loss"], rel=1e-6)


def test_it_runs_from_the_texts_to_the_evaluation(capsys: pytest.CaptureFixture) -> None:
    example().main(num_sft=64, num_prompts=8, num_test=4)
    last = capsys.readouterr().out.splitlines()[-2:]
    number = r"-?\d+\.\d\d"
    for name, line in zip(("supervised", "aligned"), last, strict=True):
        interval = rf"{number} \[{number}, {number}\]"
        assert re.fullmatch(rf"{name}: +reward {interval} at KL {interval} nats", line)
    assert "at KL 0.00 [0.00, 0.00] nats" in last[0]  # the supervised policy is where KL is measured from


def test_it_can_be_read_at_one_sitting() -> None:
    assert len((ROOT / "examples" / "exo.py").read_text(encoding="utf-8").splitlines()) <= 150
