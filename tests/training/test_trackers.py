"""Every training of a run stands in trackers in the run's group, under its place in the run: read back where one is."""

from __future__ import annotations

import json
import sqlite3
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

from exalign.errors import InputError
from exalign.methods.sft import SFT, train_sft
from exalign.training.loop import tracked_as
from training.tiny_world import make_groups, make_policy, make_tokenizer

PLACES = [("films", "search/exo/trial-0"), ("films", "sft"), ("jokes", "sft")]


@pytest.fixture
def runs(tmp_path: Path) -> Path:
    for run in ("films", "jokes"):
        (tmp_path / run).mkdir()
        (tmp_path / run / "recipe.yaml").touch()
    return tmp_path


def in_wandb(folder: Path) -> list[tuple[str, str]]:
    import wandb
    from wandb.proto.wandb_internal_pb2 import RunRecord

    wandb.teardown()  # a process of its own writes the files, and not always before a run is finished
    files = [file.read_bytes() for file in folder.glob("wandb/offline-run-*/run-*.wandb")]
    known = [RunRecord(run_group=group, display_name=name).SerializeToString() for group, name in PLACES]
    return [PLACES[number] for number, written in enumerate(known) for file in files if written in file]


def in_trackio(folder: Path) -> list[tuple[str, str]]:
    with closing(sqlite3.connect(folder / "exalign.db")) as database:
        rows = database.execute("select config, run_name from configs").fetchall()
    return sorted((json.loads(config)["_Group"], name) for config, name in rows)


def in_mlflow(_: Path) -> list[tuple[str, str]]:
    import mlflow

    found = mlflow.search_runs(experiment_names=["exalign"], output_format="list")
    return sorted((run.data.tags["group"], run.info.run_name) for run in found)


@pytest.mark.parametrize("read", [in_wandb, in_trackio, in_mlflow])
def test_trainings_of_a_run_are_a_group(
    read: Callable[[Path], list[tuple[str, str]]], runs: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tracker, folder = read.__name__.removeprefix("in_"), runs / "tracked"
    folder.mkdir()
    places = {"WANDB_DIR": folder, "TRACKIO_DIR": folder, "MLFLOW_TRACKING_URI": f"sqlite:///{folder}/mlflow.db"}
    for name, value in {"WANDB_MODE": "offline", "WANDB_SILENT": "true", **places}.items():
        monkeypatch.setenv(name, str(value))  # read as they are imported
    pytest.importorskip(tracker, reason="a tracker that is no part of the test environment")
    for group, name in PLACES:
        settings = SFT(batch_prompts=4, trackers=(tracker,))
        train_sft(make_policy(), make_tokenizer(), make_groups(4), settings, runs / group / name)
    assert read(folder) == PLACES


def test_a_tracker_that_does_not_begin_is_one_sentence(tmp_path: Path) -> None:
    """As one does for which nobody is logged in; here a file lies where its folder would."""
    (tmp_path / "exalign").touch()
    settings = SFT(batch_prompts=4, trackers=("tensorboard",))
    with pytest.raises(InputError, match=r"^trackers: .*exalign"):
        train_sft(make_policy(), make_tokenizer(), make_groups(4), settings, tmp_path)


def test_the_run_is_the_folder_with_a_recipe(runs: Path) -> None:
    for group, name in PLACES:
        assert tracked_as(runs / group / name)["wandb"] == {"group": group, "name": name}
    assert tracked_as(runs / "mine/dpo")["trackio"] == {"group": "mine", "name": "dpo"}  # trained without a recipe
