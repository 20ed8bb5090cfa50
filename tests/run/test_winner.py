"""What a search's best trial trained is what its method's stage ends with, wherever this is interrupted."""

from __future__ import annotations

import os
import shutil
from collections import Counter
from pathlib import Path

import pytest
from safetensors.torch import load_file

from exalign.checksums import write_sums
from exalign.evaluation.run_folder import RunFolder
from exalign.evaluation.schema import Curve
from exalign.run.carry_out import run_recipe
from exalign.run.search import _take_over
from exalign.storage import read_json, remove_leftovers
from run.searched_run import searched_recipe

SEARCH = (
    "align.exo-rw.save_policies=2",
    "search={trials: 3, kl: 50, prompts: 4}",
    "search.methods={exo-rw: {learning_rate: {choices: [1e-4, 1e-2, 1e-3]}}}",
    "align.ppo=null",
)

AS_TUPLES = {"adam_betas": (0.9, 0.95), "trackers": ()}
"""JSON has no tuples."""


def weights(folder: Path) -> dict[str, bytes]:
    """Every weight of the final model and of the policies saved."""
    files = sorted([folder / "model" / "model.safetensors", *folder.glob("policies/*/model.safetensors")])
    return {
        f"{path.parent.name}/{name}": tensor.numpy().tobytes()
        for path in files
        for name, tensor in load_file(path).items()
    }


def folders(place: Path) -> set[str]:
    return {path.name for path in place.iterdir() if path.is_dir()}


PPO = (
    "align={exo-rw: {method: ppo, learning_rate: 1e-3, critic_learning_rate: 1e-3, batch_prompts: 8, "
    "rollout_prompts: 16, passes: 1, save_policies: 2}}",
)
"""Under the other's name, so that the rest of the test is the same."""


@pytest.fixture(scope="module")
def searched(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("searched") / "run"
    run_recipe(searched_recipe(world, *SEARCH), "search", folder=folder)
    return folder


@pytest.mark.parametrize(
    "extra",
    [
        pytest.param((), id="given"),
        pytest.param(("align.exo-rw.fresh_every=2",), id="own samples", marks=pytest.mark.large),  # PPO draws them too
        pytest.param(PPO, id="PPO"),
    ],
)
def test_the_weights_are_those_of_a_training_without_search(
    extra: tuple[str, ...], searched: Path, world: Path, tmp_path: Path
) -> None:
    recipe = searched_recipe(world, *SEARCH, *extra)
    if not extra:
        shutil.copytree(searched, tmp_path / "run")
    run_recipe(recipe, "align", folder=tmp_path / "run")
    place = tmp_path / "run/search/exo-rw"
    best = read_json(place / "best.json")
    for trial in place.glob("trial-*"):
        assert (folders(trial) >= {"checkpoints", "policies"}) is (trial.name == best["folder"])

    own = recipe.align["exo-rw"]
    alone = {"search": None, "align": {"exo-rw": type(own)(**best["settings"] | AS_TUPLES)}}
    run_recipe(recipe.model_copy(update=alone), "align", folder=tmp_path / "alone")
    found, expected = (weights(tmp_path / run / "align/exo-rw") for run in ("run", "alone"))
    assert found == expected and len({name.split("/")[0] for name in found}) == 3
    counts = [read_json(tmp_path / run / "align/exo-rw/done.json")["counts"] for run in ("run", "alone")]
    assert counts[0] == counts[1]

    # The stage took no time to train; what it says of the training is what the trial took.
    (curve,) = (curve for curve in RunFolder(tmp_path / "run").curves(Counter()) if curve.stage == "align/exo-rw")
    assert curve.total("seconds") == pytest.approx(
        read_json(place / best["folder"] / "result.json")["seconds"], abs=0.01
    )


def test_damaged_weights_are_trained_again(searched: Path, world: Path, tmp_path: Path) -> None:
    shutil.copytree(searched, tmp_path, dirs_exist_ok=True)
    trial = tmp_path / "search/exo-rw" / read_json(tmp_path / "search/exo-rw/best.json")["folder"]
    files = {path: path.read_bytes() for path in trial.glob("policies/*/model.safetensors")}
    file = next(iter(files))
    times = file.stat()
    file.write_bytes(files[file][:-1] + bytes([files[file][-1] ^ 1]))
    os.utime(file, ns=(times.st_atime_ns, times.st_mtime_ns))  # a start does not see it; what reads it does
    run_recipe(searched_recipe(world, *SEARCH), "align", folder=tmp_path)
    for path, expected in files.items():
        assert (tmp_path / "align/exo-rw" / path.relative_to(trial)).read_bytes() == expected


def test_a_search_made_again_trains_only_what_is_new_and_what_was_best_may_be_so_again(
    searched: Path, world: Path, tmp_path: Path
) -> None:
    """Ranked at another KL; without the best of three; and with it again."""
    shutil.copytree(searched, tmp_path, dirs_exist_ok=True)
    place, stage = tmp_path / "search/exo-rw", tmp_path / "align/exo-rw"
    run_recipe(searched_recipe(world, *SEARCH), "align", folder=tmp_path)
    best, expected, trained = read_json(place / "best.json"), weights(stage), inodes(stage)
    run_recipe(searched_recipe(world, *SEARCH, "search.kl=49"), "align", folder=tmp_path, redo=True)
    assert read_json(place / "best.json") == {**best, "ranked_at": 49}
    assert inodes(stage) == trained, "beyond every reach another KL ranks the same, and nothing is trained"

    others = sorted({1e-4, 1e-2, 1e-3} - {best["settings"]["learning_rate"]})
    ranges = f"search.methods={{exo-rw: {{learning_rate: {{choices: {others}}}}}}}"
    without = searched_recipe(world, *SEARCH, f"align.exo-rw.learning_rate={others[0]}", "search.trials=2", ranges)
    run_recipe(without, "align", folder=tmp_path, redo=True)
    assert read_json(place / "best.json")["settings"]["learning_rate"] in others
    assert weights(stage) != expected
    run_recipe(searched_recipe(world, *SEARCH), "align", folder=tmp_path, redo=True)
    assert weights(stage) == expected


def inodes(place: Path) -> dict[str, int]:
    """The files of weights and state by their number in the file system."""
    return {
        path.relative_to(place).as_posix(): path.stat().st_ino
        for name in ("policies", "checkpoints")
        for path in (place / name).rglob("*")
        if path.is_file()
    }


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_taking_over_can_be_interrupted_at_any_rename(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trial = tmp_path / "trial-000"
    for name in ("policies/step-000001/a", "rollouts/round-000/b", "checkpoints/step-000001/c", "evaluated/step/d"):
        (trial / name).parent.mkdir(parents=True)
        (trial / name).write_text(name)
        write_sums((trial / name).parent)
    (trial / "metrics.jsonl").write_text('{"step": 1}\n')
    before = contents(trial)
    expected = {name: text for name, text in before.items() if "evaluated" not in name}
    rename, names, fatal = os.replace, 0, 0

    def counted(old: Path, new: Path) -> None:
        nonlocal names
        names += 1
        if names == fatal:
            raise KeyboardInterrupt
        rename(old, new)

    while names >= fatal:
        fatal, names, stage = fatal + 1, 0, tmp_path / f"stage-{fatal}"
        stage.mkdir()
        monkeypatch.setattr(os, "replace", counted)
        try:
            assert _take_over(trial, stage)
        except KeyboardInterrupt:
            monkeypatch.setattr(os, "replace", rename)
            remove_leftovers(stage)
            assert _take_over(trial, stage)
        assert contents(stage) == expected and contents(trial) == before, fatal
    assert fatal == 5, "each of four names has failed once, and then none"


def test_a_total_over_buckets_is_that_of_the_steps() -> None:
    """Seven steps in three buckets are 3 + 2 + 2: 3 · 1 + 2 · 4 + 2 · 8."""
    assert Curve("x", 7, [2.0, 4.5, 6.5], {"seconds": [1.0, 4.0, 8.0]}).total("seconds") == 27.0
    assert Curve("x", 2, [1.0, 2.0], {"seconds": [1.0, None]}).total("seconds") is None
    assert Curve("x", 2, [1.0, 2.0], {}).total("seconds") is None
