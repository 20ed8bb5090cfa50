"""The example of a reward that can be checked: its questions, its reward, and a recipe that holds."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

from exalign.run.carry_out import check_inputs
from exalign.run.recipe import make_recipe

EXAMPLES = Path(__file__).parents[2] / "examples"


def example() -> ModuleType:
    spec = importlib.util.spec_from_file_location("largest", EXAMPLES / "largest.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_its_recipe_passes_the_preflight_with_the_reward_on_real_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    largest = example()
    largest.write_questions(tmp_path)
    rows = {n: [json.loads(x) for x in (tmp_path / f"{n}.jsonl").open()] for n in ("sft", "prompts", "evaluation")}
    assert [len(found) for found in rows.values()] == [4 * 872, 872, 128]
    assert not {row["prompt"] for row in rows["prompts"]} & {row["prompt"] for row in rows["evaluation"]}
    answers = {row["prompt"]: row["answer"] for row in rows["prompts"]}
    right = sum(row["completion"].strip() == answers[row["prompt"]] for row in rows["sft"]) / len(rows["sft"])
    assert right == pytest.approx(1 / 3 + 2 / 3 / 10, abs=0.03)  # told rightly, or by chance: 4 standard errors
    monkeypatch.syspath_prepend(str(EXAMPLES))
    assert check_inputs(make_recipe(largest.recipe_of(tmp_path))) == []
    assert largest.correct(["3 9 4 :"] * 3, [" 9", "9 ", " 4"], ["9"] * 3) == [1.0, 1.0, 0.0]
