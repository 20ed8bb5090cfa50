"""Numbers and texts as a person reads them."""

from __future__ import annotations

import math
import re
from typing import Any

from exalign.evaluation.schema import Interval

_CONTROLS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200b-\u200f\u2028-\u202e\u2060-\u2069\ufeff\ufff9-\ufffb]")


def visible(text: str) -> str:
    """Control characters and those that reorder or hide text, made visible; line breaks and tabs stay.

    >>> visible("a\\x00b\\u202ec")
    'a␀b[U+202E]c'
    """
    text = text.replace("\r\n", "\n")

    def name(match: re.Match[str]) -> str:
        code = ord(match[0])
        return chr(0x2400 + code) if code < 0x20 else "␡" if code == 0x7F else f"[U+{code:04X}]"

    return _CONTROLS.sub(name, text)


def number(value: float | None, digits: int = 3) -> str:
    """A number with about `digits` significant digits and a true minus; – where there is none.

    >>> number(12.345), number(-0.01234), number(1234567.0), number(0.0), number(None)
    ('12.3', '−0.0123', '1,234,567', '0', '–')
    """
    if value is None:
        return "–"
    if value == 0:
        return "0"
    magnitude = math.floor(math.log10(abs(value)))
    if magnitude < -4:
        text = f"{value:.{digits - 1}e}"
    else:
        text = f"{value:,.{max(0, digits - 1 - magnitude)}f}"
    return text.replace("-", "−")


def decimals(interval: Interval) -> int:
    """Decimals that suit the interval's width: 2 for a width between 0.07 and 0.7, and so on; at most 4."""
    if interval.low is None or interval.high is None or interval.high <= interval.low:
        return 2
    return min(4, max(0, 1 - math.floor(math.log10(1.5 * (interval.high - interval.low)))))


def interval(value: Interval | None) -> str:
    """An estimate with its interval, which a line break never splits.

    >>> interval(Interval(1.234, 1.1, 1.3, 10)), interval(Interval(1.234, None, None, 1)), interval(None)
    ('1.23 [1.10,\xa01.30]', '1.23', '–')
    """
    if value is None:
        return "–"
    places = decimals(value)
    texts = [f"{x:.{places}f}".replace("-", "−") for x in (value.estimate, value.low, value.high) if x is not None]
    return texts[0] if len(texts) < 3 else f"{texts[0]} [{texts[1]},\N{NO-BREAK SPACE}{texts[2]}]"


def percent(value: Interval | None) -> str:
    """A share with its interval, in per cent, cut to what a share can be: widened for few prompts, it can reach beyond.

    >>> percent(Interval(0.5, 0.45, 0.55, 10)), percent(Interval(0.01, -0.002, 0.02, 200))
    ('50\xa0% [45,\xa055]', '1\xa0% [0,\xa02]')
    """
    if value is None:
        return "–"
    text = f"{100 * value.estimate:.0f}\N{NO-BREAK SPACE}%"
    if value.low is None or value.high is None:
        return text
    low, high = within_a_share(value.low), within_a_share(value.high)
    return f"{text} [{100 * low:.0f},\N{NO-BREAK SPACE}{100 * high:.0f}]"


def within_a_share(bound: float) -> float:
    """`bound` cut to [0, 1]."""
    return min(1.0, max(0.0, bound))


def duration(seconds: float | None) -> str:
    """Wall time.

    >>> duration(4.21), duration(75), duration(7500), duration(None)
    ('4.2 s', '1 min 15 s', '2 h 5 min', '–')
    """
    if seconds is None:
        return "–"
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes} min {rest} s" if minutes < 60 else f"{minutes // 60} h {minutes % 60} min"


def setting(value: Any) -> str:
    """The value of a setting, a number as `number` writes it.

    >>> setting(1e-5), setting(64), setting(None), setting("linear")
    ('1.00e−05', '64', 'none', 'linear')
    """
    if isinstance(value, float):
        return number(value)
    return "none" if value is None else str(value)


def words(key: str) -> str:
    """A snake_case key as words."""
    return key.replace("_", " ")
