"""The estimated optimum where the truth can be enumerated."""

import itertools

import numpy as np
import pytest

from exalign.data.record import Completion, Record
from exalign.errors import InputError
from exalign.evaluation.pool import (
    LEAST_ESS,
    best_of_n,
    best_of_n_shares,
    beta_at,
    expected_best,
    gain_at,
    gap_to_optimum,
    objective_share,
    optimum,
    pool_frontier,
)
from exalign.evaluation.sample_table import tabulate

PROBABILITIES = np.array([0.4, 0.3, 0.2, 0.1])
REWARDS = np.array([0.0, 1.0, 2.0, 4.0])


def exact(beta):
    """Reward and KL of π* ∝ π exp(r/β), by enumeration."""
    weights = PROBABILITIES * np.exp(REWARDS / beta)
    best = weights / weights.sum()
    return best @ REWARDS, best @ np.log(best / PROBABILITIES)


def proportional_pool(scale):
    """A pool in which every outcome occurs exactly in proportion to its probability: no sampling error is left."""
    counts = np.round(PROBABILITIES * 10).astype(int) * scale
    return list(np.repeat(REWARDS, counts))


def test_the_optimum_is_exact_when_the_pool_is_the_distribution():
    betas = np.array([8.0, 2.0, 1.0, 0.5])
    pool = pool_frontier({"a": proportional_pool(1), "b": proportional_pool(3)}, betas)
    for g, beta in enumerate(betas):
        reward, kl = exact(beta)
        np.testing.assert_allclose(pool.reward[:, g], reward)
        np.testing.assert_allclose(pool.kl[:, g], kl)
    np.testing.assert_allclose(pool.base, PROBABILITIES @ REWARDS)
    assert list(pool.num_samples) == [10, 30]


def test_random_pools_cover_the_truth():
    generator = np.random.default_rng(0)
    drawn = {f"p{i}": generator.choice(REWARDS, 256, p=PROBABILITIES) for i in range(60)}
    points = optimum(pool_frontier(drawn)).points
    checked = 0
    for point in points:
        reward, kl = exact(point.beta)
        if point.reliable:
            assert point.reward.estimate == pytest.approx(reward, abs=0.05)
            assert point.kl.estimate == pytest.approx(kl, abs=0.05)
            checked += 1
    assert checked > 10
    kls = [point.kl.estimate for point in points]
    assert kls == sorted(kls)


def test_a_point_is_reliable_while_enough_samples_carry_it():
    generator = np.random.default_rng(1)
    points = optimum(pool_frontier({f"p{i}": generator.normal(size=64) for i in range(20)})).points
    assert all(point.reliable == (point.ess >= LEAST_ESS) for point in points)
    assert points[0].reliable
    assert not points[-1].reliable
    assert points[-1].kl.estimate <= np.log(64)


@pytest.mark.parametrize("samples", [64, 4096])
def test_the_optimum_is_shown_as_far_as_its_samples_carry_it(samples):
    """Not as far as a grid happens to go: at the last reliable β little more than the least of them count."""
    generator = np.random.default_rng(2)
    points = optimum(pool_frontier({f"p{i}": generator.normal(size=samples) for i in range(20)})).points
    last = [point for point in points if point.reliable][-1]
    assert LEAST_ESS <= last.ess < 1.25 * LEAST_ESS and not points[-1].reliable


def test_prompts_of_one_reward_make_no_point_reliable():
    """Six of ten prompts keep all their samples at any β; where one sample of the others is left, nothing is known."""
    generator = np.random.default_rng(3)
    varied = {f"p{i}": generator.normal(size=64) for i in range(4)}
    alone, among = (pool_frontier(pool) for pool in (varied, varied | {f"q{i}": [1.0] * 64 for i in range(6)}))
    assert alone.ess[:, -1].max() < 2 and not among.reliable[-1]
    same_betas = pool_frontier(varied, among.betas)
    np.testing.assert_array_equal(among.reliable, same_betas.reliable)
    np.testing.assert_allclose([p.ess for p in optimum(among).points], [p.ess for p in optimum(same_betas).points])


def test_beyond_the_end_of_the_optimum_there_is_no_more_to_gain():
    """Of rewards 0 and 1, evenly, π* has nothing but 1 from log 2 nats on, with half of the samples behind it."""
    rewards = {"a": [0.0, 1.0] * 32, "b": [1.0, 0.0] * 32}
    pool = pool_frontier(rewards)
    assert gain_at(pool, 2.0) == pytest.approx([0.5, 0.5])
    sft, policy = samples([0.5, 0.5], 0.0), samples([0.75, 0.75], 2.0)
    gap = gap_to_optimum(pool_frontier({"p0": rewards["a"], "p1": rewards["b"]}), sft, [policy])
    assert gap.kl == 2.0 and gap.gap.estimate == pytest.approx(0.25)
    with pytest.raises(InputError, match=r"No β leads 2 nats away: at 0\.69 nats the optimum has the highest reward"):
        beta_at(rewards, 2.0)
    carried_by_few = pool_frontier({"a": [0.0, 1.0] * 4})
    assert gain_at(carried_by_few, 2.0) is None


@pytest.mark.parametrize("pool", [{}, {"a": [1.0]}, {"a": [2.0, 2.0], "b": [3.0, 3.0]}, {"a": [0.1] * 64}])
def test_without_differences_there_is_no_frontier(pool):
    assert pool_frontier(pool) is None


def samples(rewards, log_ratio):
    texts = (Completion("y", logprob=log_ratio, reference_logprob=0.0, reward=float(r)) for r in rewards)
    return tabulate([Record(f"p{i}", "x", (text,)) for i, text in enumerate(texts)], "test")


def gaussian_world(efficiency, distance, num_prompts=64):
    """A pool of N(0, 1) rewards, and a policy with reward efficiency·s at KL s²/2; the optimum has s there."""
    generator = np.random.default_rng(0)
    pool = pool_frontier({f"p{i}": generator.normal(size=256) for i in range(num_prompts)})
    sft = samples(generator.normal(size=num_prompts), 0.0)
    policy = samples(efficiency * distance + 0.1 * generator.normal(size=num_prompts), distance**2 / 2)
    return pool, sft, policy


def test_the_gap_of_a_policy_of_known_efficiency():
    pool, sft, policy = gaussian_world(0.5, 1.2)
    gap = gap_to_optimum(pool, sft, [policy])
    assert gap.kl == pytest.approx(1.2**2 / 2)
    assert gap.gap.low < 0.5 * 1.2 < gap.gap.high
    assert gap.gap.estimate == pytest.approx(0.6, abs=0.1)
    assert not gap.below_first_checkpoint


def test_a_policy_beyond_the_reliable_optimum_is_judged_on_its_way_there():
    pool, sft, policy = gaussian_world(0.5, 6.0)
    gap = gap_to_optimum(pool, sft, [policy])
    assert gap.kl < 3
    assert gap.below_first_checkpoint


def test_the_gap_needs_shared_prompts_and_a_policy_that_moved():
    pool, sft, policy = gaussian_world(0.5, 1.0)
    elsewhere = tabulate([Record("q", "x", (Completion("y", logprob=1.0, reference_logprob=0.0, reward=1.0),))], "t")
    assert gap_to_optimum(pool, sft, [elsewhere]) is None
    assert gap_to_optimum(pool, sft, []) is None
    assert gap_to_optimum(pool, sft, [sft.as_reference()]) is None
    assert gap_to_optimum(pool, sft, [policy]) is not None


def tilted(beta, scale=3000):
    """A policy π ∝ π_sft exp(r/β) on the four outcomes, each sampled in proportion, with its log-ratio."""
    weights = PROBABILITIES * np.exp(REWARDS / beta)
    weights /= weights.sum()
    counts = np.round(scale * weights).astype(int)
    texts = [
        Completion("y", logprob=float(np.log(w / q)), reference_logprob=0.0, reward=float(r))
        for n, w, q, r in zip(counts, weights, PROBABILITIES, REWARDS, strict=True)
        for _ in range(n)
    ]
    return tabulate([Record("p", "x", tuple(texts))], "test")


def test_the_share_of_the_objective_is_the_share_of_the_way_to_the_optimum():
    """1 − KL(π‖π*)/KL(π_sft‖π*), by enumeration: 1 for the optimum, 0 for π_sft, below 0 for what overshoots it."""
    pool, sft, beta = {"p": proportional_pool(10)}, tilted(1e9), 1.5

    def share(policy):
        return objective_share(pool, beta, sft, policy).estimate

    def distance(other):
        p, q = (PROBABILITIES * np.exp(REWARDS / b) for b in (other, beta))
        p, q = p / p.sum(), q / q.sum()
        return p @ np.log(p / q)

    assert share(tilted(beta)) == pytest.approx(1, abs=1e-3)
    assert share(sft) == pytest.approx(0, abs=1e-3)
    for other in (4.0, 1.0, 0.3):
        assert share(tilted(other)) == pytest.approx(1 - distance(other) / distance(1e9), abs=2e-3)
    assert share(tilted(0.3)) < 0.3


def test_no_share_of_an_objective_whose_optimum_the_pool_does_not_show():
    pool, sft = {"p": proportional_pool(1)}, tilted(1e9)
    assert objective_share(pool, 1.5, sft, tilted(1.5)) is None  # ten samples, of which fewer than ten count
    elsewhere = tabulate([Record("q", "x", (Completion("y", logprob=0.0, reference_logprob=0.0, reward=1.0),))], "t")
    assert objective_share({"p": proportional_pool(10)}, 1.5, sft, elsewhere) is None


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_expected_best_is_the_mean_over_all_subsets(n):
    rewards = [3.0, -1.0, 2.0, 2.0, 0.5]
    wanted = np.mean([max(subset) for subset in itertools.combinations(rewards, n)])
    assert expected_best(rewards, n) == pytest.approx(wanted)


def test_best_of_n_doubles_up_to_the_smallest_pool():
    points = best_of_n({"a": [0.0, 1.0, 2.0, 3.0, 4.0], "b": [1.0, 1.0, 1.0, 1.0]})
    assert [point.n for point in points] == [1, 2, 4]
    assert [point.n for point in best_of_n({"a": [0.0] * 6, "b": [1.0] * 9})] == [1, 2, 4, 6]
    assert points[0].reward.estimate == pytest.approx((2 + 1) / 2)
    assert points[0].kl_bound == 0
    assert points[2].kl_bound == pytest.approx(np.log(4) - 3 / 4)
    assert best_of_n({}) == []


def test_expected_best_of_more_than_the_pool_is_refused():
    with pytest.raises(ValueError, match="between 1 and the 2 rewards"):
        expected_best([1.0, 2.0], 3)


def won(ours: float, theirs: float) -> float:
    return 1.0 if ours > theirs else 0.5 if ours == theirs else 0.0


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_best_of_n_wins_as_often_as_over_all_subsets(n):
    """Every subset of the pool against every opponent, with ties among the pool and across."""
    pool, theirs = [3.0, -1.0, 2.0, 2.0, 0.5], [2.0, 0.0, 2.5, 3.0]
    pairs = [(max(subset), r) for subset in itertools.combinations(pool, n) for r in theirs]
    share, ties = best_of_n_shares(pool, np.array(theirs), n)
    assert share == pytest.approx(np.mean([won(best, r) for best, r in pairs]))
    assert ties == pytest.approx(np.mean([best == r for best, r in pairs]))


def test_best_of_n_is_rated_on_the_prompts_that_both_have():
    answers = {"a": [1.5, 9.0], "b": [0.0], "elsewhere": [0.0]}
    records = [Record(key, "x", tuple(Completion("y", reward=r) for r in rs)) for key, rs in answers.items()]
    pool = {"a": [1.0, 2.0], "b": [0.0, 0.0], "c": [5.0, 5.0]}
    points = best_of_n(pool, {"SFT": tabulate(records, "t")})
    # a: the best of two, 2, beats 1.5 and not 9; b: a tie. One of them: 1 loses to both, 2 wins one of two.
    assert [point.win_rates[0].rate.estimate for point in points] == [
        pytest.approx(np.mean([0.25, 0.5])),
        pytest.approx(np.mean([0.5, 0.5])),
    ]
    (rate,) = points[-1].win_rates
    assert (rate.opponent, rate.rate.num_prompts, rate.num_pairs, rate.missing_prompts) == ("SFT", 2, 2 * 2 + 2 * 1, 2)
    assert rate.ties == pytest.approx(0.5)
    nobody = tabulate([Record("q", "x", (Completion("y", reward=1.0),))], "t")
    assert best_of_n(pool, {"SFT": nobody})[0].win_rates == []
