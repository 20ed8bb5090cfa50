"""The search for a method's settings: trials that train it as its own stage does, ranked on validation prompts.

validation → search/METHOD → align/METHOD, which takes over the weights of the best trial.

A trial is a training with other settings, in a folder `search/METHOD/trial-000` that ends with `result.json`. It is
known by what it tried: its settings, and what they were tried on. What a later trial tries is a function of the seed
and of the results before it, for which Optuna's study is built anew each time: so a search that was killed goes on as
if it had not been, and one with more trials, other ranges or another KL carries out what is new. The best trial keeps
its weights, of which the method's stage gets second names; all other trials keep settings, metrics and scored samples.
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
from rich.table import Table

from exalign.checksums import damaged_files
from exalign.data.record import Record
from exalign.data.store import Header, read_records, write_records
from exalign.errors import InputError
from exalign.evaluation.frontier import path as path_along
from exalign.evaluation.frontier import reach, reward_at_kl
from exalign.evaluation.sample_table import tabulate
from exalign.evaluation.schema import Trial
from exalign.methods.method import Material, Method
from exalign.processes import gathered, leads, several
from exalign.run.evaluating import Wanted, sample_policies
from exalign.run.materials import (
    SAMPLED,
    Drawing,
    Scoring,
    Takes,
    different_prompts,
    draw,
    evaluation_sampling,
    judging,
    records_of,
    run_tokenizer,
    seeded,
    supervised,
    takes_data,
    takes_supervised,
)
from exalign.run.recipe import Recipe
from exalign.run.search_settings import Range, Value, changed
from exalign.run.view import Stage, View
from exalign.spreadsheet import csv_text
from exalign.storage import (
    atomic_path,
    fingerprint,
    link_folder,
    read_json,
    read_sealed,
    remove_folder,
    write_json,
    write_sealed,
    write_text,
)
from exalign.terminal import shown
from exalign.training.guards import NotFiniteError

STARTUP = 4
"""Results that the estimator needs; before them values are drawn from the ranges at random."""
WEIGHTS = ("policies", "checkpoints")


def validation_stage(recipe: Recipe) -> Iterator[Stage]:
    """The prompts that trials are ranked on, with scored samples of π_sft; none without a search."""
    judge = judging(recipe)
    if recipe.search is None or judge is None:
        return
    takes = (
        takes_supervised(recipe)
        + judge.takes
        + Takes((*SAMPLED, "search.prompts", "search.samples", "evaluate.prompts"))
    )
    takes += takes_data(recipe, "evaluation") + takes_data(recipe, "validation")
    yield takes.stage("validation", partial(_validation, judge=judge))


def search_stage(recipe: Recipe, name: str, takes: Takes, material: Callable[[View], Material]) -> Stage:
    """The stage search/NAME for a method whose own stage `takes` this, and gets its material so."""
    judge = judging(recipe)
    assert judge is not None
    ranked = Takes(
        (*SAMPLED, "search.samples", "search.trials", "search.kl", f"search.methods.{name}"), ("validation",)
    )
    work = partial(_search, name=name, material=material, judge=judge)
    return (takes + judge.takes + ranked).stage(f"search/{name}", work, stays=("trial-*",))


def searched_settings(view: View, name: str, method: Method) -> Method:
    """The method with the settings of its search's best trial, whose weights are put into the stage's folder.

    They are what a training leaves of which all steps are done; damaged ones are left, and trained again.
    """
    best = read_json(view.path(f"search/{name}", "best.json"))
    if leads():
        write_json(view.folder / "settings.json", {"trial": best["trial"], "settings": best["settings"]})
        taken = _take_over(view.path(f"search/{name}", best["folder"]), view.folder)
    else:
        taken = False
    if gathered(taken)[0]:  # the others wait here for the files
        view.console.print(shown(f"  the weights are those of trial {best['trial']}", "dim"))
    return type(method).model_validate_json(json.dumps(best["settings"]))


def _take_over(trial: Path, folder: Path) -> bool:
    """Give the weights of a complete trial second names in `folder`, checkpoints last; whether they are there now."""
    if (folder / "checkpoints").exists():
        return False  # taken before, or a training is under way
    if not (trial / "checkpoints").exists() or any(damaged_files(trial)):
        return False
    for file in (each for each in trial.iterdir() if each.is_file() and each.name not in ("tried.json", "result.json")):
        with atomic_path(folder / file.name) as temporary:
            shutil.copyfile(file, temporary)
    for each in sorted(each for each in trial.iterdir() if each.is_dir() and each.name != "evaluated"):
        if each.name != "checkpoints":
            link_folder(each, folder / each.name)
    link_folder(trial / "checkpoints", folder / "checkpoints")
    return True


def validation_prompts(
    evaluation: Iterable[Record], validation: Iterable[Record] | None, counts: Counter[str], *, used: int, wanted: int
) -> list[Record]:
    """`wanted` prompts that the evaluation, which uses the first `used`, does not; from data.validation if it is given.

    Fewer are an `InputError`.
    """
    different = different_prompts(evaluation)
    taken = {fingerprint(record.prompt) for record in islice(different, used)}
    found: list[Record] = []
    for record in different if validation is None else different_prompts(validation):
        if fingerprint(record.prompt) in taken:
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
    rows = records_of(view, "evaluation", Counter() if own else None) if "data.evaluation" in view.stage.reads else ()
    prompts = validation_prompts(rows, own, view.counts, used=recipe.evaluate.prompts, wanted=search.prompts)
    write_records(view.folder / "prompts", prompts, Header(counts=dict(view.counts)))
    tokenizer, settings = run_tokenizer(view), evaluation_sampling(view, search.samples)
    model = supervised(view, tokenizer)
    drawing, scorer = Drawing(model, tokenizer, settings, "validation"), judge.load(view)
    draw(view, drawing, prompts, view.folder / "samples", scorer=scorer, reference=model)


def _search(view: View, *, name: str, material: Callable[[View], Material], judge: Scoring) -> None:
    if several():
        raise InputError("A search runs in one process: start exalign search RECIPE without accelerate launch first.")
    search, own = view.recipe.search, view.recipe.align[name]
    assert search is not None
    base = _tried_on(view, name)
    for folder in view.folder.glob("trial-*"):
        if (_tried(folder) or {}).get("base") != base:
            remove_folder(folder)  # a search that tries its settings has other results
    # Methods with the same ranges start with the same draws.
    seed = [view.recipe.seed, "search"]
    proposer = Proposer(search.methods[name], type(own), trials=search.trials, seed=seed)
    trials: list[Trial] = []
    places: list[Path] = []
    for number in range(search.trials):
        results = [(trial.values, trial.value) for trial in trials]
        values = proposer.propose(results) if trials else {name: getattr(own, name) for name in proposer.ranges}
        settings = changed(own, values)
        trial = Trial(number, values, settings.model_dump(mode="json"))
        twin = next((other for other in trials if other.settings == trial.settings), None)
        if twin is None:
            places.append(_place(view.folder, {"settings": trial.settings, "base": base}, places))
            trial = _carried_out(view, places[-1], settings, trial, material, judge)
        else:
            places.append(places[twin.number])
            trial = _same_as(twin, trial)
        trials.append(trial)
        _keep_weights_of_the_best(trials, places)
        view.counts.update(trial.counts)
        view.console.print(shown(f"  {_sentence(trial)}", "dim"), soft_wrap=True)
    _finish(view, name, trials, places)


def _finish(view: View, name: str, trials: Sequence[Trial], places: Sequence[Path]) -> None:
    """What the search found, beside its trials."""
    assert view.recipe.search is not None
    kl, best = view.recipe.search.kl, best_of(trials, name)
    for earlier in set(view.folder.glob("trial-*")) - set(places):
        _forget_weights(earlier)
    view.counts["trials"] = len(trials)
    view.counts["failed_trials"] = sum(trial.value is None for trial in trials)
    write_text(view.folder / "trials.csv", trials_csv(trials))
    listed = {"trials": [asdict(trial) for trial in trials], "folders": [place.name for place in places]}
    write_sealed(view.folder / "trials.json", listed)
    found = {"trial": best.number, "folder": places[best.number].name, "value": best.value, "kl": best.kl}
    write_json(view.folder / "best.json", {**found, "ranked_at": kl, "settings": best.settings})
    title = f"search/{name}: reward at a KL of {kl:g} nats, or as far as a trial went"
    view.console.print(_table(trials, best, title))


def _tried_on(view: View, name: str) -> str:
    """What all trials share: the stages they are made from, and every setting but those of the search itself."""
    own = {path: value for path, value in view.key.items() if not path.startswith(("search.", f"align.{name}"))}
    needs = [read_sealed(view.path(need, "done.json"))["fingerprint"] for need in view.stage.needs]
    return fingerprint([own, view.key.get("search.samples"), needs])


def _place(search: Path, tried: dict[str, Any], taken: Sequence[Path]) -> Path:
    """The folder of the trial that tried this, or a new one."""
    folders = [folder for folder in sorted(search.glob("trial-*")) if folder not in taken]
    same = next((folder for folder in folders if _tried(folder) == tried), None)
    if same is not None:
        return same
    place = next(folder for n in range(10**6) if not (folder := search / f"trial-{n:03d}").exists())
    with atomic_path(place) as temporary:
        temporary.mkdir()
        write_sealed(temporary / "tried.json", tried)
    return place


def _tried(folder: Path) -> dict[str, Any] | None:
    """What was tried in a folder; None where that does not stand there whole."""
    try:
        return read_sealed(folder / "tried.json")
    except (InputError, OSError):
        return None


def _carried_out(
    view: View, place: Path, settings: Method, trial: Trial, material: Callable[[View], Material], judge: Scoring
) -> Trial:
    """Train with these settings in `place`, continuing what stands there, and evaluate every policy saved.

    Where a trial of the same stands complete, only its value is computed again, at this search's KL.
    """
    search, values = view.recipe.search, asdict(trial)
    assert search is not None
    if (place / "result.json").exists():
        done = read_sealed(place / "result.json")
        values |= {name: done[name] for name in ("seconds", "counts", "failed")}
    else:
        alone = replace(view, counts=Counter())
        own = seeded(settings, view.recipe)
        try:
            torch.manual_seed(own.seed)
            own.train(material(alone), place)
            prompts = read_records(view.path("validation", "prompts"))
            sampling = evaluation_sampling(alone, search.samples)
            # The same random numbers for every trial: trials with the same policies have the same value.
            sample_policies(alone, place, Wanted(prompts, sampling, "validation"), place / "evaluated", judge)
        except NotFiniteError as error:
            values["failed"] = str(error)
        values |= {"seconds": _training_seconds(place), "counts": dict(alone.counts)}
        write_sealed(place / "result.json", {name: values[name] for name in ("seconds", "counts", "failed")})
    if values["failed"] is None:
        values |= value_of(view.path("validation", "samples"), place / "evaluated", search.kl)
    return Trial(**values)


def _training_seconds(place: Path) -> float:
    """Seconds of the training steps: of each once, however often the trial was interrupted."""
    rows = (place / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return round(sum(json.loads(row)["seconds"] for row in rows), 2)


def _keep_weights_of_the_best(trials: Sequence[Trial], places: Sequence[Path]) -> None:
    best = best_so_far(trials)
    for place in set(places):
        if best is None or place != places[best.number]:
            _forget_weights(place)
        elif (place / "model").exists():
            remove_folder(place / "model")  # the last checkpoint holds it too


def _forget_weights(trial: Path) -> None:
    for name in (*WEIGHTS, "model"):
        if (trial / name).exists():
            remove_folder(trial / name)


def value_of(supervised: Path, evaluated: Path, kl: float) -> dict[str, Any]:
    """The mean reward at `kl` nats along the policies in `evaluated`, or at their reach where that is less.

    Samples that have no KL (a policy that gives its own samples no probability) are the reason of a failed trial.
    """
    steps = sorted(evaluated.glob("step-*"))
    sft = tabulate(read_records(supervised), "validation/samples")
    try:
        tables = [tabulate(read_records(step / "samples"), step.name) for step in steps]
    except InputError as error:
        return {"failed": str(error)}
    kls, rewards = path_along(sft, tables, sft.ids)
    at = min(kl, reach(kls, rewards))
    points = [
        {"step": int(step.name.removeprefix("step-")), "reward": float(reward), "kl": float(nats)}
        for step, reward, nats in zip(steps, rewards.mean(axis=0)[1:], kls.mean(axis=0)[1:], strict=True)
    ]
    return {"value": float(reward_at_kl(kls, rewards, at).mean()), "kl": at, "points": points}


def best_of(trials: Sequence[Trial], method: str) -> Trial:
    """The trial with the highest value, of equal ones the first; an `InputError` where every trial failed."""
    best = best_so_far(trials)
    if best is None:
        raise InputError(
            f"search/{method}: every trial failed, the first one because: {trials[0].failed} "
            f"Choose other ranges in search.methods.{method}."
        )
    return best


def best_so_far(trials: Sequence[Trial]) -> Trial | None:
    """The trial with the highest value, of equal ones the first; None where every trial failed."""
    done = [trial for trial in trials if trial.value is not None]
    return max(done, key=lambda trial: trial.value or 0.0, default=None)


def _same_as(twin: Trial, trial: Trial) -> Trial:
    """A trial that tries what its twin tried, with what came of that."""
    first = twin.number if twin.same_as is None else twin.same_as
    return replace(trial, value=twin.value, kl=twin.kl, points=twin.points, failed=twin.failed, same_as=first)


def _shown(values: Mapping[str, Value]) -> str:
    return ", ".join(f"{name} {v:.3g}" if isinstance(v, float) else f"{name} {v}" for name, v in values.items())


def _sentence(trial: Trial) -> str:
    """What is printed of a finished trial."""
    if trial.value is None:
        outcome = f"failed: {trial.failed}"
    else:
        outcome = f"reward {trial.value:.3f} at KL {trial.kl:.2f}"
    again = "" if trial.same_as is None else f" (the same as trial {trial.same_as})"
    return f"trial {trial.number}: {_shown(trial.values)}: {outcome}{again}"


def _table(trials: Sequence[Trial], best: Trial, title: str) -> Table:
    """What is printed of a finished search."""
    table = Table(title=title)
    for name in ("trial", "settings", "reward", "KL", "seconds"):
        table.add_column(name, justify="left" if name == "settings" else "right")
    for trial in trials:
        numbers = ("failed", "–") if trial.value is None else (f"{trial.value:.3f}", f"{trial.kl:.2f}")
        style = "bold" if trial is best else None
        number = f"{trial.number} (best)" if trial is best else str(trial.number)
        table.add_row(number, shown(_shown(trial.values)), *numbers, f"{trial.seconds:.1f}", style=style)
    return table


def trials_csv(trials: Sequence[Trial]) -> str:
    """A row per trial: its number, what was searched over, value and KL, its last policy, seconds and what failed."""
    outcome = ["value", "kl", "last_reward", "last_kl", "seconds", "same_as", "failed"]
    rows: list[list[object]] = [["trial", *trials[0].values, *outcome]]
    for t in trials:
        last = t.points[-1] if t.points else {}
        row = [t.value, t.kl, last.get("reward"), last.get("kl"), t.seconds, t.same_as, t.failed]
        rows.append([t.number, *t.values.values(), *row])
    return csv_text(rows)


class Proposer:
    """Proposes values from `ranges`, which are those of settings of the class `owner`, for the highest value.

    A proposal is a function of `seed`, the number of trials and the results alone.
    """

    def __init__(self, ranges: Mapping[str, Range], owner: type[Any], *, trials: int, seed: Any) -> None:
        self.ranges = ranges
        self._owner = owner
        self._trials = trials
        self._seed = seed

    def propose(self, results: Sequence[tuple[Mapping[str, Value], float | None]]) -> dict[str, Value]:
        """What to try after these results: values with what came of them, None where that failed.

        Where every range is a list and there are no more combinations than trials, each is tried once before any is
        tried again: a grid. Results from outside the ranges are not learned from.
        """
        optuna = _optuna()
        tried = [dict(values) for values, _ in results]
        untried = [values for values in self._grid() if values not in tried]
        if untried:
            return untried[0]
        seed = int(fingerprint([self._seed, len(results)]), 16) % 2**32
        sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=STARTUP)
        study = optuna.create_study(direction="maximize", sampler=sampler)
        distributions = {name: self._distribution(name) for name in self.ranges}
        states = optuna.trial.TrialState
        for values, value in results:
            if all(self.ranges[name].contains(found) for name, found in values.items()):
                outcome = {"state": states.FAIL} if value is None else {"value": value}
                study.add_trial(optuna.create_trial(params=dict(values), distributions=distributions, **outcome))
        return dict(study.ask(distributions).params)

    def _grid(self) -> list[dict[str, Value]]:
        """Every combination, in the order of the lists; none where they are more than the trials, or no lists."""
        lists = [values.choices for values in self.ranges.values()]
        if (
            any(choices is None for choices in lists)
            or prod(len(choices) for choices in lists if choices) > self._trials
        ):
            return []
        return [
            dict(zip(self.ranges, values, strict=True)) for values in product(*(choices or () for choices in lists))
        ]

    def _distribution(self, name: str) -> Any:
        optuna, values = _optuna(), self.ranges[name]
        if values.choices is not None:
            return optuna.distributions.CategoricalDistribution(values.choices)
        if self._owner.model_fields[name].annotation in (int, int | None):
            return optuna.distributions.IntDistribution(values.low, values.high, log=values.log)
        return optuna.distributions.FloatDistribution(values.low, values.high, log=values.log)


def _optuna() -> Any:
    try:
        import optuna
    except ImportError:
        raise InputError('A search needs Optuna: pip install "exalign[search]".') from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna
