"""What a person sees while a model trains: a bar on a terminal, elsewhere a line every so often."""

from __future__ import annotations

import time
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from exalign.terminal import escape_controls, shown

LINE_SECONDS = 30.0


class TrainingProgress:
    """A context that shows the rows of metrics it is given; `visible=False` shows nothing (all processes but one)."""

    def __init__(self, label: str, *, num_steps: int, done: int, visible: bool, console: Console | None = None) -> None:
        self.label = label
        self.num_steps = num_steps
        self.console = console or Console(stderr=True, quiet=not visible)
        self._last_line = 0.0
        columns = (
            TextColumn("{task.description}", markup=False),
            BarColumn(),
            MofNCompleteColumn(),
            TimeRemainingColumn(),
        )
        fields = TextColumn("[dim]{task.fields[numbers]}[/dim]")
        self._bar = Progress(*columns, fields, console=self.console, disable=not self.console.is_terminal)
        self._task = self._bar.add_task(escape_controls(label), total=num_steps, completed=done, numbers="")

    def __enter__(self) -> TrainingProgress:
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()

    def say(self, text: str) -> None:
        """Print one line beside the bar."""
        self.console.print(shown(text), soft_wrap=True)

    def update(self, row: dict[str, Any]) -> None:
        """Show the metrics of a finished step."""
        shown = [name for name in ("loss", "kl", "accuracy", "tokens_per_second") if row.get(name) is not None]
        numbers = "  ".join(f"{name.replace('_', ' ')} {row[name]:.4g}" for name in shown)
        self._bar.update(self._task, completed=row["step"], numbers=numbers)
        now = time.monotonic()
        last = row["step"] == self.num_steps
        if not self.console.is_terminal and (last or now - self._last_line >= LINE_SECONDS):
            self._last_line = now
            self.say(f"{self.label}: step {row['step']}/{self.num_steps}  {numbers}")
