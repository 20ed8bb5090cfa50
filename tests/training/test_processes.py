"""Two processes give the run of one: the same losses, the same weights, whatever is divided among them."""

from __future__ import annotations

import json
import time
from multiprocessing.context import ForkServerContext
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from exalign.data.store import iter_records, read_header, read_records, shards_of
from exalign.errors import InputError
from exalign.processes import in_order
from exalign.storage import read_json
from exalign.training.distributed import make_accelerator, sharding_wanted
from training.launched import FSDP2, TRAININGS, finish, run_trainings, share_numbers, start
from training.tiny_world import TIMINGS, read_metrics

WHAT_RUNS = {
    "ddp": ["sft", "reward", "align", "align-lora", "kto", "poisoned", "poisoned-loss", "ppo", "ppo-odd", "fresh"],
    "fsdp2": list(TRAININGS),
    "fsdp2-one-group": ["align"],
}
KEPT = "skipped/step-000002.json"
CASES = [(layout, name) for layout, names in WHAT_RUNS.items() for name in names]


@pytest.fixture(scope="module")
def one(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("one")
    threads = torch.get_num_threads()
    run_trainings(folder, list(TRAININGS), token_budget=512)
    torch.set_num_threads(threads)
    return folder


@pytest.fixture(scope="module")
def several(tmp_path_factory: pytest.TempPathFactory, workers: ForkServerContext) -> dict[str, Path]:
    """The trainings of a layout one after the other in the same two processes, as stages of a run are."""
    folders = {}
    for layout, names in WHAT_RUNS.items():
        folders[layout] = tmp_path_factory.mktemp(layout)
        assert finish(start(workers, layout, run_trainings, folders[layout], names)) == [0, 0]
    return folders


def assert_same_run(folder: Path, other: Path, *, rel: float = 2e-4, abs_: float = 2e-6) -> None:
    """Metrics and weights to the rounding of sums in another order."""
    rows, other_rows = (read_metrics(place, without=TIMINGS) for place in (folder, other))
    assert len(rows) == len(other_rows)
    for row, other_row in zip(rows, other_rows, strict=True):
        assert [name for name in row if row[name] is None] == [name for name in other_row if other_row[name] is None]
        numbers, others = ({name: x for name, x in some.items() if x is not None} for some in (row, other_row))
        # The first log-ratios are hardly above rounding, and a correlation has no scale.
        correlations = [some.pop("reward_correlation", 0.0) for some in (numbers, others)]
        assert correlations[0] == pytest.approx(correlations[1], abs=max(1e-3, 10 * abs_))
        assert numbers == pytest.approx(others, rel=rel, abs=abs_)
    models = sorted(path.relative_to(other) for path in other.rglob("model.safetensors"))
    assert sorted(path.relative_to(folder) for path in folder.rglob("model.safetensors")) == models
    for path in models:
        weights, other_weights = load_file(folder / path), load_file(other / path)
        assert weights.keys() == other_weights.keys()
        for name, tensor in other_weights.items():
            torch.testing.assert_close(weights[name], tensor, rtol=5 * rel, atol=5 * abs_)


@pytest.mark.parametrize(("layout", "name"), CASES)
def test_two_processes_give_the_run_of_one(layout: str, name: str, one: Path, several: dict[str, Path]) -> None:
    """Micro-batches are smaller than those of one process, so that each step divides into several."""
    loose = {"rel": 2e-2, "abs_": 1e-3} if name == "align-bf16" else {}
    assert_same_run(several[layout] / name, one / name, **loose)


@pytest.mark.parametrize("name", sorted(TRAININGS))
def test_each_process_holds_its_share_of_the_weights(name: str, several: dict[str, Path]) -> None:
    """Half of the rows of every matrix, one row more where their number is odd."""
    shares = [json.loads((several["fsdp2"] / f"{name}-{rank}.json").read_text()) for rank in range(2)]
    (held, whole), (other_held, _) = shares
    assert held + other_held == whole
    assert max(held, other_held) < 0.55 * whole


def test_the_last_batch_of_an_epoch_counts_once(several: dict[str, Path], one: Path) -> None:
    """It has one prompt: one process works on it, the other repeats it without weight and nothing hangs."""
    for layout in ("ddp", "fsdp2"):
        tokens, expected = ([row["tokens"] for row in read_metrics(place / "sft")] for place in (several[layout], one))
        assert tokens == expected
        assert sum(tokens[:3]) == sum(tokens[3:])
        assert [row["step"] for row in read_metrics(several[layout] / "sft")] == [1, 2, 3, 4, 5, 6]


def test_a_step_that_is_not_finite_on_one_process_is_skipped_on_all(several: dict[str, Path], one: Path) -> None:
    for layout, name in [(layout, name) for layout, name in CASES if name.startswith("poisoned")]:
        assert [row["skipped"] for row in read_metrics(several[layout] / name)] == [0, 1, 0]
        kept, expected = (read_json(place / name / KEPT) for place in (several[layout], one))
        assert [(g["row"], g["finite"]) for g in kept["groups"]] == [
            (g["row"], g["finite"]) for g in expected["groups"]
        ]
        assert (False in [g["finite"] for g in kept["groups"]]) is (expected["loss"] is None)
        losses, others = ([g["loss"] for g in batch["groups"] if g["finite"]] for batch in (kept, expected))
        assert losses == pytest.approx(others, rel=1e-4)


@pytest.mark.parametrize("layout", ["ddp", "fsdp2"])
@pytest.mark.parametrize("first", ["two", "one"])
def test_a_killed_run_continues_on_another_number_of_processes(
    layout: str, first: str, one: Path, tmp_path: Path, workers: ForkServerContext
) -> None:
    """The checkpoints of two processes are those of one, and the other way round."""
    assert_continues(workers, layout, first, tmp_path)
    assert_same_run(tmp_path / "align", one / "align")


def assert_continues(workers: ForkServerContext, layout: str, first: str, folder: Path) -> None:
    """A training on one or two processes, SIGKILL in its middle, and to its end on two or one."""
    log = folder / "align" / "metrics.jsonl"

    def go(number: int) -> list:
        return start(workers, layout if number == 2 else "ddp", run_trainings, folder, ["align"], number=number)

    processes = go({"two": 2, "one": 1}[first])
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and (not log.exists() or log.read_text().count("\n") < 3):
        time.sleep(0.001)
    for process in processes:
        process.kill()
    codes = finish(processes)
    assert codes == [-9] * len(processes), "the run ended before the kill: nothing was tested"
    assert (folder / "align" / "checkpoints" / "step-000002").is_dir()
    assert set(finish(go({"two": 1, "one": 2}[first]))) == {0}


def test_what_cannot_be_had_is_refused_in_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in FSDP2.items():
        monkeypatch.setenv(name, value)
    assert sharding_wanted() is None  # alone
    for name, value, sentence in [
        ("FSDP_VERSION", "1", "set fsdp_version: 2"),
        ("FSDP_CPU_RAM_EFFICIENT_LOADING", "true", "fsdp_cpu_ram_efficient_loading is not supported"),
        ("FSDP_ACTIVATION_CHECKPOINTING", "true", "gradient_checkpointing in the recipe does that"),
        ("FSDP_OFFLOAD_PARAMS", "true", "fsdp_offload_params is not supported"),
        ("FSDP_AUTO_WRAP_POLICY", "SIZE_BASED_WRAP", "only TRANSFORMER_BASED_WRAP"),
    ]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv(name, value)
            with pytest.raises(InputError, match=sentence):
                sharding_wanted()


@pytest.mark.parametrize("name", ["DEEPSPEED", "MEGATRON_LM"])
def test_an_old_configuration_for_deepspeed_is_told_what_takes_its_place(
    name: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(f"ACCELERATE_USE_{name}", "true")
    with pytest.raises(InputError, match="is not supported; use FSDP2"):
        make_accelerator(tmp_path, precision="fp32", trackers=(), some_left_out=False)


@pytest.mark.parametrize(("number", "count"), [(2, 0), (2, 11), (3, 1), (3, 14)])
def test_every_process_makes_its_share_of_the_records(
    number: int, count: int, tmp_path: Path, workers: ForkServerContext
) -> None:
    """In shards of four: whole shards while there is one for each process, then shares of those that are left."""

    def go(number: int, stops_at: str | None = None) -> set[int | None]:
        return set(finish(start(workers, "ddp", share_numbers, tmp_path, count, 4, stops_at, number=number)))

    if count > 4 * number:
        assert go(number, str(4 * number)) == {3}  # in the second round of shards
        assert len([*iter_records(tmp_path)]) == 4 * number and not (tmp_path / "header.json").exists()
    assert go(number) == {0}
    records = read_records(tmp_path)
    assert [record.id for record in records] == [str(place) for place in range(count)]
    assert len(shards_of(tmp_path)) == -(-count // 4)
    counted = {"even": -(-count // 2)} if count else {}
    assert read_header(tmp_path).counts == counted == json.loads((tmp_path / "counted.json").read_text())
    whole = 4 * number * ((count + 3) // (4 * number))  # in rounds of a shard for each process
    wanted = [(n // 4 if n < whole else n % 4) % number for n in range(count)]
    assert [int(record.completions[0].text) for record in records] == wanted


def test_shares_are_put_together_in_order() -> None:
    for count in range(7):
        items = list(range(count))
        assert in_order([items[rank::3] for rank in range(3)]) == items
