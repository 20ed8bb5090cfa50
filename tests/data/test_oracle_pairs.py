"""Preferences of the oracle: disjoint pairs, ties dropped and counted, the winner where the reward is higher."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from exalign.data.record import Completion, Record, pairs_from_rewards
from exalign.errors import InputError


def scored(rewards, name="r"):
    return Record(name, "p", tuple(Completion(str(i), reward=r) for i, r in enumerate(rewards)))


@given(st.lists(st.lists(st.integers(0, 3).map(float), min_size=1, max_size=7), max_size=5))
def test_every_sample_is_used_once_or_counted(all_rewards):
    counts = Counter()
    records = [scored(rewards, f"r{i}") for i, rewards in enumerate(all_rewards)]
    pairs = list(pairs_from_rewards(records, counts))
    assert len({pair.id for pair in pairs}) == len(pairs) == counts["pairs"]
    assert all(pair.rewards[pair.preferred] > pair.rewards[1 - pair.preferred] for pair in pairs)
    assert all(int(pair.completions[1].text) == int(pair.completions[0].text) + 1 for pair in pairs)
    samples = sum(map(len, all_rewards))
    assert samples == 2 * (counts["pairs"] + counts["pairs_tied"]) + counts["samples_without_partner"]


@pytest.mark.parametrize("rewards", [[1.0, None], [1.0, float("nan")], [float("inf"), 0.0], []])
def test_records_without_finite_rewards_are_named(rewards):
    with pytest.raises(InputError, match="Record r "):
        list(pairs_from_rewards([scored(rewards)], Counter()))
