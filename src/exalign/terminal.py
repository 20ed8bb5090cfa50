"""Texts of models, data sets and people on a terminal: shown as they are, never obeyed.

A text may hold escape sequences that move the cursor or open links, characters that turn the direction of what is
read, and brackets that rich takes for markup. Spelled out and handed over as `Text`, none of them has an effect.
"""

from __future__ import annotations

import time
import unicodedata

from rich.text import Text

_HIDDEN = ("Cc", "Cf", "Cs", "Co", "Cn", "Zl", "Zp")


def escape_controls(text: str) -> str:
    """`text` with control, format and line-separating characters spelled out, so that it cannot steer a terminal.

    >>> print(escape_controls("a\\n\\x1b[31mb\\u202e"))
    a\\n\\x1b[31mb\\u202e
    """
    if text.isascii() and text.isprintable():
        return text
    hidden = [character for character in set(text) if unicodedata.category(character) in _HIDDEN]
    return text.translate({ord(c): c.encode("unicode_escape").decode("ascii") for c in hidden})


LINE_SECONDS = 30.0
"""Between two lines about long work where there is no terminal for a bar."""


def time_left(begun: float, done: int, total: int) -> str:
    """How long the rest of work takes that began at `begun` (`time.monotonic`), if it goes on as it went.

    >>> time_left(time.monotonic() - 10, 1, 3), time_left(time.monotonic() - 60, 1, 5)
    (', about 20 s left', ', about 4 min left')
    """
    left = (time.monotonic() - begun) / done * (total - done)
    return f", about {left:.0f} s left" if left < 90 else f", about {left / 60:.0f} min left"


def shown(text: object, style: str = "") -> Text:
    """`text` on one line for `Console.print`, without markup, links, emoji codes or control characters.

    >>> shown("[red]x[/]\\x1b]8;;http://a\\x07").plain
    '[red]x[/]\\\\x1b]8;;http://a\\\\x07'
    """
    return Text(escape_controls(str(text)), style=style)
