"""The reward of the synthetic world, known exactly: how much a reader likes a remark about a film.

A remark is read clause by clause with a small grammar; what does not parse counts against it. No single word can be
repeated for profit, long remarks tire, and a word that praises a comedy does not praise a documentary, so the best
continuation depends on the prompt and lies well inside what a supervised model can say.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from exalign.data.records import Prompt

GENRES = ("comedy", "thriller", "drama", "musical", "western", "documentary")
VERBS = ("was", "felt", "seemed")
ASPECTS = ("acting", "music", "plot", "ending", "dialogue", "camera", "cast", "pace")
DEGREES = {"slightly": 0.5, "rather": 0.75, "very": 1.5}
QUALITIES = {
    "brilliant": 2.0,
    "charming": 1.5,
    "clever": 1.0,
    "warm": 1.0,
    "good": 0.75,
    "fine": 0.5,
    "silly": -0.5,
    "slow": -0.5,
    "weak": -1.0,
    "dull": -1.0,
    "boring": -1.5,
    "dreadful": -2.0,
}
"""What everybody agrees on, and how good it is."""
FITTING = {
    "funny": "comedy",
    "tense": "thriller",
    "moving": "drama",
    "tuneful": "musical",
    "rugged": "western",
    "factual": "documentary",
}
"""Worth `FITS` for films of that genre and `MISFITS` for any other."""
FITS, MISFITS = 2.0, -1.0

DIMINISH = 0.7
"""The i-th opinion of a remark counts 0.7^i."""
REPEATED_WORD = 1.0
"""Cost of an adjective or an aspect said again."""
EXTRA_VERY = 0.5
"""Cost of each `very` after the first."""
WRONG_LINK = 0.5
"""Cost of `but` between opinions of one sign, or `and` between opposite ones."""
UNPARSED = 0.75
"""Cost of each word or sign that is part of no clause."""
UNFINISHED = 1.0
"""Cost of a remark that does not end with a full stop."""
PATIENCE, IMPATIENCE = 18, 0.15
"""Words that are read gladly, and the cost of each word beyond them."""


class Clause(NamedTuple):
    """One opinion of a remark: `was very slow` at its start, then `, but the music felt warm` with link and aspect."""

    link: str
    aspect: str
    degree: str
    adjective: str


@dataclass(frozen=True, slots=True)
class Remark:
    """A completion as it was read. `unparsed` counts words and signs that are part of no clause."""

    clauses: tuple[Clause, ...]
    words: int
    unparsed: int
    finished: bool


_TOKEN = re.compile(r"\w+|[^\w\s]")
_LINKS = {(".", "The"): "", (",", "and", "the"): "and", (",", "but", "the"): "but"}


def read_remark(text: str) -> Remark:
    """Read a completion from left to right; where no clause begins, one word or sign is passed over.

    >>> read_remark(" was very funny, but the music felt dull.").clauses[1]
    Clause(link='but', aspect='music', degree='', adjective='dull')
    """
    tokens = _TOKEN.findall(text)
    words = sum(token[0].isalnum() for token in tokens)
    finished = tokens[-1:] == ["."]
    tokens = tokens[:-1] if finished else tokens
    clauses: list[Clause] = []
    position = unparsed = 0
    while position < len(tokens):
        found = _clause_at(tokens, position)
        if found is None:
            unparsed += 1
            position += 1
        else:
            clause, position = found
            clauses.append(clause)
    return Remark(tuple(clauses), words, unparsed, finished)


def _clause_at(tokens: Sequence[str], position: int) -> tuple[Clause, int] | None:
    """The clause that begins at `position` and where it ends, or None."""
    link, aspect = "", ""
    if position > 0:
        found = next(
            (opening for opening in _LINKS if tuple(tokens[position : position + len(opening)]) == opening), None
        )
        position += len(found or ())
        if found is None or position >= len(tokens) or tokens[position] not in ASPECTS:
            return None
        link, aspect = _LINKS[found], tokens[position]
        position += 1
    rest = tokens[position : position + 3]
    degree = rest[1] if len(rest) == 3 and rest[1] in DEGREES else ""
    needed = 3 if degree else 2
    if len(rest) < needed or rest[0] not in VERBS or not (rest[needed - 1] in QUALITIES or rest[needed - 1] in FITTING):
        return None
    return Clause(link, aspect, degree, rest[needed - 1]), position + needed


def opinion(clause: Clause, genre: str | None) -> float:
    """How much one clause says for the film: the adjective's worth times its degree.

    >>> opinion(Clause("", "", "very", "funny"), "comedy"), opinion(Clause("", "", "", "funny"), "western")
    (3.0, -1.0)
    """
    worth = QUALITIES.get(clause.adjective)
    if worth is None:
        worth = FITS if FITTING[clause.adjective] == genre else MISFITS
    return worth * DEGREES.get(clause.degree, 1.0)


def remark_reward(prompt: str, completion: str) -> float:
    """The reward of one completion: diminishing opinions minus the costs above.

    >>> remark_reward("This comedy about a shy baker", " was very funny.")
    3.0
    >>> remark_reward("This comedy about a shy baker", " was funny, but the plot was dull.")  # 2 − 0.7
    1.3
    """
    genre = next((word for word in _TOKEN.findall(prompt) if word in GENRES), None)
    remark = read_remark(completion)
    opinions = [opinion(clause, genre) for clause in remark.clauses]
    said = [clause.adjective for clause in remark.clauses]
    praised = [clause.aspect for clause in remark.clauses if clause.aspect]
    fresh = [value for i, value in enumerate(opinions) if said[i] not in said[:i]]
    repeats = len(said) - len(set(said)) + len(praised) - len(set(praised))
    very = sum(clause.degree == "very" for clause in remark.clauses)
    pairs = zip(remark.clauses[1:], opinions, opinions[1:], strict=False)
    wrong_links = sum(clause.link != "" and (clause.link == "but") == (a * b > 0) for clause, a, b in pairs)
    costs = (
        REPEATED_WORD * repeats
        + EXTRA_VERY * max(0, very - 1)
        + WRONG_LINK * wrong_links
        + UNPARSED * remark.unparsed
        + UNFINISHED * (not remark.finished)
        + IMPATIENCE * max(0, remark.words - PATIENCE)
    )
    return sum(DIMINISH**i * value for i, value in enumerate(fresh)) - costs


def reward(prompts: Sequence[Prompt], completions: Sequence[Sequence[str]]) -> list[list[float]]:
    """The oracle of the synthetic world as a scorer calls it: a reward for each completion of each prompt."""
    return [
        [remark_reward(_plain(prompt), text) for text in texts]
        for prompt, texts in zip(prompts, completions, strict=True)
    ]


def _plain(prompt: Prompt) -> str:
    return prompt if isinstance(prompt, str) else " ".join(message["content"] for message in prompt)
