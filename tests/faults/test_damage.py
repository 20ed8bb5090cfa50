"""One flipped bit or a lost end in any file of a run: it is said which, or made again; never silently used.

`make faults` damages a file of every kind; here it is a few, others every day.
"""

from __future__ import annotations

import random
import shutil
from datetime import date
from pathlib import Path

import pytest

from faults.damage import damage_finished, damage_interrupted, flip
from faults.outcome import differing
from faults.starts import Starter
from faults.world import World

SEED = str(date.today())


def test_damage_in_a_finished_run(starter: Starter, faulty_world: World, tmp_path: Path) -> None:
    for outcome in damage_finished(starter, faulty_world, tmp_path, rng=random.Random(SEED), most=3):
        assert outcome.kept, (SEED, outcome)


@pytest.mark.parametrize("stage", ["SFT", "sample"])
def test_damage_in_an_interrupted_run(stage: str, starter: Starter, faulty_world: World, tmp_path: Path) -> None:
    rng = random.Random(SEED)
    for outcome in damage_interrupted(starter, faulty_world, tmp_path, rng=rng, most=2, stages=[stage]):
        assert outcome.kept, (SEED, outcome)


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
