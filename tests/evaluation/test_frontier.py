"""Frontier points, win rates, paths and comparisons, by hand."""

import math
from dataclasses import replace

import numpy as np
import pytest

from exalign.data.record import Completion, Record
from exalign.errors import InputError
from exalign.evaluation.frontier import (
    Paths,
    at_equal_length,
    changes,
    compare_all,
    compare_pairs,
    frontier_point,
    reach,
    reward_at_kl,
    select_within,
    win_rate,
)
from exalign.evaluation.sample_table import SampleTable, tabulate


def completion(reward, log_ratio=0.0, tokens=3, finish="stop"):
    return Completion("x", tuple(range(tokens)), finish, log_ratio - 20.0, -20.0, reward)


def records(*prompts):
    return [Record(f"p{i}", "x", tuple(completions)) for i, completions in enumerate(prompts)]


def table_of(rewards, kls) -> SampleTable:
    """One sample per prompt."""
    return tabulate(records(*([completion(r, k)] for r, k in zip(rewards, kls, strict=True))), "test")


RAGGED = records(
    [completion(1.0, 0.5, 2), completion(3.0, 1.5, 4, "length")],
    [completion(-2.0, 4.0, 6)],
)


def test_a_point_by_hand():
    point = frontier_point(tabulate(RAGGED, "test"), step=7, rewards_are_log_odds=True)
    assert (point.step, point.num_samples) == (7, 3)
    # Prompts weigh the same: (2 + −2)/2 and (1 + 4)/2, not sums over three samples.
    assert point.reward.estimate == pytest.approx((2 + -2) / 2)
    assert point.kl.estimate == pytest.approx((1 + 4) / 2)
    sigmoids = [1 / (1 + np.exp(-x)) for x in (1, 3, -2)]
    assert point.accuracy.estimate == pytest.approx(((sigmoids[0] + sigmoids[1]) / 2 + sigmoids[2]) / 2)
    assert point.tokens == pytest.approx((3 + 6) / 2)
    assert point.finished == pytest.approx((0.5 + 1) / 2)
    # Around the mean 0: ((1 + 9)/2 + 4)/2.
    assert point.reward_std == pytest.approx(np.sqrt((5 + 4) / 2))
    assert point.reward.num_prompts == 2


def test_the_parts_of_a_sum_have_their_means_over_prompts():
    rows = [
        replace(
            r, completions=tuple(replace(c, parts={"length": 2.0 * i, "fun": c.reward or 0.0}) for c in r.completions)
        )
        for i, r in enumerate(RAGGED)
    ]
    assert frontier_point(tabulate(rows, "test"), step=1).parts == {"length": 1.0, "fun": 0.0}
    half = [rows[0], RAGGED[1]]
    assert frontier_point(tabulate(half, "test"), step=1).parts == {} == tabulate([], "test").parts


def test_without_log_odds_there_is_no_accuracy():
    assert frontier_point(tabulate(RAGGED, "test"), step=1).accuracy is None


def test_the_supervised_policy_has_no_kl_to_itself():
    point = frontier_point(tabulate(RAGGED, "test").as_reference(), step=0)
    assert (point.kl.estimate, point.kl.low, point.kl.high) == (0, 0, 0)


def test_lengths_are_absent_where_one_sample_does_not_say():
    bare = [replace(RAGGED[0], completions=(replace(RAGGED[0].completions[0], token_ids=None, finish_reason=None),))]
    point = frontier_point(tabulate([*bare, RAGGED[1]], "test"), step=1)
    assert point.tokens is None
    assert point.finished is None


def test_prompts_without_samples_are_counted_not_averaged():
    table = tabulate([*RAGGED, Record("empty", "x")], "test")
    assert table.empty_prompts == 1
    assert frontier_point(table, step=1).reward.num_prompts == 2


@pytest.mark.parametrize(
    ("broken", "message"),
    [
        (replace(RAGGED[1].completions[0], reward=None), "'p9' has reward None"),
        (replace(RAGGED[1].completions[0], reward=float("nan")), "'p9' has reward nan"),
        (replace(RAGGED[1].completions[0], logprob=None), "'p9' lacks a finite logprob"),
        (replace(RAGGED[1].completions[0], logprob=float("-inf")), "'p9' lacks a finite logprob"),
    ],
)
def test_a_broken_sample_is_named(broken, message):
    with pytest.raises(InputError, match=message):
        tabulate([*RAGGED, Record("p9", "x", (broken,))], "evaluation/exo")


def test_an_id_that_occurs_twice_is_an_error():
    with pytest.raises(InputError, match="'p0' occurs twice"):
        tabulate([RAGGED[0], RAGGED[0]], "test")


def test_without_log_probabilities_there_is_no_kl_and_without_samples_nothing():
    bare = [Record("a", "x", (Completion("y", reward=1.0),))]
    point = frontier_point(tabulate(bare, "test"), step=1)
    assert point.kl is None and point.nats == math.inf and point.reward is not None
    with pytest.raises(InputError, match="no samples"):
        frontier_point(tabulate([], "test"), step=1)


def test_win_rate_by_hand():
    ours = tabulate(records([completion(1.0), completion(3.0)], [completion(0.0)], [completion(9.0)]), "ours")
    theirs = tabulate(records([completion(1.0), completion(2.0)], [completion(0.0), completion(-1.0)]), "theirs")
    rate = win_rate(ours.by_prompt, theirs.by_prompt, opponent="SFT")
    # p0: tie, loss, win, win → 2.5 of 4; p1: tie, win → 1.5 of 2; p2 has no opponent.
    assert rate.rate.estimate == pytest.approx((2.5 / 4 + 1.5 / 2) / 2)
    assert rate.ties == pytest.approx((1 / 4 + 1 / 2) / 2)
    assert (rate.num_pairs, rate.missing_prompts) == (6, 1)


def test_at_equal_length_it_is_the_win_rate_where_lengths_say_nothing_and_chance_where_they_say_all():
    """Longer by 100 characters on average and never better but by that: rewards are lengths, of 200 prompts × 3 × 2."""
    generator, kinds = np.random.default_rng(0), {"equal": lambda _: 7, "all": lambda length: length}

    def table(mean, length_of) -> SampleTable:
        rows = generator.integers(mean - 200, mean + 200, (200, 2 if mean > 300 else 3)).tolist()
        texts = [[replace(completion(float(n)), text="x" * length_of(n)) for n in row] for row in rows]
        return tabulate(records(*texts), "test")

    for kind, length_of in kinds.items():
        ours, theirs = table(400, length_of), table(300, length_of)
        rate, equal = win_rate(ours.by_prompt, theirs.by_prompt, opponent="b").rate, at_equal_length(ours, theirs)
        assert rate.low > 0.6
        if kind == "equal":
            assert equal.estimate == pytest.approx(rate.estimate, abs=1e-9)
            assert (equal.low, equal.high) == pytest.approx((rate.low, rate.high), abs=0.01)
        else:
            assert equal.low < 0.5 < equal.high
        back = at_equal_length(theirs, ours)
        assert equal.estimate + back.estimate == pytest.approx(1, abs=1e-6)


def test_win_rates_of_two_sides_sum_to_one():
    generator = np.random.default_rng(0)
    ours, theirs = (table_of(generator.integers(0, 3, 30), np.zeros(30)).by_prompt for _ in range(2))
    there, back = win_rate(ours, theirs, opponent="b"), win_rate(theirs, ours, opponent="a")
    assert there.rate.estimate + back.rate.estimate == pytest.approx(1)
    assert there.ties == back.ties


def test_a_checkpoint_that_pi_sft_beats_is_passed_over_where_another_one_gains():
    """Rewards 0, −1 (at 1 nat) and 2 (at 4): at 1 nat a method has what lies between the first and the last, 2·½."""
    kls, rewards = np.array([[0.0, 1.0, 4.0]]), np.array([[0.0, -1.0, 2.0]])
    assert reward_at_kl(kls, rewards, 1.0) == pytest.approx([1.0])
    assert reward_at_kl(kls, np.array([[0.0, -1.0, -2.0]]), 1.0) == pytest.approx([-1.0])  # where all lose


def test_no_shared_prompt_means_no_win_rate():
    other = tabulate([Record("elsewhere", "x", (completion(1.0),))], "other")
    assert win_rate(tabulate(RAGGED, "test").by_prompt, other.by_prompt, opponent="SFT") is None
    assert changes(tabulate(RAGGED, "test"), other) == {}


def test_selection_takes_the_best_within_the_budget():
    tables = [table_of([r, r], [k, k]) for r, k in ((1.0, 0.5), (3.0, 1.0), (2.0, 1.5), (9.0, 5.0))]
    points = [frontier_point(table, step=i) for i, table in enumerate(tables)]
    assert select_within(points, 2.0).step == 1
    assert select_within(points, 5.0).step == 3
    assert select_within(points, 0.1) is None


KLS = np.array([[0.0, 2.0, 4.0], [0.0, 2.0, 4.0]])
REWARDS = np.array([[0.0, 2.0, 3.0], [0.0, 4.0, 5.0]])


@pytest.mark.parametrize(
    ("kl", "reward"),
    [
        (0.0, 0.0),
        (1.0, 3 * np.sqrt(1 / 2)),
        (2.0, 3.0),
        (3.0, 3 + (np.sqrt(3) - np.sqrt(2)) / (2 - np.sqrt(2))),
        (4.0, 4.0),
    ],
)
def test_reward_is_linear_in_the_root_of_the_kl(kl, reward):
    assert reward_at_kl(KLS, REWARDS, kl).mean() == pytest.approx(reward)


def test_interpolation_follows_a_gaussian_that_is_shifted():
    # N(s, 1) against N(0, 1): KL s²/2, and a reward that is the outcome itself has mean s = √(2 KL).
    shifts = np.array([[0.0, 1.0, 3.0]])
    for kl in np.linspace(0, 4.5, 10):
        assert reward_at_kl(shifts**2 / 2, shifts, kl).mean() == pytest.approx(np.sqrt(2 * kl))


def test_a_checkpoint_that_another_beats_is_passed_over():
    kls, rewards = np.array([[0.0, 1.0, 1.5, 2.0, 4.0]]), np.array([[0.0, 3.0, 1.0, 2.0, 5.0]])
    without = [0, 1, 4]
    for kl in (0.5, 1.5, 2.0, 3.0):
        assert reward_at_kl(kls, rewards, kl) == pytest.approx(reward_at_kl(kls[:, without], rewards[:, without], kl))
    # The last checkpoint is beaten: beyond the best one its reward is held.
    assert reward_at_kl(kls[:, :3], rewards[:, :3], 1.5).mean() == pytest.approx(3.0)
    assert (reach(kls, rewards), reach(kls[:, :3], rewards[:, :3])) == (4.0, 1.0)


def test_a_policy_worse_than_the_supervised_one_is_shown_as_worse():
    assert reward_at_kl(np.array([[0.0, 1.0]]), np.array([[2.0, 0.0]]), 1.0).mean() == pytest.approx(0.0)


def test_reward_at_kl_does_not_depend_on_the_order_of_checkpoints():
    shuffled = [0, 2, 1]
    for kl in (0.3, 2.0, 3.9):
        np.testing.assert_allclose(
            reward_at_kl(KLS, REWARDS, kl), reward_at_kl(KLS[:, shuffled], REWARDS[:, shuffled], kl)
        )


def test_the_interval_at_equal_kl_counts_the_uncertainty_of_the_kl():
    # Prompts with more KL have more reward, exactly as the frontier's tangent says: at a fixed KL nothing is uncertain.
    kl = np.random.default_rng(0).gamma(2.0, size=200)
    reward = 3 * (1 + (kl - kl.mean()) / (2 * kl.mean()))
    values = reward_at_kl(np.stack([0 * kl, kl], 1), np.stack([0 * kl, reward], 1), float(kl.mean()))
    np.testing.assert_allclose(values, 3)


def test_the_interval_at_equal_kl_is_that_of_repeated_experiments():
    generator = np.random.default_rng(0)
    shifts, count = np.array([0.0, 0.8, 1.6]), 60

    def experiment():
        z = generator.normal(shifts, 1.0, (count, 3))
        return shifts * z - shifts**2 / 2, 0.6 * z + 0.8 * generator.normal(size=(count, 3))

    readings, widths = [], []
    for _ in range(300):
        values = reward_at_kl(*experiment(), 0.9)
        readings.append(values.mean())
        widths.append(values.std(ddof=1) / np.sqrt(count))
    assert np.mean(readings) == pytest.approx(0.6 * np.sqrt(2 * 0.9), abs=0.04)
    assert np.std(readings) == pytest.approx(np.mean(widths), rel=0.2)


def paths():
    sft = table_of([0.0, 1.0], [0, 0])
    exo = [table_of([2.0, 3.0], [1.0, 1.0]), table_of([3.0, 4.0], [2.0, 2.0])]
    dpo = [table_of([3.0, 4.0], [4.0, 4.0])]
    still = [table_of([0.0, 1.0], [0.01, 0.01])]
    return Paths(sft, {"dpo": dpo, "exo": exo, "still": still, "absent": []})


def test_pairs_are_compared_at_the_largest_kl_both_reach():
    pairs = {(c.first, c.second): c for c in compare_pairs(paths())}
    assert set(pairs) == {("exo", "dpo"), ("dpo", "still"), ("exo", "still")}
    pair = pairs["exo", "dpo"]
    # At KL 2, DPO is √(2/4) of the way from (0, 0.5) to (4, 3.5).
    assert pair.kl == pytest.approx(2)
    assert pair.difference.estimate == pytest.approx(3.5 - (0.5 + 3 * np.sqrt(1 / 2)))


def test_a_method_that_did_not_move_is_named_not_compared():
    equal = compare_all(paths(), among=["dpo", "exo", "still"])
    assert equal.kl == pytest.approx(2)
    assert [s.method for s in equal.standings] == ["exo", "dpo"]
    assert equal.standings[0].behind_leader is None
    assert equal.standings[1].behind_leader.estimate == pytest.approx(3 - 3 * np.sqrt(1 / 2))
    assert equal.left_out == ["still"]


def test_a_method_that_went_very_far_keeps_no_other_from_being_compared():
    sft, near = table_of([0.0, 1.0], [0, 0]), [table_of([2.0, 3.0], [1.0, 1.0])]
    paths = Paths(sft, {"a": near, "b": near, "far": [table_of([5.0, 6.0], [100.0, 100.0])]})
    equal = compare_all(paths, among=["a", "b", "far"])
    assert (equal.kl, equal.left_out, len(equal.standings)) == (1.0, [], 3)


def test_nobody_moved():
    assert compare_all(Paths(table_of([0.0], [0]), {}), among=[]) is None
    sft = table_of([0.0, 0.0], [0, 0])
    assert compare_all(Paths(sft, {"a": [table_of([1.0, 1.0], [-0.1, -0.1])]}), among=["a"]) is None


def test_gain_is_paired():
    gain = changes(table_of([1.0, 11.0, 101.0], [1, 1, 1]), table_of([0.0, 10.0, 100.0], [0, 0, 0]))["reward"]
    assert (gain.estimate, gain.low, gain.high) == pytest.approx((1, 1, 1))
