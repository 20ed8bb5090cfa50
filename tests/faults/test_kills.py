"""A run that is killed at any moment, and again while it continues, ends bit for bit as one that was not.

`make faults` kills 50 times in each stage; here it is a few times, at moments that every day differ.
"""

from __future__ import annotations

import random
from datetime import date
from pathlib import Path

import pytest

from faults.kills import kill_stage
from faults.outcome import differing
from faults.starts import Starter
from faults.world import STAGES, World

HITS = 2


@pytest.mark.parametrize("stage", [stage for stage in STAGES if stage != "whole run"])
def test_a_stage_survives_kills(stage: str, starter: Starter, faulty_world: World, tmp_path: Path) -> None:
    seed = f"{date.today()} {stage}"
    done = kill_stage(starter, faulty_world, stage, tmp_path, hits=HITS, rng=random.Random(seed))
    assert not done.failures, (seed, done.failures)
    assert not done.changed, (seed, done.changed)
    assert done.hits >= HITS
    assert done.restarts >= HITS


def test_the_comparison_sees_one_changed_bit_and_one_lost_file(faulty_world: World, tmp_path: Path) -> None:
    """What the test above relies on."""
    folder = tmp_path / "run"
    faulty_world.before("score", folder)
    assert "scored/done.json" in differing(folder, faulty_world.finished)
    whole = set(differing(folder, faulty_world.finished))
    metrics = folder / "sft" / "metrics.jsonl"
    metrics.write_text(metrics.read_text().replace('"step": 7', '"step": 8'))
    assert set(differing(folder, faulty_world.finished)) - whole == {"sft/metrics.jsonl"}
