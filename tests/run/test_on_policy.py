"""Alignment on own samples as an entry of a recipe, and preferences from K completions with rewards."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest

from exalign.data.record import Completion, Record
from exalign.data.store import read_records
from exalign.errors import InputError
from exalign.methods.matching import distance_of
from exalign.run.carry_out import run_recipe
from exalign.run.recipe import Recipe
from exalign.run.stages import plan, preferences_of, preferred_only
from exalign.storage import read_json

OWN = (
    "align={again: {learning_rate: 1e-3, batch_prompts: 8, save_policies: 2, fresh_every: 2, beta_pi: 0.5}, "
    "grpo: {method: grpo, learning_rate: 1e-3, batch_prompts: 8, epochs: 2}}"
)


def test_a_recipe_of_own_samples_needs_no_rollouts_and_ends_in_evidence(
    tiny: Callable[..., Recipe], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = tiny(OWN)
    assert [stage.name for stage in plan(recipe)] == [
        "sft", "preferences", "reward", "align/again", "align/grpo",
        "evaluation/drawn/prompts", "evaluation/prompts", "evaluation/drawn/sft", "evaluation/sft",
        "evaluation/drawn/pool", "evaluation/pool", "evaluation/proxy",
        "evaluation/drawn/again", "evaluation/again",
        "evaluation/drawn/grpo", "evaluation/grpo",
        "evaluation/density/again", "evaluation/density/grpo", "report",
    ]  # fmt: skip
    run_recipe(recipe, folder=tmp_path)
    folder = tmp_path / "align" / "again"
    assert read_json(folder / "done.json")["counts"]["completions"] == 24 * 3
    assert read_json(tmp_path / "align" / "grpo" / "done.json")["counts"]["completions"] == 2 * 24 * 3
    methods = read_json(tmp_path / "evaluation" / "evidence.json")["methods"]
    assert [(m["name"], m["family"], m["settings"]["fresh_every"]) for m in methods] == [
        ("again", "exo", 2), ("grpo", "grpo", 1),
    ]  # fmt: skip
    assert "align.again: β_π = 0.5 sends the policy's own samples back" in " ".join(capsys.readouterr().out.split())


def test_alpha_acts(tiny: Callable[..., Recipe]) -> None:
    recipe = tiny("align={a: {divergence: alpha, alpha: 0.3}}")
    settings = recipe.align["a"]
    assert distance_of(settings).keywords == {"alpha": 0.3}  # type: ignore[attr-defined]


def ranked(*rewards: float) -> Record:
    return Record("7", "Hi", tuple(Completion(str(place), reward=r) for place, r in enumerate(rewards)))


def test_completions_with_rewards_give_disjoint_pairs_and_the_best_to_learn_from() -> None:
    counts: Counter[str] = Counter()
    pairs = list(preferences_of(ranked(0, 2, 1, 1), counts))
    assert [([c.text for c in pair.completions], pair.preferred) for pair in pairs] == [(["0", "1"], 1)]
    assert counts == {"pairs": 1, "pairs_tied": 1}
    assert [c.text for c in preferred_only(ranked(0, 2, 1, 2)).completions] == ["1"]
    with pytest.raises(InputError, match="row 7 has no preference"):
        list(preferences_of(ranked(1), counts))


def test_a_recipe_reads_its_preferences_from_rewards(tiny: Callable[..., Recipe], tmp_path: Path) -> None:
    rows = [
        {"prompt": f"The new comedy {i}", "completions": [" is fun.", " is dull."], "rewards": [i % 3, 1]}
        for i in range(9)
    ]
    (tmp_path / "k.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    recipe = tiny("preferences=null", f"data.preferences={{source: {tmp_path}/k.jsonl}}", "sft.epochs=1")
    run_recipe(recipe, "preferences", folder=tmp_path / "run")
    kept = read_records(tmp_path / "run" / "preferences" / "records")
    assert [record.preferred for record in kept] == [1, 0] * 3  # rewards 0 and 2 against 1; the ties are dropped
    assert read_json(tmp_path / "run" / "preferences" / "done.json")["counts"]["pairs_tied"] == 3
