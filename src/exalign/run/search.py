"""The search for a method's settings: trials that train it as its own stage does, ranked on validation prompts.

validation → search/METHOD → align/METHOD, which takes over the weights of the best trial.

A trial is a training with other settings in a folder that ends with `result.json`, named by what was tried: what it
was tried on, and its settings. What a later trial tries is a function of the seed and of the results before it, for
which Optuna's study is built anew each time: so a search that was killed goes on as if it had not been, and one with
more trials, other ranges or another KL carries out what is new. The best trial keeps its weights, of which the method's
stage gets second names; all other trials keep metrics and scored samples.
"""

from __future__ import annotations

import json
import shutil
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from itertools import islice, product
from math import prod
from pathlib import Path
from typing import Any

import torch

from exalign.checksums import damaged_files
from exalign.data.reading import prompt_digest
from exalign.data.record import Record
from exalign.data.store import Header, read_records, write_records
from exalign.errors import InputError
from exalign.evaluation.frontier import path as path_along
from exalign.evaluation.frontier import reach, reward_at_kl
from exalign.evaluation.sample_table import tabulate
from exalign.evaluation.schema import Trial
from exalign.evaluation.statistics import Array
from exalign.methods.method import Material, Method
from exalign.processes import gathered, leads
from exalign.run.evaluating import evaluation_rows, in_order, sample_policies, takes_evaluation
from exalign.run.materials import (
    SAMPLED,
    Scoring,
    Takes,
    Wanted,
    are_cut,
    different_prompts,
    draw,
    evaluation_sampling,
    judging,
    metric_rows,
    records_of,
    room_to_train,
    run_tokenizer,
    seeded,
    supervised,
    takes_data,
    takes_supervised,
)
from exalign.run.recipe import Range, Recipe, Value, changed
from exalign.run.view import Stage, View
from exalign.settings import CONTENT, FUNCTION
from exalign.storage import (
    atomic_path,
    fingerprint,
    link_folder,
    read_json,
    read_sealed,
    remove_folder,
    write_json,
    write_sealed,
)
from exalign.terminal import shown
from exalign.training.guards import NotFiniteError

Curve = tuple[Array, Array]
"""KL and reward of each prompt under π_sft and the policies that a trial saved, see `frontier.path`."""
STARTUP = 4
"""Results that the estimator needs; before them values are drawn from the ranges at random."""


def validation_stage(recipe: Recipe) -> Iterator[Stage]:
    """The prompts that trials are ranked on, with scored samples of π_sft; none without a search."""
    judge = judging(recipe)
    if recipe.search is None or judge is None:
        return
    own = Takes((*SAMPLED, "search.prompts", "search.samples", "evaluate.prompts", "evaluate.first_prompt"))
    rows = takes_evaluation(recipe) + takes_data(recipe, "validation")
    takes = takes_supervised(recipe) + judge.takes + own + rows
    yield takes.stage("validation", partial(_validation, judge=judge), shared=True)


def search_stage(recipe: Recipe, name: str, takes: Takes, material: Callable[[View], Material]) -> Stage:
    """The stage search/NAME for a method whose own stage `takes` this, and gets its material so."""
    judge = judging(recipe)
    assert judge is not None
    ranked = Takes(
        (*SAMPLED, "search.samples", "search.trials", "search.kl", f"search.methods.{name}"), ("validation",)
    )
    work = partial(_search, name=name, material=material, judge=judge)
    return (takes + judge.takes + ranked).stage(f"search/{name}", work, stays=("trial-*",), shared=True)


def searched_settings(view: View, name: str, method: Method) -> Method:
    """The method with the settings of its search's best trial, whose weights are put into the stage's folder.

    They are what a training leaves of which all steps are done; damaged ones are left, and trained again.
    """
    best, taken = read_json(view.path(f"search/{name}", "best.json")), False
    if leads():
        write_json(view.folder / "settings.json", {"trial": best["trial"], "settings": best["settings"]})
        taken = _take_over(view.path(f"search/{name}", best["folder"]), view.folder)
    if gathered(taken)[0]:  # the others wait here for the files
        view.console.print(shown(f"  the weights are those of trial {best['trial']}", "dim"))
    return type(method).model_validate_json(json.dumps(best["settings"]))


def _take_over(trial: Path, folder: Path) -> bool:
    """Give the weights of a complete trial second names in `folder`, checkpoints last; whether they are there now."""
    if (folder / "checkpoints").exists():
        return False  # taken before, or a training is under way
    if not (trial / "checkpoints").exists() or any(damaged_files(trial)):
        return False
    for each in sorted(trial.iterdir(), key=lambda each: (each.name == "checkpoints", each.name)):
        if each.is_dir() and each.name != "evaluated":
            link_folder(each, folder / each.name)
        elif each.is_file() and each.name != "result.json":
            with atomic_path(folder / each.name) as temporary:
                shutil.copyfile(each, temporary)
    return True


def validation_prompts(
    evaluation: Iterable[Record], validation: Iterable[Record] | None, counts: Counter[str], *, used: int, wanted: int
) -> list[Record]:
    """`wanted` prompts that the evaluation, which uses the first `used`, does not; from data.validation if it is given.

    Fewer are an `InputError`.
    """
    different = different_prompts(evaluation)
    taken = {prompt_digest(record) for record in islice(different, used)}
    found: list[Record] = []
    for record in different if validation is None else different_prompts(validation):
        if prompt_digest(record) in taken:
            counts["prompts_of_the_evaluation"] += 1
        elif len(found) < wanted:
            found.append(replace(record, completions=(), preferred=None))
        else:
            break
    if len(found) < wanted:
        where = "data.evaluation has after its first evaluate.prompts" if validation is None else "data.validation has"
        raise InputError(
            f"search.prompts asks for {wanted} prompts that the evaluation does not use, but all that {where} is "
            f"{len(found)}; lower it, or give more in data.validation."
        )
    return found


def _validation(view: View, *, judge: Scoring) -> None:
    recipe = view.recipe
    search = recipe.search
    assert search is not None
    own = records_of(view, "validation") if "data.validation" in view.stage.reads else None
    quiet = replace(view, counts=Counter()) if own else view
    rows = in_order(evaluation_rows(quiet), recipe.evaluate.first_prompt)
    prompts = validation_prompts(rows, own, view.counts, used=recipe.evaluate.prompts, wanted=search.prompts)
    given = None if view.has("preferences") else recipe.data.evaluation
    if not are_cut(recipe.data.validation if own else given):
        prompts = [replace(record, prompt_ids=None) for record in prompts]  # another run's: its template, its limit
    if leads():
        write_records(view.folder / "prompts", prompts, Header(counts=dict(view.counts)))
    tokenizer, settings = run_tokenizer(view), evaluation_sampling(view, search.samples)
    model = supervised(view, tokenizer)
    wanted = Wanted(prompts, settings, "validation")
    draw(view, model, tokenizer, wanted, view.folder / "samples", scorer=judge.load(view), reference=model)


def _search(view: View, *, name: str, material: Callable[[View], Material], judge: Scoring) -> None:
    search, own = view.recipe.search, view.recipe.align[name]
    assert search is not None
    ranges, tried_on = search.methods[name], gathered(_tried_on(view, name))[0]  # the first process knows the key
    for folder in view.folder.glob("trial-*") if leads() else ():
        if not folder.name.startswith(f"trial-{tried_on}-"):
            remove_folder(folder)  # a search that tries its settings has other results
        elif (damaged := next(damaged_files(folder / "evaluated"), None)) is not None:
            view.console.print(shown(f"! {damaged} is damaged; its trial is made again.", "yellow"), soft_wrap=True)
            remove_folder(folder)
    trials: list[Trial] = []
    curves: list[Curve | None] = []
    places: list[Path] = []
    for number in range(search.trials):
        values = {setting: getattr(own, setting) for setting in ranges}
        if trials:  # methods with the same ranges start with the same draws
            results, seed = [(trial.values, trial.value) for trial in trials], [view.recipe.seed, "search"]
            values = propose(ranges, type(own), results, trials=search.trials, seed=seed)
        settings = changed(own, values)
        trial = Trial(number, values, settings.model_dump(mode="json"))
        place = view.folder / f"trial-{tried_on}-{fingerprint(settings.deciding())[:8]}"
        trial, curve = _carried_out(view, place, settings, trial, material, judge)
        if place in places:
            trial = replace(trial, seconds=0.0, counts={}, same_as=places.index(place))
        places.append(place)
        curves.append(curve)
        trials = at_one_kl([*trials, trial], curves, search.kl)
        best = best_of(trials)
        _forget_weights(places, None if best is None else places[best.number])
        view.counts.update(trial.counts)
        view.console.print(shown(f"  {_sentence(trials[-1])}", "dim"), soft_wrap=True)
    best = best_of(trials)
    if best is None:
        raise InputError(
            f"search/{name}: every trial failed, the first one because: {trials[0].failed} "
            f"Choose other ranges in search.methods.{name}."
        )
    place = places[best.number]
    _forget_weights([*view.folder.glob("trial-*")], place)
    view.counts["trials"] = len(trials)
    view.counts["failed_trials"] = sum(trial.value is None for trial in trials)
    if not leads():
        return
    listed = {"trials": [asdict(trial) for trial in trials], "folders": [each.name for each in places]}
    write_sealed(view.folder / "trials.json", listed)
    found = {"trial": best.number, "folder": place.name, "value": best.value, "kl": best.kl}
    write_json(view.folder / "best.json", {**found, "ranked_at": search.kl, "settings": best.settings})
    view.console.print(shown(f"  best: trial {best.number}, in {place.name}", "dim"), soft_wrap=True)


def _tried_on(view: View, name: str) -> str:
    """What all trials share: the stages they are made from, and every setting but those of the search itself.

    Of the method's own, which name a trial, it is what stands under the names of files and models.
    """
    own = {path: value for path, value in view.key.items() if not path.startswith(("search.", f"align.{name}"))}
    method = view.recipe.align[name]
    named = method.marked(CONTENT) | method.marked(FUNCTION)
    for setting, value in view.key.get(f"align.{name}", {}).items():
        if isinstance(value, dict) or (setting in named and isinstance(value, list)):
            own[f"align.{name}.{setting}"] = value
    needs = [read_sealed(view.path(need, "done.json"))["fingerprint"] for need in view.stage.needs]
    return fingerprint([own, view.key.get("search.samples"), needs])[:8]


def _carried_out(
    view: View, place: Path, settings: Method, trial: Trial, material: Callable[[View], Material], judge: Scoring
) -> tuple[Trial, Curve | None]:
    """Train with these settings in `place`, continuing what stands there, and evaluate every policy saved.

    The curve is None where that failed.
    """
    search, result, failed = view.recipe.search, place / "result.json", None
    assert search is not None
    if not gathered(result.exists())[0]:
        alone, own = replace(view, counts=Counter()), seeded(settings, view.recipe)
        place.mkdir(exist_ok=True)
        try:
            torch.manual_seed(own.seed)
            with room_to_train():
                own.train(material(alone), place)
            prompts = read_records(view.path("validation", "prompts"))
            sampling = evaluation_sampling(alone, search.samples)
            # The same random numbers for every trial: trials with the same policies have the same value.
            sample_policies(alone, place, Wanted(prompts, sampling, "validation"), place / "evaluated", judge)
        except NotFiniteError as error:
            failed = str(error)
        if leads():
            seconds = round(sum(row["seconds"] for row in metric_rows(place)), 2)  # each step once
            write_sealed(result, {"seconds": seconds, "counts": dict(alone.counts), "failed": failed})
        gathered(None)
    trial = replace(trial, **read_sealed(result))
    if trial.failed is not None:
        return trial, None
    sft = tabulate(read_records(view.path("validation", "samples")), "validation/samples")
    steps = sorted((place / "evaluated").glob("step-*"))
    samples = [read_records(step / "samples") for step in steps]
    try:
        tables = [tabulate(records, step.name) for records, step in zip(samples, steps, strict=True)]
    except InputError as error:  # a policy that gives its own samples no probability has no KL
        return replace(trial, failed=str(error)), None
    kls, rewards = path_along(sft, tables, sft.ids)
    points = [
        {"step": int(step.name.removeprefix("step-")), "reward": float(reward), "kl": float(nats)}
        for step, reward, nats in zip(steps, rewards.mean(axis=0)[1:], kls.mean(axis=0)[1:], strict=True)
    ]
    return replace(trial, points=points), (kls, rewards)


def _forget_weights(places: Iterable[Path], best: Path | None) -> None:
    """Remove weights of trials but the best's, and of that the last model, which its last checkpoint holds too."""
    for place in set(places) if leads() else ():
        for name in ("model",) if place == best else ("policies", "checkpoints", "model"):
            if (place / name).exists():
                remove_folder(place / name)


def at_one_kl(trials: Sequence[Trial], curves: Sequence[Curve | None], kl: float) -> list[Trial]:
    """The trials with the mean reward along their curves at one KL, which all that count reach.

    It is `kl`, or the least reach of the trials that come a quarter of the way there. One that does not is worth what
    it reaches, so that a rate at which nothing moves decides nothing.
    """
    reaches = [None if curve is None else reach(*curve) for curve in curves]
    common = min([kl, *(far for far in reaches if far is not None and far >= kl / 4)])
    valued = []
    for trial, curve, far in zip(trials, curves, reaches, strict=True):
        if curve is not None and far is not None:
            at = min(common, far)
            trial = replace(trial, value=float(reward_at_kl(*curve, at).mean()), kl=at)
        valued.append(trial)
    return valued


def best_of(trials: Sequence[Trial]) -> Trial | None:
    """The trial with the highest value, of equal ones the first; None where every trial failed."""
    done = [trial for trial in trials if trial.value is not None]
    return max(done, key=lambda trial: trial.value or 0.0, default=None)


def _sentence(trial: Trial) -> str:
    """What is printed of a finished trial."""
    values = ", ".join(f"{name} {v:.3g}" if isinstance(v, float) else f"{name} {v}" for name, v in trial.values.items())
    failed = f"failed: {trial.failed}"
    outcome = failed if trial.value is None else f"reward {trial.value:.3f} at KL {trial.kl:.2f}"
    again = "" if trial.same_as is None else f" (the same as trial {trial.same_as})"
    return f"trial {trial.number}: {values}: {outcome}{again}"


def propose(
    ranges: Mapping[str, Range],
    owner: type[Method],
    results: Sequence[tuple[Mapping[str, Value], float | None]],
    *,
    trials: int,
    seed: Any,
) -> dict[str, Value]:
    """Values of settings of `owner` to try after these results, which have None for what failed.

    Where every range is a list and there are no more combinations than trials, each is tried once before any is
    tried again: a grid. Results from outside the ranges are not learned from.
    """
    try:
        import optuna
    except ImportError:
        raise InputError('A search needs Optuna: pip install "exalign[search]".') from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    lists = [values.choices or () for values in ranges.values()]
    if all(lists) and prod(map(len, lists)) <= trials:
        tried = [dict(values) for values, _ in results]
        for values in product(*lists):
            if (untried := dict(zip(ranges, values, strict=True))) not in tried:
                return untried
    seed = int(fingerprint([seed, len(results)]), 16) % 2**32
    sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=STARTUP)
    study = optuna.create_study(direction="maximize", sampler=sampler)
    distributions: dict[str, Any] = {}
    for name, given in ranges.items():
        whole = owner.model_fields[name].annotation in (int, int | None)
        kind: Any = optuna.distributions.IntDistribution if whole else optuna.distributions.FloatDistribution
        if given.choices is None:
            distributions[name] = kind(given.low, given.high, log=given.log)
        else:
            distributions[name] = optuna.distributions.CategoricalDistribution(given.choices)
    for params, value in results:
        if all(ranges[name].contains(one) for name, one in params.items()):
            outcome = {"state": optuna.trial.TrialState.FAIL} if value is None else {"value": value}
            study.add_trial(optuna.create_trial(params=dict(params), distributions=distributions, **outcome))
    return dict(study.ask(distributions).params)
