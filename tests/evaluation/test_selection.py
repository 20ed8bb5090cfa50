"""Selection under a KL budget, on a run folder whose truth is known."""

from __future__ import annotations

from pathlib import Path

import pytest
from typer.testing import CliRunner

from evaluation.synthetic_run import World, write_run
from exalign.cli import app
from exalign.errors import InputError
from exalign.evaluation.evidence import build_evidence
from exalign.evaluation.verdict import select


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = write_run(tmp_path_factory.mktemp("selection") / "run", World())
    build_evidence(folder, num_resamples=50)
    return folder


@pytest.mark.parametrize("budget", [0.3, 1.0, 100.0])
def test_no_checkpoint_within_the_budget_has_more_reward(run: Path, budget: float) -> None:
    """All of them surely gained."""
    evidence = build_evidence(run, num_resamples=50)
    selected, without = select(run, budget)
    assert {s.method for s in selected} | set(without) == {method.name for method in evidence.methods}
    rewards = [s.point.reward.estimate for s in selected]
    assert rewards == sorted(rewards, reverse=True) and rewards
    for choice in selected:
        (method,) = (m for m in evidence.methods if m.name == choice.method)
        assert choice.point.kl.estimate <= budget
        assert choice.folder == f"align/{choice.method}/policies/step-{choice.point.step:06d}"
        better = [p for p in method.points if p.reward.estimate > choice.point.reward.estimate]
        assert all(p.kl.estimate > budget for p in better)


def test_a_budget_that_is_too_small_is_said_for_each_method(run: Path) -> None:
    selected, without = select(run, 1e-6)
    assert not selected and without
    result = CliRunner().invoke(app, ["select", str(run), "--kl-budget", "1e-6"])
    assert result.exit_code == 0
    assert all(f"{name} has no checkpoint within 1e-06 nats" in result.stdout for name in without)


def test_what_cannot_be_selected_from_is_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="allows no checkpoint"):
        select(run, 0.0)
    with pytest.raises(InputError, match="finish it with"):
        select(tmp_path, 1.0)
