"""Every stage on a pretend accelerator: no tensors of two devices meet, the numbers are the CPU's, and few waits.

What a GPU alone can show, its kernels and its speed, is not tested here.
"""

from __future__ import annotations

import pytest

from device import work
from device.pretend import MEMORY, apart
from exalign.data.synthetic import write_world
from exalign.storage import read_json

LARGE = {
    *("ppo, critic first", "dpo on own pairs", "grpo"),
    *(f"{kind}, {name}" for kind in ("exo", "sampling") for name in ("three heads", "windows")),
}
"""Near kin of the others: the same lines of code, with other numbers."""


@pytest.mark.parametrize(
    "stage", [pytest.param(name, marks=[pytest.mark.large] * (name in LARGE)) for name in work.STAGES]
)
def test_a_stage_gives_the_numbers_of_the_cpu(stage, workers, tmp_path) -> None:
    ours = apart(workers, work.numbers_of, stage, tmp_path / "device")
    assert ours == pytest.approx(work.numbers_of(stage, tmp_path / "cpu"), abs=1e-4, rel=1e-4)


@pytest.mark.parametrize("name", work.CONFIGS)
def test_completions_share_their_prompt_on_the_device_too(name, workers) -> None:
    expected = "PlainDecoder" if name == "no shared prompts" else "SharedDecoder"
    there = "PagedDecoder" if expected == "SharedDecoder" and name != "narrow heads" else expected
    assert (apart(workers, work.decoder_of, name), work.decoder_of(name)) == (there, expected)


@pytest.mark.parametrize("stage", work.HALF)
def test_half_precision_gives_the_numbers_of_the_cpu_to_its_rounding(stage, workers, tmp_path) -> None:
    ours = apart(workers, work.numbers_of, stage, tmp_path / "device")
    assert ours == pytest.approx(work.numbers_of(stage, tmp_path / "cpu"), abs=0.05, rel=0.1)


def test_a_decoded_step_costs_the_same_for_any_number_of_groups_and_rows(workers) -> None:
    """One wait, one copy for the model and one for the draw; the first step also has the mask of the prompts."""
    costs = apart(workers, work.each, work.cost_of_decoding, (1, 2), (3, 2), (3, 8), (7, 4))
    for steps in costs:
        assert all(step["waits"] == 1 for step in steps), steps
        assert all(step["uploads"] == 2 for step in steps[1:]), steps
        assert [step["launches"] for step in steps[1:]] == [step["launches"] for step in costs[0][1:]]


@pytest.mark.parametrize("kind", work.TRAINED)
def test_a_micro_batch_waits_once_and_uploads_twice_whatever_the_number_of_trees(kind, workers) -> None:
    for cost in apart(workers, work.each, work.cost_of_micro_batch, *((kind, count) for count in (1, 4, 12))):
        assert cost.get("waits", 0) <= 1, cost
        assert cost["uploads"] <= 2, cost


@pytest.mark.parametrize("kind", [*work.OWN, "ppo"])
def test_a_micro_batch_of_own_samples_costs_no_more(kind, workers) -> None:
    """PPO has a copy more, for its critic's row."""
    for cost in apart(workers, work.each, work.cost_of_own_micro_batch, (kind, 2), (kind, 8)):
        assert cost.get("waits", 0) <= 1, cost
        assert cost["uploads"] <= 2 + (kind == "ppo"), cost


@pytest.mark.large
def test_a_whole_run_ends_with_its_report_and_notes_the_memory_it_began_with(workers, tmp_path) -> None:
    write_world(tmp_path / "world", num_sft=64, num_prompts=24, num_test=12)
    stages = apart(workers, work.whole_run, tmp_path / "world", tmp_path / "run")
    assert {"sft", "rollouts", "scored", "reward", "align/exo", "align/own", "align/ppo", "evaluation/own"} <= {*stages}
    assert read_json(tmp_path / "run" / "environment.json")["memory"] == MEMORY


def test_sizes_left_to_choose_follow_from_the_device(workers, tmp_path) -> None:
    assert work.chosen_sizes(tmp_path / "cpu") == (2048, 64)
    tokens, completions = apart(workers, work.chosen_sizes, tmp_path / "device")
    assert (tokens, completions) not in ((2048, 64), (32768, 1024))


@pytest.mark.parametrize("kind", ["exo", "reward model"])
def test_a_step_waits_twice_more(kind, workers, tmp_path) -> None:
    """And not at all between a micro-batch and the next one, which is made ready while the device works."""
    micro, cost = apart(workers, work.cost_of_step, kind, 12, 64, tmp_path)
    assert micro > 3
    asked = [line for line in cost.pop("asked") if line.startswith("waits")]
    assert cost["waits"] == (micro if kind == "reward model" else 0) + 2, cost
    assert sorted(line.split(":")[1] for line in asked) == sorted(
        [" training/loop.py", " training/distributed.py", *[" objectives/matching.py"] * (kind == "reward model")]
    )
    assert cost["uploads"] <= 2 * micro, cost
