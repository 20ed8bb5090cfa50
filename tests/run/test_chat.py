"""Talking to models in the terminal."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from exalign import __version__
from exalign.cli import app
from exalign.data.record import Record
from exalign.models.loading import load_policy, load_tokenizer, save_model
from exalign.models.model_settings import ModelSettings
from exalign.rollout.sampler import GroupedSampler
from exalign.rollout.settings import SampleSettings
from exalign.run.chat import Speaker

CONFIG = {"model_type": "gpt2", "n_layer": 1, "n_embd": 16, "n_head": 2, "n_positions": 256}
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
HOW = SampleSettings(num_completions=1, max_new_tokens=8, max_prompt_tokens=248)


@pytest.fixture(scope="module")
def models(world: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`chat` with a template, `plain` without."""
    place = tmp_path_factory.mktemp("models")
    tokenizer = load_tokenizer(str(world / "tokenizer"))
    torch.manual_seed(0)
    model = load_policy(ModelSettings(config=CONFIG), tokenizer)
    save_model(model, tokenizer, place / "plain", card="")
    tokenizer.chat_template = TEMPLATE
    save_model(model, tokenizer, place / "chat", card="")
    return place


def test_an_answer_is_a_sample_after_all_that_was_said(models: Path) -> None:
    source = str(models / "chat")
    speaker = Speaker.load(source, max_new_tokens=8, temperature=0.7, seed=3, system="Be brief.")
    first, second = speaker.answer("Hello"), speaker.answer("And then?")
    turns = (
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hello"},
        {"role": "assistant", "content": first},
        {"role": "user", "content": "And then?"},
    )
    tokenizer = load_tokenizer(source)
    model = load_policy(ModelSettings(source=source), tokenizer)
    for name, prompt, said in (("turn-1", turns[:2], first), ("turn-2", turns, second)):
        (drawn,) = GroupedSampler(model, tokenizer, HOW, temperature=0.7, seed=3).sample([Record(name, prompt)])
        assert drawn.completions[0].text == said


def test_two_side_by_side_in_the_terminal(models: Path) -> None:
    arguments = ["chat", str(models / "chat"), "--against", str(models / "plain"), "--max-new-tokens", "4"]
    ended = CliRunner().invoke(app, arguments, input="Hello\n\n/new\nHello\n")
    assert ended.exit_code == 0, ended.output
    assert ended.output.count("models") >= 2 and "plain, which has no chat template" in ended.output.replace("\n", " ")
    assert ended.output.count("/chat ─") == 2 and ended.output.count("/plain ─") == 2  # a panel each, twice


def test_bytes_that_are_no_text_end_no_conversation(models: Path) -> None:
    speaker = Speaker.load(str(models / "chat"), max_new_tokens=1, temperature=0.7, seed=3, system="Be\udcff brief.")
    speaker.answer("Hel\udcfflo")
    assert [turn["content"] for turn in speaker.turns[:2]] == ["Be\ufffd brief.", "Hel\ufffdlo"]
    ended = CliRunner().invoke(app, ["chat", str(models / "plain"), "--max-new-tokens", "1"], input=b"Hel\xfflo\n")
    assert ended.exit_code == 0 and "not UTF-8" in ended.output


def test_what_is_said_of_a_conversation_is_of_this_one(models: Path) -> None:
    cut = "no room for all of it: the beginning is cut"
    arguments = ["chat", str(models / "chat"), "--max-new-tokens", "4", "--system", "Be brief."]
    ended = CliRunner().invoke(app, arguments, input=f"{'long ' * 300}\n/new\nHello\n")
    assert ended.exit_code == 0, ended.output
    assert " ".join(ended.output.split()).count(cut) == 1
    plain = CliRunner().invoke(
        app, ["chat", str(models / "plain"), "--max-new-tokens", "4", "--system", "Be brief."], input=""
    )
    assert "continues each text by itself, without --system" in " ".join(plain.output.split())


def test_the_version_is_said() -> None:
    assert CliRunner().invoke(app, ["--version"]).output == f"exalign {__version__}\n"
