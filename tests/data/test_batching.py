"""Micro-batches lose, repeat and split no group; the order of an epoch is a permutation that can be computed again."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from exalign.data.batching import (
    Group,
    completion_mask,
    epoch_order,
    microbatches,
    stack_values,
    stack_weights,
    values_of,
)


def group(index, prompt=1, lengths=(1,), **values):
    return Group(index, torch.zeros(prompt).long(), tuple(torch.zeros(n).long() for n in lengths), **values)


@given(st.lists(st.integers(1, 60), max_size=30), st.integers(1, 64))
def test_every_group_is_in_one_microbatch_within_the_budget_or_alone(completion_lengths, budget):
    groups = [group(i, lengths=(n,)) for i, n in enumerate(completion_lengths)]
    batches = microbatches(groups, token_budget=budget)
    assert sorted(g.index for batch in batches for g in batch) == list(range(len(groups)))
    for batch in batches:
        assert len(batch) == 1 or sum(g.num_tokens for g in batch) <= budget
        assert [g.index for g in batch] == sorted(g.index for g in batch)
    assert [b[0].index for b in batches] == sorted(b[0].index for b in batches)


@given(st.lists(st.integers(1, 50), min_size=1, max_size=40))
def test_no_two_microbatches_would_fit_into_one(completion_lengths):
    batches = microbatches([group(i, lengths=(n,)) for i, n in enumerate(completion_lengths)], token_budget=51)
    loads = sorted(sum(g.num_tokens for g in batch) for batch in batches)
    assert len(loads) < 2 or loads[0] + loads[1] > 51


def test_a_prompt_counts_once_per_group():
    assert group(0, prompt=10, lengths=(2, 3)).num_tokens == 15


def test_no_budget_is_an_error():
    with pytest.raises(ValueError, match="token_budget"):
        microbatches([], token_budget=0)
    assert microbatches([], token_budget=1) == []


def test_ragged_values_are_padded_with_zero_where_the_mask_is_false():
    groups = [
        group(0, lengths=(1, 1, 1), rewards=torch.tensor([1.0, 2.0, 3.0]), preferred=2),
        group(1, rewards=torch.tensor([4.0]), preferred=0),
    ]
    assert stack_values(groups, "rewards").tolist() == [[1.0, 2.0, 3.0], [4.0, 0.0, 0.0]]
    assert completion_mask(groups).tolist() == [[True, True, True], [True, False, False]]
    assert values_of(groups, torch.device("cpu")).preferred.tolist() == [2, 0]
    assert values_of([*groups, group(2)], torch.device("cpu")).preferred is None


def test_missing_values_name_the_group():
    with pytest.raises(ValueError, match="group 7 has no reference_logp"):
        stack_values([group(7)], "reference_logp")
    with pytest.raises(ValueError, match="group 7 has 1 completions"):
        stack_values([group(7, rewards=torch.zeros(2))], "rewards")


def test_weights_are_one_unless_given_and_never_negative():
    """A mean over rows weighted 2 and 1 is the mean over three rows of which two are alike."""
    losses = torch.tensor([3.0, 6.0])
    weights = stack_weights([group(0, weight=2.0), group(1)])
    assert weights.dtype == torch.float32
    assert float((weights * losses).sum() / weights.sum()) == (3.0 + 3.0 + 6.0) / 3
    for wrong in (-1.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match="group 7 has the weight"):
            stack_weights([group(7, weight=wrong)])


@given(st.integers(0, 200), st.integers(0, 2**40), st.integers(0, 1000))
def test_an_epoch_order_is_a_permutation_and_a_function_of_its_arguments(n, seed, epoch):
    assert sorted(epoch_order(n, seed, epoch)) == list(range(n))
    assert epoch_order(n, seed, epoch) == epoch_order(n, seed, epoch)


def test_epochs_and_seeds_give_different_orders():
    orders = {tuple(epoch_order(50, seed, epoch)) for seed in range(4) for epoch in range(4)}
    assert len(orders) == 16


def test_every_place_is_equally_likely():
    """The position of group 0 among 4 over 4,000 epochs: 1,000 each, standard deviation √(4000·¼·¾) ≈ 27."""
    places = [epoch_order(4, 0, epoch).index(0) for epoch in range(4000)]
    assert all(abs(places.count(place) - 1000) < 5 * 27.4 for place in range(4))
