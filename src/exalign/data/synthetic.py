"""The offline world of the demo: remarks about films, a tokenizer trained on them, and their exact reward.

The texts come from a small grammar with moods, so that a tiny model learns them in seconds, yet samples of one prompt
differ in what they are worth (see `synthetic_reward`). Everything is a pure function of the seed. The files are
those an ordinary user would bring: JSON lines and a tokenizer folder.
"""

from __future__ import annotations

import json
import random
from itertools import product
from pathlib import Path

from exalign.data.synthetic_reward import (
    ASPECTS,
    DEGREES,
    FITTING,
    GENRES,
    QUALITIES,
    VERBS,
    Clause,
    opinion,
    remark_reward,
    reward,
)
from exalign.data.vocabulary import build_tokenizer
from exalign.storage import atomic_path, write_text

__all__ = ["make_completion", "make_prompts", "remark_reward", "reward", "write_world"]

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
