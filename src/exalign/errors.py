"""What is raised when the input, not the program, is wrong."""

from __future__ import annotations

from exalign.redaction import redact


class InputError(Exception):
    """One clear sentence for a person: what is wrong, where (file, row, setting), and what to do.

    The command line prints it without a traceback and exits with status 2. Credentials in an address that the sentence
    quotes are blotted out here, so that no message can forget it.
    """

    def __init__(self, sentence: str) -> None:
        super().__init__(redact(sentence))


def first_line(error: BaseException) -> str:
    """What a library's error says, as far as its first line, and the next where that only announces it."""
    first, *more = (str(error).strip() or type(error).__name__).splitlines()
    return f"{first} {more[0].strip()}" if first.endswith(":") and more else first
