"""Alignment: what each target and divergence does to a policy, and what the log says about it."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from exalign.data.batching import Group
from exalign.errors import InputError
from exalign.methods.matching import (
    DIVERGENCES,
    Matching,
    MatchingTask,
    check_groups,
    train_matching,
    with_reference_logp,
)
from exalign.models.logprobs import completion_logprobs
from exalign.training.batches import EpochBatches
from training.tiny_world import by_formula, make_groups, make_policy, make_tokenizer, read_metrics

TEMPERATURE = 0.8
GOLDEN = Path(__file__).with_name("golden_align.json")


def align(policy: nn.Module, folder: Path, groups: list[Group], **changes: object) -> list[dict[str, float]]:
    settings = Matching(**({"learning_rate": 3e-3, "batch_prompts": 8, "epochs": 6} | changes))  # type: ignore[arg-type]
    groups = with_reference_logp(policy, groups, settings, temperature=TEMPERATURE)
    train_matching(policy, make_tokenizer(), groups, settings, folder, temperature=TEMPERATURE)
    return read_metrics(folder)


def weighted_rewards(policy: nn.Module, groups: list[Group], reference: list[Tensor]) -> float:
    """Mean over prompts of Σ w_i r_i with w = softmax(log π_θ − log π_sft), by hand."""
    found = []
    for group, before in zip(groups, reference, strict=True):
        logp = completion_logprobs(policy, [group], temperature=TEMPERATURE)[0].detach()
        found.append(float((torch.softmax(logp - before, dim=0) * group.rewards).sum()))
    return sum(found) / len(found)


@pytest.mark.parametrize("target", ["reward", "preference"])
@pytest.mark.parametrize("divergence", sorted(DIVERGENCES))
def test_every_method_moves_the_policy_towards_reward(divergence: str, target: str, tmp_path: Path) -> None:
    policy, groups = make_policy(), make_groups(24)
    reference = [completion_logprobs(policy, [group], temperature=TEMPERATURE)[0].detach() for group in groups]
    before = weighted_rewards(policy, groups, reference)
    assert before == pytest.approx(sum(float(group.rewards.mean()) for group in groups) / len(groups), rel=1e-5)
    rows = align(policy, tmp_path, groups, divergence=divergence, target=target)
    assert weighted_rewards(policy, groups, reference) > before + 0.03
    assert rows[-1]["loss"] < rows[0]["loss"]
    assert rows[-1]["kl"] > 0


def test_an_epsilon_without_effect_is_told_once() -> None:
    """Nothing is infinite on a target that no ε belongs to."""
    assert list(Matching(epsilon=0).problems()) == ["epsilon has no effect on a reward target; remove it"]
    assert "infinite" in next(Matching(target="preference", epsilon=0).problems())


def test_before_the_first_step_every_log_ratio_is_zero(tmp_path: Path) -> None:
    """Same code for policy and cached reference, dropout off (the configuration asks for dropout 0.1)."""
    groups = make_groups(16)
    row = align(make_policy(), tmp_path, groups, token_budget=30, batch_prompts=16)[0]
    assert row["kl"] == pytest.approx(0, abs=1e-5)
    assert row["log_ratio_spread"] == pytest.approx(0, abs=1e-5)
    # Equal log-ratios make the policy's distribution uniform: KL(uniform ‖ p_r) from the rewards alone.
    losses = []
    for group in groups:
        log_target = torch.log_softmax(group.rewards / Matching().beta_r, dim=0)
        losses.append(float(-math.log(group.num_completions) - log_target.mean()))
    assert row["loss"] == pytest.approx(sum(losses) / len(losses), rel=1e-5)


def test_metrics_by_hand() -> None:
    policy = make_policy()
    group = make_groups(1, num_completions=3)[0]
    logp = completion_logprobs(policy, [group], temperature=TEMPERATURE)[0].detach().double()
    ratio = torch.tensor([0.5, -1.0, 2.0], dtype=torch.float64)
    group = replace(group, reference_logp=(logp - ratio).float(), rewards=torch.tensor([1.0, 4.0, 1.0]))
    settings = Matching(beta_pi=0.5, beta_r=0.25)
    loss, metrics = MatchingTask(EpochBatches([group], batch_prompts=1, epochs=1, seed=0), settings, TEMPERATURE).loss(
        policy, [group]
    )
    weights = ratio.softmax(0)
    log_p, log_t = (0.5 * ratio).log_softmax(0), (group.rewards.double() / 0.25).log_softmax(0)
    expected = {
        "kl": (weights * (3 * weights).log()).sum(),
        "log_ratio_spread": ratio.std(correction=0),
        "saturated": torch.tensor(0.0),
        "completion_tokens": torch.tensor(sum(map(len, group.completion_ids)) / 3),
        "reward": (weights * group.rewards).sum(),
        "reward_spread": math.sqrt(2.0) / 0.25 * torch.tensor(1.0),
        "reward_correlation": torch.corrcoef(torch.stack([ratio, group.rewards.double()]))[0, 1],
    }
    assert {name: float(value) for name, value in metrics.items()} == pytest.approx(
        {name: float(value) for name, value in expected.items()}, rel=1e-5
    )
    assert float(loss.detach()) == pytest.approx(float((log_p.exp() * (log_p - log_t)).sum()), rel=1e-5)


def test_confidently_wrong_pairs_are_counted_as_saturated() -> None:
    policy = make_policy()
    group = make_groups(1, num_completions=2)[0]
    logp = completion_logprobs(policy, [group], temperature=TEMPERATURE)[0].detach()
    settings = Matching(target="preference", beta_pi=1.0)
    saturated = []
    for difference in (-12.0, -2.0, 0.0, 12.0):  # f of the preferred less f of the other
        ratio = torch.tensor([difference, 0.0])
        wrong = replace(group, reference_logp=logp - ratio, preferred=0, rewards=None)
        task = MatchingTask(EpochBatches([wrong], batch_prompts=1, epochs=1, seed=0), settings, TEMPERATURE)
        metrics = task.loss(policy, [wrong])[1]
        assert "reward" not in metrics
        saturated.append(float(metrics["saturated"]))
    assert saturated == [1.0, 0.0, 0.0, 0.0]


def test_proposal_counts_only_where_it_is_given() -> None:
    """q = π_sft given or not is one loss; another q changes it; groups with and without one stand in one batch."""
    policy = make_policy()
    plain = with_reference_logp(make_policy(seed=1), make_groups(4), Matching(), temperature=TEMPERATURE)
    batches = EpochBatches(plain, batch_prompts=4, epochs=1, seed=0)
    same = [replace(group, proposal_logp=group.reference_logp) for group in plain]
    shift = torch.tensor([0.0, 0.5, -1.0, 2.0])
    other = [replace(g, proposal_logp=g.reference_logp + shift[: g.num_completions]) for g in plain]
    for target in ("reward", "preference"):
        task = MatchingTask(batches, Matching(target=target), TEMPERATURE)

        def loss(groups: list[Group], task: MatchingTask = task) -> float:
            return float(task.loss(policy, groups)[0].detach())

        assert loss(same) == pytest.approx(loss(plain), rel=1e-5)
        assert abs(loss(other) - loss(plain)) > 1e-3
        mixed = [other[0], plain[1], other[2], plain[3]]
        assert loss(mixed) == pytest.approx(sum(loss([group]) for group in mixed), rel=1e-5)


def test_reference_of_another_precision_is_computed_in_that_precision(tmp_path: Path) -> None:
    row = align(make_policy(), tmp_path, make_groups(8), precision="bf16", token_budget=10**6)[0]
    assert row["log_ratio_spread"] == pytest.approx(0, abs=1e-5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reference_logp": None}, "Row 2 has no reference_logp"),
        ({"rewards": None}, "Row 2 has no rewards"),
        ({"rewards": torch.tensor([0.0, math.nan, 0.0, 0.0])}, "Row 2 has a value in rewards that is not finite"),
    ],
)
def test_groups_that_lack_something_name_their_row(change: dict[str, object], message: str, tmp_path: Path) -> None:
    settings = Matching()
    groups = with_reference_logp(make_policy(), make_groups(3), settings, temperature=TEMPERATURE)
    groups[2] = replace(groups[2], **change)  # type: ignore[arg-type]
    for trained, held_out in ((groups, ()), (groups[:2], groups)):
        given = (make_policy(), make_tokenizer(), trained, settings, tmp_path / "run")
        with pytest.raises(InputError, match=message):
            train_matching(*given, temperature=TEMPERATURE, held_out=held_out)
        assert not (tmp_path / "run").exists()


def test_preference_target_needs_preferences_and_two_completions() -> None:
    settings = Matching(target="preference")
    group = with_reference_logp(make_policy(), make_groups(1), settings, temperature=TEMPERATURE)[0]
    check_groups([replace(group, rewards=None)], settings)
    with pytest.raises(InputError, match="no preferred completion"):
        check_groups([replace(group, preferred=None)], settings)
    with pytest.raises(InputError, match="has one completion"):
        check_groups([replace(group, completion_ids=group.completion_ids[:1])], settings)


def traced(divergence: str, target: str, folder: Path) -> list[dict[str, float]]:
    changes = {"divergence": divergence, "target": target}
    return align(by_formula(make_policy()), folder, make_groups(10), learning_rate=1e-3, batch_prompts=4, **changes)


def test_with_beta_r_in_standard_deviations_the_scale_of_the_rewards_is_nothing(tmp_path: Path) -> None:
    settings = Matching(beta_pi=1.0, beta_r_std=0.7, learning_rate=1e-2, batch_prompts=4)
    assert settings.line == "EXO, reward target, β_π 1, β_r 0.7 standard deviations of the rewards"
    losses, groups = [], list[Group]()
    for name, scale in (("as they are", 1.0), ("tenfold", 10.0)):
        policy = make_policy()
        groups = with_reference_logp(policy, make_groups(12), settings, temperature=TEMPERATURE)
        groups = [replace(group, rewards=scale * group.rewards + 3) for group in groups]
        spread = math.sqrt(sum(float(group.rewards.var()) for group in groups) / 12)
        settled = settings.settled(groups)
        assert settled.beta_r == pytest.approx(0.7 * spread, rel=1e-6)
        assert settled.line == f"EXO, reward target, β_π 1, β_r {settled.beta_r:g}"
        train_matching(policy, make_tokenizer(), groups, settled, tmp_path / name, temperature=TEMPERATURE)
        losses.append([row["loss"] for row in read_metrics(tmp_path / name)])
    assert losses[0] == pytest.approx(losses[1], rel=1e-4)
    same = [replace(group, rewards=torch.zeros(group.num_completions)) for group in groups]
    with pytest.raises(InputError, match="beta_r_std: all completions of a prompt have the same reward"):
        settings.settled(same)


def test_at_seven_tenths_of_a_standard_deviation_the_optimum_of_normal_rewards_is_a_nat_away() -> None:
    rewards = 3 * torch.randn(400_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    log_w = torch.log_softmax(rewards / (0.7 * 3), dim=0)
    assert float((log_w.exp() * (log_w + math.log(len(rewards)))).sum()) == pytest.approx(1 / (2 * 0.7**2), abs=0.05)


@pytest.mark.parametrize("target", ["reward", "preference"])
@pytest.mark.parametrize("divergence", sorted(DIVERGENCES))
def test_golden_trace(divergence: str, target: str, tmp_path: Path) -> None:
    """A refactor reproduces these losses. To change them on purpose, write the new ones here and say why."""
    rows, expected = traced(divergence, target, tmp_path), json.loads(GOLDEN.read_text())[f"{divergence} {target}"]
    for name in ("loss", "grad_norm"):
        assert [row[name] for row in rows] == pytest.approx(expected[name], rel=1e-6)
