"""The wheel that people install: it holds what it needs, names what it imports, and aligns a model from nothing."""

from __future__ import annotations

import ast
import json
import os
import re
import shutil
import subprocess
import sys
import sysconfig
import tomllib
import venv
from contextlib import suppress
from importlib.metadata import PackageNotFoundError, packages_distributions, requires
from pathlib import Path

from exalign.data.synthetic import write_world
from exalign.models.loading import load_policy, load_tokenizer, save_model
from exalign.models.model_settings import ModelSettings

HOUSE = Path(__file__).parents[1]
CONFIG = {"model_type": "gpt2", "n_layer": 1, "n_embd": 16, "n_head": 2, "n_positions": 96}


def installed(folder: Path) -> Path:
    """The `exalign` of a new environment that holds the wheel alone; what it depends on is that of this one."""
    pip = [sys.executable, "-m", "pip", "--quiet", "--disable-pip-version-check"]
    build = ["wheel", "--no-deps", "--no-build-isolation", "--wheel-dir", str(folder / "dist"), str(folder / "source")]
    shutil.copytree(HOUSE / "src/exalign", folder / "source/src/exalign", ignore=shutil.ignore_patterns("__pycache__"))
    for file in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(HOUSE / file, folder / "source")
    subprocess.run([*pip, *build], check=True)
    (wheel,) = (folder / "dist").glob("exalign-*.whl")
    environment = folder / "environment"
    venv.create(environment)
    python = environment / "bin" / "python"
    subprocess.run([*pip, "--python", str(python), "install", "--no-deps", "--no-index", str(wheel)], check=True)
    (site,) = environment.glob("lib/python*/site-packages")
    (site / "others.pth").write_text(f"{sysconfig.get_path('purelib')}\n")  # whose own .pth files are not followed
    return environment / "bin" / "exalign"


def test_a_model_and_pairs_become_an_aligned_model_and_a_report(tmp_path: Path) -> None:
    write_world(tmp_path / "world", num_sft=40, num_prompts=4, num_test=4)
    tokenizer = load_tokenizer(str(tmp_path / "world/tokenizer"))
    save_model(load_policy(ModelSettings(config=CONFIG), tokenizer), tokenizer, tmp_path / "model", card="")
    rows = [json.loads(line) for line in (tmp_path / "world/sft.jsonl").read_text().splitlines()]
    pairs = [{"prompt": r["prompt"], "chosen": r["completion"], "rejected": f"no {i}"} for i, r in enumerate(rows)]
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(pair) + "\n" for pair in pairs))

    command = [str(installed(tmp_path)), "align", "model", "pairs.jsonl", "--out", "aligned"]
    alone = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    run = subprocess.run(command, cwd=tmp_path, env=alone, capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "Warning" not in run.stderr and "Traceback" not in run.stderr
    assert list((tmp_path / "aligned").glob("align/*/model/model.safetensors"))
    page = (tmp_path / "aligned/report/index.html").read_text()
    assert "<svg" in page and "{{" not in page
    where = [str(tmp_path / "environment/bin/python"), "-c", "import exalign; print(exalign.__file__)"]
    found = subprocess.run(where, cwd=tmp_path, env=alone, capture_output=True, text=True).stdout
    assert found.startswith(str(tmp_path / "environment"))


def test_every_import_is_of_a_declared_dependency() -> None:
    project = tomllib.loads((HOUSE / "pyproject.toml").read_text())["project"]
    extras = [line for name, lines in project["optional-dependencies"].items() if name != "dev" for line in lines]
    open_, declared = [*project["dependencies"], *extras], {"exalign"}
    while open_:
        line = open_.pop()
        name = re.split(r"[^\w.-]", line)[0].lower().replace("_", "-")
        if name not in declared and "extra ==" not in line:
            declared.add(name)
            with suppress(PackageNotFoundError):  # an extra that is not installed here
                open_ += requires(name) or []
    trees = [ast.parse(path.read_text()) for path in (HOUSE / "src").rglob("*.py")]
    nodes = [node for tree in trees for node in ast.walk(tree)]
    names = {alias.name for node in nodes if isinstance(node, ast.Import) for alias in node.names}
    names |= {node.module for node in nodes if isinstance(node, ast.ImportFrom) and node.module and not node.level}
    owners = packages_distributions()
    for root in sorted({name.split(".")[0] for name in names} - set(sys.stdlib_module_names)):
        owning = {owner.lower().replace("_", "-") for owner in owners.get(root, [root])}
        assert owning & declared, f"{root} ({owning}) is imported and not declared"
