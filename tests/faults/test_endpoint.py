"""An endpoint that goes away delays a judge; nothing is lost, and nothing that was answered is asked again."""

from __future__ import annotations

from pathlib import Path

from faults.endpoint import CONCURRENCY, PROMPTS, endpoint_away
from faults.starts import Starter


def test_a_judge_waits_for_an_endpoint_that_is_away(starter: Starter, tmp_path: Path) -> None:
    """Two seconds, in which every question's six attempts would be over many times if they counted."""
    away = endpoint_away(starter, tmp_path, seconds=2.0)
    assert away.first.status == 0, away.first.printed
    assert away.first.printed.count("Nobody answers") == 1
    assert away.questions == 2 * PROMPTS
    assert 1 <= len(away.under_way) <= CONCURRENCY
    assert away.kept, away
