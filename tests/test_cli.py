"""The command line as a person meets it: one sentence and status 2 for every mistake, before any long work."""

from __future__ import annotations

import io
import json
import os
import re
import signal
import subprocess
import sys
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import pytest
from typer.testing import CliRunner

from exalign.cli import app, main
from exalign.data.synthetic import write_world
from exalign.errors import InputError
from exalign.models.loading import load_tokenizer
from exalign.run.demo import RECIPE, copy_recipe
from exalign.run.recipe import RECIPES, load_recipe
from faults.starts import Starter


def exalign(*arguments: str) -> subprocess.CompletedProcess[str]:
    """What the process of the command would do, in this one."""
    out, err, status = io.StringIO(), io.StringIO(), 0
    with redirect_stdout(out), redirect_stderr(err):
        try:
            main(list(arguments))
        except SystemExit as left:
            status = int(left.code or 0)
    return subprocess.CompletedProcess(arguments, status, out.getvalue(), err.getvalue())


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    write_world(folder, num_sft=16, num_prompts=4, num_test=4)
    return folder


def recipe_problem(world: Path, *overrides: str) -> str:
    places = [
        f"tokenizer.source={world}/tokenizer",
        f"data.sft.source={world}/sft.jsonl",
        f"data.prompts.source={world}/prompts.jsonl",
        f"data.evaluation.source={world}/test.jsonl",
    ]
    result = exalign("run", str(RECIPE), "--run", str(world / "run"), *places, *overrides)
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    (line,) = result.stderr.strip().splitlines()
    return line


def test_a_misspelt_setting(world: Path) -> None:
    assert "did you mean epochs?" in recipe_problem(world, "sft.epohs=3")


def test_a_missing_file_names_the_nearest(world: Path) -> None:
    line = recipe_problem(world, f"data.sft.source={world}/stf.jsonl")
    assert "stf.jsonl" in line
    assert "sft.jsonl" in line


def test_a_malformed_row_is_named_with_file_and_row(world: Path) -> None:
    bad = world / "bad.jsonl"
    bad.write_text('{"prompt": "a", "completion": "b"}\n{"prompt": "a", "completion": 3}\n')
    line = recipe_problem(world, f"data.sft.source={bad}")
    assert "bad.jsonl, row 2" in line


def test_bad_evaluation_data_is_found_before_any_training(world: Path) -> None:
    bad = world / "bad-test.jsonl"
    bad.write_text('{"prompt": "a", "completion": "b"}\nnot json\n')
    assert "bad-test.jsonl, row 2" in recipe_problem(world, f"data.evaluation.source={bad}")
    assert not (world / "run" / "sft" / "metrics.jsonl").exists()


def test_a_function_that_does_not_exist(world: Path) -> None:
    assert "no_such_module" in recipe_problem(world, "preferences.scorer={function: 'no_such_module:reward'}")
    assert not (world / "run" / "sft" / "metrics.jsonl").exists()


def test_an_unknown_command_names_the_nearest() -> None:
    result = subprocess.run([sys.executable, "-m", "exalign", "algn"], capture_output=True, text=True, check=False)
    assert result.returncode == 2
    assert "align" in result.stderr and "Traceback" not in result.stderr


def test_ctrl_c_ends_in_one_sentence(world: Path, starter: Starter, tmp_path: Path) -> None:
    places = [f"tokenizer.source={world}/tokenizer", f"data.sft.source={world}/sft.jsonl", "sft.epochs=2000"]
    places += [
        f"data.{name}.source={world}/{file}.jsonl" for name, file in (("prompts", "prompts"), ("evaluation", "test"))
    ]
    log = tmp_path / "log"
    starter.start(["sft", RECIPE, "--run", world / "stopped", *places], log)
    while not (log.exists() and "sft: step 1/" in log.read_text()):
        assert starter.wait(0.01) is None, "it ended before it could be interrupted"
    os.kill(starter.pid, signal.SIGINT)
    ended = starter.wait()
    assert ended is not None and ended.status == 130
    line = ended.printed.splitlines()[-1]
    assert re.fullmatch(r"error: Interrupted: sft after step \d+ of 2000\. The same command .*\.", line)


def test_help_lists_every_stage() -> None:
    result = exalign("--help")
    assert result.returncode == 0
    for command in (
        "sft",
        "reward",
        "sample",
        "score",
        "align",
        "evaluate",
        "report",
        "run",
        "demo",
        "inspect",
        "recipe",
    ):
        assert f" {command} " in result.stdout


def test_where_the_terminal_has_no_tau_it_is_spelled_out() -> None:
    command, ascii_alone = (
        [sys.executable, "-m", "exalign", "recipe", "--explain", "temperature"],
        {"PYTHONIOENCODING": "ascii"},
    )
    result = subprocess.run(command, capture_output=True, check=False, env=os.environ | ascii_alone)
    assert result.returncode == 0 and b"\\u03c4: one temperature" in result.stdout


def test_shipped_recipes_are_listed_and_copied(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    listed = CliRunner().invoke(app, ["recipes"]).output.splitlines()
    assert [line.split("  ")[0] for line in listed] == sorted(path.stem for path in RECIPES.glob("*.yaml"))
    assert all(line.split("  ")[1] for line in listed)
    with pytest.raises(InputError, match="exalign recipes copy imdb writes it here"):
        load_recipe("recipes/imdb.yaml")
    assert CliRunner().invoke(app, ["recipes", "copy", "imdb"]).output == "wrote imdb.yaml\n"
    assert load_recipe("imdb.yaml") == load_recipe(RECIPES / "imdb.yaml")
    with pytest.raises(InputError, match="is there already"):
        copy_recipe("imdb")
    for other in ("imbd", "../imdb"):
        with pytest.raises(InputError, match="did you mean imdb"):
            copy_recipe(other)


def test_recipe_prints_what_can_be_read_again(tmp_path: Path) -> None:
    printed = exalign("recipe", str(RECIPE), "align.exo-rw.beta_pi=0.25").stdout
    (tmp_path / "again.yaml").write_text(printed)
    assert exalign("recipe", str(tmp_path / "again.yaml")).stdout == printed
    assert "beta_pi: 0.25" in printed


def test_explain_prints_every_setting() -> None:
    printed = exalign("recipe", "--explain").stdout
    assert "align.NAME.beta_pi" in printed
    assert "sample.num_completions" in printed
    assert printed.count("shuffle_seed integer") == printed.count("adam_betas list") == 1  # what sections share, once
    assert "as above: data.sft.source to data.sft.streaming" in printed and "label_smoothing: epsilon" in printed
    lines = exalign("recipe", "data.sft", "--explain").stdout.splitlines()
    names = [line.split()[0] for line in lines if not line.startswith(" ")]
    assert names[0] == "data.sft" and all(name.startswith("data.sft.") for name in names[1:]) and len(names) > 5


@pytest.mark.parametrize(
    ("arguments", "said"),
    [(["algn"], "algn is no setting of a recipe; did you mean align?"), (["align", "seed=1"], "seed=1 is one more")],
)
def test_explaining_what_there_is_not_is_one_sentence(arguments: list[str], said: str) -> None:
    result = exalign("recipe", *arguments, "--explain")
    assert result.returncode == 2
    assert said in result.stderr and "Traceback" not in result.stderr


def test_inspect_shows_tokens_and_counts(world: Path) -> None:
    rows = [{"prompt": "This drama", "chosen": " was fine.", "rejected": " was dull."}]
    rows.append({"prompt": "This drama", "chosen": " was fine.", "rejected": " was fine."})
    (world / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    result = exalign("inspect", str(world / "pairs.jsonl"), "--model", str(world / "tokenizer"))
    assert result.returncode == 0
    assert "preferred" in result.stdout
    assert "pairs equal" in result.stdout


def test_inspect_reads_turns_of_human_and_assistant_as_align_does(world: Path, tmp_path: Path) -> None:
    """As messages for a model with a chat template, unless told otherwise."""
    tokenizer = load_tokenizer(str(world / "tokenizer"))
    tokenizer.chat_template = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }} {% endfor %}"
    tokenizer.save_pretrained(tmp_path / "chat")
    said = {name: f"\n\nHuman: Was it good?\n\nAssistant: It was {name}." for name in ("fine", "dull")}
    (tmp_path / "hh.jsonl").write_text(json.dumps({"chosen": said["fine"], "rejected": said["dull"]}) + "\n")
    read = exalign("inspect", str(tmp_path / "hh.jsonl"), "--model", str(tmp_path / "chat")).stdout
    told = exalign("inspect", str(tmp_path / "hh.jsonl"), "chat=false", "--model", str(tmp_path / "chat")).stdout
    assert "prompts read as dialogues" in read and "prompts read as" not in told


def test_names_that_are_no_file_end_in_a_sentence(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty.yaml").write_text("")
    (tmp_path / "bytes.yaml").write_bytes(b"\xff\xfe")
    said = {
        ".": ". is a folder, and a recipe is a file",
        f"{'a' * 260}.yaml": "cannot be read",
        "empty.yaml": "empty.yaml is empty",
        "bytes.yaml": "bytes.yaml is not UTF-8 at byte 1",
    }
    for name, sentence in said.items():
        ended = CliRunner().invoke(app, ["run", name])
        assert isinstance(ended.exception, InputError) and sentence in str(ended.exception), name
    ended = CliRunner().invoke(app, ["select", "nosuch", "--kl-budget", "2"])
    assert isinstance(ended.exception, InputError) and str(ended.exception) == "There is no folder nosuch."
