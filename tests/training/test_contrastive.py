"""Contrastive methods through their whole training: the published formulas on log-probabilities of a real model."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from exalign.data.batching import Group, GroupValues, values_of
from exalign.errors import InputError
from exalign.methods.contrastive import Contrastive, ContrastiveTask
from exalign.methods.cpo import CPO
from exalign.methods.dpo_norm import DPONorm
from exalign.methods.ipo import IPO
from exalign.methods.kto import KTO, KTOTask, unrelated_to
from exalign.methods.matching import with_reference_logp
from exalign.methods.method import Material, Method, available, method_class
from exalign.methods.orpo import ORPO
from exalign.methods.simpo import SimPO
from exalign.models.loading import load_policy
from exalign.models.logprobs import PackedPolicy, plain_completion_logprobs
from exalign.models.model_settings import ModelSettings
from exalign.storage import read_json
from exalign.training.batches import EpochBatches
from training.tiny_world import (
    TIMINGS,
    assert_same_outcome,
    by_formula,
    make_groups,
    make_policy,
    make_tokenizer,
    read_metrics,
)

TEMPERATURE = 0.8
GOLDEN = Path(__file__).with_name("golden_contrastive.json")
METHODS: dict[str, Contrastive] = {
    "simpo": SimPO(beta=2.0, gamma=0.5),
    "ipo": IPO(beta=0.1),
    "orpo": ORPO(weight=0.3),
    "cpo": CPO(beta=0.2),
    "dpo_norm": DPONorm(beta=4.0, epsilon=0.1),
    "kto": KTO(beta=0.3, desirable_weight=1.5, undesirable_weight=0.5),
}


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x))


def log_odds(mean: float) -> float:
    return mean - math.log(1 - math.exp(mean))


def kto(hw: float, hl: float, z: float) -> float:
    """1 − σ(x) = σ(−x)."""
    return (1.5 * math.exp(log_sigmoid(-0.3 * (hw - z))) + 0.5 * math.exp(log_sigmoid(0.3 * (hl - z)))) / 2


# Of the log-probability w, l of the preferred and the other one, their log-ratios hw, hl, lengths nw, nl, and z.
PAPERS: dict[str, Any] = {
    "simpo": lambda w, v, hw, hv, nw, nv, z: -log_sigmoid(2.0 * (w / nw - v / nv) - 0.5),
    "ipo": lambda w, v, hw, hv, nw, nv, z: (hw - hv - 5.0) ** 2,
    "orpo": lambda w, v, hw, hv, nw, nv, z: -w / nw - 0.3 * log_sigmoid(log_odds(w / nw) - log_odds(v / nv)),
    "cpo": lambda w, v, hw, hv, nw, nv, z: -w - log_sigmoid(0.2 * (w - v)),
    "dpo_norm": lambda w, v, hw, hv, nw, nv, z: (
        -0.9 * log_sigmoid(4.0 * (hw / nw - hv / nv)) - 0.1 * log_sigmoid(-4.0 * (hw / nw - hv / nv))
    ),
    "kto": lambda w, v, hw, hv, nw, nv, z: kto(hw, hv, z),
}


def pairs(count: int) -> list[Group]:
    """With a log π_sft that is another model's."""
    groups = [
        replace(group, weight=1.0 + index % 2) for index, group in enumerate(make_groups(count, num_completions=2))
    ]
    return with_reference_logp(make_policy(seed=1), groups, IPO(), temperature=TEMPERATURE)


def material(policy: Any, groups: list[Group]) -> Material:
    return Material(policy, make_tokenizer(), TEMPERATURE, groups)


def task_of(settings: Contrastive, policy: Any, groups: list[Group]) -> ContrastiveTask:
    batches = EpochBatches(groups, batch_prompts=settings.batch_prompts, epochs=1, seed=0)
    return settings.task_of(PackedPolicy(policy), material(policy, groups))(batches)


def logps(policy: Any, groups: list[Group]) -> Tensor:
    return plain_completion_logprobs(policy, groups, temperature=TEMPERATURE).detach()


@pytest.mark.parametrize("name", METHODS)
def test_the_loss_of_pairs_is_the_paper_s_times_their_weights(name: str) -> None:
    policy, groups = by_formula(make_policy()), pairs(4)
    task = task_of(METHODS[name], policy, groups)
    with torch.no_grad():  # away from where a task was made, as a step does
        for parameter in policy.parameters():
            parameter.mul_(1.5)
    before = task.batches[0]
    found, expected, z = logps(policy, groups), 0.0, 0.0
    if isinstance(task, KTOTask):
        others = unrelated_to(groups)
        start = logps(by_formula(make_policy()), others)  # which the task was made with
        weights = torch.tensor([group.weight for group in groups])
        mean = float(((logps(policy, others) - start).mean(1) * weights).sum() / weights.sum())
        z = max(0.0, mean)
        assert task.batches.kl == pytest.approx(mean, rel=1e-5)
        assert [g.prompt_ids.tolist() for g in others] == [g.prompt_ids.tolist() for g in groups]
    for row, group in enumerate(groups):
        assert group.reference_logp is not None and group.preferred is not None
        w, v = group.preferred, 1 - group.preferred
        ratio = found[row] - group.reference_logp.double()
        lengths = [len(ids) for ids in group.completion_ids]
        values = (*(float(x[i]) for x in (found[row], ratio) for i in (w, v)), lengths[w], lengths[v], z)
        expected += group.weight * PAPERS[name](*values)
    loss, metrics = task.loss(policy, before)
    assert float(loss.detach()) == pytest.approx(expected, rel=1e-6)
    assert task.weight(groups) == 6.0
    assert {"accuracy", "margin", "chosen_log_ratio", "rejected_log_ratio", "kl"} <= metrics.keys()


@pytest.mark.parametrize("name", METHODS)
def test_at_the_start_every_step_raises_the_preferred_completion_against_the_other(name: str) -> None:
    groups = pairs(4)
    given = values_of(groups, torch.device("cpu"))
    assert given.reference_logp is not None and given.preferred is not None
    logp = given.reference_logp.double().requires_grad_()
    (gradient,) = torch.autograd.grad(METHODS[name].losses(logp, given).sum(), logp)
    rows = torch.arange(4)
    assert (gradient[rows, given.preferred] < 0).all() and (gradient[rows, 1 - given.preferred] > 0).all()


def labelled(count: int) -> list[Group]:
    """One completion to a row: label 1 where it has the good word twice."""
    rows = make_groups(count, num_completions=2)
    return [
        replace(g, completion_ids=g.completion_ids[:1], rewards=torch.tensor([float(i % 2)]), preferred=None)
        for i, g in enumerate(rows)
    ]


def trained(settings: Method, groups: list[Group], folder: Path, **changes: Any) -> tuple[Any, list[dict[str, Any]]]:
    policy: Any = by_formula(make_policy())
    how = {"learning_rate": 1e-3, "batch_prompts": 4, "epochs": 2, "save_policies": 1} | changes
    settings = type(settings).model_validate(settings.model_dump() | how)
    groups = with_reference_logp(policy, groups, settings, temperature=TEMPERATURE)
    settings.train(material(policy, groups), folder)
    return policy, read_metrics(folder)


GOLDENS: dict[str, tuple[Method, Any]] = {
    name: (method, make_groups(10, num_completions=2)) for name, method in METHODS.items()
}
GOLDENS["kto of labels"] = KTO(target="reward", beta=0.3), labelled(10)


@pytest.mark.parametrize("name", GOLDENS)
def test_golden_trace(name: str, tmp_path: Path) -> None:
    """A refactor reproduces these losses, in one piece or in several. To change them on purpose, say why."""
    expected = json.loads(GOLDEN.read_text())[name]
    for token_budget in (4096, 20) if name.startswith("kto") else (20,):
        _, rows = trained(*GOLDENS[name], tmp_path / str(token_budget), token_budget=token_budget)
        for metric in ("loss", "grad_norm"):
            assert [row[metric] for row in rows] == pytest.approx(expected[metric], rel=1e-6)
        assert "margin" not in rows[0] or rows[-1]["margin"] > rows[0]["margin"]


def test_labels_move_completions_apart(tmp_path: Path) -> None:
    groups = labelled(16)
    policy, rows = trained(KTO(target="reward"), groups, tmp_path, learning_rate=3e-3, epochs=8)
    moved = logps(policy, groups) - logps(by_formula(make_policy()), groups)
    assert float(moved[1::2].mean()) > 0.5 > 0 > float(moved[::2].mean())
    assert rows[0]["right_side"] == 0.5 and rows[-1]["right_side"] > 0.7
    assert rows[0]["unrelated_kl"] == 0 and "margin" not in rows[0]


@pytest.mark.parametrize(
    ("settings", "change", "message"),
    [
        (SimPO(), {"preferred": None}, "Row 2 has no preferred completion"),
        (IPO(), {"reference_logp": None}, "Row 2 has no reference_logp"),
        (KTO(), {"completion_ids": (torch.tensor([3]),)}, "Row 2 has one completion"),
        (KTO(target="reward"), {"rewards": None}, "Row 2 has no rewards"),
        (KTO(target="reward", desirable_above=9.0), {}, "every completion is undesirable, all rewards are on one side"),
        (KTO(), {"prompt_ids": torch.tensor([3])}, "all rows have the same prompt"),
    ],
)
def test_rows_that_lack_something_are_named(settings: Contrastive, change: Any, message: str, tmp_path: Path) -> None:
    groups = pairs(3)
    every = change.keys() == {"prompt_ids"}
    groups = [replace(group, **change) if every or group.index == 2 else group for group in groups]
    given = [material(make_policy(), groups)]
    if message.startswith("Row"):
        given.append(replace(material(make_policy(), pairs(3)), held_out=groups))
    for one in given:
        with pytest.raises(InputError, match=message):
            settings.train(one, tmp_path / "run")
        assert not (tmp_path / "run").exists()


def test_what_methods_have_in_common_is_none_of_them() -> None:
    assert {*METHODS} < {*available()} and "contrastive" not in available()
    for name, method in METHODS.items():
        assert method_class(name) is type(method)
        assert method.label.lower() == name.replace("_", "-")
        assert method.optimum_beta is None and method.trains_on == "preferences"


def stopping(folder: Path, steps: int | None = None, stop_after: int | None = 2) -> Path:
    """Sixteen steps on four pairs that say the contrary of the held-out ones; killed after so many steps."""
    groups = make_groups(8, num_completions=2)
    settings = IPO(
        learning_rate=1e-2, batch_prompts=2, epochs=8, save_policies=8, checkpoint_every=3, stop_after=stop_after
    )
    policy: Any = by_formula(make_policy())
    groups = with_reference_logp(policy, groups, settings, temperature=TEMPERATURE)
    wrong = [replace(group, preferred=1 - (group.preferred or 0)) for group in groups[:4]]
    given = replace(material(policy, wrong), held_out=groups)
    if steps is None:
        return settings.train(given, folder)

    class KilledError(Exception):
        pass

    def losses(logp: Tensor, given: GroupValues) -> Tensor:
        if sum(1 for _ in (folder / "metrics.jsonl").open()) >= steps:
            raise KilledError
        return IPO.losses(settings, logp, given)

    object.__setattr__(settings, "losses", losses)
    with pytest.raises(KilledError):
        settings.train(given, folder)
    return folder


def test_training_stops_where_held_out_pairs_say_so_and_keeps_the_best(tmp_path: Path) -> None:
    stopping(tmp_path / "whole", stop_after=None)
    model = stopping(tmp_path / "stopped")
    rows = read_metrics(tmp_path / "whole", without=TIMINGS)
    measured = {row["step"]: row["held_out_loss"] for row in rows if "held_out_loss" in row}
    assert [*measured] == [1, 2, 3, 4, 7, 9, 13, 16]  # as policies are saved
    best, last = next(
        (best, steps[-1])
        for steps in ([*measured][:end] for end in range(1, 9))
        if len(steps) - 1 - steps.index(best := min(steps, key=measured.__getitem__)) == 2
    )
    assert 1 <= best < last < 16
    assert read_metrics(tmp_path / "stopped", without=TIMINGS) == rows[:last]
    said = read_json(tmp_path / "stopped" / "held-out.json")
    assert (said["best"], said["last"]) == (best, last) and f"lowest after step {best}" in said["sentence"]
    kept = sorted((tmp_path / "stopped" / "policies").iterdir())
    assert kept[-1].name == f"step-{best:06d}"
    for name in ("model", f"policies/step-{best:06d}"):
        same = load_file(tmp_path / "whole" / f"policies/step-{best:06d}" / "model.safetensors")
        assert all(torch.equal(w, same[n]) for n, w in load_file(model.parent / name / "model.safetensors").items())
    stopping(tmp_path / "killed", steps=last - 1)
    stopping(tmp_path / "killed")
    assert_same_outcome(tmp_path / "killed", tmp_path / "stopped")
    others = tmp_path / "stopped/policies/step-mine"
    others.mkdir()
    again = stopping(tmp_path / "stopped")  # it is done: no step is taken again
    others.rmdir()  # it is there
    assert_same_outcome(again.parent, tmp_path / "killed")


def test_what_is_measured_on_held_out_pairs_is_the_loss_of_the_policy_that_is_saved(tmp_path: Path) -> None:
    stopping(tmp_path, stop_after=None)
    policy: Any = load_policy(ModelSettings(source=str(tmp_path / "model")), make_tokenizer())
    groups = with_reference_logp(by_formula(make_policy()), make_groups(8, num_completions=2), IPO(), temperature=0.8)
    loss, metrics = task_of(IPO(), policy, groups).loss(policy, groups)
    last = read_metrics(tmp_path)[-1]
    assert last["held_out_loss"] == pytest.approx(float(loss.detach()) / 8, rel=1e-4)
    assert last["held_out_accuracy"] == float(metrics["accuracy"]) / 8
    assert last["held_out_margin"] == pytest.approx(float(metrics["margin"]) / 8, rel=1e-4)


def test_a_stop_without_held_out_pairs_is_refused(tmp_path: Path) -> None:
    policy, groups = make_policy(), pairs(3)
    with pytest.raises(InputError, match="stop_after looks at held-out preferences or rewards, and there are none"):
        IPO(stop_after=1, save_policies=3).train(material(policy, groups), tmp_path)


def test_a_bound_of_rewards_without_effect_is_told() -> None:
    bound = "desirable_above has no effect on a preference target; remove it"
    assert list(KTO(desirable_above=0.7).problems()) == [bound]
    assert list(KTO(target="reward", desirable_above=0.7).problems()) == []
