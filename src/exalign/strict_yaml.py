"""YAML from a person or a stranger: plain values only, of bounded size, or an `InputError` that names the line.

`yaml.SafeLoader` builds no objects, but it follows aliases without counting: a few lines can stand for billions of
values. Here the values that a document stands for are counted before any is built.
"""

from __future__ import annotations

import math
import os
import re
from datetime import date
from typing import Any

import yaml

from exalign.errors import InputError

MAX_CHARACTERS = 1 << 20
MAX_VALUES = 100_000
"""Values that a document stands for, every alias counted as what it repeats."""
MAX_DEPTH = 32
MAX_NUMBER = 64
"""Characters of a number."""
MAX_INTEGER = 2**63 - 1


class _Loader(yaml.SafeLoader):
    """YAML as people write it: `1e-6` is a number; a key is given once and is a text, also `yes` and `1`."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.depth > MAX_DEPTH:
            raise _problem(f"nested more than {MAX_DEPTH} deep", self.peek_event().start_mark)
        self.depth += 1
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def compose_mapping_node(self, anchor: Any) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise _problem("a setting's name is a word", key.start_mark)
            if key.tag != "tag:yaml.org,2002:merge":
                if key.value in seen:
                    raise _problem(f"{key.value[:60]!r} is given twice", key.start_mark)
                seen.add(key.value)
                key.tag = "tag:yaml.org,2002:str"
        return node

    def construct_scalar(self, node: yaml.ScalarNode | yaml.MappingNode) -> Any:
        number = node.tag in ("tag:yaml.org,2002:int", "tag:yaml.org,2002:float")
        if number and isinstance(node.value, str) and not 0 < len(node.value) <= MAX_NUMBER:
            raise _problem(f"a number of {len(node.value):,} characters", node.start_mark)
        return super().construct_scalar(node)


class _Dumper(yaml.SafeDumper):
    """Writes a text that `_Loader` would take for a number in quotes."""


for _kind in (_Loader, _Dumper):  # each has its own resolvers from then on; yaml's own are everybody's
    _kind.add_implicit_resolver(
        "tag:yaml.org,2002:float", re.compile(r"^[-+]?(\d[\d_]*)(\.\d*)?[eE][-+]?\d+$"), list("-+0123456789")
    )


def parse_yaml(text: str, where: str) -> Any:
    """The document as new, unshared mappings, lists, texts, numbers, truth values and None.

    Anything else is an `InputError` that names `where` and, where it can, the line: other objects, more than
    `MAX_VALUES` values once aliases are followed, an alias inside itself, numbers not finite or beyond 64 bits.
    """
    if len(text) > MAX_CHARACTERS:
        raise InputError(f"{where} has {len(text):,} characters; at most {MAX_CHARACTERS:,} are read.")
    loader = None
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _count(node, {}, 0)
        return plain_values(loader.construct_document(node), where)
    # Besides its own errors, PyYAML lets through what Python raises on a value that does not suit an explicit tag.
    except (yaml.YAMLError, ValueError, LookupError, TypeError, AttributeError, ArithmeticError) as error:
        mark = getattr(error, "problem_mark", None)
        line = f", line {mark.line + 1}" if mark else ""
        said = " ".join(str(getattr(error, "problem", None) or error).split())[:200]
        raise InputError(f"{where}{line}: not valid YAML ({said}).") from None
    finally:
        if loader is not None:
            loader.dispose()


def dump_yaml(values: Any) -> str:
    """YAML that `parse_yaml` reads back; characters that hide or reorder text are spelled out."""
    text: str = yaml.dump(values, Dumper=_Dumper, sort_keys=False, allow_unicode=True)
    hidden = any(not (character.isprintable() or character in "\n ") for character in text)
    return str(yaml.dump(values, Dumper=_Dumper, sort_keys=False)) if hidden else text


def _count(node: yaml.Node, known: dict[int, tuple[int, int] | None], level: int) -> tuple[int, int]:
    """How many values a node stands for, and how deep they are nested; `known` holds None for those under way."""
    if id(node) in known:
        counted = known[id(node)]
        if counted is None:
            raise _problem("an alias stands inside of what it repeats", node.start_mark)
    else:
        known[id(node)] = None
        size, height = 1, 0
        children = [] if isinstance(node, yaml.ScalarNode) else node.value
        for child in [part for pair in children for part in (pair if isinstance(pair, tuple) else (pair,))]:
            inner, below = _count(child, known, level + 1)
            size, height = size + inner, max(height, below + 1)
            if size > MAX_VALUES:
                raise _problem(f"its aliases stand for more than {MAX_VALUES:,} values", node.start_mark)
        counted = known[id(node)] = (size, height)
    if level + counted[1] > MAX_DEPTH:
        raise _problem(f"nested more than {MAX_DEPTH} deep", node.start_mark)
    return counted


def _problem(text: str, mark: Any) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=text, problem_mark=mark)


def plain_values(value: Any, where: str, path: tuple[str, ...] = ()) -> Any:
    """A copy that JSON can spell; dates and paths become texts, anything else is an `InputError` that names it."""
    if len(path) > MAX_DEPTH:
        raise InputError(f"{_named(where, path)}: nested more than {MAX_DEPTH} deep.")
    if isinstance(value, dict):
        return {plain_values(key, where, path): plain_values(of, where, (*path, str(key))) for key, of in value.items()}
    if isinstance(value, list | tuple):
        return [plain_values(inner, where, (*path, str(number))) for number, inner in enumerate(value)]
    if isinstance(value, date | os.PathLike):
        value = str(value)
    if isinstance(value, str):
        if "\0" in value or any("\ud800" <= character <= "\udfff" for character in value):
            raise InputError(f"{_named(where, path)}: {value!a:.60} has a character that no file can hold.")
        return value
    if isinstance(value, float) and not math.isfinite(value):
        raise InputError(f"{_named(where, path)}: {value} is not a finite number.")
    if isinstance(value, int) and not -MAX_INTEGER <= value <= MAX_INTEGER:
        raise InputError(f"{_named(where, path)}: an integer beyond 64 bits.")
    if value is None or isinstance(value, bool | int | float):
        return value
    raise InputError(f"{_named(where, path)}: a {type(value).__name__} is no value of a setting.")


def _named(where: str, path: tuple[str, ...]) -> str:
    return ": ".join(part for part in (where, ".".join(path)[:200]) if part)
