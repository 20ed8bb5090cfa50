"""One flipped bit or a lost end in any file of a run: it is said which, or made again; never silently used.

`make faults` damages a file of every kind; here it is a few, others every day.
"""

from __future__ import annotations

import random
import shutil
from datetime import date
from pathlib import Path

import pytest

from exalign.storage import read_sealed
from faults.damage import damage_finished, damage_interrupted, damage_quietly, flip, flip_quietly
from faults.outcome import differing
from faults.starts import Starter
from faults.world import World

SEED = str(date.today())


def test_damage_in_a_finished_run(starter: Starter, faulty_world: World, tmp_path: Path) -> None:
    for outcome in damage_finished(starter, faulty_world, tmp_path, rng=random.Random(SEED), most=2):
        assert outcome.kept, (SEED, outcome)


@pytest.mark.parametrize("stage", ["SFT", "sample"])
def test_damage_in_an_interrupted_run(stage: str, starter: Starter, faulty_world: World, tmp_path: Path) -> None:
    rng = random.Random(SEED)
    for outcome in damage_interrupted(starter, faulty_world, tmp_path, rng=rng, most=1, stages=[stage]):
        assert outcome.kept, (SEED, outcome)


def test_damage_that_size_and_time_do_not_tell_of(starter: Starter, faulty_world: World, tmp_path: Path) -> None:
    for outcome in damage_quietly(starter, faulty_world, tmp_path, rng=random.Random(SEED), most=2):
        assert outcome.kept, (SEED, outcome)


@pytest.mark.parametrize(
    ("stage", "file"),
    [
        ("sample", "sft/model/model.safetensors"),
        ("sample", "sft/model/tokenizer.json"),
        ("score", "reward/model/config.json"),
        ("score", "rollouts/records/part-000000.parquet"),
        ("evaluate", "align/exo-rw/policies/step-000005/model.safetensors"),
    ],
)
def test_what_is_read_as_input_is_named_where_it_is_damaged_and_verify_finds_it_without(
    stage: str, file: str, starter: Starter, faulty_world: World, tmp_path: Path
) -> None:
    folder, log = tmp_path / "run", tmp_path / "log"
    shutil.copytree(faulty_world.finished, folder)
    flip_quietly(folder / file, random.Random(SEED))
    started = starter.exalign("evaluate", faulty_world.recipe, "--run", folder, log=log)
    assert started.status == 0 and "▸" not in started.printed, started.printed  # nothing reads it
    found = starter.exalign("verify", folder, log=log)
    assert f"! {folder / file} is damaged" in found.printed
    assert "1 of" in found.sentence
    command = faulty_world.before(stage, folder)
    flip_quietly(folder / file, random.Random(SEED))
    assert f"{folder / file} is damaged" in starter.exalign(*command, log=log).sentence


def test_verify_reads_all_that_is_written(starter: Starter, faulty_world: World, tmp_path: Path) -> None:
    found = starter.exalign("verify", faulty_world.finished, log=tmp_path / "log")
    assert found.status == 0 and "all are what was written" in found.printed


def test_a_copy_of_a_run_is_read_once(starter: Starter, faulty_world: World, tmp_path: Path) -> None:
    """Its times are others, its files the same; afterwards its times are known."""
    folder = tmp_path / "run"
    shutil.copytree(faulty_world.finished, folder, copy_function=shutil.copyfile)
    for _ in range(2):
        started = starter.exalign("evaluate", faulty_world.recipe, "--run", folder, log=tmp_path / "log")
        assert started.status == 0 and "▸" not in started.printed, started.printed
        for done in folder.rglob("done.json"):
            for name, (size, time, _) in read_sealed(done)["files"].items() if done.parent.name != "report" else ():
                found = (done.parent / name).stat()
                assert (found.st_size, found.st_mtime_ns) == (size, time), done.parent / name
    assert differing(folder, faulty_world.finished) == []


def test_redo_makes_a_damaged_stage_again_and_nothing_else(
    starter: Starter, faulty_world: World, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(faulty_world.finished, folder)
    shard = folder / "rollouts" / "records" / "part-000000.parquet"
    flip(shard, random.Random(SEED))
    command = ["score", faulty_world.recipe, "--run", folder]
    assert f"{shard} is damaged" in starter.exalign(*command, log=tmp_path / "log").sentence
    again = starter.exalign(*command, "--redo", log=tmp_path / "log")
    assert f"! {shard} is damaged" in again.printed
    assert [line.split()[1] for line in again.printed.splitlines() if line.startswith("▸")] == ["rollouts"]
    assert differing(folder, faulty_world.finished) == []


@pytest.mark.parametrize(
    ("command", "file"),
    [
        ("figures {run} --out {out}", "sft/metrics.jsonl"),
        ("compare {run} {whole}", "evaluation/evidence.json"),
        ("assess new {run} --match exo-rw:sft", "evaluation/sft/samples/part-000000.parquet"),
        (
            "judge {run} --against sft --endpoint http://127.0.0.1:9/v1 --model m --dry-run",
            "evaluation/sft/samples/part-000000.parquet",
        ),
    ],
)
def test_what_reads_a_run_names_the_damaged_file(
    command: str, file: str, starter: Starter, faulty_world: World, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    shutil.copytree(faulty_world.finished, folder)
    flip(folder / file, random.Random(SEED))
    words = [word.format(run=folder, whole=faulty_world.finished, out=tmp_path / "figures") for word in command.split()]
    ended = starter.exalign(*words, log=tmp_path / "log", environment={"OPENAI_API_KEY": ""})
    assert str(folder / file) in ended.sentence
