"""The tables of docs/reliability.md, from what `python -m faults` wrote; no number there is written by hand."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

DOCUMENT = Path(__file__).parents[2] / "docs" / "reliability.md"


def render(document: str, results: dict[str, Any]) -> str:
    """The document with what stands between `<!-- NAME -->` and `<!-- /NAME -->` made anew, where there are results."""

    def fill(match: re.Match[str]) -> str:
        name = match.group(1)
        table = TABLES[name](results)
        return f"<!-- {name} -->\n{table}\n<!-- /{name} -->" if table else match.group(0)

    return re.sub(r"<!-- (faults-\w+) -->\n.*?<!-- /\1 -->", fill, document, flags=re.DOTALL)


def kills(results: dict[str, Any]) -> str:
    rows = [
        [
            done["stage"],
            done["moments"],
            done["hits"],
            done["in_a_write"],
            done["restarts"],
            done["runs"],
            len(done["changed"]) + len(done["failures"]),
            f"{done['seconds'] / 60:.1f}",
        ]
        for done in results.get("kills", [])
    ]
    titles = "stage|moments tried|hit at work|of these in a write|restarts|runs|lost or changed artefacts|minutes"
    return _table(titles, rows)


def damage(results: dict[str, Any]) -> str:
    rows = []
    for run in dict.fromkeys(one["run"] for one in results.get("damage", [])):
        found = [one for one in results["damage"] if one["run"] == run]
        counts = Counter("named" if one["named"] else "mended" if one["mended"] else "silent" for one in found)
        files = len({one["file"] for one in found})
        rows.append([run, files, *(counts[name] for name in ("named", "mended", "silent"))])
    return _table("run|files|one sentence that names it|same artefacts in the end|anything else", rows)


def endpoint(results: dict[str, Any]) -> str:
    one = results.get("endpoint")
    if not one:
        return ""
    row = [f"{one['seconds']:g}", one["questions"], one["answered"], len(one["under_way"]), len(one["repeated"])]
    return _table("seconds away|questions|answered|under way when it left|asked twice", [row])


def _table(titles: str, rows: Iterable[Iterable[object]]) -> str:
    lines = [f"| {' | '.join(str(cell) for cell in row)} |" for row in rows]
    names = titles.split("|")
    return "\n".join([f"| {' | '.join(names)} |", "|" + "---|" * len(names), *lines]) if lines else ""


TABLES = {"faults-kills": kills, "faults-damage": damage, "faults-endpoint": endpoint}
