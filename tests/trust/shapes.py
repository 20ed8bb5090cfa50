"""Values of any shape, and what a reader says of them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from hypothesis import settings
from hypothesis import strategies as st

from exalign.errors import InputError

some = settings(max_examples=60)
odd = st.sampled_from(
    [
        None,
        True,
        0,
        7,
        -1,
        2.5,
        10**400,
        float("nan"),
        float("inf"),
        "",
        "a",
        "\ud800",
        "\0",
        [],
        {},
        [None],
        [[]],
        {"a": 1},
    ]
)
values = st.recursive(odd | st.text(max_size=4), lambda below: st.lists(below, max_size=3), max_leaves=4)


def grafted(valid: Any) -> st.SearchStrategy[Any]:
    """`valid` with one of its parts replaced by anything, or taken out."""

    @st.composite
    def draw_one(draw: Callable[..., Any]) -> Any:
        def graft(value: Any) -> Any:
            if isinstance(value, dict | list) and value and draw(st.integers(0, 4)):
                place = draw(st.sampled_from(list(value) if isinstance(value, dict) else range(len(value))))
                changed = value.copy()
                if draw(st.integers(0, 6)):
                    changed[place] = graft(value[place])
                else:
                    del changed[place]
                return changed
            return draw(values)

        return graft(valid)

    return draw_one()


def sentence(read: Callable[[], Any]) -> str | None:
    """What an `InputError` says, None where `read` succeeds; every other error is the test's failure."""
    try:
        read()
    except InputError as error:
        said = str(error).strip()
    else:
        return None
    assert 0 < len(said) < 3000
    return said
