"""A planned study is balanced, blind, seeded, and made of what the run holds."""

from __future__ import annotations

from collections import Counter, defaultdict
from itertools import combinations, pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from exalign.data.record import Record
from exalign.data.store import Header, write_records
from exalign.errors import InputError
from exalign.judging.study import assign, parse_matches, plan_study


@given(st.integers(1, 6), st.integers(1, 6), st.integers(1, 4), st.integers(1, 12), st.integers(0, 99))
def test_assignments_are_balanced(num_assessors, per_item, num_matches, num_prompts, seed):
    per_item = min(per_item, num_assessors)
    num_items = num_prompts * num_matches
    assignments = assign(num_items, num_assessors, per_item, num_matches=num_matches, seed=seed)
    loads, items, sides = Counter(), defaultdict(list), Counter()
    for a in assignments:
        loads[a.assessor] += 1
        items[a.item].append(a)
        sides[a.assessor, a.item % num_matches] += 1 if a.left == "first" else -1
    assert max(loads.values()) - min(loads[i] for i in range(num_assessors)) <= 1
    assert len(items) == num_items
    for group in items.values():
        assert len({a.assessor for a in group}) == per_item
        assert abs(sum(1 if a.left == "first" else -1 for a in group)) <= 1
    assert all(abs(difference) <= 3 for difference in sides.values())
    for assessor in range(num_assessors):
        positions = sorted(a.position for a in assignments if a.assessor == assessor)
        assert positions == list(range(1, len(positions) + 1))


@pytest.mark.parametrize(("num_assessors", "per_item", "pairs"), [(4, 2, 6), (6, 3, 15), (5, 2, 10), (6, 2, 15)])
def test_everybody_judges_with_everybody(num_assessors, per_item, pairs):
    items = defaultdict(list)
    for a in assign(180, num_assessors, per_item, num_matches=3, seed=0):
        items[a.item].append(a.assessor)
    met = Counter(pair for group in items.values() for pair in combinations(sorted(group), 2))
    mean = 180 * per_item * (per_item - 1) / 2 / pairs
    assert len(met) == pairs and all(0.9 * mean <= times <= 1.1 * mean for times in met.values()), met


def test_the_full_study_is_balanced_to_the_last_side():
    assignments = assign(300, 3, 3, num_matches=3, seed=0)
    sides = Counter((a.assessor, a.item % 3, a.left) for a in assignments)
    assert set(sides.values()) <= {49, 50, 51}


def test_the_seed_decides_and_nothing_else():
    def plan(seed):
        return assign(60, 3, 2, num_matches=3, seed=seed)

    assert plan(1) == plan(1) != plan(2)


def test_neither_order_nor_side_tells_the_match_up():
    assignments = [a for a in assign(300, 3, 3, num_matches=3, seed=5) if a.assessor == 0]
    by_position = sorted(assignments, key=lambda a: a.position)
    repeats = sum(a.item % 3 == b.item % 3 for a, b in pairwise(by_position))
    assert 70 < repeats < 130  # 299/3 ± 4 standard deviations
    runs = sum(a.left == b.left for a, b in pairwise(by_position))
    assert 115 < runs < 185


def test_items_come_from_the_last_step_and_the_first_sample(make_run):
    run = make_run(6)
    study = plan_study(run, [("exo", "sft"), ("exo@10", "dpo")], name="s", num_prompts=4, assessors=["a"], seed=1)
    assert len(study.items) == 8
    for item in study.items:
        number = item.prompt_id[1:]
        expected = {"exo": "exo", "exo@10": "exo-early", "sft": "sft", "dpo": "dpo"}
        assert item.first_text == f"{expected[item.first]} answers prompt {number}."
        assert item.second_text == f"{expected[item.second]} answers prompt {number}."
        assert item.reference == f"reference answers prompt {number}."
        assert item.prompt == ({"role": "user", "content": f"Question {number}?"},)
    first, second = [{i.prompt_id for i in study.items if i.second == name} for name in ("sft", "dpo")]
    assert first == second
    assert len(first) == 4


def test_a_match_against_the_reference_does_not_show_it_again(make_run):
    study = plan_study(make_run(2), [("exo", "reference")], name="s", num_prompts=2, assessors=["a"])
    assert {item.reference for item in study.items} == {None}
    assert all(item.second_text.startswith("reference") for item in study.items)
    study = plan_study(make_run(2), [("exo", "sft"), ("exo", "reference")], name="s", num_prompts=2, assessors=["a"])
    assert {item.reference for item in study.items} == {None}  # nor beside others, where it would be recognised


def test_identical_answers_stay_in_and_are_counted(make_run):
    run = make_run(3, lambda system, i: "the same" if i == 0 else f"{system} {i}")
    study = plan_study(run, [("exo", "dpo")], name="s", num_prompts=3, assessors=["a"])
    assert study.counts == {"identical_pair": 1}


def test_what_the_run_cannot_give_is_said(make_run):
    run = make_run(3)

    def plan(matches, **options):
        return plan_study(run, matches, **{"name": "s", "num_prompts": 3, "assessors": ["a", "b"], **options})

    with pytest.raises(InputError, match="--prompts 4: exo, dpo share 3 prompts"):
        plan([("exo", "dpo")], num_prompts=4)
    with pytest.raises(InputError, match="no evaluation samples of kto; evaluated there: sft, dpo, exo, ppo"):
        plan([("exo", "kto")])
    with pytest.raises(InputError, match="exo@7"):
        plan([("exo@7", "dpo")])
    with pytest.raises(InputError, match="3 judgements"):
        plan([("exo", "dpo")], per_item=3)
    with pytest.raises(InputError, match="same name"):
        plan([("exo", "dpo")], assessors=["a", "a"])
    write_records(run / "evaluation/sft/samples", [Record("p0", "Other?", ())], Header())
    with pytest.raises(InputError, match="No prompt is answered by both exo and sft"):
        plan([("exo", "sft")])


def test_matches_are_read_strictly():
    assert parse_matches("exo:dpo,exo:sft") == [("exo", "dpo"), ("exo", "sft")]
    for wrong in ("exo", "exo:", "exo:dpo:sft", "exo:exo", "exo:dpo,dpo:exo", ""):
        with pytest.raises(InputError, match="--match"):
            parse_matches(wrong)
