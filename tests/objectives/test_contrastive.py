"""Laws of the contrastive losses in float64: published pairs written out, K = 2 and more, ties, ragged rows."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from exalign.objectives import (
    cpo_loss,
    forward_kl,
    ipo_loss,
    kto_loss,
    log_policy_distribution,
    log_preference_target,
    orpo_loss,
    per_token,
    simpo_loss,
)

LENGTHS = torch.tensor([[4, 8, 5], [3, 2, 7]])
PREFERRED = torch.tensor([1, 0])


def log_sigmoid(x: float) -> float:
    return -math.log1p(math.exp(-x))


def log_odds(mean: float) -> float:
    return mean - math.log(1 - math.exp(mean))


def simpo(policy: Tensor, reference: Tensor, mask: Tensor | None = None) -> Tensor:
    lengths, preferred = LENGTHS[:, : policy.shape[1]], PREFERRED
    return simpo_loss(policy, lengths, preferred, mask, beta=2.0, gamma=0.5)


def orpo(policy: Tensor, reference: Tensor, mask: Tensor | None = None) -> Tensor:
    return orpo_loss(policy, LENGTHS[:, : policy.shape[1]], PREFERRED, mask, weight=0.3)


LOSSES = {
    "simpo": simpo,
    "ipo": lambda policy, reference, mask=None: ipo_loss(policy, reference, PREFERRED, mask, beta=0.1),
    "orpo": orpo,
    "cpo": lambda policy, reference, mask=None: cpo_loss(policy, PREFERRED, mask, beta=0.2),
}
PAIRS = {
    "simpo": lambda w, v, rw, rv, nw, nv: -log_sigmoid(2.0 * (w / nw - v / nv) - 0.5),
    "ipo": lambda w, v, rw, rv, nw, nv: ((w - rw) - (v - rv) - 5.0) ** 2,
    "orpo": lambda w, v, rw, rv, nw, nv: -w / nw - 0.3 * log_sigmoid(log_odds(w / nw) - log_odds(v / nv)),
    "cpo": lambda w, v, rw, rv, nw, nv: -w - log_sigmoid(0.2 * (w - v)),
}


@pytest.fixture
def logps(draw) -> tuple[Tensor, Tensor]:
    """Policy and reference, `[2, 3]`, below 0."""
    return -6 + draw(2, 3), -6 + draw(2, 3)


@pytest.mark.parametrize("name", LOSSES)
def test_a_prompt_is_the_mean_of_its_pairs_as_published(name: str, logps: tuple[Tensor, Tensor]) -> None:
    policy, reference = logps
    found = LOSSES[name](policy, reference)
    for row, won in enumerate(PREFERRED.tolist()):
        pairs = [
            PAIRS[name](
                *(float(values[row, column]) for values in (policy, reference) for column in (won, lost)),
                int(LENGTHS[row, won]),
                int(LENGTHS[row, lost]),
            )
            for lost in range(3)
            if lost != won
        ]
        assert float(found[row]) == pytest.approx(sum(pairs) / 2, rel=1e-12)


@pytest.mark.parametrize("name", LOSSES)
def test_what_is_masked_reaches_neither_value_nor_gradient(name: str, logps: tuple[Tensor, Tensor]) -> None:
    policy, reference = (values.clone() for values in logps)
    mask = torch.tensor([[True, True, False], [True, True, False]])
    policy[:, 2] = math.nan
    policy.requires_grad_()
    found = LOSSES[name](policy, reference, mask)
    torch.testing.assert_close(found, LOSSES[name](logps[0][:, :2], logps[1][:, :2]), rtol=0, atol=1e-12)
    (gradient,) = torch.autograd.grad(found.sum(), policy)
    assert gradient[:, :2].isfinite().all() and not gradient[:, 2].any()
    assert (gradient[[0, 1], PREFERRED] < 0).all()  # a step raises the preferred completion


@pytest.mark.parametrize(("name", "alone"), [("simpo", 0.0), ("ipo", 0.0), ("orpo", 6.0 / 8), ("cpo", 6.0)])
def test_a_preferred_completion_without_rival_has_no_pair(name: str, alone: float) -> None:
    """What is left is the supervised part, where there is one: −ℓ_w, or −ℓ_w / T."""
    policy = torch.full((2, 3), -6.0, dtype=torch.float64)
    mask = torch.tensor([[False, True, False], [False, False, False]])
    torch.testing.assert_close(LOSSES[name](policy, policy, mask), torch.tensor([alone, 0.0], dtype=torch.float64))


def test_two_completions_that_are_the_same_to_the_policy() -> None:
    """Ties: margins are 0. σ(0) = ½."""
    policy = torch.full((2, 2), -6.0, dtype=torch.float64)
    same = torch.full((2, 2), 3)
    zero = math.log(2)
    for found, expected in (
        (simpo_loss(policy, same, PREFERRED, beta=2.0, gamma=0.0), zero),
        (ipo_loss(policy, policy, PREFERRED, beta=0.5), 1.0),
        (orpo_loss(policy, same, PREFERRED, weight=2.0), 2.0 + 2 * zero),
        (cpo_loss(policy, PREFERRED, beta=1.0), 6.0 + zero),
    ):
        assert found.tolist() == pytest.approx([expected] * 2, rel=1e-12)


def test_ipo_is_at_rest_at_its_margin() -> None:
    policy = torch.tensor([[2.5, 0.0]], dtype=torch.float64, requires_grad=True)
    loss = ipo_loss(policy, torch.zeros(1, 2, dtype=torch.float64), torch.tensor([0]), beta=0.2)  # 1/(2β) = 2.5
    assert float(loss.detach()) == 0 and not torch.autograd.grad(loss, policy)[0].any()


def test_orpo_bears_a_certain_policy() -> None:
    policy = torch.tensor([[0.0, -1.0]], dtype=torch.float64, requires_grad=True)
    loss = orpo_loss(policy, torch.ones(1, 2, dtype=torch.long), torch.tensor([0]), weight=1.0)
    assert loss.isfinite() and torch.autograd.grad(loss, policy)[0].isfinite().all()


def test_length_normalised_dpo_is_forward_kl_on_nats_per_token(logps: tuple[Tensor, Tensor]) -> None:
    """−log σ(β (h_w/T_w − h_l/T_l)) as ε → 0; equal lengths T make it DPO at β/T."""
    policy, reference = (values[:, :2] for values in logps)
    lengths = LENGTHS[:, :2]
    target = log_preference_target(PREFERRED, num_completions=2, epsilon=1e-12, dtype=torch.float64)

    def dpo(policy: Tensor, reference: Tensor, beta: float) -> Tensor:
        return forward_kl(log_policy_distribution(policy, reference, beta_pi=beta), target)

    found = dpo(per_token(policy, lengths), per_token(reference, lengths), 3.0)
    ratio = (policy - reference) / lengths
    for row, won in enumerate(PREFERRED.tolist()):
        margin = 3.0 * float(ratio[row, won] - ratio[row, 1 - won])
        assert float(found[row]) == pytest.approx(-log_sigmoid(margin), abs=1e-9)
    seven = torch.full((2, 2), 7)
    equal = dpo(per_token(policy, seven), per_token(reference, seven), 3.0)
    torch.testing.assert_close(equal, dpo(policy, reference, 3.0 / 7), rtol=1e-12, atol=0)


def test_kto_judges_a_completion_by_itself() -> None:
    """λ (1 − σ(±β (h − z))), and z counts as 0 below 0; no gradient flows through it."""
    policy = torch.tensor([[-3.0], [-3.0]], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([[-5.0], [-5.0]], dtype=torch.float64)
    kl = torch.tensor(0.5, dtype=torch.float64, requires_grad=True)
    labels = torch.tensor([[True], [False]])
    loss = kto_loss(policy, reference, labels, kl, beta=0.1, desirable_weight=1.5, undesirable_weight=0.5)
    above = 1 / (1 + math.exp(-0.1 * 1.5))  # σ(β (2 − ½))
    assert loss.tolist() == pytest.approx([1.5 * (1 - above), 0.5 * above], rel=1e-12)
    policy_gradient, kl_gradient = torch.autograd.grad(loss.sum(), (policy, kl), allow_unused=True)
    slope = 0.1 * above * (1 - above)
    assert policy_gradient.flatten().tolist() == pytest.approx([-1.5 * slope, 0.5 * slope], rel=1e-12)
    assert kl_gradient is None
    below = kto_loss(policy, reference, labels, torch.tensor(-3.0), beta=0.1)
    torch.testing.assert_close(below, kto_loss(policy, reference, labels, torch.tensor(0.0), beta=0.1))


def test_kto_of_several_completions_is_their_mean(draw) -> None:
    policy, reference = draw(1, 3), draw(1, 3)
    labels, kl = torch.tensor([[True, False, True]]), torch.tensor(0.2)
    mask = torch.tensor([[True, True, False]])
    ones = [kto_loss(policy[:, [i]], reference[:, [i]], labels[:, [i]], kl, beta=0.3) for i in range(2)]
    torch.testing.assert_close(kto_loss(policy, reference, labels, kl, mask, beta=0.3), sum(ones) / 2)


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        (lambda p: simpo_loss(p, LENGTHS, PREFERRED, beta=0.0, gamma=0.0), "beta must be a finite number above 0"),
        (lambda p: simpo_loss(p, LENGTHS, PREFERRED, beta=1.0, gamma=-1.0), "gamma must be at least 0"),
        (lambda p: simpo_loss(p, LENGTHS * 0, PREFERRED, beta=1.0, gamma=0.0), "at least one token"),
        (lambda p: cpo_loss(p, torch.tensor([0, 3]), beta=1.0), r"preferred\[1\] is 3, outside 0 … 2"),
        (lambda p: ipo_loss(p, p, torch.tensor([0]), beta=1.0), "preferred must be int64 .* one per row"),
        (lambda p: cpo_loss(p, torch.tensor([True, False]), beta=1.0), "preferred must be int64 .* not torch.bool"),
        (lambda p: orpo_loss(p, LENGTHS, PREFERRED, weight=0.0), "weight must be a finite number above 0"),
        (lambda p: kto_loss(p, p, PREFERRED, torch.tensor(0.0), beta=1.0), "desirable must be bool"),
    ],
)
def test_wrong_input_is_named(wrong, message: str, logps: tuple[Tensor, Tensor]) -> None:
    with pytest.raises(ValueError, match=message):
        wrong(logps[0])
