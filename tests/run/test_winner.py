"""What a search's best trial trained is what its method's stage ends with, wherever this is interrupted."""

from __future__ import annotations

import os
from collections import Counter
from contextlib import suppress
from pathlib import Path

import pytest
from safetensors.torch import load_file

from exalign.checksums import write_sums
from exalign.evaluation.run_folder import RunFolder
from exalign.evaluation.schema import Curve
from exalign.run.carry_out import run_recipe
from exalign.run.winner import forget_weights, give_back, hand_over, take_over
from exalign.storage import read_json, remove_leftovers
from run.searched_run import searched_recipe

SEARCH = (
    "align.exo-rw.save_policies=2",
    "search={trials: 3, kl: 50, prompts: 4}",
    "search.methods={exo-rw: {learning_rate: {choices: [1e-4, 1e-2, 1e-3]}}}",
    "ppo={}",
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


TRAINED = {"policies", "checkpoints"}

PPO = (
    "align={}",
    "ppo={exo-rw: {learning_rate: 1e-3, critic_learning_rate: 1e-3, batch_prompts: 8, rollout_prompts: 16, passes: 1, "
    "save_policies: 2}}",
)
"""Under the other's name, so that the rest of the test is the same."""


@pytest.mark.parametrize("extra", [(), ("align.exo-rw.rounds=2",), PPO], ids=["one round", "two rounds", "PPO"])
def test_the_weights_are_those_of_a_training_without_search(
    extra: tuple[str, ...], world: Path, tmp_path: Path
) -> None:
    recipe = searched_recipe(world, *SEARCH, *extra)
    run_recipe(recipe, "search", folder=tmp_path / "run")
    best = read_json(tmp_path / "run/search/exo-rw/best.json")
    place = tmp_path / "run/search/exo-rw"
    assert {"checkpoints", "policies"} <= folders(place / "handed-over")
    trials = [place / f"trial-{number:03d}" for number in range(3)]
    assert all(not folders(trial) & {"model", "policies", "checkpoints"} for trial in trials)
    run_recipe(recipe, "align", folder=tmp_path / "run")
    assert not (place / "handed-over").exists()

    section = "ppo" if extra is PPO else "align"
    own = getattr(recipe, section)["exo-rw"]
    alone = {"search": None, section: {"exo-rw": type(own)(**best["settings"] | AS_TUPLES)}}
    run_recipe(recipe.model_copy(update=alone), "align", folder=tmp_path / "alone")
    found, expected = (weights(tmp_path / run / "align/exo-rw") for run in ("run", "alone"))
    assert found == expected and len({name.split("/")[0] for name in found}) == 3
    counts = [read_json(tmp_path / run / "align/exo-rw/done.json")["counts"] for run in ("run", "alone")]
    assert counts[0] == counts[1]

    # The stage took no time to train; what it says of the training is what the trial took.
    (curve,) = (curve for curve in RunFolder(tmp_path / "run").curves(Counter()) if curve.stage == "align/exo-rw")
    assert curve.total("seconds") == pytest.approx(
        read_json(trials[best["trial"]] / "result.json")["seconds"], abs=0.01
    )


def test_damaged_weights_are_trained_again(world: Path, tmp_path: Path) -> None:
    recipe = searched_recipe(world, *SEARCH)
    run_recipe(recipe, "search", folder=tmp_path)
    handed = tmp_path / "search/exo-rw/handed-over"
    file = next(handed.glob("policies/*/model.safetensors"))
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    undamaged = {path: path.read_bytes() for path in handed.glob("policies/*/model.safetensors") if path != file}
    run_recipe(recipe, "align", folder=tmp_path)
    assert not handed.exists()
    for path, expected in undamaged.items():
        assert (tmp_path / "align/exo-rw" / path.relative_to(handed)).read_bytes() == expected
    assert len(weights(tmp_path / "align/exo-rw")) == 3 * len(load_file(file_of_model(tmp_path)))


@pytest.mark.parametrize("taken", [False, True], ids=["handed over", "taken over"])
def test_a_search_made_again_with_the_same_best_does_not_train_it_again(
    taken: bool, world: Path, tmp_path: Path
) -> None:
    """Beyond every reach another KL ranks the same. The very files of the weights are there before and after."""
    run_recipe(searched_recipe(world, *SEARCH), "align" if taken else "search", folder=tmp_path)
    stage, handed = tmp_path / "align/exo-rw", tmp_path / "search/exo-rw/handed-over"
    trained = files_of(stage if taken else handed)
    best = read_json(tmp_path / "search/exo-rw/best.json")
    again = searched_recipe(world, *SEARCH, "search.kl=49")
    run_recipe(again, "search", folder=tmp_path, redo=True)
    assert read_json(tmp_path / "search/exo-rw/best.json") == {**best, "ranked_at": 49}
    assert files_of(handed) == trained
    if taken:
        assert files_of(stage) == trained, "what was aligned before stays until it is aligned again"
    run_recipe(again, "align", folder=tmp_path, redo=True)
    assert files_of(stage) == trained and not handed.exists()
    assert not any(folders(trial) & {"model", *TRAINED} for trial in (tmp_path / "search/exo-rw").glob("trial-*"))


def test_another_best_takes_the_place_of_the_one_before(world: Path, tmp_path: Path) -> None:
    """The best of three, then without it, then with it again: an earlier trial keeps no weights."""
    run_recipe(searched_recipe(world, *SEARCH), "align", folder=tmp_path)
    best = read_json(tmp_path / "search/exo-rw/best.json")["settings"]["learning_rate"]
    expected = weights(tmp_path / "align/exo-rw")
    others = sorted({1e-4, 1e-2, 1e-3} - {best})
    without = searched_recipe(
        world, *SEARCH, f"align.exo-rw.learning_rate={others[0]}", "search.trials=2",
        f"search.methods={{exo-rw: {{learning_rate: {{choices: {others}}}}}}}"
    )  # fmt: skip
    run_recipe(without, "align", folder=tmp_path, redo=True)
    assert read_json(tmp_path / "search/exo-rw/best.json")["settings"]["learning_rate"] in others
    assert weights(tmp_path / "align/exo-rw") != expected
    places = list((tmp_path / "search/exo-rw").glob("*-[0-9]*"))
    assert len(places) == 3 and not any(folders(place) & {"model", *TRAINED} for place in places)
    run_recipe(searched_recipe(world, *SEARCH), "align", folder=tmp_path, redo=True)
    assert weights(tmp_path / "align/exo-rw") == expected


def files_of(place: Path) -> dict[str, int]:
    """The files of weights and state by their number in the file system."""
    return {
        path.relative_to(place).as_posix(): path.stat().st_ino
        for name in TRAINED
        for path in (place / name).rglob("*")
        if path.is_file()
    }


def file_of_model(run: Path) -> Path:
    return run / "align/exo-rw/model/model.safetensors"


def contents(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def trial_at(folder: Path) -> Path:
    """What training leaves, in outline."""
    for name in ("policies/step-000001/a", "rollouts/round-000/b", "checkpoints/step-000001/c", "evaluated/step/d"):
        (folder / name).parent.mkdir(parents=True)
        (folder / name).write_text(name)
        write_sums((folder / name).parent)
    (folder / "metrics.jsonl").write_text('{"step": 1}\n')
    return folder


def test_an_interruption_at_any_move_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Handing over and taking over make seven moves, the copy of the metrics among them; one fails, then all is done
    again as after a kill."""
    expected = {
        name: text for name, text in contents(trial_at(tmp_path / "as it was")).items() if "evaluated" not in name
    }
    replace, moves, fatal = os.replace, 0, 0

    def counted(source: Path, target: Path) -> None:
        nonlocal moves
        moves += 1
        if moves == fatal:
            raise KeyboardInterrupt
        replace(source, target)

    while moves >= fatal:
        fatal, moves = fatal + 1, 0
        run = tmp_path / f"run-{fatal}"
        trial, handed, stage = trial_at(run / "trial-000"), run / "handed-over", run / "stage"
        stage.mkdir()
        monkeypatch.setattr(os, "replace", counted)
        try:
            hand_over(trial, handed)
            assert take_over(handed, stage)
        except KeyboardInterrupt:
            monkeypatch.setattr(os, "replace", replace)
            hand_over(trial, handed)
            take_over(handed, stage)
        assert contents(stage) == expected, fatal
        assert not handed.exists() and folders(trial) == {"evaluated"} and (trial / "metrics.jsonl").exists()
    assert fatal == 9, "every move has failed once, and then none"


@pytest.mark.parametrize("source", ["handed", "stage"])
def test_giving_back_can_be_interrupted_at_any_rename(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rename, names, fatal = os.replace, 0, 0

    def counted(old: Path, new: Path) -> None:
        nonlocal names
        names += 1
        if names == fatal:
            raise KeyboardInterrupt
        rename(old, new)

    while names >= fatal:
        fatal += 1
        run = tmp_path / f"run-{fatal}"
        trial, handed, stage = trial_at(run / "trial-000"), run / "handed-over", run / "stage"
        (trial / "result.json").touch()
        (trial / "evaluated/step").rename(trial / "evaluated/step-000001")
        expected = contents(trial)
        stage.mkdir()
        hand_over(trial, handed)
        assert source == "handed" or take_over(handed, stage)
        assert contents(trial) != expected
        names = 0
        monkeypatch.setattr(os, "replace", counted)
        with suppress(KeyboardInterrupt):
            give_back([trial], handed, stage)
        monkeypatch.setattr(os, "replace", rename)
        remove_leftovers(run)
        give_back([trial], handed, stage)
        assert contents(trial) == expected and not handed.exists(), fatal
    assert fatal > 3


def test_weights_of_another_training_are_not_given_to_a_trial(tmp_path: Path) -> None:
    """One that took other times is another training, though its steps were the same."""
    trial, stage = trial_at(tmp_path / "trial-000"), trial_at(tmp_path / "stage")
    (trial / "result.json").touch()
    (trial / "evaluated/step").rename(trial / "evaluated/step-000001")
    forget_weights(trial)
    (stage / "metrics.jsonl").write_text('{"step": 1, "seconds": 2}\n')
    give_back([trial], tmp_path / "handed-over", stage)
    assert folders(trial) == {"rollouts", "evaluated"}


def test_a_total_over_buckets_is_that_of_the_steps() -> None:
    """Seven steps in three buckets are 3 + 2 + 2: 3 · 1 + 2 · 4 + 2 · 8."""
    assert Curve("x", 7, [2.0, 4.5, 6.5], {"seconds": [1.0, 4.0, 8.0]}).total("seconds") == 27.0
    assert Curve("x", 2, [1.0, 2.0], {"seconds": [1.0, None]}).total("seconds") is None
    assert Curve("x", 2, [1.0, 2.0], {}).total("seconds") is None
