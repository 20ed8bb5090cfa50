"""PPO as an entry of a recipe: trained, evaluated and reported like every other method."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from exalign.data.store import read_records
from exalign.run.carry_out import run_recipe
from exalign.run.recipe import Recipe
from exalign.run.stages import plan
from exalign.storage import read_json

PPO = (
    "align.ppo={method: ppo, learning_rate: 1e-3, critic_learning_rate: 1e-3, batch_prompts: 8, rollout_prompts: 16, "
    "passes: 1, save_policies: 2, checkpoint_every: 1}"
)


def test_a_recipe_with_ppo_alone_ends_in_evidence(tiny: Callable[..., Recipe], tmp_path: Path) -> None:
    recipe = tiny("align={}", PPO)
    assert [stage.name for stage in plan(recipe)] == [
        "sft", "preferences", "reward", "align/ppo",
        "evaluation/drawn/prompts", "evaluation/prompts", "evaluation/drawn/sft", "evaluation/sft",
        "evaluation/drawn/pool", "evaluation/pool", "evaluation/proxy",
        "evaluation/drawn/ppo", "evaluation/ppo",
        "evaluation/density/ppo", "report",
    ]  # fmt: skip
    run_recipe(recipe, folder=tmp_path)
    assert read_json(tmp_path / "align" / "ppo" / "done.json")["counts"]["completions"] == 24 * 3
    for step in (1, 3):
        samples = read_records(tmp_path / "evaluation" / "ppo" / f"step-{step:06d}" / "samples")
        assert all(c.reward is not None and c.reference_logprob is not None for r in samples for c in r.completions)
    (method,) = read_json(tmp_path / "evaluation" / "evidence.json")["methods"]
    assert (method["name"], method["family"], method["finished"]) == ("ppo", "ppo", True)
    assert method["settings"]["beta"] == 0.1
    assert [point["step"] for point in method["points"]] == [1, 3]
    assert "PPO, β 0.1" in (tmp_path / "report" / "index.html").read_text(encoding="utf-8")


def test_the_critic_starts_from_the_reward_model_where_both_read_the_same_tokens(tiny: Callable[..., Recipe]) -> None:
    def needs(*overrides: str) -> tuple[str, ...]:
        recipe = tiny("align={}", PPO, "score.scorer={function: exalign.data.synthetic:reward}", *overrides)
        return next(stage.needs for stage in plan(recipe) if stage.name == "align/ppo")

    assert needs() == ("sft", "reward")
    assert needs("reward.model={source: elsewhere}") == ("sft",)
    assert needs("align.ppo.critic={source: elsewhere}") == ("sft",)
    assert needs("reward=null") == ("sft",)
