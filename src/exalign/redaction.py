"""Credentials that stand in an address, blotted out before the address is printed or kept."""

from __future__ import annotations

import re
from typing import Any

REDACTED = "[redacted]"
# One slash too, since `pathlib` folds `https://` to `https:/`.
_USER = re.compile(r"\b([a-z][a-z0-9+.-]*:/{1,2})[^\s/?#]+@", re.IGNORECASE)
_PARAMETER = re.compile(
    r"([?&;](?:[\w-]*(?:key|token|secret|password|signature|credential)|sig|auth)=)[^\s&;#'\"]+", re.IGNORECASE
)


def redact(text: str) -> str:
    """`text` without the user and password of any web or database address in it, and without keys in its query.

    >>> redact("no file https://ann:pa55@example.org/a.jsonl?api_key=s3cret&page=2, see https://example.org/@ann")
    'no file https://[redacted]@example.org/a.jsonl?api_key=[redacted]&page=2, see https://example.org/@ann'
    """
    return _PARAMETER.sub(rf"\g<1>{REDACTED}", _USER.sub(rf"\g<1>{REDACTED}@", text))


def redact_values(values: Any) -> Any:
    """The same for every text in nested mappings and lists, keys included."""
    if isinstance(values, str):
        return redact(values)
    if isinstance(values, dict):
        return {redact_values(key): redact_values(value) for key, value in values.items()}
    if isinstance(values, list | tuple):
        return [redact_values(value) for value in values]
    return values
