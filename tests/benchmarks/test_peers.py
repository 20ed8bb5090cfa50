"""TRL's own DPO trainer, on the same pairs and settings, ends at exalign's policy."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

pytest.importorskip("trl", reason="the peers are in the extra 'benchmarks'")

from benchmarks import peers
from exalign.data.store import read_records
from exalign.data.synthetic import write_world
from exalign.errors import InputError
from exalign.models.loading import load_policy, load_tokenizer, save_model
from exalign.models.model_settings import ModelSettings
from exalign.run.carry_out import run_recipe
from exalign.run.recipe import Recipe, make_recipe

CONFIG = {"model_type": "gpt2", "n_layer": 1, "n_embd": 16, "n_head": 2, "n_positions": 112}


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A model, and sixteen pairs of an answer and the one before it."""
    folder = tmp_path_factory.mktemp("peers")
    write_world(folder, num_sft=16, num_prompts=2, num_test=2)
    tokenizer = load_tokenizer(str(folder / "tokenizer"))
    torch.manual_seed(0)
    save_model(load_policy(ModelSettings(config=CONFIG), tokenizer), tokenizer, folder / "model", card="")
    rows = [json.loads(line) for line in (folder / "sft.jsonl").read_text().splitlines()]
    pairs = [
        {"prompt": row["prompt"], "chosen": row["completion"], "rejected": rows[i - 1]["completion"]}
        for i, row in enumerate(rows)
    ]
    (folder / "pairs.jsonl").write_text("".join(f"{json.dumps(pair)}\n" for pair in pairs))
    return folder


def recipe(world: Path, **changes: Any) -> Recipe:
    """Every batch is all pairs, so that both take the same steps whatever order they read in."""
    dpo = {
        "divergence": "forward_kl", "target": "preference", "beta_pi": 0.3, "learning_rate": 1e-3, "epochs": 4,
        "batch_prompts": 16, "schedule": "constant", "warmup_fraction": 0.0, "save_policies": 2,
    }  # fmt: skip
    data = {
        "preferences": {"source": str(world / "pairs.jsonl")},
        "held_out": 0.1,
        "max_prompt_tokens": 48,
        "max_completion_tokens": 48,
    }
    values = {
        "name": "peers",
        "temperature": 1.0,
        "model": {"source": str(world / "model")},
        "data": data,
        "align": {"dpo": dpo},
    }
    return make_recipe({**values, **changes})


def test_both_trainers_end_at_one_policy(world: Path, tmp_path: Path) -> None:
    given = recipe(world)
    theirs = peers.train(given, "dpo", tmp_path / "trl", folder=tmp_path / "run", micro=16)
    ours = run_recipe(given, "align", folder=tmp_path / "run").folder / "align/dpo/model"
    pairs = read_records(tmp_path / "run/preferences/records")
    assert len(pairs) < 16  # one is held out, so the batch has what there is
    before = load_file(world / "model/model.safetensors")
    weights, others = (load_file(place / "model.safetensors") for place in (ours, theirs[-1]))
    moved = max(float((weights[name] - before[name]).abs().max()) for name in before)
    assert moved > 3e-3  # four steps of Adam at 1e-3
    for name in before:
        torch.testing.assert_close(weights[name], others[name], rtol=0, atol=1e-4)


def test_what_trl_does_not_train_is_said(world: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"temperature=1\.0"):
        peers.train(recipe(world, temperature=0.8), "dpo", tmp_path / "trl")
    data = {"preferences": {"source": str(world / "pairs.jsonl")}, "max_prompt_tokens": 48, "max_completion_tokens": 2}
    limited = recipe(world, data=data)
    with pytest.raises(InputError, match="TRL cuts otherwise"):
        peers.train(limited, "dpo", tmp_path / "trl", folder=tmp_path / "run")
