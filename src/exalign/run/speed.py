"""How fast a stage went: tokens per second, and the share of this machine's matrix-product peak that it reached.

Necessary work counts each prompt once, no padding, and the head on completion tokens only (`models.flops`).
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import nn

from exalign.data.batching import Group
from exalign.models.flops import matmul_peak, training_flops
from exalign.processes import leads, number
from exalign.run.runner import Run
from exalign.storage import read_sealed, write_sealed
from exalign.training.settings import TrainSettings


def record_training_speed(
    run: Run, folder: Path, model: nn.Module, groups: Sequence[Group], settings: TrainSettings
) -> None:
    """Write how fast the steps in `folder`/metrics.jsonl were to `folder`/speed.json, and say it.

    Of several processes the first does so; the peak is then its own, times their number.
    """
    if not leads():
        return
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
    peak = matmul_peak(model, dtype=torch.bfloat16 if settings.precision == "bf16" else None) * number()
    work = training_flops(model, groups) * settings.epochs
    record_speed(folder, sum(row["tokens"] for row in rows), sum(row["seconds"] for row in rows), work, peak)
    say_speed(run, folder)


def say_speed(run: Run, folder: Path) -> None:
    """Print what `folder`/speed.json holds, where there is one."""
    if (folder / "speed.json").exists():
        speed = read_sealed(folder / "speed.json")
        run.console.print(
            f"  [dim]{speed['tokens_per_second']:,.0f} tokens/s; necessary work at {speed['share_of_peak']:.0%} "
            "of this machine's matrix-product peak[/dim]",
            highlight=False,
        )


def record_speed(folder: Path, tokens: int, seconds: float, work: float, peak: float) -> None:
    """Write `folder`/speed.json: `work` in operations, `peak` in operations per second."""
    speed = {"tokens_per_second": tokens / seconds, "share_of_peak": work / seconds / peak, "peak_flops": peak}
    write_sealed(folder / "speed.json", speed)
