"""That all contenders of `benchmarks.step` make the same step, and that each does the work its name says."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

pytest.importorskip("trl", reason="the peers are in the extra 'benchmarks'")

from benchmarks.contenders import Exalign, copy_of, exo_loss, gradient_of
from benchmarks.workload import make_config, make_groups, make_model, make_reference, with_reference

from benchmarks import step
from exalign.errors import InputError
from exalign.models.logprobs import plain_completion_logprobs


def world(k: int, prompts: int = 3) -> tuple[Any, Any, list[Any]]:
    policy = make_model(make_config("tiny"))
    reference = make_reference(policy)
    groups = make_groups("tiny", prompts=prompts, k=k, vocabulary=211)
    return policy, reference, with_reference(groups, copy_of(reference))


@pytest.mark.parametrize("k", [2, 3])
def test_all_contenders_compute_the_same(k: int) -> None:
    found = step.compare("tiny", k, model="tiny", prompts=3, names=step.NAMES, rounds=1, seconds_each=9)
    for name, row in found["contenders"].items():
        limit = 1e-5 if row["precision"] == "fp32" else 2e-2
        assert row["difference"]["gradient"] < limit and row["difference"]["loss"] < limit, name
    assert set(found["contenders"]) == set(step.NAMES)


@pytest.mark.parametrize("k", [2, 4])
def test_the_loss_is_the_one_of_plain_log_probabilities(k: int) -> None:
    """The equality is not one of equal mistakes: plain padded forwards of both models give it too."""
    policy, reference, groups = world(k)
    logp = plain_completion_logprobs(copy_of(policy), groups, temperature=1.0)
    reference_logp = plain_completion_logprobs(copy_of(reference), groups, temperature=1.0)
    assert (logp - reference_logp).abs().min() > 1e-4  # a wrong reference would be seen
    expected = exo_loss(logp, reference_logp, groups).mean()
    for name in ("exalign", "trl-best", "official"):
        contender = step.make_contender(name, policy, groups, reference)
        assert contender.gradient(groups, contender.sizes[0]) == pytest.approx(float(expected), rel=1e-4)


@pytest.mark.parametrize("name", ["exalign", "trl-best", "official"])
def test_micro_batches_change_nothing(name: str) -> None:
    """Also where the last one is smaller."""
    policy, reference, groups = world(3)
    gradients = []
    for size in (1, 2, 200):
        contender = step.make_contender(name, policy, groups, reference)
        contender.gradient(groups, size)
        gradients.append(gradient_of(contender.model))
    for other in gradients[1:]:
        torch.testing.assert_close(other, gradients[0], rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("k", [2, 3])
def test_each_way_does_less_work_than_the_one_before(k: int) -> None:
    policy, reference, groups = world(k)
    counted = []
    for name in ("official", "trl-best", "trl-completions", "exalign"):
        contender = step.make_contender(name, policy, groups, reference)
        with FlopCounterMode(display=False) as counter:
            contender.gradient(groups, 2 if name != "exalign" else 999)
        counted.append(counter.get_total_flops())
    assert counted == sorted(counted, reverse=True) and len(set(counted)) == 4


def test_a_contender_that_computes_something_else_ends_the_run() -> None:
    policy, _, groups = world(2)
    contender = Exalign(policy, groups)
    loss, gradient = contender.gradient(groups, 99), gradient_of(contender.model)
    step._difference(contender, (loss, gradient), (loss, gradient * (1 + 1e-5)))
    with pytest.raises(InputError, match="does not compute"):
        step._difference(contender, (loss, gradient), (loss, gradient * 1.01))
    with pytest.raises(InputError, match="nothing was timed"):
        step._difference(contender, (float("nan"), gradient), (loss, gradient))


def test_on_own_samples_all_start_at_one_reward_and_their_parts_are_the_whole() -> None:
    from benchmarks import on_policy

    task: dict[str, Any] = {"model": "tiny", "prompts": 2, "steps": 2, "rounds": 0, "seconds_each": 9}
    found = on_policy.compare("tiny", 4, names=tuple(on_policy.WAYS), **task)
    for row in found["contenders"].values():
        assert row["n"] == 1 and all(value >= 0 for value in row["parts"].values())
        assert sum(row["parts"].values()) == pytest.approx(row["seconds"])
    with pytest.raises(InputError, match="not of one policy"):
        on_policy.check([0.5, 0.6], samples=1000, words=10)


def test_an_update_moves_all_by_the_same_amount() -> None:
    policy, reference, groups = world(2)
    weights = []
    for name in ("exalign", "trl-best", "official"):
        contender = step.make_contender(name, policy, groups, reference)
        contender.gradient(groups, 50 if name == "exalign" else 1)
        contender.update()
        weights.append(torch.cat([parameter.detach().flatten() for parameter in contender.model.parameters()]))
    start = torch.cat([parameter.detach().flatten() for parameter in policy.parameters()])
    for moved in weights:
        # the first AdamW step is the learning rate in size, whatever the gradient
        assert float((moved - start).abs().median()) == pytest.approx(1e-6, rel=0.1)
