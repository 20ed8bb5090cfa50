"""A recipe of a stranger: it stands for a bounded number of plain values, or it is refused in a sentence at once."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

from exalign.errors import InputError
from exalign.run.demo import RECIPE
from exalign.run.recipe import load_recipe, make_recipe
from exalign.strict_yaml import MAX_DEPTH, MAX_VALUES, dump_yaml, parse_yaml, plain_values

LAUGHS = "a0: &a0 [ha, ha]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}, *a{i - 1}]\n" for i in range(1, 31))
MERGES = "a0: &a0 {k0: x}\n" + "".join(f"a{i}: &a{i} {{k{i}: x, <<: [*a{i - 1}, *a{i - 1}]}}\n" for i in range(1, 31))
CHAIN = "a0: &a0 [x]\n" + "".join(f"a{i}: &a{i} [*a{i - 1}]\n" for i in range(1, 5000))


@pytest.mark.parametrize(
    ("text", "said"),
    [
        (LAUGHS, f"more than {MAX_VALUES:,} values"),
        (MERGES, f"more than {MAX_VALUES:,} values"),
        (CHAIN, f"nested more than {MAX_DEPTH} deep"),
        ("a: " + "[" * 100_000, f"nested more than {MAX_DEPTH} deep"),
        ("a: " + "{b: " * 100_000, f"nested more than {MAX_DEPTH} deep"),
        ("- " * 100_000, f"nested more than {MAX_DEPTH} deep"),
        ("a: &a [*a]", "inside of what it repeats"),
        ("a: &a {<<: *a}", "inside of what it repeats"),
        ("a: " + "9" * 5000, "a number of 5,000 characters"),
        ("a: 0x" + "f" * 100_000, "a number of 100,002 characters"),
        ("a: 1" + ":59" * 100_000, "a number of 300,001 characters"),
        ("a: " + "9" * 30, "a: an integer beyond 64 bits"),
        ("a: .nan", "a: nan is not a finite number"),
        ("a: {b: [1, -.inf]}", "a.b.1: -inf is not a finite number"),
        ("a: 1e999", "a: inf is not a finite number"),
        ("a: !!int ''", "not valid YAML"),
        ("a: !!float ''", "not valid YAML"),
        ("a: !!bool maybe", "not valid YAML"),
        ("a: !!timestamp now", "not valid YAML"),
        ("a: 2001-13-41", "not valid YAML"),
        ("a: !!map [x]", "not valid YAML"),
        ("!!map x", "not valid YAML"),
        ("a: !!binary aGk=", "a: a bytes is no value"),
        ("a: !!set {b, c}", "a: a set is no value"),
        ("a: !!python/name:os.system", "not valid YAML"),
        ('a: "\\0"', "no file can hold"),
        ('a: "\\ud800"', "no file can hold"),
        ("? [a]\n: b", "a setting's name is a word"),
    ],
    ids=lambda text: " ".join(text[:24].split()),
)
def test_what_is_refused(text: str, said: str) -> None:
    start = time.monotonic()
    with pytest.raises(InputError) as caught:
        parse_yaml(text, "recipe")
    assert said in str(caught.value)
    assert len(str(caught.value)) < 400
    # A bound against exponential work, far above what counting takes.
    assert time.monotonic() - start < 10


def test_a_name_is_a_text_however_it_is_spelled() -> None:
    """Labels of a data set are written as the data has them, `yes` and `on` too."""
    text = "labels: &x {yes: 1, on: 0, No: 2, 1.0: 3, null: 4}\nmore: {<<: *x, yes: 5}"
    labels = {"yes": 1, "on": 0, "No": 2, "1.0": 3, "null": 4}
    assert parse_yaml(text, "recipe") == {"labels": labels, "more": {**labels, "yes": 5}}


def test_aliases_within_bounds_are_copies() -> None:
    """Methods that repeat one block are told apart afterwards: changing one changes no other."""
    base = "{divergence: reverse_kl, target: reward}"
    recipe = load_recipe(RECIPE, [f"align={{a: &b {base}, c: *b}}", "align.a.beta_pi=0.125"])
    assert recipe.align["a"].beta_pi == 0.125
    assert recipe.align["c"].beta_pi != 0.125


def test_a_recipe_without_end_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="at most"):
        load_recipe("/dev/zero")
    (tmp_path / "long.yaml").write_text("# " + "x" * (1 << 21))
    with pytest.raises(InputError, match="at most"):
        load_recipe(tmp_path / "long.yaml")


@pytest.mark.parametrize("path", ["a\0b.yaml", "x" * 5000, "/", "/proc/self/mem"])
def test_a_path_that_is_no_recipe_is_one_sentence(path: str) -> None:
    with pytest.raises(InputError):
        load_recipe(path)


def test_values_from_python_are_held_to_the_same(tmp_path: Path) -> None:
    for value in (float("nan"), 10**30, object(), "\0", {1, 2}):
        with pytest.raises(InputError, match=r"recipe: model\.config\.x"):
            make_recipe({"name": "x", "model": {"config": {"x": value}}})
    assert plain_values({"a": tmp_path}, "recipe") == {"a": str(tmp_path)}


plain = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**62), 2**62) | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0")),
    lambda below: st.lists(below, max_size=3) | st.dictionaries(st.text("abcde_", min_size=1), below, max_size=3),
    max_leaves=12,
)  # fmt: skip


@settings(max_examples=80)
@given(st.dictionaries(st.text("abcde_", min_size=1), plain, max_size=4))
def test_what_is_written_is_read_again_and_hides_nothing(values: dict) -> None:
    text = dump_yaml(values)
    assert parse_yaml(text, "again") == values
    assert all(character.isprintable() or character == "\n" for character in text)


def test_a_number_without_a_point_is_one_here_and_for_nobody_else() -> None:
    assert parse_yaml("a: 1e5", "recipe") == {"a": 1e5} and yaml.safe_load("a: 1e5") == {"a": "1e5"}
    assert parse_yaml(dump_yaml({"a": "1e5"}), "recipe") == {"a": "1e5"}
