"""A stage sees only what its key covers, and its key covers only what it sees."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

from exalign.errors import InputError
from exalign.run.demo import RECIPE
from exalign.run.recipe import Recipe, load_recipe
from exalign.run.runner import Run
from exalign.run.stages import plan
from exalign.run.view import Contents, ReadPastViewError, Stage, View, key, sections_of, step_sizes
from exalign.settings import NO_RESULT, STEP_SIZE, Settings
from exalign.storage import read_json
from run.conftest import ALIGN, tiny_overrides
from run.searched_run import ALONE, SEARCH

MakeRecipe = Callable[..., Recipe]
RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))


def leaves(value: Any, path: str = "", *, marked: bool = False) -> list[tuple[str, bool]]:
    """Every setting that has a value, dotted, and whether its field says that it changes no result."""
    if isinstance(value, Settings):
        found = []
        for name, info in type(value).model_fields.items():
            mark = marked or info.json_schema_extra == NO_RESULT
            found += leaves(getattr(value, name), f"{path}.{name}".lstrip("."), marked=mark)
        return found
    if isinstance(value, dict):
        return [leaf for name, inner in value.items() for leaf in leaves(inner, f"{path}.{name}", marked=marked)]
    return [] if value is None else [(path, marked)]


def with_another(value: Any, path: str) -> Any:
    """The same settings with another value at one place, valid or not."""
    if not path:
        if isinstance(value, bool):
            return not value
        return value + 1 if isinstance(value, int | float) else f"{value} another"
    if isinstance(value, Settings):
        name, _, rest = path.partition(".")
        return value.model_copy(update={name: with_another(getattr(value, name), rest)})
    name = next(name for name in value if path == name or path.startswith(f"{name}."))  # names may have dots
    return {**value, name: with_another(value[name], path[len(name) + 1 :])}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_a_setting_changes_the_keys_of_exactly_the_stages_that_read_it(path: Path, tmp_path: Path) -> None:
    recipe, contents = load_recipe(path), Contents(tmp_path / "inputs.json")
    stages = plan(recipe)
    keys = {stage.name: key(recipe, stage.reads, contents) for stage in stages}
    used: set[str] = set()
    for setting, marked in leaves(recipe):
        other = with_another(recipe, setting)
        changed = {stage.name for stage in stages if key(other, stage.reads, contents) != keys[stage.name]}
        readers = {stage.name for stage in stages if {setting, *sections_of(setting)} & {*stage.reads}}
        assert changed == (set() if marked else readers), setting
        used |= {setting} if readers or marked else set()
    # What no stage reads: names for people, and settings that a recipe's other settings leave without effect.
    unread = {setting for setting, _ in leaves(recipe)} - used
    assert {setting.split(".")[0] for setting in unread} <= {
        "name", "temperature", "evaluate", "sample", "data", "score", "search", "preferences"
    }  # fmt: skip


@dataclass
class Watched(Run):
    """A run that keeps every view."""

    views: list[View] = field(default_factory=list)

    def view(self, stage: Stage, key: dict[str, Any] | None = None) -> View:
        self.views.append(super().view(stage, key))
        return self.views[-1]


def check_that_all_is_read(run: Watched) -> None:
    for view in run.views:
        assert set(view.stage.reads) == view.read or view.stage.always, view.stage.name


def test_stages_read_all_that_they_declare(world: Path, tmp_path: Path) -> None:
    answers = "evaluate.answers={temperature: 0.95, top_p: 0.9}"
    run = Watched(load_recipe(RECIPE, tiny_overrides(world, answers)), tmp_path)
    run.carry_out(plan(run.recipe), ["evaluation"])
    check_that_all_is_read(run)


def test_stages_of_a_search_and_of_ppo_read_all_that_they_declare(world: Path, tmp_path: Path) -> None:
    run = Watched(load_recipe(RECIPE, tiny_overrides(world, *ALONE, *SEARCH, "search.trials=2")), tmp_path)
    run.carry_out(plan(run.recipe), ["align"])
    check_that_all_is_read(run)


def test_a_stage_that_reads_past_its_view_is_an_error(tiny: MakeRecipe, tmp_path: Path) -> None:
    def work(view: View) -> None:
        assert view.recipe.data.max_prompt_tokens and view.recipe.sft.epochs
        view.path("sft")
        for past in (lambda: view.recipe.seed, lambda: view.recipe.sft.batch_prompts, lambda: view.path("reward")):
            with pytest.raises(ReadPastViewError):
                past()
        view.counts["checked"] = 1

    stages = [
        Stage("sft", (), (), lambda view: None),
        Stage("it", ("data.max_prompt_tokens", "sft.epochs"), ("sft",), work),
    ]
    run = Watched(tiny(), tmp_path)
    run.carry_out(stages)
    assert run.views[-1].counts["checked"] == 1


def test_memory_that_runs_out_where_nothing_smaller_can_be_tried_is_one_sentence(
    tiny: MakeRecipe, tmp_path: Path
) -> None:
    def work(view: View) -> None:
        torch.empty(2**52)

    run = Watched(tiny(), tmp_path)
    with pytest.raises(
        InputError, match=r"^it: memory ran out \(.*can't allocate memory.*\)\. What is finished stays\."
    ):
        run.carry_out([Stage("it", (), (), work)])
    assert not (tmp_path / "it" / "done.json").exists()


def test_another_tokenizer_makes_the_prompts_again_and_the_batch_of_the_sampler_nothing(tmp_path: Path) -> None:
    """The paper's IMDB cuts texts by tokens: its evaluation prompts hold ids."""
    contents = Contents(tmp_path / "inputs.json")
    recipe = load_recipe(RECIPES[0].parent / "imdb.yaml")
    other = load_recipe(RECIPES[0].parent / "imdb.yaml", ["model.source=another"])
    smaller = load_recipe(RECIPES[0].parent / "imdb.yaml", ["sample.batch_completions=1"])
    for stage in plan(recipe):
        before = key(recipe, stage.reads, contents)
        assert key(smaller, stage.reads, contents) == before
        if stage.name == "evaluation/drawn/prompts":
            assert key(other, stage.reads, contents) != before


@pytest.mark.parametrize(
    ("recipe", "changed", "looked_at"),
    [
        ("hh-cpu", [], "evaluation/pairs"),
        ("hh-cpu", ["data.evaluation=null"], "evaluation/pairs"),
        ("imdb-smol", [], "evaluation/pool"),
        ("imdb-smol", ["evaluate.scorer={function: 'exalign.data.synthetic:reward'}"], "evaluation/proxy"),
    ],
)
def test_more_prompts_for_the_evidence_or_another_judge_train_nothing_again(
    recipe: str, changed: list[str], looked_at: str
) -> None:
    """Though trainings look at held-out pairs, and at the pool where they aim at a KL."""
    stages = {stage.name: stage for stage in plan(load_recipe(RECIPES[0].parent / f"{recipe}.yaml", changed))}
    behind = {name for name in stages if name.startswith("align/")}
    while more := {need for name in behind for need in stages[name].needs} - behind:
        behind |= more
    assert {looked_at, "sft"} < behind
    assert not any({"evaluate.prompts", "evaluate.scorer"} & {*stages[name].reads} for name in behind)


def test_contents_are_read_once_and_noticed_when_they_change(tmp_path: Path) -> None:
    data, known, long_ago = tmp_path / "rows.jsonl", tmp_path / "inputs.json", 10**18
    data.write_text("one")
    contents = Contents(known)
    first = contents.of(str(data))
    contents.remember()
    assert not known.exists()  # it changed a moment ago and might change again without another time
    os.utime(data, ns=(long_ago, long_ago))
    contents = Contents(known)
    assert contents.of(str(data)) == first
    contents.remember()
    data.write_text("two")
    second = Contents(known).of(str(data))
    assert second != first
    os.utime(data, ns=(long_ago, long_ago))
    assert Contents(known).of(str(data)) == first  # as it was known at that time: it is not read
    known.write_bytes(b"damaged")
    assert Contents(known).of(str(data)) == second
    assert Contents(known).of("a-name/on-a-hub") is None
    assert Contents(known).of_function("exalign.data.synthetic:reward") is not None
    assert Contents(known).of_function("no.such:thing") is None


def test_a_file_whose_name_is_no_utf_8_has_a_content_and_is_remembered(tmp_path: Path) -> None:
    folder = tmp_path / "rows"
    folder.mkdir()
    file = Path(os.fsdecode(os.fsencode(folder) + b"/caf\xe9.jsonl"))
    file.write_text("one")
    os.utime(file, (1, 1))
    contents = Contents(tmp_path / "inputs.json")
    found = contents.of(str(folder))
    contents.remember()
    file.rename(folder / "cafe.jsonl")
    assert Contents(tmp_path / "inputs.json").of(str(folder)) != found is not None
    assert "caf\\udce9.jsonl" in "".join(read_json(tmp_path / "inputs.json"))


def test_a_function_in_the_working_directory_has_a_content(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything has imported it, as at the start of a run that is done."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "not_imported_yet.py").write_text("def reward(): ...")
    first = Contents(tmp_path / "known").of_function("not_imported_yet:reward")
    (tmp_path / "not_imported_yet.py").write_text("def reward(): pass")
    assert first is not None and first != Contents(tmp_path / "known").of_function("not_imported_yet:reward")


def test_the_content_of_a_function_is_also_that_of_what_its_file_imports(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pack").mkdir()
    files = {
        "graded.py": "import json\nfrom pack import words\ndef reward(): ...",
        "pack/__init__.py": "",
        "pack/words.py": "from .deeper import LIST\ndef late():\n    import elsewhere",
        "pack/deeper.py": "import graded\nLIST = []",
        "elsewhere.py": "not python",
        "pack/beside.py": "",
    }
    for name, text in files.items():
        (tmp_path / name).write_text(text)

    def content() -> str | None:
        return Contents(tmp_path / "known").of_function("graded:reward")

    for name in files:
        before = content()
        (tmp_path / name).write_text(files[name] + "\n")
        assert (content() != before) == (name != "pack/beside.py"), name


def test_a_method_of_one_s_own_is_made_again_where_its_file_changed(
    tiny: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "my_own_method.py"
    file.write_text(Path(__file__).with_name("outside_method.py").read_text())
    recipe = tiny("align={mine: {method: 'my_own_method:BestOfK'}}")

    def keys() -> dict[str, Any]:
        return {stage.name: key(recipe, stage.reads, Contents(tmp_path / "known")) for stage in plan(recipe)}

    before = keys()
    file.write_text(file.read_text().replace("argmax", "argmin"))
    after = keys()
    assert before["align/mine"] != after["align/mine"] and before["sft"] == after["sft"]


def test_an_adapter_is_what_it_is_on_its_base(tmp_path: Path) -> None:
    base, adapter = tmp_path / "base", tmp_path / "adapter"
    base.mkdir()
    adapter.mkdir()
    (base / "model.safetensors").write_bytes(b"weights")
    (adapter / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": str(base)}))
    before = Contents(tmp_path / "inputs.json").of(str(adapter))
    (base / "model.safetensors").write_bytes(b"other weights")
    after = Contents(tmp_path / "inputs.json").of(str(adapter))
    assert before is not None and before != after
    (adapter / "config.json").write_text("{}")  # a whole model beside it needs no base
    whole = Contents(tmp_path / "inputs.json").of(str(adapter))
    (base / "model.safetensors").write_bytes(b"weights")
    assert Contents(tmp_path / "inputs.json").of(str(adapter)) == whole


def test_step_sizes_are_those_of_the_sections_that_are_read(tiny: MakeRecipe) -> None:
    recipe = tiny()
    assert step_sizes(recipe, ["align.exo-rw", "seed"]) == {"learning_rate": 1e-3, "max_grad_norm": 1.0}
    assert STEP_SIZE != NO_RESULT


def test_methods_are_trained_searched_evaluated_and_reported_by_their_object_alone(world: Path, tmp_path: Path) -> None:
    """One from outside, one on pairs, and one on single completions with a label, in the usual layout of these."""
    labels = tmp_path / "labels.jsonl"
    rows = [{"prompt": f"the {word}", "completion": f" is {word}", "label": word in "ac"} for word in "abcd"]
    labels.write_text("\n".join(map(json.dumps, rows)))
    common, scorer = ALIGN[: ALIGN.index("beta_pi")], "{function: exalign.data.synthetic:reward}"
    recipe = load_recipe(
        RECIPE,
        tiny_overrides(
            world,
            *ALONE,
            "score={}",
            f"evaluate.scorer={scorer}",
            f"preferences={{scorer: {scorer}}}",
            f"data.rewards={{source: {labels}}}",
            f"align={{best: {common}method: 'run.outside_method:BestOfK'}}, simpo: {common}method: simpo}}, "
            f"kto: {common}method: kto, target: reward}}}}",
            "search={trials: 2, kl: 50, prompts: 4}",
            "search.methods.best={learning_rate: {choices: [1e-3, 1e-2]}}",
            "search.methods.simpo={gamma: {choices: [1, 0]}}",
        ),
    )
    run = Watched(recipe, tmp_path / "run")
    run.carry_out(plan(recipe))
    check_that_all_is_read(run)
    page = (run.folder / "report" / "index.html").read_text()
    methods = {method["name"]: method for method in read_json(run.folder / "evaluation" / "evidence.json")["methods"]}
    for name, line in (
        ("best", "Learns the best of the K completions"),
        ("simpo", "SimPO, β 2, γ "),
        ("kto", "KTO, reward target, β 0.1"),
    ):
        assert line in methods[name]["line"] and line in page
    assert (methods["best"]["label"], methods["best"]["family"]) == ("best of K", "other")
    assert methods["best"]["settings"]["least"] == -1e9
    assert {methods[name]["target"] for name in ("best", "kto")} == {"reward"}
