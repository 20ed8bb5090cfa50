"""TRL's own DPO trainer on a recipe's model, pairs and settings: `python -m benchmarks.peers RECIPE METHOD OUT`.

TRL gets the pairs as the run reads them, as messages or text; templates, tokens, batches, loss and optimizer are its
own. Its settings are those of `align.METHOD`, by the names of docs/from-trl.md. The policies that it saves go beside
exalign's into one evaluation by `align.trl="{method: given, policies: [OUT/checkpoint-…, …]}"`, which is printed.
"""

from __future__ import annotations

import argparse
import math
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from datasets import Dataset
from transformers import AutoModelForCausalLM
from trl import DPOConfig, DPOTrainer

from exalign.data.record import Record
from exalign.data.store import read_records
from exalign.data.tokenization import TokenLimits, tokenize_record
from exalign.device import device
from exalign.errors import InputError
from exalign.methods.matching import Matching
from exalign.models.loading import load_tokenizer
from exalign.run.carry_out import run_recipe
from exalign.run.recipe import Recipe, load_recipe

LOSSES = {"forward_kl": "sigmoid", "reverse_kl": "exo_pair"}


def train(recipe: Recipe, name: str, out: Path, *, folder: Path | None = None, micro: int = 2) -> list[Path]:
    """Train what `align.NAME` trains with TRL's trainer and return the folders of its policies in their order."""
    settings = _comparable(recipe, name)
    if out.exists() and any(out.iterdir()):
        raise InputError(f"{out} is not empty; name another folder for TRL's policies.")
    micro = math.gcd(micro, settings.batch_prompts)
    source = str(recipe.model.source)
    run = run_recipe(recipe, "preferences", folder=folder)
    pairs = read_records(run.folder / "preferences" / "records")
    _check_whole(recipe, pairs)
    steps = settings.epochs * math.ceil(len(pairs) / settings.batch_prompts)
    options = DPOConfig(
        output_dir=str(out),
        loss_type=[LOSSES[settings.divergence]],
        beta=settings.beta_pi,
        label_smoothing=settings.epsilon,
        max_length=None,
        precompute_ref_log_probs=True,
        learning_rate=settings.learning_rate,
        adam_beta1=settings.adam_betas[0],
        adam_beta2=settings.adam_betas[1],
        weight_decay=settings.weight_decay,
        max_grad_norm=settings.max_grad_norm,
        lr_scheduler_type=settings.schedule,
        warmup_steps=math.ceil(settings.warmup_fraction * steps),
        num_train_epochs=settings.epochs,
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=settings.batch_prompts // micro,
        save_steps=math.ceil(steps / settings.save_policies),
        save_only_model=True,
        seed=recipe.seed,
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=device().type == "cpu",
        report_to=[],
    )
    trainer = DPOTrainer(
        model=AutoModelForCausalLM.from_pretrained(source, dtype="float32"),
        args=options,
        train_dataset=Dataset.from_list([_row(pair) for pair in pairs]),
        processing_class=load_tokenizer(source),
    )
    trainer.train()
    return sorted(out.glob("checkpoint-*"), key=lambda place: int(place.name.split("-")[1]))


def _comparable(recipe: Recipe, name: str) -> Matching:
    """The method's settings, if TRL has the same objective."""
    settings = recipe.align.get(name)
    if not isinstance(settings, Matching) or settings.target != "preference" or settings.divergence not in LOSSES:
        raise InputError(f"align.{name} is no DPO or EXO on preferences, which is what TRL's DPO trainer trains.")
    if recipe.temperature != 1.0:
        raise InputError(f"temperature is {recipe.temperature}, and TRL's log-probabilities are at 1: temperature=1.0")
    if recipe.model.source is None or recipe.model.lora is not None or recipe.sft is not None:
        raise InputError(
            "model must be a source, without lora and without an sft section: TRL trains all weights of it."
        )
    if settings.precision != "fp32" or settings.sweep is not None:
        raise InputError(f"align.{name} has a precision or a sweep that is not handed on to TRL; leave it out.")
    return settings


def _check_whole(recipe: Recipe, pairs: Sequence[Record]) -> None:
    """Refuse pairs of which TRL would see something else."""
    if any(pair.weight not in (None, 1.0) or pair.tools for pair in pairs):
        raise InputError("The pairs have weights or tools, which TRL's trainer is not given.")
    counts: Counter[str] = Counter()
    tokenizer = load_tokenizer(str(recipe.model.source))
    limits = TokenLimits(**recipe.data.model_dump(include={"max_prompt_tokens", "max_completion_tokens"}))
    for index, pair in enumerate(pairs):
        tokenize_record(pair, tokenizer, index=index, counts=counts, limits=limits)
    if cut := counts["prompts_cut"] + counts["completions_cut"]:
        raise InputError(
            f"{cut} texts are over data.max_prompt_tokens or data.max_completion_tokens; TRL cuts otherwise."
        )


def _row(pair: Record) -> dict[str, Any]:
    """TRL's row of a pair: messages where the prompt is messages, else text."""
    chat = not isinstance(pair.prompt, str)
    texts = [pair.completions[i].text for i in (pair.preferred or 0, 1 - (pair.preferred or 0))]
    answers = [[{"role": "assistant", "content": text}] if chat else text for text in texts]
    return {"prompt": list(pair.prompt) if chat else pair.prompt, "chosen": answers[0], "rejected": answers[1]}


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("recipe", type=Path)
    parser.add_argument("method", help="the name of exalign's method in align")
    parser.add_argument("out", type=Path)
    parser.add_argument("overrides", nargs="*", metavar="KEY=VALUE")
    parser.add_argument("--run", type=Path, default=None)
    given = parser.parse_args()
    places = train(load_recipe(given.recipe, given.overrides), given.method, given.out, folder=given.run)
    print(f'align.trl="{{method: given, policies: [{", ".join(str(place.absolute()) for place in places)}]}}"')
