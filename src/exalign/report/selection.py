"""The selected checkpoints as a person reads them in the terminal."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from rich.table import Table

from exalign.evaluation.schema import Interval
from exalign.evaluation.selection import Selected
from exalign.terminal import shown


def selection_table(selected: Sequence[Selected], run: Path) -> Table:
    """For the terminal; a model that is no longer in the run is said to be gone."""
    table = Table(box=None, pad_edge=False, padding=(0, 1, 0, 0))
    for name in ("method", "KL (nats)", "reward", "model in the run"):
        table.add_column(name, justify="left" if name.startswith("m") else "right", overflow="fold")
    for row in selected:
        place = shown(str(row.folder) if (run / row.folder).is_dir() else f"{row.folder} (gone)")
        kl, reward = _text(row.point.kl), _text(row.point.reward)
        table.add_row(shown(row.method), kl, reward, place)
    return table


def _text(interval: Interval) -> str:
    if interval.low is None or interval.high is None:
        return f"{interval.estimate:.2f}"
    return f"{interval.estimate:.2f} [{interval.low:.2f}, {interval.high:.2f}]"
