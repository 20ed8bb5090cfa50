"""Several runs of one experiment, as seeds are, side by side: every run's numbers, and their mean.

Within a run an interval is over prompts; across runs it is over the runs (Student's t), which is what tells a method
from the luck of its training.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from scipy.special import stdtrit

from exalign.errors import InputError
from exalign.evaluation.frontier import Paths
from exalign.evaluation.pool import OPTIMUM, PROXY_OPTIMUM, gain_at, pool_frontier, proxy_share
from exalign.evaluation.run_folder import RunFolder, complete_records, pool_rewards
from exalign.evaluation.sample_table import SampleTable, tabulate
from exalign.evaluation.schema import Evidence, Interval, MethodEvidence
from exalign.evaluation.statistics import CONFIDENCE, Bootstrap
from exalign.strict_yaml import parse_yaml


@dataclass(frozen=True)
class RunResults:
    """One run: its evidence, and at each KL the reward of each method, with `OPTIMUM` last, and differences of them.

    None stands beyond a method's reach. `shares` are what each method gains over π_sft as a share of what the optimum
    gains, empty without a pool. `differences` are the first's reward less the second's, paired by prompt, for
    the pairs of `contrasts`. Without a scorer there is the evidence alone.
    """

    name: str
    evidence: Evidence
    rewards: dict[str, dict[float, Interval | None]]
    differences: dict[tuple[str, str], dict[float, Interval | None]]
    shares: dict[str, dict[float, Interval | None]] = field(default_factory=dict)


@dataclass(frozen=True)
class AcrossRuns:
    """A mean over `runs` runs with Student's interval; no bounds for a single one."""

    mean: float
    low: float | None
    high: float | None
    runs: int


def read_runs(folders: Sequence[Path], kls: Sequence[float]) -> list[RunResults]:
    """The results of finished runs; a run without evidence, or one given twice, is an `InputError`."""
    places = [folder.resolve() for folder in folders]
    if len(set(places)) < len(places):
        raise InputError("A run is given twice; name each folder once.")
    if not kls or not all(0 < kl < math.inf for kl in kls):
        raise InputError("Rewards are compared at KLs above 0 nats.")
    names = [place.name for place in places]
    if len(set(names)) < len(names):  # the same seed of several experiments
        names = [folder.as_posix() for folder in folders]
    return [_read(folder, name, kls) for folder, name in zip(folders, names, strict=True)]


def over_runs(values: Sequence[float]) -> AcrossRuns | None:
    """Mean and interval of one number per run; None where no run has it.

    >>> round(over_runs([1.0, 2.0, 3.0]).low, 3), over_runs([2.0]).low, over_runs([])
    (-0.484, None, None)
    """
    if not values:
        return None
    mean = float(np.mean(values))
    if len(values) == 1:
        return AcrossRuns(mean, None, None, 1)
    half = stdtrit(len(values) - 1, (1 + CONFIDENCE) / 2) * np.std(values, ddof=1) / np.sqrt(len(values))
    return AcrossRuns(mean, float(mean - half), float(mean + half), len(values))


def contrasts(methods: Sequence[MethodEvidence]) -> list[tuple[str, str]]:
    """What the paper compares: EXO with methods of other known families, as DPO and PPO, on one target and one K."""
    return [
        (first.name, second.name)
        for first in methods
        for second in methods
        if first.family == "exo" and second.family not in ("exo", "other") and first.on == second.on
    ]


def difference_at(runs: Sequence[RunResults], pair: tuple[str, str], kl: float) -> AcrossRuns | None:
    """Reward of a pair's first less that of its second at `kl`, over the runs in which both reach it."""
    found = [run.differences.get(pair, {}).get(kl) for run in runs]
    return over_runs([value.estimate for value in found if value is not None])


def differing_settings(runs: Sequence[RunResults]) -> dict[str, dict[str, list[Any]]]:
    """For each method, its settings that differ between runs, with the value in every run that has the method.

    The seed is not among them, nor a β_r that follows from the samples. A mean over runs of such a method is a mean
    over settings too.
    """
    found: dict[str, dict[str, list[Any]]] = {}
    for method in dict.fromkeys(method.name for run in runs for method in run.evidence.methods):
        settings = [m.settings for run in runs for m in run.evidence.methods if m.name == method]
        derived = {"seed", *(("beta_r",) if all(each.get("beta_r_std") for each in settings) else ())}
        for name in dict.fromkeys(name for each in settings for name in each if name not in derived):
            values = [each.get(name) for each in settings]
            if any(value != values[0] for value in values):
                found.setdefault(method, {})[name] = values
    return found


def differing_sections(runs: Sequence[RunResults]) -> list[str]:
    """The sections of the runs' recipes, as `model` or `data`, in which they differ, but for the methods'."""
    recipes = [parse_yaml(run.evidence.recipe, run.evidence.name) or {} for run in runs]
    aside = {"name", "seed", "threads", "cluster", "align", "search"}
    names = dict.fromkeys(name for recipe in recipes for name in recipe if name not in aside)
    return [name for name in names if any(recipe.get(name) != recipes[0].get(name) for recipe in recipes)]


def _read(folder: Path, name: str, kls: Sequence[float]) -> RunResults:
    run = RunFolder(folder)
    evidence = run.read_evidence()
    if not evidence.scored:
        return RunResults(name, evidence, {}, {})
    # What stands in the folder without a part in the evidence is of an earlier recipe.
    judged = pool_rewards(run.pool) if evidence.optimum else {}
    supervised = replace(_table(run.supervised), more=judged)
    checkpoints = {m.name: [_table(run.samples(m.name, point.step)) for point in m.points] for m in evidence.methods}
    resamples = Bootstrap(seed=evidence.seed)
    paths = Paths(supervised, checkpoints, resamples)
    beyond, mean = dict.fromkeys(kls), resamples.mean
    reached = {method: [kl for kl in kls if kl <= paths.reach(method)] for method in paths.methods}
    rewards = {
        method: beyond | {kl: mean(paths.reward(method, kl)) for kl in within} for method, within in reached.items()
    }
    differences = {
        (one, other): beyond
        | {kl: mean(paths.reward(one, kl) - paths.reward(other, kl)) for kl in reached[one] if kl in reached[other]}
        for one, other in contrasts([method for method in evidence.methods if method.name in reached])
    }
    shares = dict[str, dict[float, Interval | None]]()
    trained = pool_rewards(run.proxy) if evidence.proxy_optimum else {}
    pool, proxy = pool_frontier(judged), pool_frontier(trained, judged=judged)
    if pool is not None and pool.reliable.any():
        gains = {kl: most for kl in kls if (most := gain_at(pool, kl)) is not None and most.mean() > 0}
        shares = {
            method: beyond | {kl: resamples.ratio(paths.gain(method, kl), gains[kl]) for kl in within if kl in gains}
            for method, within in reached.items()
        }
        if proxy is not None:
            shares[PROXY_OPTIMUM] = {kl: proxy_share(proxy, pool, kl, resamples) for kl in kls}
    for which, found in ((PROXY_OPTIMUM, proxy), (OPTIMUM, pool)):
        if found is not None and found.reliable.any():
            known = {kl: gain for kl in kls if (gain := gain_at(found, kl)) is not None}
            rewards[which] = beyond | {kl: mean(found.base + gain) for kl, gain in known.items()}
    return RunResults(name, evidence, rewards, differences, shares)


def _table(folder: Path) -> SampleTable:
    records = complete_records(folder)
    if records is None:
        raise InputError(f"{folder} is missing or incomplete; run the evaluate stage first.")
    return tabulate(records, str(folder))
