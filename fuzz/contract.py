"""The contract of every reader, and the loop that tries to break it.

For any bytes whatever, a reader returns or raises an `InputError` of one bounded sentence. Anything else is a finding,
and so are an input that takes more than `SECONDS` and one that needs more than `MEGABYTES`: libFuzzer stops there and
writes the input to `fuzz/findings`.

    python -m fuzz.recipe -max_total_time=600     # more of libFuzzer's options: -help=1
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import atheris

from exalign.errors import InputError

SECONDS = 10
MEGABYTES = 6000
LONGEST = 1 << 14
LONGEST_SENTENCE = 3000


def holds(read: Callable[[bytes], object]) -> Callable[[bytes], None]:
    """`read` as a target: an `InputError` is a success if its sentence is one, everything else passes through."""

    def target(data: bytes) -> None:
        try:
            read(data)
        except InputError as error:
            sentence = str(error)
            assert sentence.strip() and len(sentence) < LONGEST_SENTENCE, f"not a sentence: {sentence[:200]!r}"

    return target


def fuzz(name: str, read: Callable[[bytes], object], seeds: Iterable[bytes]) -> None:
    """Fuzz until libFuzzer's options say to stop, starting from `seeds` and the corpus of earlier runs."""
    corpus, findings = (Path(__file__).parent / folder / name for folder in ("corpus", "findings"))
    for folder in (corpus, findings):
        folder.mkdir(parents=True, exist_ok=True)
    for number, seed in enumerate(seeds):
        (corpus / f"seed-{number:03d}").write_bytes(seed)
    limits = [f"-timeout={SECONDS}", f"-rss_limit_mb={MEGABYTES}", f"-max_len={LONGEST}", "-print_final_stats=1"]
    options = [sys.argv[0], *limits, f"-artifact_prefix={findings}/", *sys.argv[1:], str(corpus)]
    atheris.Setup(options, holds(read))
    atheris.Fuzz()
