"""What the README shows is carried out, not only printed."""

from __future__ import annotations

import json
import re
import subprocess
from pathlib import Path

import pytest
import torch

from exalign.cli import app
from exalign.data.reading import each
from exalign.data.synthetic import write_world
from exalign.models.loading import load_policy, load_tokenizer, save_model
from exalign.models.model_settings import ModelSettings
from exalign.run.demo import RECIPE
from exalign.run.recipe import Recipe, load_recipe
from run.conftest import tiny_overrides

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
PYTHON = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)


def test_a_recipe_from_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture) -> None:
    write_world(tmp_path / "world", num_sft=32, num_prompts=16, num_test=8)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "recipes").mkdir()
    (tmp_path / "recipes" / "demo.yaml").write_text(RECIPE.read_text())
    changed = PYTHON[0].replace('["align.exo-rw.beta_pi=0.2"]', "overrides")
    assert changed != PYTHON[0]
    exec(changed, {"overrides": tiny_overrides(tmp_path / "world")})
    folder = Path(capsys.readouterr().out.strip().splitlines()[-1])
    assert (folder / "model.safetensors").exists()


def test_the_mathematics_from_python() -> None:
    names: dict = {}
    exec(PYTHON[1], names)
    gradient = names["policy_logp"].grad
    assert gradient.abs().max() > 0
    assert gradient.sum() == pytest.approx(0, abs=1e-6)


def test_step_by_step_from_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_world(tmp_path / "world", num_sft=8, num_prompts=4, num_test=4)
    tokenizer = load_tokenizer(str(tmp_path / "world" / "tokenizer"))
    torch.manual_seed(0)
    tiny = {"model_type": "gpt2", "n_layer": 1, "n_embd": 16, "n_head": 2}
    save_model(load_policy(ModelSettings(config=tiny), tokenizer), tokenizer, tmp_path / "my-model", card="tiny")
    rows = [{"prompt": "This drama", "chosen": f" was fine {i}.", "rejected": " was dull."} for i in range(8)]
    (tmp_path / "preferences.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    names: dict = {}
    exec(PYTHON[2], names)
    assert (tmp_path / "aligned" / "model" / "model.safetensors").exists()
    assert names["counts"]["records"] == 8


def test_every_command_that_is_shown_exists() -> None:
    blocks = re.findall(r"```sh\n(.*?)```", README, flags=re.DOTALL)
    shown = {
        name
        for line in "\n".join(blocks).splitlines()
        if line.startswith("exalign ")
        for name in line.split()[1].split("|")
    }
    assert shown <= {
        command.name or command.callback.__name__ for command in app.registered_commands if command.callback
    }
    assert "run" in shown


def test_every_link_into_the_repository_leads_somewhere() -> None:
    for document in (ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))):
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", document.read_text(encoding="utf-8")):
            if "://" not in target:
                assert (document.parent / target).exists(), f"{document.name}: {target}"


def test_what_the_site_takes_from_other_files_is_there() -> None:
    """A formatter of Python in Markdown takes the line that includes a file for Python."""
    page = (ROOT / "docs" / "add-a-method.md").read_text(encoding="utf-8")
    (included,) = re.findall(r'^```\{\.python\}\n--8<-- "(.*)"\n```$', page, flags=re.MULTILINE)
    assert "class BestOfK(Method)" in (ROOT / included).read_text(encoding="utf-8")
    for document in (ROOT / "docs").rglob("*.md"):
        assert "--8 <" not in document.read_text(encoding="utf-8"), document.name


def sources(recipe: Recipe) -> list[str]:
    kinds = [getattr(recipe.data, name) for name in type(recipe.data).model_fields]
    return [
        source.source
        for kind in kinds
        if kind is not None and not isinstance(kind, int | float)
        for source in each(kind)
    ]


@pytest.mark.parametrize("path", sorted((ROOT / "recipes").glob("*.yaml")), ids=lambda path: path.name)
def test_shipped_recipes_name_data_sets_of_the_hub(path: Path) -> None:
    if path.name != "demo.yaml":  # which writes its own
        assert all(re.fullmatch(r"[\w-]+/[\w-]+", name) for name in sources(load_recipe(path)))


@pytest.mark.parametrize("page", sorted((ROOT / "docs/results").glob("*-cpu*.md")), ids=lambda path: path.name)
def test_the_commands_of_the_results_take_the_files_that_they_were_made_from(page: Path) -> None:
    """The shell expands the commands as they are printed; the recipes that come of it read files alone."""
    data = re.findall(r"```sh\n(FILES=.*?)```", (ROOT / "docs/results/README.md").read_text(), flags=re.DOTALL)
    commands = "\n".join(re.findall(r"```sh\n(.*?)```", page.read_text(), flags=re.DOTALL))
    script = f'exalign() {{ printf "%s\\t" "$@"; echo; }}\n{data[0]}\n{commands}'
    printed = subprocess.run(["bash", "-euc", script], capture_output=True, text=True, check=True).stdout
    runs = [line.split("\t")[1:-1] for line in printed.splitlines() if "recipes/" in line]
    assert runs
    for recipe, *rest in runs:
        overrides = rest[: rest.index("--run")] if "--run" in rest else rest
        read = sources(load_recipe(ROOT / recipe, overrides))
        assert read and all(name.startswith(("../shared/data/", "runs/")) for name in read)
