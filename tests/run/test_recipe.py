"""A recipe is complete and strict: each mistake is one sentence that names the setting and the nearest right one."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from jsonschema import Draft202012Validator

from exalign.errors import InputError
from exalign.run.demo import RECIPE
from exalign.run.explain import LEAST, explain, recipe_schema
from exalign.run.familiar import SETTINGS, loss_meaning, meaning
from exalign.run.recipe import Recipe, dump_recipe, load_recipe, make_recipe, parse_yaml

RECIPES = sorted((Path(__file__).parents[2] / "recipes").glob("*.yaml"))


def problem(*overrides: str) -> str:
    with pytest.raises(InputError) as caught:
        load_recipe(RECIPE, overrides)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.name)
def test_every_shipped_recipe_is_valid_and_survives_being_written_out_in_full(path: Path) -> None:
    recipe = load_recipe(path)
    assert make_recipe(dump_recipe(recipe)) == recipe


def test_a_misspelt_setting_names_the_nearest() -> None:
    assert "align.exo-rw.beta_p is not a setting; did you mean beta_pi?" in problem("align.exo-rw.beta_p=0.1")
    assert "did you mean temperature?" in problem("temprature=1.0")
    assert "did you mean num_completions?" in problem("sample.num_completion=3")
    assert problem("data.sft.limt=3").endswith(": data.sft.limt is not a setting; did you mean limit?")
    assert problem("data.sft=[{source: a, limt: 3}]").endswith(
        ": data.sft.0.limt is not a setting; did you mean limit?"
    )
    assert "sum.1.wieght is not a setting; did you mean weight?" in problem(
        "evaluate.scorer.sum=[{function: 'a:b'}, {function: 'c:d', wieght: 2}]"
    )


def test_what_may_be_one_or_a_list_is_told_of_in_the_form_that_was_written() -> None:
    assert problem("data.sft.limit=x").endswith(": data.sft.limit: input should be a valid integer, not 'x'.")
    assert problem("data.sft=[{source: a, limit: x}]").endswith(
        ": data.sft.0.limit: input should be a valid integer, not 'x'."
    )
    assert problem("data.sft=5").endswith(": data.sft: it takes settings, as name: value, not 5.")
    assert problem("evaluate=null").endswith(
        "it takes settings, as name: value, not null; leave it out where its defaults will do."
    )
    assert "data.sft: list should have at least 1 item" in problem("data.sft=[]")


def test_a_method_that_could_train_on_the_rewards_that_are_given_says_how() -> None:
    data = {"rewards": {"source": "r"}, "evaluation": {"source": "e"}}
    values: dict[str, Any] = {"name": "a", "model": {"source": "m"}, "data": data, "align": {"kto": {"method": "kto"}}}
    with pytest.raises(InputError, match=r"align needs preferences: .*; target: reward trains on data\.rewards"):
        make_recipe(values)
    values["align"]["kto"]["target"] = "reward"
    assert make_recipe(values).align["kto"].trains_on == "rewards"


@pytest.mark.parametrize(
    ("override", "named"),
    [
        ("temperature=hot", "temperature"),
        ("temperature=0", "temperature"),
        ("seed=1.5", "seed"),
        ("sft.epochs='3'", "sft.epochs"),
        ("align.exo-rw.beta_pi=-1", "align.exo-rw.beta_pi"),
        ("align.exo-pref.epsilon=1.0", "align.exo-pref.epsilon"),
        ("align.exo-rw.divergence=kl", "align.exo-rw.divergence"),
        ("sft.learning_rate=.nan", "sft.learning_rate"),
        ("name=a/b", "name"),
        ("data.sft.source=''", "data.sft.source"),
    ],
)
def test_a_wrong_value_names_the_setting(override: str, named: str) -> None:
    assert f"{named}:" in problem(override)


def test_a_list_is_not_called_a_single_value() -> None:
    with pytest.raises(InputError, match="prompts is a list, which is given whole"):
        load_recipe(RECIPE, ["data.prompts=[{source: a.jsonl}, {source: b.jsonl}]", "data.prompts.limit=9"])


def test_a_name_with_dots_is_reached_where_it_is_there() -> None:
    named = "align={exo-0.5: {beta_r: 0.5}, exo-0: {beta_r: 1.0}}"
    align = load_recipe(RECIPE, [named, "align.exo-0.5.learning_rate=3e-4", "align.exo-0.epochs=2"]).align
    assert align["exo-0.5"].learning_rate == 3e-4 and align["exo-0"].epochs == 2
    assert list(load_recipe(RECIPE, [named, "align.exo-0.5=null"]).align) == ["exo-0"]


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (
            ["score.scorer={stage: oracle}"],
            "score.scorer names the stage 'oracle', but the recipe has no oracle section",
        ),
        (["preferences.scorer={stage: reward}"], "cannot be this run's reward model"),
        (["data.prompts=null"], "data.prompts is missing"),
        (["data.labelled={source: x.jsonl}"], "data.labelled has no effect without an oracle"),
        (["data.evaluation=null"], "data.evaluation is missing"),
        (["preferences=null"], "needs preferences"),
        (["sft=null"], "needs the sft section"),
        (["tokenizer.vocab_size=400"], "give source or vocab_size, not both"),
        (["score.scorer={stage: reward, function: a:b}"], "give exactly one of"),
        (["data.preferences={source: p.jsonl}"], "preferences has no effect beside data.preferences"),
        (["align.exo-pref.beta_r=0.7"], "beta_r"),
        (["align.exo-rw.epsilon=0.2"], "epsilon"),
        (["align.exo-rw.beta_r_std=0.7"], "align.exo-rw: beta_r has no effect beside beta_r_std"),
        (["align={a: {fresh_every: 1, beta_r_std: 0.7}}"], "align.a: beta_r_std is of the rewards of given samples"),
        (["align.exo-rw.alpha=0.3"], "align.exo-rw: alpha has no effect on the divergence reverse_kl"),
        (["align.exo-rw.fresh_every=3", "align.exo-rw.passes=2"], "align.exo-rw: fresh_every = 3 steps are no whole"),
        (
            ["align.grpo={method: grpo, ratio: sequence}"],
            "align.grpo: ratio has no effect with fresh_every = 1, where all ratios are 1",
        ),
        (["align.rloo={method: rloo, clip: 0.01}"], "align.rloo: clip has no effect with fresh_every = 1"),
        (["sft=null", "model={source: x}", "tokenizer={}"], "data.sft has no effect without an sft section"),
        (["align.exo-rv.beta_pi=9"], "align has no exo-rv; did you mean exo-rw?"),
        (["x-align.beta_pi=9"], "what x- holds is in its places by then"),
        (
            ["learning_rate=1e-5"],
            "learning_rate is not a setting; it is a setting of a method, align.NAME.learning_rate",
        ),
        (["pool_prompts=4"], "pool_prompts is not a setting; it is evaluate.pool_prompts"),
        (["lerning_rate=1"], "did you mean a setting of a method, align.NAME.learning_rate?"),
        (["seeds=1"], "seeds is not a setting; did you mean seed?"),
        (["align.exo-rw.passes=2"], "align.exo-rw: passes has no effect without fresh_every"),
        (
            ["align={a: {fresh_every: 2, target: preference}}", "sample.num_completions=3"],
            "align.a: orders own samples",
        ),
        (["align={a: {method: rloo}}", "sample.top_p=0.9"], "align.a: needs samples of the policy itself"),
        (["align={a: {method: grpo}}", "sample.num_completions=1"], "align.a: compares the completions of a prompt"),
        (["align.exo-rw.rounds=2"], "align.exo-rw.rounds is not a setting; here: fresh_every, in optimizer steps"),
        (["align={a: {fresh_every: 2}}", "data.prompts=null"], "data.prompts is missing"),
        (["sample.num_completions=1"], "align.exo-rw: compares at least two completions of a prompt"),
        (["align.EXO-rw={}"], "align: exo-rw and EXO-rw are one folder where case does not count; rename one"),
        (["align.sft={}"], "is not 'answers', 'density', 'drawn', 'pairs', 'pool', 'prompts', 'proxy', 'sft'"),
        (["align.pool={}"], "'pool', 'prompts'"),
        (["evaluate.density_prompts=100"], "evaluate.density_prompts is above evaluate.pool_prompts"),
        (["ppo={ppo: {}}"], "ppo is not a setting; here: each method is a section of align, as align: {ppo: {method"),
        (["align.exo-rw.fresh_every=1", "align.exo-rw.stop_after=2"], "align.exo-rw: stop_after looks at held-out"),
        (["align.exo-rw.stop_after=99"], "align.exo-rw: stop_after = 99 counts saved policies"),
        (
            ["align={a: {method: kto, save_policies: 4, stop_after: 2}}"],
            "align.a: stop_after compares losses, and KTO's",
        ),
        (
            ["align={a: {sweep: {kl: [0.5, 1]}}}", "data.rewards={source: r.jsonl}", "score.scorer=null"],
            "align.a.sweep: kl chooses β by the pool's rewards, and data.rewards brings its own",
        ),
        (
            ["align={a: {beta_r: 0.3, sweep: {kl: [0.5, 1]}}}"],
            "align.a.sweep: kl chooses β, beside which beta_r has no effect; remove it",
        ),
        (
            ["align={a: {method: rloo, beta: 0.3, sweep: {kl: [0.5, 1]}}}"],
            "align.a.sweep: kl chooses β, beside which beta has no effect; remove it",
        ),
        (
            ["search={trials: 2, kl: 1, methods: {exo-rw: {num_completions: {choices: [2, 4]}}}}"],
            "search.methods.exo-rw.num_completions cannot be searched over: what a method trains on",
        ),
        (["align.exo-rw.num_completions=9"], "align.exo-rw: num_completions = 9 is above sample.num_completions = "),
        (["align.dpo-pref.num_completions=2"], "align.dpo-pref: num_completions has no effect on a method without rew"),
        (
            ["align={a: {fresh_every: 2, target: preference, num_completions: 3}}"],
            "align.a: orders own samples",
        ),
        (
            [
                "preferences=null",
                "data.preferences.source=pairs.jsonl",
                "align.dpo-pref.stop_after=3",
                "align.dpo-pref.save_policies=3",
            ],
            "align.dpo-pref: stop_after = 3 counts saved policies; raise save_policies above it",
        ),
        (
            ["align.other={method: pppo}"],
            "align.other.method: 'pppo' is none; there are cpo, dpo_norm, given,",
        ),
        (["align.other={method: 'json:dumps'}"], "align.other.method: json:dumps is no subclass of"),
        (["align.ppo={method: ppo}", "sample.top_p=0.9"], "remove sample.top_p and sample.top_k"),
        (["align.ppo={method: ppo}", "score.scorer={stage: oracle}"], "score.scorer names the stage 'oracle'"),
        (["cluster={workers: 0}"], "cluster.workers:"),
        (["cluster={}", "align={}", "preferences=null", "reward=null"], "cluster has no effect"),
        (
            ["sample.engine=exalign", "sample.vllm={cache_gib: 2}"],
            "sample.vllm has no effect with sample.engine: exalign",
        ),
        (["align.ppo={method: ppo, lamb: 0.9}"], "align.ppo.lamb is not a setting; did you mean lam?"),
        (["align.ppo={method: ppo, gamma: 1.5}"], "align.ppo.gamma:"),
        (["align.ppo={method: ppo, kl_rate: 0.2}"], "align.ppo: kl_rate has no effect without target_kl"),
        (["align.ppo={method: ppo, target_kl: 1.0, kl_rate: 5.0}"], "align.ppo.kl_rate:"),
        (["align.ppo={method: ppo, target_kl: 1.0, beta: 0.0}"], "align.ppo: beta = 0 can never change"),
    ],
)
def test_what_cannot_take_effect_is_refused(overrides: list[str], sentence: str) -> None:
    assert sentence in problem(*overrides)


def test_a_missing_file_names_the_recipes_that_exist(tmp_path: Path) -> None:
    (tmp_path / "imdb.yaml").write_text("name: x")
    with pytest.raises(InputError, match=r"does not exist; there are .*imdb\.yaml"):
        load_recipe(tmp_path / "imbd.yaml")


@pytest.mark.parametrize(
    "text", ["a: [", "a: 1\na: 2", "- 1", "a: !!python/object:os.system {}", "\t", "", "a: &x [*x]"]
)
def test_yaml_that_is_no_recipe_is_one_sentence(tmp_path: Path, text: str) -> None:
    (tmp_path / "bad.yaml").write_text(text)
    with pytest.raises(InputError) as caught:
        load_recipe(tmp_path / "bad.yaml")
    assert "bad.yaml" in str(caught.value)


@given(st.text(alphabet="ab:[]{}&*!-#'\"\n |>,.1e\x00", max_size=40))
def test_no_text_gets_anything_but_a_value_or_one_sentence(text: str) -> None:
    try:
        values = parse_yaml(text, "recipe")
        make_recipe(values if isinstance(values, dict) else {})
    except InputError:
        pass


@given(st.floats(1e-12, 1e12))
def test_numbers_are_read_as_people_write_them(value: float) -> None:
    for text in (repr(value), f"{value:e}", f"{value:.3E}"):
        assert parse_yaml(f"x: {text}", "recipe")["x"] == float(text)


def test_neighbouring_methods_differ_in_one_line() -> None:
    """EXO and DPO, from preferences or rewards: each is its neighbour with one setting changed."""
    base = {"divergence": "reverse_kl", "target": "reward"}
    for divergence, target in itertools.product(("reverse_kl", "forward_kl"), ("reward", "preference")):
        overrides = [f"align={{one: {{divergence: {divergence}, target: {target}}}}}"]
        made = load_recipe(RECIPE, overrides).align["one"].model_dump()
        neighbour = load_recipe(RECIPE, [f"align={{one: {base}}}"]).align["one"].model_dump()
        different = {key for key in made if made[key] != neighbour[key]}
        assert different == {key for key, value in base.items() if value not in (divergence, target)}


def test_every_setting_is_explained() -> None:
    settings = list(explain(Recipe))
    assert len({(setting.name, setting.meaning) for setting in settings}) == len(settings)
    assert [setting.name for setting in settings if not setting.meaning] == []
    names = {setting.name for setting in settings}
    assert {"temperature", "align.NAME.beta_pi", "data.sft.source", "model.lora.rank"} <= names
    assert {"search.methods.NAME.NAME.log", "score.scorer.sum.weight"} <= names


LEAST_RECIPE = {"name": "x", "model": {"source": "m"}, "data": {"preferences": {"source": "p.jsonl"}}}


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"beta": 0.1}, "align.a.beta is not a setting; here: beta_pi (β_π), or beta of a method that is not matching"),
        ({"label_smoothing": 0.1}, "here: epsilon (ε)"),
        ({"loss_type": "simpo"}, "loss_type is not a setting; here: write method: simpo."),
        ({"loss_type": ["sigmoid"]}, "here: sigmoid is divergence: forward_kl, target: preference."),
        ({"loss_type": "unheard"}, "here: divergence and target"),
        (
            {"method": "exo"},
            "align.a.method: 'exo' is none; there are cpo, dpo_norm, given, grpo, ipo, kto, matching, orpo, ppo, rloo",
        ),
        ({"method": "exo"}, "exo is divergence: reverse_kl, target: preference."),
        ({"num_train_epochs": 3}, "here: epochs."),
    ],
)
def test_a_familiar_name_says_what_it_is_here(settings: dict[str, Any], sentence: str) -> None:
    with pytest.raises(InputError) as caught:
        make_recipe({**LEAST_RECIPE, "align": {"a": settings}})
    assert sentence in str(caught.value)


def test_familiar_names_lead_to_settings_that_exist() -> None:
    names = {setting.name for setting in explain(Recipe)}
    known = names | {name.removeprefix("align.NAME.") for name in names} | {"metrics.jsonl"}
    for here in SETTINGS.values():
        first = re.match(r"[a-z_.]+", here.removeprefix("none").removeprefix("; nearest is ").lstrip(": "))
        words = re.findall(r"\b[a-z]+(?:[._][a-z_]+)+\b", here)
        assert {word for word in words if word not in known} <= {"forward_kl", "reverse_kl"}, here
        assert first is None or here.startswith(("none", "each", "the option")) or first[0] in known, here
    with pytest.raises(InputError, match="dpo is not a setting; here: each method is a section of align"):
        make_recipe({**LEAST_RECIPE, "dpo": {}})


def test_a_method_of_ones_own_is_found_in_the_working_directory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Started as the script `exalign` is, whose own folder is where Python looks first, and not where one stands."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "start.py").write_text("from exalign.cli import main\nmain()\n")
    (tmp_path / "my_method.py").write_text(Path(__file__).with_name("outside_method.py").read_text())
    (tmp_path / "my_broken_method.py").write_text("1 / 0\n")
    monkeypatch.chdir(tmp_path)
    rows, path = {"source": "p.jsonl"}, list(sys.path)
    recipe = {**LEAST_RECIPE, "data": {"prompts": rows, "evaluation": rows}, "score": {"scorer": {"reward_model": "m"}}}
    Path("mine.yaml").write_text(json.dumps({**recipe, "align": {"a": {"method": "my_method:BestOfK"}}}))
    command = [sys.executable, "bin/start.py", "recipe", "mine.yaml"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "least: -1000000000.0" in done.stdout, done
    for name, said in (
        ("my_broken_method", f"cannot be imported from {tmp_path}: ZeroDivisionError: division by zero."),
        ("no_such_method", f"cannot be imported from {tmp_path}: No module named 'no_such_method'."),
    ):
        with pytest.raises(InputError) as caught:
            make_recipe({**recipe, "align": {"a": {"method": f"{name}:BestOfK"}}})
        assert f"align.a.method: {name} {said}" in str(caught.value)
    assert sys.path == path


def test_every_name_that_the_page_for_users_of_trl_explains_is_known() -> None:
    page = (Path(__file__).parents[2] / "docs" / "from-trl.md").read_text(encoding="utf-8")
    table = re.search(r"\| TRL \| exalign \|\n((?:\|.*\n)+)", page)
    assert table is not None
    spans = [span for row in table[1].splitlines() for span in re.findall(r"`([^`]+)`", row.split("|")[1])]
    theirs = {name for span in spans for name in re.findall(r"\w+(?=:|$)", span)}
    ours = {setting.name.rpartition(".")[2] for setting in explain(Recipe)}
    assert {"dataset_config", "exo_pair", "use_vllm", "model_init_kwargs", "max_steps"} <= theirs
    assert [name for name in theirs - ours if meaning(name) is None and loss_meaning(name) is None] == []


def test_the_least_recipe_is_one() -> None:
    recipe = make_recipe(parse_yaml(LEAST, "least"))
    assert [method.trains_on for method in recipe.align.values()] == ["preferences"]


def test_the_schema_takes_every_shipped_recipe_and_no_other_setting() -> None:
    schema = recipe_schema()
    check = Draft202012Validator(schema)
    for path in RECIPES:
        values: Any = parse_yaml(path.read_text(), str(path))
        assert check.is_valid(values), path
        for section in (values, *values.get("align", {}).values(), values["data"]):
            section["no_setting"] = 1
            assert not check.is_valid(values), path
            del section["no_setting"]
