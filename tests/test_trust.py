"""What the source may not do, checked on the source itself: run what it reads, or speak to a network unasked."""

from __future__ import annotations

import ast
import csv
import io
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from exalign.report.wording import csv_text

SOURCE = Path(__file__).parents[1] / "src" / "exalign"
FILES = sorted(SOURCE.rglob("*.py"))
TREES = {file.relative_to(SOURCE).as_posix(): ast.parse(file.read_text(encoding="utf-8")) for file in FILES}

UNPICKLERS = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve", "jsonpickle"}
NETWORK = {"socket", "ssl", "http", "urllib.request", "requests", "httpx", "aiohttp", "ftplib", "smtplib", "webbrowser"}
PROCESSES = {"subprocess", "os.system", "os.popen", "pty"}


def calls(tree: ast.AST) -> Iterator[tuple[str, ast.Call]]:
    """Every call with the name of what is called, as it is written."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            yield ast.unparse(node.func), node


def argument(call: ast.Call, name: str) -> str | None:
    """A keyword argument as it is written."""
    return next((ast.unparse(keyword.value) for keyword in call.keywords if keyword.arg == name), None)


def imported(tree: ast.AST) -> set[str]:
    names: set[str] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def users_of(*modules: str) -> set[str]:
    return {
        file
        for file, tree in TREES.items()
        if any(name == module or name.startswith(module + ".") for name in imported(tree) for module in modules)
    }


def test_nothing_is_unpickled_and_no_process_is_started() -> None:
    assert users_of(*UNPICKLERS) == set()
    assert users_of(*PROCESSES) == {"rollout/vllm.py"}  # ends vLLM's own process with this one
    forbidden = {"eval", "exec", "compile", "__import__", "torch.hub.load", "torch.jit.load", "np.load", "numpy.load"}
    forbidden |= {"os.system", "os.popen", "pd.read_pickle", "pandas.read_pickle"}
    assert {(file, name) for file, tree in TREES.items() for name, _ in calls(tree) if name in forbidden} == set()


def test_tensors_are_loaded_as_tensors_only() -> None:
    found = [(file, argument(call, "weights_only")) for file, tree in TREES.items() for name, call in calls(tree)
             if name == "torch.load"]  # fmt: skip
    assert found == [("training/checkpoint.py", "True")]


def test_yaml_is_loaded_in_one_place() -> None:
    loaders = {(file, name) for file, tree in TREES.items() for name, _ in calls(tree)
               if name.startswith("yaml.") and "load" in name}  # fmt: skip
    assert loaders == set()
    assert {file for file, tree in TREES.items() if "yaml.SafeLoader" in ast.unparse(tree)} == {"strict_yaml.py"}


def test_models_come_as_safetensors_and_remote_code_is_off_unless_named() -> None:
    found = []
    for file, tree in TREES.items():
        for name, call in calls(tree):
            # PEFT and the makers of quantisers know no remote code.
            if name.endswith((".from_pretrained", ".from_config")) and not name.startswith(("Peft", "AutoHfQuantizer")):
                found.append(file)
                assert argument(call, "trust_remote_code") in (
                    "False",
                    "trust_remote_code",
                    "settings.trust_remote_code",
                )
                if name == "auto_class.from_pretrained":
                    assert argument(call, "use_safetensors") == "True"
            if name.endswith(".save_pretrained") and "tokenizer" not in name:
                assert argument(call, "safe_serialization") == "True"
    assert set(found) == {"models/loading.py", "run/plan.py"}
    written = [argument(call, "trust_remote_code") for tree in TREES.values() for _, call in calls(tree)]
    assert "True" not in written


def test_who_may_speak_to_a_network() -> None:
    assert users_of(*NETWORK) == set()
    assert users_of("openai") == {"judging/askers.py"}  # asks the endpoint that --endpoint names
    assert users_of("uvicorn") == {"judging/assess.py"}  # serves the assessment page
    assert users_of("datasets") == {"data/reading.py"}  # reads a data set from the hub by its name
    # A data set is read by its name; `exalign push` uploads what it is told to.
    assert users_of("huggingface_hub") == {"data/reading.py", "run/publish.py"}
    assert users_of("ray") == {"run/cluster.py"}  # joins the cluster that a recipe names, or starts one here
    assert users_of("vllm") == {"rollout/vllm.py"}


def test_every_page_escapes_what_it_prints() -> None:
    for file, tree in TREES.items():
        for name, call in calls(tree):
            if name.endswith("Environment") and "jinja2" in imported(tree) | {n.split(".")[0] for n in imported(tree)}:
                sandboxed = name == "ImmutableSandboxedEnvironment"  # a question to a model, which is no page
                assert argument(call, "autoescape") == ("False" if sandboxed else "True"), file
            if name == "Template" or name.endswith("jinja2.Template"):
                raise AssertionError(f"{file} fills a template outside of an environment")
    markup = {file for file, tree in TREES.items() for name, _ in calls(tree) if name.endswith("Markup")}
    assert markup <= {"report/page.py", "report/verdicts.py"}


def test_csv_is_written_in_one_place() -> None:
    """A cell that begins with `=` is a formula to a spreadsheet; `wording.csv_text` makes a text of it."""
    writers = ("csv.writer", "csv.DictWriter", ".to_csv", ".write_csv")
    assert {file for file, tree in TREES.items() for name, _ in calls(tree) if name.endswith(writers)} == {
        "report/wording.py"
    }


@given(st.lists(st.lists(st.one_of(st.text(), st.integers(), st.floats(allow_nan=False)), min_size=1), min_size=1))
def test_no_cell_is_a_formula_and_numbers_stay_numbers(rows: list[list[str | int | float]]) -> None:
    found = list(csv.reader(io.StringIO(csv_text(rows), newline="")))
    for row, cells in zip(rows, [cells or [""] for cells in found], strict=True):
        for value, cell in zip(row, cells, strict=True):
            if isinstance(value, str):
                assert not cell.startswith(("=", "+", "-", "@", "\t", "\r"))
                assert cell.removeprefix("'") == value.removeprefix("'")
            else:
                assert float(cell) == float(value)


@pytest.mark.parametrize("file", TREES)
def test_what_is_printed_was_made_safe_for_a_terminal(file: str) -> None:
    """A console is given constants and `Text`; a bare f-string may hold numbers only, which a format makes of them."""
    for name, call in calls(TREES[file]):
        if name.split(".")[-1] == "print" and name != "print":
            for given in call.args:
                for value in ast.walk(given):
                    if isinstance(given, ast.JoinedStr) and isinstance(value, ast.FormattedValue):
                        assert value.format_spec is not None, f"{file}:{call.lineno} prints {ast.unparse(value.value)}"
        assert name != "print", file
