"""The house rules, checked on the source itself: sizes, who may import whom, and what belongs in one place only."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

SOURCE = Path(__file__).parents[1] / "src" / "exalign"
FILES = sorted(SOURCE.rglob("*.py"))
TREES = {file: ast.parse(file.read_text(encoding="utf-8")) for file in FILES}

FOUNDATION = {
    "checksums",
    "device",
    "errors",
    "processes",
    "redaction",
    "settings",
    "storage",
    "strict_yaml",
    "terminal",
}
MAY_IMPORT = {
    "checksums": {"errors", "storage"},
    "errors": {"redaction"},
    "device": set(),
    "processes": {"device", "errors"},
    "redaction": set(),
    "strict_yaml": {"errors"},
    "terminal": set(),
    "settings": set(),
    "storage": {"errors"},
    "objectives": set(),
    "exact": {"objectives"},
    "data": FOUNDATION,
    "models": {*FOUNDATION, "data"},
    "rollout": {*FOUNDATION, "data", "models", "objectives"},
    "training": {*FOUNDATION, "data", "models", "rollout", "objectives"},
    "methods": {*FOUNDATION, "data", "models", "rollout", "training", "objectives"},
    "evaluation": {*FOUNDATION, "data", "models", "rollout", "objectives"},
    "judging": {*FOUNDATION, "data", "models", "rollout", "evaluation"},
    "report": {*FOUNDATION, "evaluation"},
    "run": {
        *FOUNDATION,
        "data",
        "models",
        "rollout",
        "training",
        "methods",
        "evaluation",
        "judging",
        "report",
        "exact",
        "objectives",
    },
    "cli": {*FOUNDATION, "data", "models", "evaluation", "judging", "report", "run", "exact"},
    "__init__": {"run"},
    "__main__": {"cli"},
}


def package_of(file: Path) -> str:
    return file.relative_to(SOURCE).parts[0].removesuffix(".py")


def imports_of(tree: ast.AST) -> set[str]:
    names = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, "imports are absolute"
            names.add(node.module or "")
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return names


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(SOURCE)))
def test_imports_follow_the_arrows(file: Path) -> None:
    package = package_of(file)
    ours = {name.split(".")[1] for name in imports_of(TREES[file]) if name.startswith("exalign.")}
    ours &= set(MAY_IMPORT)
    assert ours - {package} <= MAY_IMPORT[package]


def test_every_package_has_its_place() -> None:
    assert {package_of(file) for file in FILES} <= set(MAY_IMPORT)


MODULES = {
    file: ".".join(file.relative_to(SOURCE.parent).with_suffix("").parts).removesuffix(".__init__") for file in FILES
}


def check_no_circle(edges: dict[str, set[str]]) -> None:
    done: set[str] = set()

    def visit(name: str, path: tuple[str, ...]) -> None:
        assert name not in path, " → ".join((*path[path.index(name) :], name))
        if name not in done:
            for other in edges.get(name, set()) - {name}:
                visit(other, (*path, name))
            done.add(name)

    for name in sorted(edges):
        visit(name, ())


def test_no_import_circle_between_files_or_folders() -> None:
    """Every import counts, in functions and under TYPE_CHECKING too. `exalign` itself hands names on when asked."""
    known = set(MODULES.values()) - {"exalign"}
    edges = {MODULES[file]: imports_of(TREES[file]) & known for file in FILES if MODULES[file] != "exalign"}
    check_no_circle(edges)
    folders: dict[str, set[str]] = {}
    for name, others in edges.items():
        folders.setdefault(name.split(".")[1], set()).update(other.split(".")[1] for other in others)
    check_no_circle(folders)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(SOURCE)))
def test_a_function_fits_in_the_head(file: Path) -> None:
    for node in ast.walk(TREES[file]):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            assert (node.end_lineno or 0) - node.lineno + 1 <= 60, f"{node.name} is longer than 60 lines"
            arguments = [*node.args.posonlyargs, *node.args.args, *node.args.kwonlyargs]
            arguments = [a for a in arguments if a.arg not in ("self", "cls")]
            assert len(arguments) <= 8, f"{node.name} has more than 8 parameters"


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(SOURCE)))
def test_names(file: Path) -> None:
    assert not re.search(r"utils?|helpers?|common|misc", file.stem)
    names = {node.arg for node in ast.walk(TREES[file]) if isinstance(node, ast.arg)}
    assert "loss_type" not in names
    if file.relative_to(SOURCE).as_posix() not in PAIR_FILES:
        assert not {name for name in names if re.match(r"(chosen|rejected)(_|$)", name)}


PAIR_FILES = {"data/shapes.py"}
"""Where a preference pair is still called chosen and rejected: the reader of what the ecosystem writes."""


def only_in(library: str, *allowed: str) -> None:
    users = {
        file.relative_to(SOURCE).as_posix()
        for file in FILES
        if any(name == library or name.startswith(library + ".") for name in imports_of(TREES[file]))
    }
    assert users <= set(allowed)


def test_accelerate_is_known_where_processes_are_and_nowhere_else() -> None:
    only_in("accelerate", "processes.py", "training/distributed.py", "training/loop.py")


def test_one_file_chooses_the_device() -> None:
    for file in FILES:
        asked = {
            ast.unparse(node)
            for node in ast.walk(TREES[file])
            if isinstance(node, ast.Attribute) and node.attr in ("current_accelerator", "is_available")
        }
        assert file.name == "device.py" or asked <= {"torch.distributed.is_available"}, file


def test_no_pickle() -> None:
    only_in("pickle")
    for file in FILES:
        for node in ast.walk(TREES[file]):
            if isinstance(node, ast.Call) and ast.unparse(node.func) == "torch.load":
                assert any(k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in node.keywords), file


def test_the_report_never_imports_torch() -> None:
    for file in FILES:
        if package_of(file) == "report":
            assert not any(name.split(".")[0] in ("torch", "transformers") for name in imports_of(TREES[file]))


@pytest.mark.parametrize(
    "module", ["cli", "run.explain", "report.compare", "evaluation.evidence", "judging.judge", "judging.grading"]
)
def test_what_needs_no_model_does_not_wait_for_torch(module: str) -> None:
    code = (
        f"import sys, exalign.{module}; print(*sorted({{'torch', 'transformers', 'scipy.stats'}} & set(sys.modules)))"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == ""


def test_the_mathematics_imports_torch_only() -> None:
    standard = {"__future__", "math", "collections", "dataclasses", "typing", "functools", "itertools"}
    for file in FILES:
        if package_of(file) in ("objectives", "exact"):
            foreign = {name.split(".")[0] for name in imports_of(TREES[file])} - standard
            assert foreign <= {"torch", "exalign"}
