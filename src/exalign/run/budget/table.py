"""A budget as tables for a terminal of 100 columns, and as values for JSON."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from rich.text import Text

from exalign.run.budget.assumptions import Assumptions
from exalign.run.budget.cost import Cost
from exalign.run.budget.devices import NODE
from exalign.run.budget.memory import Memory
from exalign.run.budget.stages import Budget
from exalign.terminal import shown

_FITS = {"yes": "[green]yes[/]", "sharded": "[yellow]sharded[/]", "no": "[bold red]no[/]"}


def print_budget(budget: Budget, console: Console) -> None:
    """Work and hours, memory by what it is for, the totals, and every assumption."""
    machine = budget.machine
    about = f" on {machine.count} × {machine.device.name}. Nothing here was measured: every number follows from the "
    about += "recipe, formulas and the assumptions below."
    console.print(Text.assemble(shown(budget.recipe.name, "bold"), about))
    for table in (work_table(budget), memory_table(budget)):
        console.print()
        console.print(table)
    console.print()
    console.print("[bold]Assumed[/]")
    for sentence in assumptions(budget):
        console.print(Text.assemble("  • ", shown(sentence)))


def work_table(budget: Budget) -> Table:
    """A row for each stage, and the totals of stages that follow one another."""
    table = _table("Work")
    for name in ("stage", "parameters", "trained", "devices", "tokens", "PFLOP", "time", "bound by", "GB out"):
        _column(table, name, left=name in ("stage", "bound by"))
    for cost in budget.costs:
        table.add_row(
            shown(cost.stage),
            quantity(cost.parameters),
            quantity(cost.trained) if cost.trained else "–",
            str(cost.devices),
            quantity(cost.tokens),
            _petaflop(cost.flops),
            duration(cost.seconds),
            cost.bound,
            _gigabytes(cost.stored),
        )
    table.add_section()
    done = (quantity(budget.tokens), _petaflop(budget.flops), duration(budget.seconds), "", _gigabytes(budget.stored))
    table.add_row("all", "", "", "", *done)
    return table


def memory_table(budget: Budget) -> Table:
    """GB on one device where everything is replicated; the last columns: in all, under a full shard, and what fits."""
    table = _table(f"Memory of one device, GB; {budget.machine.usable / 1e9:,.1f} are usable")
    names = ("stage", "weights", "grads", "AdamW", "copies", "activ.", "cache", "exch.", "in all", "sharded", "fits")
    for name in names:
        _column(table, name, left=name == "stage")
    for cost in budget.costs:
        memory = cost.replicated
        parts = (memory.weights, memory.gradients, memory.optimizer, memory.copies, memory.activations, memory.cache)
        sizes = [_gigabytes(part) for part in (*parts, memory.exchange)]
        spread = _gigabytes(cost.sharded.total) if cost.sharded is not None else "–"
        fits = _FITS[cost.fits(budget.machine.usable)]
        table.add_row(shown(cost.stage), *sizes, f"[bold]{_gigabytes(memory.total)}[/]", spread, fits)
    return table


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", title_style="bold", box=SIMPLE_HEAD, padding=(0, 0))


def _column(table: Table, name: str, *, left: bool) -> None:
    table.add_column(name, justify="left" if left else "right", no_wrap=True)


def assumptions(budget: Budget) -> list[str]:
    """Every assumption as a sentence: the device's specification, the shares, the lengths, the data and the models."""
    machine, assumed = budget.machine, budget.machine.assumed
    device = machine.device
    lengths = [
        f"mean prompt {assumed.prompt_tokens or 'half the longest, or data.*.prompt_tokens where set'}",
        f"mean completion {assumed.completion_tokens or 'half the longest'}",
    ]
    return [
        f"{device.name}: {device.memory / 1e9:,.0f} GB, {device.bandwidth / 1e9:,.0f} GB/s, dense products "
        f"{device.bf16 / 1e12:,.3g} TFLOP/s in bf16 and {device.fp32 / 1e12:,.3g} in fp32, link "
        f"{device.link / 1e9:,.0f} GB/s one way ({device.specification})",
        f"{assumed.training_share:.0%} of that rate for necessary work without decoding (--training-share), "
        f"{assumed.bandwidth_share:.0%} of the bandwidth (--bandwidth-share), "
        f"{assumed.memory_share:.0%} of the memory (--memory-share)",
        f"sampling starts its operations one by one, {assumed.launch:g} µs each (--launch): 12 + 22 for each running "
        "group, in every layer, at every step",
        f"nodes of {NODE}; beyond one, {assumed.network:g} GB/s from each device to others (--network); nothing of "
        "an exchange is hidden behind products",
        f"tokens: {'; '.join(lengths)} (--prompt-tokens, --completion-tokens). Memory is for the longest",
        "bound by: operations of the devices, a batch with fewer micro-batches than devices, the exchange of "
        "gradients, AdamW's update, the memory's bandwidth, launches of small operations, or search, which has done it",
        "sampling, scores and references: prompts are dealt out to the devices; PPO: one device",
        "sharded: a full shard in the manner of FSDP2, taken for the time only where replicas do not fit",
        *budget.said,
    ]


def as_values(budget: Budget) -> dict[str, Any]:
    """The budget as plain values: seconds, bytes, operations."""
    machine = budget.machine
    return {
        "recipe": budget.recipe.name,
        "device": asdict(machine.device),
        "count": machine.count,
        "assumed": Assumptions.model_dump(machine.assumed),
        "said": assumptions(budget),
        "usable_bytes": machine.usable,
        "stages": [_values(cost, machine.usable) for cost in budget.costs],
        "total": {
            "tokens": budget.tokens,
            "flops": budget.flops,
            "seconds": budget.seconds,
            "stored": budget.stored,
        },
    }


def _values(cost: Cost, usable: float) -> dict[str, Any]:
    def memory(of: Memory | None) -> dict[str, float] | None:
        return None if of is None else {**asdict(of), "total": of.total}

    return {
        **asdict(cost),
        "replicated": memory(cost.replicated),
        "sharded": memory(cost.sharded),
        "fits": cost.fits(usable),
    }


def quantity(number: float) -> str:
    """A count in at most five characters.

    >>> quantity(950), quantity(124_439_808), quantity(7_615_616_512), quantity(4e13)
    ('950', '124M', '7.62B', '40T')
    """
    for size, letter in ((1e12, "T"), (1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g}{letter}"
    return f"{number:g}"


def duration(seconds: float) -> str:
    """Hours, below one hour minutes, below one minute seconds.

    >>> duration(7.25), duration(150), duration(5400), duration(3.6e6)
    ('7.2 s', '2.5 min', '1.5 h', '1,000 h')
    """
    if seconds < 60:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    if seconds < 3600:
        return f"{seconds / 60:.2g} min" if seconds < 600 else f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h" if seconds < 360_000 else f"{seconds / 3600:,.0f} h"


def _gigabytes(size: float) -> str:
    """One decimal below 1,000; a dash for nothing."""
    gigabytes = size / 1e9
    return "–" if not size else "<0.1" if gigabytes < 0.05 else f"{gigabytes:,.{1 if gigabytes < 1000 else 0}f}"


def _petaflop(flops: float) -> str:
    petaflop = flops / 1e15
    return "<0.01" if petaflop < 0.01 else f"{petaflop:.3g}" if petaflop < 1000 else f"{petaflop:,.0f}"
