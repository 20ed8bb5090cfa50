"""The offline world of the demo: remarks about films, a tokenizer trained on them, and their exact reward.

The texts come from a small grammar with moods, so that a tiny model learns them in seconds, yet samples of one prompt
differ in what they are worth. A remark is read clause by clause with the same grammar; what does not parse counts
against it. No single word can be repeated for profit, long remarks tire, and a word that praises a comedy does not
praise a documentary, so the best continuation depends on the prompt and lies well inside what a supervised model can
say. Everything is a pure function of the seed. The files are those an ordinary user would bring: JSON lines and a
tokenizer folder.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import NamedTuple

from exalign.data.record import Prompt
from exalign.data.tokenization import build_tokenizer
from exalign.storage import atomic_path, write_text

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
_LINKS = {". The": "", ", and the": "and", ", but the": "but"}


def _any(words: Iterable[str]) -> str:
    return "|".join(map(re.escape, words))


_CLAUSE = re.compile(
    rf"(?:^|(?<= )({_any(_LINKS)}) ({_any(ASPECTS)}) )(?:{_any(VERBS)}) "
    rf"(?:({_any(DEGREES)}) )?({_any([*QUALITIES, *FITTING])})(?!\S)"
)
"""A clause among words and signs with spaces between: at the start of a remark, or after a link and with an aspect."""


def read_remark(text: str) -> Remark:
    """Read a completion from left to right; where no clause begins, one word or sign is passed over.

    >>> read_remark(" was very funny, but the music felt dull.").clauses[1]
    Clause(link='but', aspect='music', degree='', adjective='dull')
    """
    tokens = _TOKEN.findall(text)
    words = sum(token[0].isalnum() for token in tokens)
    finished = tokens[-1:] == ["."]
    tokens = tokens[:-1] if finished else tokens
    found = list(_CLAUSE.finditer(" ".join(tokens)))
    clauses = tuple(Clause(_LINKS.get(match[1], ""), *(part or "" for part in match.groups()[1:])) for match in found)
    return Remark(clauses, words, len(tokens) - sum(len(match[0].split()) for match in found), finished)


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


_OPENINGS = ("This", "That", "The new", "The old")
_TRAITS = ("shy", "brave", "lonely", "famous", "clumsy", "patient", "young", "retired")
_ROLES = (
    "baker", "sailor", "teacher", "painter", "farmer", "doctor", "pilot", "singer", "tailor", "judge", "miner", "clown",
)  # fmt: skip
_NUM_CLAUSES = (1, 2, 2, 3, 3, 4, 5)
"""How many opinions a remark has, drawn from these."""
_FITTING_SHARE, _IN_MOOD = 0.2, 0.75


def make_prompts(seed: int) -> list[str]:
    """All 2,304 beginnings of remarks, shuffled: `The new comedy about a lonely baker`.

    >>> len(make_prompts(0)), len(set(make_prompts(0)))
    (2304, 2304)
    """
    parts = product(_OPENINGS, GENRES, _TRAITS, _ROLES)
    prompts = [f"{opening} {genre} about a {trait} {role}" for opening, genre, trait, role in parts]
    random.Random(f"prompts {seed}").shuffle(prompts)
    return prompts


def make_completion(prompt: str, rng: random.Random) -> str:
    """A remark that continues `prompt`: one to five opinions in one mood, most of them, with fitting links.

    >>> make_completion("This comedy about a shy baker", random.Random(3)).endswith(".")
    True
    """
    genre = next(word for word in prompt.split() if word in GENRES)
    mood = rng.choice((-1, 1))
    text, last = "", 0.0
    for number in range(rng.choice(_NUM_CLAUSES)):
        degree = rng.choice(("", "", "", *DEGREES))
        clause = Clause("", rng.choice(ASPECTS) if number else "", degree, _adjective(genre, mood, rng))
        value = opinion(clause, genre)
        if number:
            text += _link(same_sign=value * last > 0, rng=rng) + f" {clause.aspect}"
        text += " " + " ".join(word for word in (rng.choice(VERBS), degree, clause.adjective) if word)
        last = value
    return text + "."


def _adjective(genre: str, mood: int, rng: random.Random) -> str:
    if rng.random() < _FITTING_SHARE:
        own = next(word for word, of in FITTING.items() if of == genre)
        return own if rng.random() < 0.5 else rng.choice(list(FITTING))
    sign = mood if rng.random() < _IN_MOOD else -mood
    return rng.choice([word for word, worth in QUALITIES.items() if worth * sign > 0])


def _link(*, same_sign: bool, rng: random.Random) -> str:
    if rng.random() < 0.4:
        return ". The"
    natural = rng.random() < 0.9
    return ", and the" if same_sign == natural else ", but the"


def write_world(
    folder: Path, *, seed: int = 0, num_sft: int = 4000, num_prompts: int = 1024, num_test: int = 256
) -> None:
    """Write `sft.jsonl` (prompt, completion), `prompts.jsonl` (prompt), `test.jsonl` and `tokenizer/` below `folder`.

    `test.jsonl` has prompt and completion (the reference text) of prompts that occur nowhere else; SFT rows and
    `prompts.jsonl` draw from the others. Raises `ValueError` if more prompts are asked for than there are.
    """
    prompts = make_prompts(seed)
    if min(num_sft, num_prompts, num_test) < 1 or num_prompts + num_test > len(prompts):
        raise ValueError(f"num_prompts + num_test must be at most {len(prompts)}, and every number at least 1")
    test, rest = prompts[:num_test], prompts[num_test:]
    rng = random.Random(f"texts {seed}")
    sft = [{"prompt": p, "completion": make_completion(p, rng)} for p in (rng.choice(rest) for _ in range(num_sft))]
    folder = Path(folder)
    _write_rows(folder / "sft.jsonl", sft)
    _write_rows(folder / "prompts.jsonl", [{"prompt": p} for p in rest[:num_prompts]])
    _write_rows(folder / "test.jsonl", [{"prompt": p, "completion": make_completion(p, rng)} for p in test])
    tokenizer = build_tokenizer(row["prompt"] + row["completion"] for row in sft)
    with atomic_path(folder / "tokenizer") as temporary:
        tokenizer.save_pretrained(temporary)


def _write_rows(path: Path, rows: list[dict[str, str]]) -> None:
    write_text(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
