"""A search: what is tried, that the best of it is what is trained, and that it starts again where it was."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from collections.abc import Callable
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from exalign.data.record import Completion, Record
from exalign.data.store import Header, read_records, write_records
from exalign.errors import InputError
from exalign.methods.matching import Matching
from exalign.models.loading import load_tokenizer
from exalign.run.carry_out import check_inputs, run_recipe
from exalign.run.recipe import Range, Recipe, load_recipe
from exalign.run.search import Trial, at_one_kl, best_of, propose
from exalign.run.stages import plan
from exalign.storage import read_json
from run.conftest import tiny_overrides
from run.searched_run import ALONE, RECIPE, searched_recipe, searched_run
from training.tiny_world import TIMINGS, read_metrics

METHODS = ("exo-rw", "ppo")


@pytest.fixture(scope="module")
def searched(world: Path, tmp_path_factory: pytest.TempPathFactory, workers: ForkServerContext) -> Path:
    folder = tmp_path_factory.mktemp("searched") / "run"
    process = workers.Process(target=searched_run, args=(world, folder))
    process.start()
    process.join()
    assert process.exitcode == 0
    return folder


def results(run: Path, method: str) -> list[dict[str, Any]]:
    return read_json(run / "search" / method / "trials.json")["trials"]


def places(run: Path, method: str) -> list[Path]:
    """The folder of every trial."""
    folder = run / "search" / method
    return [folder / name for name in read_json(folder / "trials.json")["folders"]]


def test_every_method_has_the_same_number_of_trials_and_the_first_is_its_own(searched: Path, world: Path) -> None:
    recipe = searched_recipe(world)
    for method in METHODS:
        trials = results(searched, method)
        assert [trial["number"] for trial in trials] == [0, 1, 2]
        own = recipe.align[method]
        assert trials[0]["settings"] == own.model_dump(mode="json")
        for trial in trials:
            fixed = {k: v for k, v in trial["settings"].items() if k not in trial["values"]}
            assert fixed.items() <= own.model_dump(mode="json").items()
        assert len({json.dumps(trial["values"]) for trial in trials}) == 3
        assert read_json(searched / "search" / method / "done.json")["counts"]["trials"] == 3


def test_what_is_trained_is_the_best_trial_over_again(searched: Path) -> None:
    evidence = {m["name"]: m for m in read_json(searched / "evaluation" / "evidence.json")["methods"]}
    for method in METHODS:
        trials = results(searched, method)
        best = max(trials, key=lambda trial: trial["value"])
        used = read_json(searched / "align" / method / "settings.json")
        assert used == {"trial": best["number"], "settings": best["settings"]}
        assert read_metrics(searched / "align" / method, without=TIMINGS) == read_metrics(
            places(searched, method)[best["number"]], without=TIMINGS
        )
        assert best["values"].items() <= evidence[method]["settings"].items()


def test_beyond_every_reach_a_trial_is_worth_its_best_policy(searched: Path) -> None:
    """kl is 50 here. The mean of a policy's rewards is taken from its samples, which stay when the weights go."""
    for method in METHODS:
        best = read_json(searched / "search" / method / "best.json")
        for trial, place in zip(results(searched, method), places(searched, method), strict=True):
            kept = {"checkpoints", "policies"} if trial["number"] == best["trial"] else set()
            assert {path.name for path in place.iterdir() if path.is_dir()} == {"evaluated", *kept}
            means = []
            for point in trial["points"]:
                samples = read_records(place / f"evaluated/step-{point['step']:06d}/samples")
                assert [len(record.completions) for record in samples] == [2] * 4
                means.append(sum(sum(record.rewards or ()) for record in samples) / 8)
                assert point["reward"] == pytest.approx(means[-1], rel=1e-6, abs=1e-9)
            assert len(means) == 2 and trial["value"] == pytest.approx(max(means), rel=1e-6, abs=1e-9)
            assert trial["seconds"] > 0


def test_trials_are_ranked_at_one_kl_that_all_of_them_reach() -> None:
    """A small rate with the better curve wins against one that only goes farther; one that hardly moves has no say."""
    curves = [
        (np.array([[0.0, 1.0]]), np.array([[0.0, 1.0]])),
        (np.array([[0.0, 1.0, 2.0]]), np.array([[0.0, 0.8, 2.0]])),
        (np.array([[0.0, 0.25]]), np.array([[0.0, 0.4]])),
        None,
    ]
    trials = [Trial(number, {}, {}, failed=None if curve else "why") for number, curve in enumerate(curves)]
    ranked = at_one_kl(trials, curves, 2.0)
    assert [(trial.value, trial.kl) for trial in ranked] == [(1.0, 1.0), (0.8, 1.0), (0.4, 0.25), (None, None)]
    assert best_of(ranked) == ranked[0]
    assert [trial.kl for trial in at_one_kl(trials, curves, 0.5)] == [0.25, 0.25, 0.25, None]
    assert [trial.kl for trial in at_one_kl(trials, curves, 50.0)] == [1.0, 2.0, 0.25, None]  # nobody comes near


def test_validation_prompts_are_none_of_the_evaluation(searched: Path) -> None:
    validation = {record.prompt for record in read_records(searched / "validation" / "prompts")}
    evaluation = {record.prompt for record in read_records(searched / "evaluation" / "prompts")}
    assert len(validation) == 4 and len(evaluation) == 8 and not validation & evaluation


def test_trials_leave_the_report_its_curves(searched: Path) -> None:
    stages = [curve["stage"] for curve in read_json(searched / "evaluation" / "evidence.json")["curves"]]
    assert sorted(stages) == ["align/exo-rw", "align/ppo", "sft"]


def test_killed_at_random_moments_and_restarted_the_trials_are_the_same(
    searched: Path, world: Path, tmp_path: Path, workers: ForkServerContext
) -> None:
    """SIGKILL in or after the second trial of either method."""
    folder, moments, hits = tmp_path / "run", random.Random(), 0
    for method in METHODS:
        process = workers.Process(target=searched_run, args=(world, folder, "search"))
        process.start()
        while process.is_alive() and len([*folder.glob(f"search/{method}/trial-*/metrics.jsonl")]) < 2:
            time.sleep(0.002)
        time.sleep(moments.uniform(0.0, 0.3))
        process.kill()
        process.join()
        hits += process.exitcode == -signal.SIGKILL
    assert hits >= 1, "no kill hit the run: nothing was tested"
    process = workers.Process(target=searched_run, args=(world, folder, "search"))
    process.start()
    process.join()
    assert process.exitcode == 0
    for method in METHODS:
        assert without_clock(results(folder, method)) == without_clock(results(searched, method))


def stamps(run: Path) -> dict[str, int]:
    """When the metrics of every trial were written, by its folder, which is named by what it tried."""
    return {
        log.parent.relative_to(run).as_posix(): log.stat().st_mtime_ns
        for log in run.glob("search/*/trial-*/metrics.jsonl")
    }


def without_clock(trials: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [{k: v for k, v in trial.items() if k not in ("seconds", "seal")} for trial in trials]


def test_more_trials_another_kl_and_other_ranges_train_only_what_is_new(
    searched: Path, world: Path, tmp_path: Path
) -> None:
    """However it came about, a search is the one that is made in one go: `searched`, at first and at last."""
    in_one_go = results(searched, "exo-rw")
    rates = [trial["settings"]["learning_rate"] for trial in in_one_go]
    ranges = "{learning_rate: {low: 1e-4, high: 1e-2, log: true}, epochs: {choices: [1, 2]}}"
    grid = f"{{learning_rate: {{choices: [{rates[2]!r}, {rates[0]!r}]}}}}"

    def search(*overrides: str, ranges: str = ranges) -> dict[str, int]:
        methods = [f"search.methods={{exo-rw: {ranges}}}", "align.ppo=null"]
        run_recipe(searched_recipe(world, *methods, *overrides), "search", folder=tmp_path, redo=True)
        return stamps(tmp_path)

    two = search("search.trials=2")
    three = search("search.trials=3")
    assert len(three) == 3 and two.items() <= three.items()
    assert without_clock(results(tmp_path, "exo-rw")) == without_clock(in_one_go)

    assert search("search.trials=3", "search.kl=0.001") == three
    for trial, other in zip(results(tmp_path, "exo-rw"), in_one_go, strict=True):
        assert trial["kl"] <= 0.001 < other["kl"] and trial["value"] != other["value"]
        assert trial["points"] == other["points"] and trial["seconds"] > 0

    assert search("search.trials=2") == three
    assert three.items() < search("search.trials=2", "align.exo-rw.epochs=2", ranges=grid).items()
    assert [trial["settings"]["learning_rate"] for trial in results(tmp_path, "exo-rw")] == [rates[0], rates[2]]
    again = search("search.trials=3")
    assert three.items() < again.items()
    assert without_clock(results(tmp_path, "exo-rw")) == without_clock(in_one_go)

    search("search.trials=2", "temperature=0.9")  # other samples, other results
    assert len(stamps(tmp_path)) == 2 and not stamps(tmp_path).items() & again.items()


def test_a_trial_whose_samples_are_damaged_is_made_again_and_not_called_failed(
    searched: Path, world: Path, tmp_path: Path
) -> None:
    shutil.copytree(searched, tmp_path / "run")
    shard = next(places(tmp_path / "run", "exo-rw")[0].glob("evaluated/*/samples/part-*.parquet"))
    before = shard.stat()
    shard.write_bytes(shard.read_bytes()[::-1])
    os.utime(shard, ns=(before.st_atime_ns, before.st_mtime_ns))  # as of a disk that fails
    recipe = searched_recipe(world, "search.trials=2")
    run_recipe(recipe, "search/exo-rw", folder=tmp_path / "run", redo=True)
    found, whole = (results(run, "exo-rw") for run in (tmp_path / "run", searched))
    assert [(trial["failed"], trial["points"]) for trial in found] == [(None, trial["points"]) for trial in whole[:2]]


def test_trials_of_a_method_of_ones_own_are_tried_again_where_its_file_changed(
    world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "my_searched_method.py"
    file.write_text("from exalign.methods.matching import Matching\n\n\nclass Mine(Matching):\n    pass\n")
    method = "{method: 'my_searched_method:Mine', learning_rate: 1e-3, batch_prompts: 8, target: reward}"
    ranges = "search.methods={mine: {learning_rate: {choices: [1e-3, 1e-2]}}}"
    recipe = searched_recipe(world, f"align={{mine: {method}}}", "search={trials: 2, kl: 1, prompts: 4}", ranges)

    def search() -> set[str]:
        run_recipe(recipe, "search", folder=tmp_path / "run", redo=True)
        return {place.name for place in places(tmp_path / "run", "mine")}

    before = search()
    file.write_text(file.read_text() + "\n")
    assert len(before) == 2 and not before & search()


def test_a_search_made_with_other_settings_is_refused_and_named(searched: Path, world: Path) -> None:
    with pytest.raises(InputError, match=r"search/exo-rw was made by another recipe \(search.kl was 50.*is 2"):
        run_recipe(searched_recipe(world, "search.kl=2"), folder=searched)
    prompts = searched_recipe(world, "search.prompts=3")
    with pytest.raises(InputError, match="validation was made by another recipe"):
        run_recipe(prompts, folder=searched)
    alone = searched_recipe(world).model_copy(update={"search": None})
    with pytest.raises(InputError, match=r"align/exo-rw was made by another recipe.*search"):
        run_recipe(alone, folder=searched)


def test_the_stages_of_a_search_stand_before_the_method(world: Path) -> None:
    recipe = load_recipe(RECIPE, tiny_overrides(world, *ALONE, "search={kl: 1, prompts: 4}", EXO))
    names = [stage.name for stage in plan(recipe)]
    assert names[:6] == ["sft", "validation", "rollouts", "scored", "reference/reward", "search/exo-rw"]
    assert names[6] == "align/exo-rw"


EXO = "search.methods.exo-rw={learning_rate: {choices: [1e-6, 1e-3]}}"


def test_the_better_of_two_learning_rates_is_found(world: Path, tmp_path: Path) -> None:
    """With the smaller one, the recipe's own, the policy hardly moves and has the reward of π_sft."""
    recipe = searched_recipe(
        world,
        "align.ppo=null",
        "sft={learning_rate: 1e-2, epochs: 8, batch_prompts: 8}",
        "sample={num_completions: 8, max_new_tokens: 24}",
        "align.exo-rw={learning_rate: 1e-6, batch_prompts: 8, epochs: 8, target: reward, beta_r: 2.0}",
        "search={trials: 4, kl: 1, prompts: 4, samples: 32}",
        "search.methods={exo-rw: {learning_rate: {choices: [1e-6, 1e-2]}}}",
    )
    run_recipe(recipe, "search", folder=tmp_path)
    trials = {trial["settings"]["learning_rate"]: trial for trial in results(tmp_path, "exo-rw")}
    assert trials[1e-6]["kl"] < 0.01 and trials[1e-2]["kl"] == 1.0
    assert trials[1e-2]["value"] > trials[1e-6]["value"] + 2.0
    best = read_json(tmp_path / "search/exo-rw/best.json")
    assert best["settings"]["learning_rate"] == 1e-2 and best["value"] == trials[1e-2]["value"]


def test_a_trial_that_fails_is_kept_and_the_search_goes_on(world: Path, tmp_path: Path) -> None:
    """One rate overflows the weights in its first step, so that nothing is finite after it."""

    def recipe(trials: int, choices: list[float]) -> Recipe:
        return searched_recipe(
            world,
            "align.ppo=null",
            "align.exo-rw={learning_rate: 1e30, batch_prompts: 2, target: reward}",
            f"search={{trials: {trials}, kl: 1, prompts: 4}}",
            f"search.methods={{exo-rw: {{learning_rate: {{choices: {choices}}}}}}}",
        )

    run_recipe(recipe(4, [1e30, 1e-3]), "align", folder=tmp_path)
    trials = results(tmp_path, "exo-rw")
    assert trials[0]["settings"]["learning_rate"] == 1e30
    for trial in trials:
        failed = trial["settings"]["learning_rate"] == 1e30
        assert (trial["value"] is None) is failed
        assert ("not finite 10 times in a row" in str(trial["failed"])) is failed
    assert read_json(tmp_path / "align/exo-rw/settings.json")["settings"]["learning_rate"] == 1e-3
    # What was tried before is not trained again.
    twins = [trial["same_as"] for trial in trials]
    assert twins.count(None) == 2 and len(trials) == 4
    counts = read_json(tmp_path / "search/exo-rw/done.json")["counts"]
    assert counts["failed_trials"] == sum(trial["value"] is None for trial in trials)
    with pytest.raises(InputError, match=r"every trial failed, the first one because: .*Choose other ranges"):
        run_recipe(recipe(2, [1e30, 1e29]), "search", folder=tmp_path, redo=True)


def proposals(count: int, seed: int, worth: Callable[[Any], float]) -> list[dict[str, Any]]:
    ranges = {"learning_rate": Range(low=1e-6, high=1e-1, log=True), "epochs": Range(low=1, high=8)}
    tried: list[dict[str, Any]] = []
    for _ in range(count):
        results = [(values, worth(values)) for values in tried]
        tried.append(propose(ranges, Matching, results, trials=count, seed=seed))
    return tried


def test_a_proposal_is_a_function_of_the_seed_and_the_results() -> None:
    assert proposals(8, 0, lambda v: v["learning_rate"]) == proposals(8, 0, lambda v: v["learning_rate"])
    assert proposals(8, 0, lambda v: v["learning_rate"]) != proposals(8, 1, lambda v: v["learning_rate"])
    up, down = (proposals(12, 0, lambda v, sign=sign: sign * v["learning_rate"]) for sign in (1, -1))
    assert up[:4] == down[:4] and up[4:] != down[4:]


def test_proposals_stay_in_their_ranges_and_gather_where_it_is_good() -> None:
    """Learning rates are drawn from five decades; after the start, most lie in the best or the worst of them."""
    for sign in (1, -1):
        tried = proposals(24, 3, lambda v, sign=sign: sign * v["learning_rate"])
        assert all(1e-6 <= v["learning_rate"] <= 1e-1 and v["epochs"] in range(1, 9) for v in tried)
        late = [v["learning_rate"] for v in tried[12:]]
        assert sum((rate > 3e-4) == (sign > 0) for rate in late) >= 9


def test_lists_with_no_more_combinations_than_trials_are_a_grid() -> None:
    ranges = {"learning_rate": Range(choices=(1e-4, 1e-3, 1e-2)), "epochs": Range(choices=(1, 2))}
    tried: list[dict[str, Any]] = [{"learning_rate": 1e-3, "epochs": 2}]
    for _ in range(5):
        tried.append(propose(ranges, Matching, [(values, None) for values in tried], trials=6, seed=0))
    assert {(v["learning_rate"], v["epochs"]) for v in tried} == {(r, e) for r in (1e-4, 1e-3, 1e-2) for e in (1, 2)}
    outside = [({"learning_rate": 5.0, "epochs": 9}, 1.0)]
    assert propose(ranges, Matching, outside, trials=6, seed=0) == {"learning_rate": 1e-4, "epochs": 1}


def test_results_outside_the_ranges_and_failures_do_not_stop_the_search() -> None:
    rates = {"learning_rate": Range(low=1e-4, high=1e-2, log=True)}
    results: list[Any] = [({"learning_rate": 1.0}, 9.0), ({"learning_rate": 1e-3}, None)]
    assert 1e-4 <= propose(rates, Matching, results, trials=3, seed=0)["learning_rate"] <= 1e-2  # type: ignore[operator]


def test_of_equal_trials_the_first_is_best() -> None:
    def trial(number: int, value: float | None) -> Trial:
        return Trial(number, {"beta_pi": 1.0}, {}, value, failed=None if value is not None else "It broke.")

    trials = [trial(0, None), trial(1, -2.0), trial(2, -2.0), trial(3, -3.0)]
    best = best_of(trials)
    assert best is not None and best.number == 1
    assert best_of([trial(0, None)]) is None


RATE = "search.methods.exo-rw.learning_rate"


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["search.methods={exo-rv: {epochs: {choices: [1]}}}"], "no method of this recipe; did you mean exo-rw?"),
        (["search.methods.exo-rw={}"], "search.methods.exo-rw names no setting to search over"),
        (["search.methods={}"], "search.methods:"),
        ([f"{RATE}s={{low: 1e-5, high: 1e-3}}"], "learning_rates is not a setting of the method; did you mean"),
        ([f"{RATE}={{low: 0.0, high: 1e-3}}"], f"{RATE} reaches 0.0, which the setting does not allow"),
        (["search.methods.exo-rw.epochs={low: 0, high: 3}"], "epochs reaches 0, which the setting does not allow"),
        (["search.methods.exo-rw.epochs={low: 1.5, high: 3}"], "epochs reaches 1.5, which the setting does not allow"),
        (["search.methods.exo-rw.divergence={choices: [kl]}"], "divergence reaches 'kl', which"),
        (["search.methods.exo-rw.divergence={low: 0, high: 1}"], "divergence is not a number"),
        (["search.methods.exo-rw.epsilon={choices: [0.001, 0.1]}"], "epsilon reaches 0.1, but then align.exo-rw: eps"),
        (["search.methods.exo-rw.seed={low: 0, high: 9}"], "seed cannot be searched over: a search over seeds"),
        (["search.methods.exo-rw.token_budget={low: 9, high: 99}"], "it changes no result"),
        (["search.methods.exo-rw.target={choices: [reward]}"], "target cannot be searched over"),
        (["search.methods.exo-rw.stop_after={choices: [1, 2]}"], "stop_after cannot be searched over: what it holds"),
        ([f"{RATE}={{low: 1e-3, high: 1e-5}}"], f"{RATE}: low must be below high"),
        ([f"{RATE}={{low: 0, high: 1, log: true}}"], "log needs low above 0"),
        ([f"{RATE}={{low: 1e-3}}"], "give low and high, or choices"),
        ([f"{RATE}={{low: 1e-5, high: 1e-3, choices: [1e-4]}}"], "give choices, or low and high, not both"),
        ([f"{RATE}={{choices: [1e-4, 1e-4]}}"], "choices must be at least one value, and each once"),
        ([f"{RATE}={{lower: 1e-5}}"], f"{RATE}.lower is not a setting; did you mean low?"),
        (["search.trials=1"], "search.trials:"),
        (["search=null", "data.validation={source: x.jsonl}"], "data.validation has no effect without a search"),
    ],
)
def test_a_search_that_cannot_be_is_one_sentence(overrides: list[str], sentence: str) -> None:
    start = ["search={kl: 2}", "search.methods.exo-rw={learning_rate: {low: 1e-5, high: 1e-3, log: true}}"]
    with pytest.raises(InputError) as caught:
        load_recipe(RECIPE, [*start, *overrides])
    assert sentence in str(caught.value) and "\n" not in str(caught.value)


def test_too_few_validation_prompts_are_found_before_any_work(world: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"asks for 5 prompts .* after its first evaluate.prompts is 4"):
        check_inputs(searched_recipe(world, "search.prompts=5"))
    source = f"data.validation={{source: {world}/prompts.jsonl}}"
    check_inputs(searched_recipe(world, "search.prompts=24", source))
    with pytest.raises(InputError, match=r"asks for 25 prompts .* data.validation has is 24"):
        check_inputs(searched_recipe(world, "search.prompts=25", source))
    overlapping = f"data.validation={{source: {world}/test.jsonl}}"
    check_inputs(searched_recipe(world, "search.prompts=4", overlapping))
    with pytest.raises(InputError, match=r"asks for 5 prompts .* data.validation has is 4"):
        check_inputs(searched_recipe(world, "search.prompts=5", overlapping))


def test_validation_prompts_of_their_own_are_used(world: Path, tmp_path: Path) -> None:
    """Here another run's, whose ids of prompts may be cut to another limit, or written in another template."""
    given = {json.loads(line)["prompt"] for line in (world / "prompts.jsonl").read_text().splitlines()}
    tokenizer = load_tokenizer(str(world / "tokenizer"))
    drawn_there = Completion(" was dull.", tuple(tokenizer.encode(" was dull.", add_special_tokens=False)))
    rows = [Record(str(i), prompt, (drawn_there,), prompt_ids=(1,)) for i, prompt in enumerate(sorted(given))]
    write_records(tmp_path / "rows", rows, Header())
    recipe: Recipe = searched_recipe(world, "search.prompts=6", f"data.validation.source={tmp_path}/rows")
    run_recipe(recipe, "validation", folder=tmp_path / "run")
    drawn = read_records(tmp_path / "run" / "validation" / "samples")
    assert {record.prompt for record in drawn} <= given and all(record.prompt_ids != (1,) for record in drawn)
