"""A training that stopped goes on by one command, and what was made in two parts is never taken for what was not."""

from __future__ import annotations

import io
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from rich.console import Console

from exalign.cli import main
from exalign.errors import InputError
from exalign.run.demo import RECIPE
from exalign.run.recipe import Recipe, load_recipe
from exalign.run.runner import Run
from exalign.run.stages import plan
from exalign.storage import read_json
from exalign.training.guards import NotFiniteError
from run.conftest import tiny_overrides
from training.tiny_world import read_metrics

MakeRecipe = Callable[..., Recipe]
# Decay multiplies each matrix by 1 − 1e-2 · 500 = −4 in every one of the 24 steps; at a tenth of the rate, by 0.5. Each
# step has all rows, so that none is finite after one that is not.
DIVERGES = (
    "sft={learning_rate: 1e-2, weight_decay: 500, schedule: constant, warmup_fraction: 0, epochs: 24,"
    " batch_prompts: 64, checkpoint_every: 1, max_skipped_in_a_row: 2}"
)
LOWER = "sft.learning_rate=1e-3"


def carry_out(recipe: Recipe, folder: Path, *targets: str, redo: bool = False, recover: bool = False) -> str:
    printed = io.StringIO()
    run = Run(recipe, folder, Console(file=printed, width=200), redo=redo, recover=recover)
    run.carry_out(plan(recipe), targets)
    return printed.getvalue()


@pytest.fixture(scope="module")
def stopped(world: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """A run whose supervised training stopped, and the step of its last good checkpoint."""
    folder = tmp_path_factory.mktemp("stopped") / "run"
    with pytest.raises(NotFiniteError, match="--recover goes on after step"):
        carry_out(load_recipe(RECIPE, tiny_overrides(world, DIVERGES)), folder, "sft")
    skipped = [row["skipped"] for row in read_metrics(folder / "sft")]
    assert skipped == [0] * (len(skipped) - 2) + [1, 1]
    return folder, len(skipped) - 3


@pytest.fixture
def copy(stopped: tuple[Path, int], tmp_path: Path) -> Path:
    shutil.copytree(stopped[0], tmp_path / "copy")
    return tmp_path / "copy"


def test_one_command_goes_on_and_tells_what_was_done(
    stopped: tuple[Path, int], copy: Path, world: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    good = stopped[1]
    before = read_metrics(copy / "sft")
    overrides = tiny_overrides(world, DIVERGES, LOWER)
    with pytest.raises(InputError, match="; --recover goes on with it from its last good checkpoint"):
        carry_out(load_recipe(RECIPE, overrides), copy, "sft")
    main(["sft", str(RECIPE), *overrides, "--recover", "--run", str(copy)])
    assert "1 recoveries" in capsys.readouterr().out
    rows = read_metrics(copy / "sft")
    assert rows[:good] == before[:good]
    assert [row["skipped"] for row in rows] == [0] * 24
    assert read_json(copy / "sft" / "done.json")["counts"]["recoveries"] == 1
    (told,) = read_json(copy / "sft" / "recoveries.json")
    assert (told["after_step"], told["were"]["learning_rate"], told["settings"]["learning_rate"]) == (good, 1e-2, 1e-3)
    assert "not finite 2 times in a row" in told["reason"]


def test_where_no_checkpoint_is_good_it_starts_over(tiny: MakeRecipe, tmp_path: Path) -> None:
    """As the message promises; the model is then that of one training, and stands as such."""
    wild = DIVERGES.replace("learning_rate: 1e-2", "learning_rate: 1e30")
    with pytest.raises(NotFiniteError, match="--recover starts over"):
        carry_out(tiny(wild), tmp_path / "run", "sft")
    carry_out(tiny(wild, LOWER), tmp_path / "run", "sft", recover=True)
    carry_out(tiny(wild, LOWER), tmp_path / "new", "sft")
    weights = [(tmp_path / name / "sft/model/model.safetensors").read_bytes() for name in ("run", "new")]
    assert weights[0] == weights[1]
    assert "sft: done before, skipped" in carry_out(tiny(wild, LOWER), tmp_path / "run", "sft")


def test_what_was_recovered_is_not_what_was_made_in_one_go(copy: Path, tiny: MakeRecipe, tmp_path: Path) -> None:
    recipe = tiny(DIVERGES, LOWER)
    carry_out(recipe, copy, "sft", recover=True)
    assert "sft: done before, skipped" in carry_out(recipe, copy, "sft")
    carry_out(recipe, copy, "preferences")
    shutil.rmtree(copy / "sft")  # made again it is another model, and what was drawn from this one shows that
    with pytest.raises(InputError, match="the stage preferences was made by another recipe"):
        carry_out(recipe, copy, "preferences")
    carry_out(recipe, tmp_path / "new", "preferences")
    assert "preferences: done before" in carry_out(recipe, tmp_path / "new", "preferences")


def test_a_recovery_changes_how_far_steps_go_and_nothing_else(copy: Path, tiny: MakeRecipe) -> None:
    with pytest.raises(InputError, match="stopped with these very settings"):
        carry_out(tiny(DIVERGES), copy, "sft", recover=True)
    for other in ("sft.weight_decay=0", "seed=1", "data.max_prompt_tokens=48"):
        with pytest.raises(InputError, match=r"was made by another recipe .*what differs\.$"):
            carry_out(tiny(DIVERGES, LOWER, other), copy, "sft", recover=True)
    with pytest.raises(InputError, match=r"recipe \((?!.*(align|evaluate))[^)]*sft.weight_decay was"):  # what it reads
        carry_out(
            tiny(DIVERGES, LOWER, "sft.weight_decay=0", "align.exo-rw.epochs=7", "evaluate.prompts=9"), copy, "sft"
        )
    carry_out(tiny(DIVERGES, LOWER), copy, "sft", redo=True)
    assert not (copy / "sft" / "recoveries.json").exists()
    assert len(read_metrics(copy / "sft")) == 24


def test_settings_without_effect_on_the_result_may_change_at_any_time(copy: Path, tiny: MakeRecipe) -> None:
    """Interrupted, the stage goes on (to the same end, one step later); complete, it stands."""
    with pytest.raises(NotFiniteError, match="not finite 3 times in a row"):
        carry_out(tiny(DIVERGES, "sft.max_skipped_in_a_row=3", "sft.token_budget=256"), copy, "sft")
    assert {row["token_budget"] for row in read_metrics(copy / "sft")} == {256, 2048}
    carry_out(tiny(DIVERGES, LOWER), copy, "sft", recover=True)
    changed = tiny(DIVERGES, LOWER, "sft.gradient_checkpointing=true", "sft.checkpoint_every=7")
    assert "sft: done before, skipped" in carry_out(changed, copy, "sft")
