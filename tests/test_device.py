"""The device that a run computes on, and how many threads of a CPU."""

from __future__ import annotations

import pytest
import torch
from rich.console import Console

from exalign import device as subject
from exalign.device import choose_threads
from exalign.run.recipe import make_recipe
from exalign.run.runner import Run
from exalign.storage import read_json
from faults.starts import Starter

UNUSABLE = """
from pathlib import Path
import torch
kind = "{kind}"
torch._C._accelerator_getAccelerator = lambda: torch.device(kind)  # what a build for it says on any machine
if kind == "mps":
    torch.accelerator.is_available = lambda: True
assert torch.accelerator.current_accelerator().type == kind

from exalign.data.record import Record
from exalign.device import device
from exalign.models.memory import release_memory
from exalign.rollout.sampler import GroupedSampler
from exalign.rollout.settings import SampleSettings
from exalign.run.materials import ready
from training.tiny_world import make_tokenizer, small_align_run

model = ready(small_align_run(Path("{folder}")))
assert device().type == "cpu"
release_memory()
settings = SampleSettings(num_completions=2, max_new_tokens=3, max_prompt_tokens=8)
drawn = list(GroupedSampler(model, make_tokenizer(), settings, temperature=1.0, seed=0).sample([Record("a", "x")]))
print("drawn", len(drawn[0].completions), model.device)
"""


@pytest.fixture(autouse=True)
def _threads_as_they_were():
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


@pytest.mark.parametrize("value", ["1", "True", "yes", "on"])
def test_the_cpu_is_asked_for_as_accelerate_reads_it(value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda **_: torch.device("cuda"))
    monkeypatch.setenv("ACCELERATE_USE_CPU", value)
    assert subject.device.__wrapped__().type == "cpu"


@pytest.mark.skipif(torch.accelerator.is_available(), reason="there is a driver here")
@pytest.mark.parametrize(
    ("kind", "said"),
    [
        ("cuda", "There is no usable GPU driver; running on the CPU."),
        ("mps", "Apple's GPU (MPS) has no float64, which sampling needs; running on the CPU."),
    ],
)
def test_a_gpu_that_cannot_be_used_leaves_the_cpu_and_says_so_once(
    kind: str, said: str, starter: Starter, tmp_path
) -> None:
    code = UNUSABLE.format(kind=kind, folder=tmp_path / "run")
    run = starter.python(code, tmp_path / "log")
    assert run.status == 0, run.printed
    assert "\ndrawn 2 cpu\n" in run.printed
    assert run.printed.count(said) == 1


@pytest.mark.parametrize("name", ["OMP_NUM_THREADS", "MKL_NUM_THREADS", None])
def test_threads_are_measured_unless_the_environment_or_a_setting_says_how_many(monkeypatch, name) -> None:
    for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(subject, "_seconds_by_threads", lambda most: {1: 0.1, 2: 0.2, most: 0.9})
    torch.set_num_threads(3)
    if name is not None:
        monkeypatch.setenv(name, "3")
        assert choose_threads() is None
        assert torch.get_num_threads() == 3
        assert choose_threads(2) == "2 threads of the CPU, as was asked."
        assert torch.get_num_threads() == 2
    else:
        assert choose_threads() == "1 thread of the CPU: 9.0 times as fast now as 3 threads."
        assert torch.get_num_threads() == 1


def test_a_recipe_says_how_many(tmp_path) -> None:
    values = {"name": "x", "model": {"source": "m"}, "data": {"preferences": {"source": "p"}}}
    Run(make_recipe({**values, "threads": 3}), tmp_path, Console(quiet=True)).carry_out([])
    assert torch.get_num_threads() == read_json(tmp_path / "environment.json")["threads"] == 3
    Run(make_recipe(values), tmp_path, Console(quiet=True)).carry_out([])  # as it began
    Run(make_recipe({**values, "threads": 2}), tmp_path, Console(quiet=True)).carry_out([])
    assert torch.get_num_threads() == 2


def test_a_number_that_is_hardly_faster_is_not_taken(monkeypatch) -> None:
    for variable in ("OMP_NUM_THREADS", "MKL_NUM_THREADS"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr(subject, "_seconds_by_threads", lambda most: {1: 0.9, most: 1.0})
    torch.set_num_threads(2)
    assert choose_threads() is None
    assert torch.get_num_threads() == 2


def test_every_power_of_two_up_to_the_most_is_tried() -> None:
    assert set(subject._seconds_by_threads(3)) == {1, 2, 3}
