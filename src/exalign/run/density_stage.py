"""The stages evaluation/density/METHOD: π_sft's own samples under each final policy, for density ratios."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path

from exalign.data.store import read_header, read_records, write_records
from exalign.run.on_demand import sampled_logprobs, with_reference_logprobs
from exalign.run.recipe import Recipe
from exalign.run.runner import Run, Stage
from exalign.run.sources import (
    load_frozen_policy,
    load_run_tokenizer,
    load_supervised,
    ready,
    supervised_needs,
)


def density_stages(recipe: Recipe) -> Iterator[Stage]:
    """A stage for every method, where some prompts have a pool: a method that is added later changes no other's."""
    prompts = min(recipe.evaluate.density_prompts, recipe.evaluate.pool_prompts)
    if not prompts:
        return
    for method in recipe.methods:
        needs = (*supervised_needs(recipe), "evaluation/pool", f"align/{method}")
        work = partial(_density, method=method, prompts=prompts)
        yield Stage(f"evaluation/density/{method}", needs, lambda: prompts, work)


def _density(run: Run, folder: Path, counts: Counter[str], *, method: str, prompts: int) -> None:
    """log π_θ (as `logprob`) and log π_sft of the pool's samples, one after the other through the same code path."""
    tokenizer = load_run_tokenizer(run)
    pool = read_records(run.path("evaluation", "pool"))[:prompts]
    supervised = ready(load_supervised(run, tokenizer))
    records = with_reference_logprobs(pool, sampled_logprobs(run, supervised, tokenizer, pool))
    policy = load_frozen_policy(run.path("align", method, "model"), run, tokenizer)
    logps = sampled_logprobs(run, policy, tokenizer, pool)
    done = [
        replace(
            record,
            completions=tuple(
                replace(completion, logprob=value) for completion, value in zip(record.completions, row, strict=True)
            ),
        )
        for record, row in zip(records, logps, strict=True)
    ]
    write_records(folder / "samples", done, replace(read_header(run.path("evaluation", "pool")), counts={}))
    counts["samples"] = sum(len(record.completions) for record in done)
