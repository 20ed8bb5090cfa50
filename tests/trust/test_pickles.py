"""A file that asks to run a function is refused, and the function does not run."""

from __future__ import annotations

import io
import json
import os
import pickle
import shutil
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch

from exalign.data.reading import DataSettings, read_source
from exalign.errors import InputError
from exalign.models.loading import load_classifier, load_policy, load_tokenizer, save_model
from exalign.models.model_settings import ModelSettings
from exalign.rollout.scorers import check_scorer
from exalign.rollout.settings import ScorerSettings
from exalign.storage import fingerprint_path, write_json
from exalign.training.checkpoint import Position, load_checkpoint
from training.tiny_world import CONFIG, make_policy, make_tokenizer


class Planted:
    """Creates the folder `place` when it is unpickled."""

    def __init__(self, place: Path) -> None:
        self.place = place

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.mkdir, (str(self.place),)


@pytest.fixture
def ran(tmp_path: Path) -> Path:
    """The folder that exists once planted code has run."""
    return tmp_path / "ran"


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An ordinary model of somebody else's, safetensors and all: nothing vouches for its files."""
    folder = tmp_path_factory.mktemp("models") / "model"
    save_model(make_policy(), make_tokenizer(), folder, card="")
    (folder / "SHA256SUMS").unlink()
    return folder


@pytest.fixture
def folder(model_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(model_folder, tmp_path / "model"))


def planted(place: Path) -> bytes:
    stream = io.BytesIO()
    torch.save({"transformer.wte.weight": Planted(place)}, stream)
    return stream.getvalue()


def test_the_planted_file_runs_where_it_is_trusted(ran: Path) -> None:
    """What the tests below rely on."""
    torch.load(io.BytesIO(planted(ran)), weights_only=False)
    assert ran.is_dir()


@pytest.mark.parametrize("load", [load_policy, load_classifier])
def test_a_pickled_model_is_refused(folder: Path, ran: Path, load) -> None:
    (folder / "model.safetensors").unlink()
    (folder / "pytorch_model.bin").write_bytes(planted(ran))
    with pytest.raises(InputError, match=r"no model\.safetensors; weights that are pickled are not opened"):
        load(ModelSettings(source=str(folder)), make_tokenizer())
    assert not ran.exists()


def test_an_honest_pickled_model_is_refused_too(folder: Path) -> None:
    """Safetensors only, whatever the pickle holds."""
    (folder / "model.safetensors").unlink()
    torch.save(make_policy().state_dict(), folder / "pytorch_model.bin")
    with pytest.raises(InputError, match="safetensors"):
        load_policy(ModelSettings(source=str(folder)), make_tokenizer())


def test_a_pickle_beside_safetensors_is_not_opened(folder: Path, ran: Path) -> None:
    for name in ("pytorch_model.bin", "training_args.bin", "optimizer.pt", "scheduler.pt", "rng_state.pth"):
        (folder / name).write_bytes(planted(ran))
    load_policy(ModelSettings(source=str(folder)), load_tokenizer(str(folder)))
    assert not ran.exists()


def test_a_pickled_adapter_is_refused(folder: Path, ran: Path, tmp_path: Path) -> None:
    adapter = tmp_path / "adapter"
    adapter.mkdir()
    settings = {"peft_type": "LORA", "base_model_name_or_path": str(folder), "task_type": "CAUSAL_LM", "r": 2}
    (adapter / "adapter_config.json").write_text(json.dumps({**settings, "target_modules": ["c_attn"]}))
    (adapter / "adapter_model.bin").write_bytes(planted(ran))
    shutil.copy(folder / "config.json", adapter)
    with pytest.raises(InputError):
        load_policy(ModelSettings(source=str(adapter)), make_tokenizer())
    assert not ran.exists()


def test_a_truncated_safetensors_file_is_one_sentence(folder: Path) -> None:
    content = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match="Cannot load the model"):
        load_policy(ModelSettings(source=str(folder)), make_tokenizer())


@pytest.mark.parametrize("vouched", [True, False])
def test_a_planted_checkpoint_is_passed_over(tmp_path: Path, ran: Path, vouched: bool) -> None:
    """Even one whose checkpoint.json has the hash of the planted file."""
    step = tmp_path / "checkpoints" / "step-000003"
    step.mkdir(parents=True)
    (step / "state.pt").write_bytes(planted(ran))
    state = fingerprint_path(step / "state.pt") if vouched else "0" * 16
    write_json(step / "checkpoint.json", {"step": 3, "skipped_in_a_row": 0, "run": "ours", "state": state})
    model = torch.nn.Linear(1, 1)
    with pytest.warns(UserWarning, match="damaged"):
        position = load_checkpoint(step.parent, "ours", model, torch.optim.AdamW(model.parameters()))
    assert position == Position(0, 0, "ours")
    assert not ran.exists()


@pytest.mark.parametrize("name", ["data.pkl", "data.pt", "data.npy", "data.pickle.gz"])
def test_a_pickle_is_no_data(tmp_path: Path, ran: Path, name: str) -> None:
    (tmp_path / name).write_bytes(pickle.dumps(Planted(ran)))
    with pytest.raises(InputError):
        list(read_source(DataSettings(source=str(tmp_path / name)), Counter()))
    assert not ran.exists()


CODE = """
import os
from transformers import GPT2Config, GPT2LMHeadModel
os.makedirs({place!r}, exist_ok=True)
class PlantedConfig(GPT2Config):
    model_type = "planted"
class PlantedModel(GPT2LMHeadModel):
    config_class = PlantedConfig
"""


@pytest.fixture
def with_code(folder: Path, ran: Path) -> Path:
    """A model that brings Python files along and asks for them to be run."""
    (folder / "planted.py").write_text(CODE.format(place=str(ran)))
    config = json.loads((folder / "config.json").read_text())
    wanted = {"AutoConfig": "planted.PlantedConfig", "AutoModelForCausalLM": "planted.PlantedModel"}
    wanted["AutoModelForSequenceClassification"] = "planted.PlantedModel"
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "planted", "auto_map": wanted}))
    return folder


def test_code_that_comes_with_a_model_does_not_run(with_code: Path, ran: Path) -> None:
    """Nor is anybody asked whether it may, which would hang a run without a terminal."""
    source = str(with_code)
    for load in (load_policy, load_classifier):
        with pytest.raises(InputError):
            load(ModelSettings(source=source), make_tokenizer())
    with pytest.raises(InputError):
        check_scorer(ScorerSettings(classifier=source), [])
    assert not ran.exists()


def test_it_runs_where_the_setting_says_so(
    with_code: Path, ran: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The setting acts, and the test above could have failed."""
    from transformers import dynamic_module_utils

    monkeypatch.setattr(dynamic_module_utils, "HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr(sys, "path", [*sys.path])
    load_policy(ModelSettings(source=str(with_code), trust_remote_code=True), make_tokenizer())
    assert ran.is_dir()


def test_a_config_cannot_fetch_a_kernel(tmp_path: Path) -> None:
    """The name of an attention kernel on a hub is code to download and run."""
    for name in ("attn_implementation", "_attn_implementation"):
        with pytest.raises(InputError, match="kernel"):
            load_policy(ModelSettings(config={**CONFIG, name: "somebody/kernel"}), make_tokenizer())
