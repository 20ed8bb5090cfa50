"""The search for a method's settings: trials that train it as its own stage does, ranked on validation prompts.

validation → search/METHOD → align/METHOD, which takes over the weights of the best trial (`winner`).

A trial is a folder, `search/METHOD/trial-000`, that ends with `result.json`; what a later trial tries is a function of
the recipe's seed and of the results before it. So a search that was killed goes on as if it had not been, and
one with more trials or other ranges carries out what is new (`trial_folders`). The weights of all trials but the best
are deleted; their settings, metrics and scored samples stay.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from exalign.data.record import Record
from exalign.data.store import Header, read_records, write_records
from exalign.errors import InputError
from exalign.evaluation.schema import Trial
from exalign.processes import gathered, leads, several
from exalign.run.evaluation_stages import (
    different_prompts,
    evaluation_sampling,
    evaluation_scorer,
    score_drawn,
    score_policies,
)
from exalign.run.on_demand import sample_supervised
from exalign.run.proposals import Proposer
from exalign.run.recipe import Recipe
from exalign.run.runner import Run, Stage, TrainingStage
from exalign.run.search_settings import changed
from exalign.run.sources import (
    data_identity,
    iter_records_of,
    model_identity,
    scorer_identity,
    scorer_needs,
    seeded,
    supervised_needs,
)
from exalign.run.stage_files import HANDED_OVER
from exalign.run.trial_folders import KEPT, forget_others, put_in_place, step_aside_from, trial_folder, tried_in
from exalign.run.trials import (
    best_of,
    best_so_far,
    same_as,
    trial_sentence,
    trials_csv,
    trials_table,
    value_of,
)
from exalign.run.winner import forget_weights, forget_what_is_made_again, give_back, hand_over, take_over
from exalign.storage import fingerprint, read_json, read_sealed, write_json, write_sealed, write_text
from exalign.terminal import shown
from exalign.training.guards import NotFiniteError
from exalign.training.settings import TrainSettings

Method = TypeVar("Method", bound=TrainSettings)
Train = Callable[[Run, Path, Counter[str], Method], None]
"""Trains a method with these settings in a folder."""


def validation_stage(recipe: Recipe) -> Iterator[Stage]:
    """The prompts that trials are ranked on, with scored samples of π_sft; none without a search."""
    if recipe.search is None:
        return
    data, scorer = recipe.data, evaluation_scorer(recipe)
    sampling = evaluation_sampling(recipe, recipe.search.samples).model_dump(exclude={"batch_completions"})
    how = [recipe.seed, recipe.temperature, model_identity(recipe), scorer_identity(scorer), sampling]
    chosen = [data_identity(data.validation), data_identity(data.evaluation)]
    numbers = [recipe.evaluate.prompts, recipe.search.prompts, data.max_prompt_tokens]
    needs = tuple(dict.fromkeys((*supervised_needs(recipe), *scorer_needs(scorer))))
    yield Stage("validation", needs, lambda: [how, chosen, numbers], _validation)


def method_stages(
    recipe: Recipe, method: str, needs: tuple[str, ...], inputs: Sequence[Any], train: Train[Any], *more: Any
) -> list[Stage]:
    """The stage align/METHOD, after search/METHOD where the recipe searches for the settings of this method.

    `inputs` and `more` are what the result depends on besides the settings and the stages that it `needs`.
    """
    search, stages = recipe.search, []
    whole = [*inputs, own_settings(recipe, method).model_dump(mode="json"), *more]
    if search is not None and method in search.methods:
        ranges = {name: values.model_dump(mode="json") for name, values in search.methods[method].items()}
        searched = [whole, search.trials, search.kl, ranges]
        trials = partial(_search, method=method, train=train, tried_on=[inputs, more], needs=(*needs, "validation"))
        stages.append(
            Stage(f"search/{method}", (*needs, "validation"), lambda: searched, trials, stays=(*KEPT, HANDED_OVER))
        )
        needs = (*needs, f"search/{method}")
    work = partial(_train, method=method, train=train)
    return [*stages, TrainingStage(f"align/{method}", needs, lambda: whole, work)]


def validation_prompts(
    recipe: Recipe, evaluation: Iterable[Record], validation: Iterable[Record] | None, counts: Counter[str]
) -> list[Record]:
    """Prompts that the evaluation does not use, from the rows of data.validation where it is given.

    Fewer than the search asks for are an `InputError`.
    """
    assert recipe.search is not None
    different = different_prompts(evaluation)
    used = {fingerprint(record.prompt) for record in islice(different, recipe.evaluate.prompts)}
    found: list[Record] = []
    for record in different if validation is None else different_prompts(validation):
        if fingerprint(record.prompt) in used:
            counts["prompts_of_the_evaluation"] += 1
        elif len(found) < recipe.search.prompts:
            found.append(replace(record, completions=(), preferred=None))
        else:
            break
    if len(found) < recipe.search.prompts:
        where = "data.evaluation has after its first evaluate.prompts" if validation is None else "data.validation has"
        raise InputError(
            f"search.prompts asks for {recipe.search.prompts} prompts that the evaluation does not use, but all that "
            f"{where} is {len(found)}; lower it, or give more in data.validation."
        )
    return found


def _validation(run: Run, folder: Path, counts: Counter[str]) -> None:
    recipe = run.recipe
    assert recipe.search is not None and recipe.data.evaluation is not None
    own = None if recipe.data.validation is None else iter_records_of(recipe.data.validation, run, counts)
    evaluation = iter_records_of(recipe.data.evaluation, run, Counter() if own else counts)
    prompts = validation_prompts(recipe, evaluation, own, counts)
    write_records(folder / "prompts", prompts, Header(counts=dict(counts)))
    settings = evaluation_sampling(recipe, recipe.search.samples)
    counts.update(sample_supervised(run, prompts, settings, folder=folder / "drawn", purpose="validation"))
    counts.update(score_drawn(run, folder / "drawn", folder / "samples"))


def _search(
    run: Run,
    folder: Path,
    counts: Counter[str],
    *,
    method: str,
    train: Train[Any],
    tried_on: Sequence[Any],
    needs: Sequence[str],
) -> None:
    search = run.recipe.search
    assert search is not None
    if several():
        raise InputError("A search runs in one process: start exalign search RECIPE without accelerate launch first.")
    base = fingerprint([tried_on, [read_sealed(run.path(need, "done.json"))["fingerprint"] for need in needs]])
    forget_others(folder, base)
    give_back(list(tried_in(folder)), folder / HANDED_OVER, run.path("align", method))
    own = own_settings(run.recipe, method)
    # Methods with the same ranges start with the same draws.
    seed = [run.recipe.seed, "search"]
    proposer = Proposer(search.methods[method], type(own), trials=search.trials, seed=seed)
    trials: list[Trial] = []
    for number in range(search.trials):
        results = [(trial.values, trial.value) for trial in trials]
        values = proposer.propose(results) if trials else {name: getattr(own, name) for name in proposer.ranges}
        settings = changed(own, values)
        trial = Trial(number, values, settings.model_dump(mode="json"))
        twin = next((other for other in trials if other.settings == trial.settings), None)
        place = put_in_place(folder, number, None if twin else {"settings": trial.settings, "base": base})
        trial = _carried_out(run, place, settings, trial, train) if twin is None else same_as(twin, trial)
        write_sealed(place / "result.json", asdict(trial))
        trials.append(trial)
        _keep_the_best(folder, trials)
        counts.update(trial.counts)
        run.console.print(shown(f"  {trial_sentence(trial)}", "dim"), soft_wrap=True)
    step_aside_from(folder, search.trials)
    for earlier in set(tried_in(folder)) - {trial_folder(folder, trial.number) for trial in trials}:
        forget_weights(earlier)
    counts["trials"] = len(trials)
    counts["failed_trials"] = sum(trial.value is None for trial in trials)
    write_text(folder / "trials.csv", trials_csv(trials))
    best = best_of(trials, method)
    found = {"trial": best.number, "value": best.value, "kl": best.kl, "ranked_at": search.kl}
    write_json(folder / "best.json", {**found, "settings": best.settings})
    title = f"search/{method}: reward at a KL of {search.kl:g} nats, or as far as a trial went"
    run.console.print(trials_table(trials, best, title))
    hand_over(trial_folder(folder, best.number), folder / HANDED_OVER)


def _carried_out(run: Run, place: Path, settings: TrainSettings, trial: Trial, train: Train[Any]) -> Trial:
    """Train with these settings in `place`, continuing what stands there, and evaluate every policy saved.

    Where a trial of the same stands complete, only its value is computed again, at this search's KL.
    """
    assert run.recipe.search is not None
    values = asdict(trial)
    if (place / "result.json").exists():
        done = Trial(**read_sealed(place / "result.json"))
        values |= {"seconds": done.seconds, "counts": done.counts}
        if done.failed is not None:
            return Trial(**values | {"failed": done.failed})
    else:
        counts: Counter[str] = Counter()
        try:
            train(run, place, counts, seeded(settings, run.recipe))
        except NotFiniteError as error:
            outcome = {"failed": str(error), "seconds": _training_seconds(place), "counts": dict(counts)}
            return Trial(**values | outcome)
        prompts = read_records(run.path("validation", "prompts"))
        sampling = evaluation_sampling(run.recipe, run.recipe.search.samples)
        # The same random numbers for every trial: trials with the same policies have the same value.
        score_policies(run, place, prompts, sampling, place / "evaluated", counts, purpose="validation")
        values |= {"seconds": _training_seconds(place), "counts": dict(counts)}
    return Trial(**values | value_of(run.path("validation", "samples"), place / "evaluated", run.recipe.search.kl))


def own_settings(recipe: Recipe, method: str) -> TrainSettings:
    """A method's settings as the recipe has them."""
    return recipe.align[method] if method in recipe.align else recipe.ppo[method]


def _train(run: Run, folder: Path, counts: Counter[str], *, method: str, train: Train[Any]) -> None:
    """Train a method with its settings, or with those of its best trial, which are written beside the model.

    Where that trial's weights were handed over, they are trained already.
    """
    settings = own_settings(run.recipe, method)
    if run.recipe.search is not None and method in run.recipe.search.methods:
        best = read_json(run.path("search", method, "best.json"))
        settings = type(settings).model_validate_json(json.dumps(best["settings"]))
        if leads():
            write_json(folder / "settings.json", {"trial": best["trial"], "settings": best["settings"]})
        taken = leads() and take_over(run.path("search", method, HANDED_OVER), folder)
        if gathered(taken)[0]:  # the others wait here for the files
            run.console.print(shown(f"  the weights are those of trial {best['trial']}", "dim"))
    train(run, folder, counts, seeded(settings, run.recipe))


def _keep_the_best(folder: Path, trials: Sequence[Trial]) -> None:
    """Delete the weights of every trial but the best so far."""
    best = best_so_far(trials)
    for trial in trials:
        place = trial_folder(folder, trial.number)
        if trial is best:
            forget_what_is_made_again(place)
        else:
            forget_weights(place)


def _training_seconds(place: Path) -> float:
    """Seconds of the training steps: of each once, however often the trial was interrupted."""
    rows = (place / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return round(sum(json.loads(row)["seconds"] for row in rows), 2)
