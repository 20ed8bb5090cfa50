"""Laws of a plan, what the command prints, and that every shipped recipe can be planned."""

from __future__ import annotations

import io
import itertools
import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console
from typer.testing import CliRunner

from exalign.cli import app
from exalign.data.reading import DataSettings
from exalign.errors import InputError
from exalign.run.demo import RECIPE
from exalign.run.plan import (
    UNKNOWN_ROWS,
    Assumptions,
    Budget,
    assumptions,
    duration,
    find_machine,
    in_turn,
    print_budget,
    quantity,
    rows_of,
)
from exalign.run.recipe import load_recipe
from exalign.run.stages import plan

RECIPES = Path(__file__).parents[2] / "recipes"
SHIPPED = sorted(RECIPES.glob("*.yaml"))
CONTINUED = [path for path in SHIPPED if (load_recipe(path).model.source or "").startswith("runs/")]
WHOLE = [path for path in SHIPPED if path not in CONTINUED]
LARGE = [path for path in WHOLE if path.name != "demo.yaml" and "-cpu" not in path.stem and "-smol" not in path.stem]
WITH_PPO = ["align.ppo={method: ppo}"]


def planned(path: Path = RECIPE, *overrides: str, gpu: str = "H100", count: int = 8, **assumed: Any) -> Budget:
    return Budget(load_recipe(path, overrides), find_machine(gpu, count, Assumptions(**assumed)))


@pytest.mark.parametrize("path", WHOLE, ids=lambda path: path.name)
def test_every_shipped_recipe_is_planned_stage_by_stage_in_100_columns(path: Path) -> None:
    budget = planned(path)
    without_model = {"tokenizer", "evaluation/drawn/prompts", "evaluation/prompts", "report"}
    if budget.recipe.data.preferences is not None:
        without_model.add("preferences")
    if budget.recipe.scoring.function is not None or budget.recipe.data.rewards is not None:
        without_model.add("scored")
    stages = [stage.name for stage in plan(budget.recipe)]
    if budget.recipe.judging is not None and budget.recipe.judging.function is not None:
        without_model |= {name.replace("/drawn/", "/") for name in stages if "/drawn/" in name}
    stages = [name for name in stages if name not in without_model]
    assert [cost.stage for cost in budget.costs] == stages
    assert all(cost.flops > 0 and cost.seconds > 0 and cost.tokens > 0 for cost in budget.costs)
    console = Console(file=io.StringIO(), width=100, record=True)
    print_budget(budget, console)
    printed = console.export_text()
    assert "…" not in printed
    assert "H100 datasheet" in printed and "--training-share" in printed


def test_a_methods_long_name_hides_no_number() -> None:
    recipe = load_recipe(RECIPE)
    name, console = "a-name-of-forty-characters-is-the-longest", Console(file=io.StringIO(), width=80, record=True)
    recipe = recipe.model_copy(update={"align": {name[:40]: recipe.align["exo-rw"]}})
    print_budget(Budget(recipe, find_machine("H100", 8, Assumptions())), console)
    assert "…" not in console.export_text()


@pytest.mark.parametrize("path", CONTINUED, ids=lambda path: path.name)
def test_a_recipe_that_goes_on_from_another_run_says_so(
    path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match="carry out the run that makes it"):
        planned(path)


def test_a_search_costs_its_trials_and_own_samples_cost_their_drawing() -> None:
    search = "search={trials: 3, kl: 1.0, prompts: 20, samples: 2, methods: {exo-rw: {beta_pi: {low: 0.1, high: 1.0}}}}"
    costs = {cost.stage: cost for cost in planned(RECIPE, search, "align.dpo-rw.fresh_every=24").costs}
    alone = {cost.stage: cost for cost in planned(RECIPE).costs}
    once, tried = alone["align/exo-rw"], costs["validation"]
    assert costs["search/exo-rw"].flops == pytest.approx(3 * (once.flops + 4 * tried.flops))  # four policies are saved
    assert "align/exo-rw" not in costs  # it has the best trial's weights
    assert tried.tokens == 2 * 20 * (12 + 2 * 28)  # drawn, scored by a function, and log π_sft of them
    fresh = costs["align/dpo-rw"]
    assert fresh.flops > once.flops


@pytest.mark.parametrize("path", LARGE, ids=lambda path: path.name)
def test_what_a_recipe_says_of_its_cost_is_what_the_command_says(path: Path) -> None:
    comment = re.sub(r"\n# ?", "\n", path.read_text(encoding="utf-8"))
    command, hours, ppo, memory = re.search(  # type: ignore[union-attr]
        r"(exalign plan .*)\nsays: (.*) in all, (.*) of it PPO(?:, .*)?; (.*) GB on the fullest device", comment
    ).groups()
    words = shlex.split(command)[2:]
    assert Path(words[0]).name == path.name
    given = {words[i][2:].replace("-", "_"): words[i + 1] for i in range(1, len(words), 2)}
    gpu, count = given.pop("gpu"), int(given.pop("count"))
    budget = planned(path, gpu=gpu, count=count, **{name: int(value) for name, value in given.items()})
    assert duration(in_turn(budget.costs).seconds) == hours
    assert duration(sum(cost.seconds for cost in budget.costs if cost.stage == "align/ppo")) == ppo
    found = {cost.stage: cost.fits(budget.machine.usable) for cost in budget.costs}
    assert [stage for stage, fits in found.items() if fits != "yes"] == ["align/ppo"] * ("FSDP2)" in comment)
    ways = [cost.sharded if found[cost.stage] == "sharded" else cost.replicated for cost in budget.costs]
    assert f"{max(way.total for way in ways if way is not None) / 1e9:.1f}" == memory


def test_more_devices_need_no_more_memory_and_change_no_work() -> None:
    budgets = [planned(RECIPE, *WITH_PPO, count=count) for count in (1, 2, 3, 8, 16, 512)]
    for fewer, more in itertools.pairwise(budgets):
        for before, after in zip(fewer.costs, more.costs, strict=True):
            assert (after.flops, after.tokens) == (before.flops, before.tokens)
            if before.sharded is not None and after.sharded is not None:
                assert after.sharded.total <= before.sharded.total
            # A single device needs no buckets; every further one needs what the second does.
            assert after.replicated.total - after.replicated.exchange <= before.replicated.total
            if fewer.machine.count > 1:
                assert after.replicated.total <= before.replicated.total


def test_the_device_changes_no_work_and_a_faster_one_takes_no_longer() -> None:
    slow, fast = planned(gpu="A100-80"), planned(gpu="H100")  # of equal memory, from which sizes follow
    assert in_turn(slow.costs).flops == in_turn(fast.costs).flops
    for before, after in zip(slow.costs, fast.costs, strict=True):
        assert after.seconds <= before.seconds
        assert after.replicated == before.replicated


@pytest.mark.parametrize(
    "override",
    [
        "sample.batch_completions=512",
        "data.max_prompt_tokens=40",
        "sft.token_budget=8192",
        "data.max_completion_tokens=80",
    ],
)
def test_more_at_a_time_never_needs_less(override: str) -> None:
    for before, after in zip(planned().costs, planned(RECIPE, override).costs, strict=True):
        assert after.replicated.total >= before.replicated.total


def test_checkpointing_trades_memory_for_time_and_changes_no_necessary_work() -> None:
    plain, recomputed = planned(count=1), planned(RECIPE, "align.exo-rw.gradient_checkpointing=true", count=1)
    before, after = (
        next(cost for cost in budget.costs if cost.stage == "align/exo-rw") for budget in (plain, recomputed)
    )
    assert after.flops == before.flops and after.seconds > before.seconds
    assert after.replicated.activations < before.replicated.activations


def test_ppo_holds_four_models_and_two_of_them_whole_while_it_draws() -> None:
    cost = next(cost for cost in planned(RECIPE, *WITH_PPO).costs if cost.stage == "align/ppo")
    trained = sum(cost.replicated.weights for cost in planned().costs if cost.stage in ("sft", "reward"))
    assert cost.sharded is not None
    assert (cost.sharded.gradients, cost.sharded.weights) == (trained / 8, trained / 8 + trained)
    few = planned(
        RECIPE, *WITH_PPO, "align.ppo.token_budget=1", "align.ppo.batch_prompts=1", "align.ppo.rollout_prompts=256"
    )
    drawing = next(cost for cost in few.costs if cost.stage == "align/ppo").sharded
    assert drawing is not None and (drawing.gradients, drawing.weights) == (0, trained / 8 + 2 * trained)
    assert cost.replicated.gradients == trained  # the critic is a reward model in shape
    assert cost.replicated.weights == 2 * trained  # π_sft and the scorer beside them


def test_a_batch_with_one_micro_batch_gains_nothing_from_more_devices() -> None:
    overrides = ["sft.batch_prompts=4", "sft.token_budget=100000"]
    one, many = (planned(RECIPE, *overrides, count=count).costs[0] for count in (1, 64))
    assert many.seconds == one.seconds and many.bound == "batch"


def test_learning_prompts_moves_their_tokens_and_adds_work_in_the_head() -> None:
    plain, learnt = planned(RECIPE, "sft.train_on_prompts=false"), planned(RECIPE, "sft.train_on_prompts=true")
    assert learnt.costs[0].tokens == plain.costs[0].tokens
    assert learnt.costs[0].flops > plain.costs[0].flops


def tokens_of(*overrides: str, **assumed: Any) -> dict[str, int]:
    return {cost.stage: cost.tokens for cost in planned(RECIPE, *overrides, **assumed).costs}


def test_references_are_of_all_completions_read_as_the_device_allows() -> None:
    """A method may train on the first K and in small micro-batches; its reference is one for all methods."""
    plain, other = planned(RECIPE), planned(RECIPE, "align.exo-rw.num_completions=2", "align.exo-rw.token_budget=64")
    assert tokens_of("align.exo-rw.num_completions=2")["align/exo-rw"] < tokens_of()["align/exo-rw"]
    before, after = (next(c for c in b.costs if c.stage == "reference/reward") for b in (plain, other))
    assert before == after


def test_preferences_that_are_held_out_are_evaluated_and_not_trained_on() -> None:
    given = ["preferences=null", "data.preferences.source=no/such-pairs", "data.evaluation=null", "data.held_out=0.1"]
    tokens = tokens_of(*given, prompts=100, prompt_tokens=10, completion_tokens=20)
    assert tokens["reward"] == 3 * 90 * (10 + 2 * 20)  # three epochs
    assert tokens["evaluation/drawn/sft"] == 2 * 10 * (10 + 4 * 20)  # drawn, and log π_sft of them
    few = tokens_of(*given, "evaluate.pairs=7", prompts=100, prompt_tokens=10, completion_tokens=20)
    assert (few["reward"], few["evaluation/drawn/sft"]) == (3 * 93 * 50, 2 * 7 * 90)
    fewer = tokens_of(*given, "evaluate.prompts=7", prompts=100, prompt_tokens=10, completion_tokens=20)
    assert (fewer["reward"], fewer["evaluation/drawn/sft"]) == (tokens["reward"], 2 * 7 * 90)


def test_held_out_pairs_are_read_where_the_rows_of_the_evaluation_are_pairs(tmp_path: Path) -> None:
    file = tmp_path / "rows.jsonl"

    def read(evaluation: str) -> set[bool]:
        given = ["preferences=null", "data.preferences.source=no/such-pairs", f"data.evaluation={{{evaluation}}}"]
        tokens = tokens_of(*given)
        return {f"evaluation/pairs{of}" in tokens for of in ("", "/exo-pref")}

    file.write_text('{"prompt": "p"}\n')
    assert read(f"source: {file}") == {False}
    file.write_text('{"prompt": "p", "chosen": "c", "rejected": "r"}\n')
    assert read(f"source: {file}") == {True}
    assert read("source: no/such-data") == {True}
    assert read("source: no/such-data, prompt_tokens: 3") == {False}


def test_a_search_is_validated_on_its_own_prompts(tmp_path: Path) -> None:
    file = tmp_path / "validation.jsonl"
    file.write_text("".join(f'{{"prompt": "p{i}"}}\n' for i in range(5)))
    search = "search={trials: 3, kl: 1.0, prompts: 20, samples: 2, methods: {exo-rw: {beta_pi: {low: 0.1, high: 1.0}}}}"
    assert tokens_of(search, f"data.validation.source={file}")["validation"] == 2 * 5 * (12 + 2 * 28)


def test_a_copy_in_half_precision_draws_faster_and_takes_room_and_the_policy_reads_what_it_drew() -> None:
    plain, half = ({c.stage: c for c in planned(RECIPE, f"sample.precision={p}").costs} for p in ("fp32", "bf16"))
    weights = plain["rollouts"].replicated.weights
    assert half["rollouts"].replicated.copies == weights / 2 and plain["rollouts"].replicated.copies == 0
    assert half["rollouts"].replicated.cache == plain["rollouts"].replicated.cache / 2
    assert half["rollouts"].seconds == pytest.approx(plain["rollouts"].seconds * 67 / 989)
    assert half["evaluation/drawn/sft"].tokens == plain["evaluation/drawn/sft"].tokens  # drawn, and read once
    assert (
        half["evaluation/drawn/exo-rw"].tokens == plain["evaluation/drawn/exo-rw"].tokens * 3 / 2
    )  # and by the policy too


def test_data_without_rows_is_one_sentence(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text('{"prompt": "p"}\n')
    with pytest.raises(InputError, match=r"data\.prompts: .*prompts\.jsonl has no usable rows"):
        planned(RECIPE, f"data.prompts={{source: {file}, skip: 1}}")
    assert rows_of(DataSettings(source="x" * 300), "prompts")[0] == UNKNOWN_ROWS


def test_rows_are_counted_published_limited_or_assumed(tmp_path: Path) -> None:
    file = tmp_path / "prompts.jsonl"
    file.write_text("".join(f'{{"prompt": "p{i}"}}\n' for i in range(9)))
    assert rows_of(DataSettings(source=str(file), skip=2, limit=5), "prompts")[0] == 5
    assert rows_of(DataSettings(source=str(file), skip=7), "prompts")[0] == 2
    assert rows_of(DataSettings(source="trl-lib/tldr", split="test"), "prompts")[0] == 6_553
    assert rows_of(DataSettings(source="stanfordnlp/imdb", skip=24_000, limit=5_000), "prompts")[0] == 1_000
    assert rows_of(DataSettings(source="Anthropic/hh-rlhf", data_dir="helpful-base"), "prompts")[0] == 43_835
    assert rows_of(DataSettings(source="no/such-data", limit=7), "prompts")[0] == 7
    assert rows_of(DataSettings(source="stanfordnlp/imdb", skip=1_000, share=0.1), "prompts")[0] == 1_500
    rows, how = rows_of(DataSettings(source="no/such-data"), "prompts")
    assert rows == UNKNOWN_ROWS and "assumed" in how


def test_devices_are_found_by_their_names_or_named_by_the_nearest() -> None:
    assert find_machine("h100", 2, Assumptions()).memory == 80e9
    with pytest.raises(InputError, match="did you mean A100-40"):
        find_machine("A100-4", 1, Assumptions())
    with pytest.raises(InputError, match=r"there are: .*H200"):
        find_machine("zzz", 1, Assumptions())
    with pytest.raises(InputError, match="needs --gflops"):
        find_machine("cpu", 1, Assumptions())
    with pytest.raises(InputError, match="--gflops is that of a cpu"):
        find_machine("H100", 1, Assumptions(gflops=3.0))
    cpu = find_machine("CPU", 1, Assumptions(gflops=340.0, memory=24.0))
    assert (cpu.fp32, cpu.memory) == (340e9, 24e9)


def test_a_mean_above_the_longest_is_refused() -> None:
    with pytest.raises(InputError, match=r"--prompt-tokens 900 is above data.max_prompt_tokens = 24"):
        planned(prompt_tokens=900)


def test_a_mean_completion_above_the_longest_is_taken_and_called_the_longest() -> None:
    above, longest = (planned(RECIPE, completion_tokens=tokens) for tokens in (10_000, 512))
    assert above.costs == longest.costs
    assert any("mean completion 10000, or the longest where that is less" in said for said in assumptions(above))


def test_an_unreadable_configuration_is_one_sentence(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"Cannot load the model .*Unrecognized model"):
        planned(RECIPE, f"model.source={tmp_path}", "model.config=null")
    with pytest.raises(InputError, match="No policy can be made of this config"):
        planned(RECIPE, "model.config={model_type: gpt3}")


CHANGES: dict[str, Any] = {
    "prompt_tokens": 20,
    "completion_tokens": 50,
    "prompts": 77,
    "training_share": 0.1,
    "sampling_share": 0.2,
    "memory_share": 0.5,
}
OF_A_CPU: dict[str, Any] = {"gflops": 100.0, "memory": 1.0}


def test_every_assumption_acts() -> None:
    assert {*CHANGES, *OF_A_CPU} == set(Assumptions.model_fields)
    plain = values(planned(count=16))
    for name, value in CHANGES.items():
        assert values(planned(count=16, **{name: value})) != plain, name
    of_a_cpu = {"gflops": 300.0, "memory": 24.0}
    plain = values(planned(gpu="cpu", **of_a_cpu))
    for name, value in OF_A_CPU.items():
        assert values(planned(gpu="cpu", **{**of_a_cpu, name: value})) != plain, name


def values(budget: Budget) -> list[Any]:
    return [budget.machine.usable, *((cost.flops, cost.seconds, cost.bound) for cost in budget.costs)]


def test_the_command_prints_values_that_add_up() -> None:
    result = CliRunner().invoke(app, ["plan", str(RECIPE), "--gpu", "A100-40", "--count", "2", "--json"])
    assert result.exit_code == 0, result.output
    printed = json.loads(result.output)
    assert printed["machine"]["memory"] == 40e9 and printed["machine"]["count"] == 2
    for name in ("flops", "seconds", "tokens"):
        assert printed["total"][name] == pytest.approx(sum(stage[name] for stage in printed["stages"]))


def test_the_command_takes_settings_and_assumptions() -> None:
    more = ["align={}", "--prompts", "10", "--prompt-tokens", "8", "--completion-tokens", "16", "--json"]
    result = CliRunner().invoke(app, ["plan", str(RECIPE), *more])
    stages = {stage["stage"]: stage for stage in json.loads(result.output)["stages"]}
    assert set(stages) == {"sft", "preferences", "reward"}
    assert stages["sft"]["tokens"] == 4 * 10 * (8 + 16)  # four epochs
    assert stages["preferences"]["tokens"] == 10 * (8 + 2 * 16)  # drawn; a function scores


def test_a_share_above_one_is_one_sentence() -> None:
    result = CliRunner().invoke(app, ["plan", str(RECIPE), "--training-share", "1.5"])
    assert isinstance(result.exception, InputError)
    assert "--training-share: input should be less than or equal to 1" in str(result.exception)


def test_every_row_of_the_page_on_scale_is_what_its_command_says(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(RECIPES.parent)
    page = Path("docs/scale.md").read_text(encoding="utf-8")
    stages = {}
    for label, command in re.findall(r"^(\w)  exalign (plan .*)$", page, re.MULTILINE):
        result = CliRunner().invoke(app, [*shlex.split(command), "--json"])
        stages |= {(label, stage["stage"]): stage for stage in json.loads(result.stdout)["stages"]}
    rows = re.findall(r"^\| (\w) \| ([\w/-]+) \| (.*) \|$", page, re.MULTILINE)
    assert len(rows) > 15
    for label, name, printed in rows:
        assert printed == row_of(stages[label, name]), (label, name)


def row_of(stage: dict[str, Any]) -> str:
    operations, spread = stage["flops"] / 1e18, stage["sharded"]
    cells = (
        quantity(stage["tokens"]),
        f"{operations:,.0f}" if operations >= 100 else f"{operations:.3g}",
        duration(stage["seconds"]),
        stage["bound"],
        f"{sum(stage['replicated'].values()) / 1e9:.1f}",
        "–" if spread is None else f"{sum(spread.values()) / 1e9:.1f}",
        stage["fits"],
    )
    return " | ".join(cells)
