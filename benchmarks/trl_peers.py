"""TRL's own trainer as a contender: its collator, its fused head, its loss, its metrics, its optimizer.

Pairs go through `DPOTrainer.compute_loss` as it is, `loss_type="exo_pair"`. More than two completions, which TRL does
not offer, go through the same machinery (collator, forward with the fused head and the outputs that its metrics need)
with K rows per prompt. Nothing of TRL is changed but what the names below say.
"""

from __future__ import annotations

import logging
import os
import tempfile
from collections.abc import Sequence
from typing import Any

import torch
import trl.trainer.utils as trl_utils
from accelerate.state import AcceleratorState
from datasets import Dataset
from torch import Tensor
from trl import DPOConfig, DPOTrainer
from trl.trainer.utils import pad

from benchmarks.contenders import ADAM_BETAS, LEARNING_RATE, copy_of, exo_loss
from benchmarks.workload import BETA_PI, EPSILON, make_tokenizer
from exalign.data.batching import Group
from exalign.device import device

logging.getLogger("trl").setLevel(logging.ERROR)
BEST_OPTIONS: dict[str, Any] = {"bf16": False, "gradient_checkpointing": False}
DEFAULTS: dict[str, Any] = {}


class TokenisedTrainer(DPOTrainer):
    """The trainer on ids that are given, so that every contender sees the same tokens."""

    def _prepare_dataset(self, dataset: Dataset, *_: Any, **__: Any) -> Dataset:
        return dataset

    def _precompute_ref_logps(self, dataset: Dataset, *_: Any) -> Dataset:
        return dataset  # the reference log-probs are in the data already

    def _send_telemetry(self) -> None:
        pass


class GroupTrainer(TokenisedTrainer):
    """The trainer's machinery for K rows per prompt, in the order of its own batches: all first ones, all second, …"""

    def _compute_loss(self, model: Any, inputs: dict[str, Any], return_outputs: bool) -> Tensor:
        groups = inputs.pop("groups")
        reference = inputs.pop("reference_logp", None)
        given = {name: inputs[name] for name in ("input_ids", "attention_mask")} | {"use_cache": False}
        labels = inputs["input_ids"].masked_fill(inputs["completion_mask"] == 0, -100)
        outputs = model(**given, labels=labels, fused_lm_head=True)
        if reference is None:
            with torch.no_grad():
                found = self.ref_model(**given, labels=labels, fused_lm_head=True).log_probs.sum(1)
            reference = found.view(-1, len(groups)).t()
        logp = outputs.log_probs.sum(1).view(-1, len(groups)).t()
        predicted = inputs["completion_mask"][:, 1:]
        self._metrics["train"]["entropy"].append(float((outputs.entropy.detach() * predicted).sum() / predicted.sum()))
        self._metrics["train"]["logits"].append(float((outputs.mean_logits * predicted).sum() / predicted.sum()))
        self._metrics["train"]["top1"].append(float((outputs.is_top1 & predicted.bool()).sum() / predicted.sum()))
        return exo_loss(logp, reference, groups).mean()


class TrlStep:
    """One optimizer step of the trainer, driven through `training_step` micro-batch by micro-batch.

    `live_reference` keeps the second model that its defaults keep; else the reference log-probs come with the data, as
    after its own precomputation. `completions_only` takes the branch of its fused head that its GPU path takes: only
    positions that predict completion tokens go through the head. `by_length` forms micro-batches of similar length.
    """

    unit = "prompts"

    def __init__(
        self,
        label: str,
        model: Any,
        groups: Sequence[Group],
        options: dict[str, Any],
        *,
        live_reference: Any = None,
        completions_only: bool = False,
        by_length: bool = True,
    ) -> None:
        self.label, self.precision = label, "fp32" if options.get("bf16") is False else "bf16"
        self.completions_only, self.by_length = completions_only, by_length
        self.pairs = groups[0].num_completions == 2
        rows = groups[0].num_completions
        self.sizes = tuple(m for m in (1, 2, 4) if m == 1 or m * rows <= 8)
        self._folder = tempfile.TemporaryDirectory()
        AcceleratorState._reset_state()
        os.environ.pop("ACCELERATE_MIXED_PRECISION", None)
        settings = DPOConfig(
            output_dir=self._folder.name,
            use_cpu=device().type == "cpu",
            report_to=[],
            loss_type=["exo_pair"],
            label_smoothing=EPSILON,
            beta=BETA_PI,
            learning_rate=LEARNING_RATE,
            adam_beta1=ADAM_BETAS[0],
            adam_beta2=ADAM_BETAS[1],
            max_length=None,
            precompute_ref_log_probs=live_reference is None,
            **options,
        )
        data = Dataset.from_list([_example(group) for group in groups])
        self.trainer = (TokenisedTrainer if self.pairs else GroupTrainer)(
            model=copy_of(model),
            ref_model=live_reference,
            args=settings,
            train_dataset=data,
            processing_class=make_tokenizer(model.config.vocab_size - 1),
        )
        self._start()

    def _start(self) -> None:
        """What `Trainer.train` does before its first step."""
        trainer = self.trainer
        if trainer.args.gradient_checkpointing:
            trainer.model.activation_checkpointing_enable(trainer.args.gradient_checkpointing_kwargs)
        trainer.create_optimizer()
        self.model, trainer.optimizer = trainer.accelerator.prepare(trainer.model, trainer.optimizer)
        trainer.model_wrapped = self.model

    def gradient(self, groups: Sequence[Group], micro: int) -> float:
        trainer = self.trainer
        order = sorted(groups, key=_longest_row) if self.by_length else list(groups)
        parts = [order[begin : begin + micro] for begin in range(0, len(order), micro)]
        use_triton = trl_utils._use_triton
        if self.completions_only:  # read only where the head chooses the positions; the arithmetic stays torch's
            trl_utils._use_triton = lambda device: True
        try:
            losses = []
            for part in parts:
                trainer.current_gradient_accumulation_steps = len(groups) / len(part)  # a shorter last part counts less
                losses.append(float(trainer.training_step(self.model, self._batch(part))))
        finally:
            trl_utils._use_triton = use_triton
        return sum(losses)

    def update(self) -> None:
        trainer = self.trainer
        trainer.accelerator.clip_grad_norm_(self.model.parameters(), trainer.args.max_grad_norm)
        trainer.optimizer.step()
        self.model.zero_grad()

    def _batch(self, part: Sequence[Group]) -> dict[str, Any]:
        if self.pairs:
            batch = self.trainer.data_collator([_example(group) for group in part])
            if not self.trainer.precompute_ref_logps:
                batch = {name: value for name, value in batch.items() if not name.startswith("ref_")}
            return batch
        return group_batch(part, with_reference=self.trainer.precompute_ref_logps)


def group_batch(part: Sequence[Group], *, with_reference: bool) -> dict[str, Any]:
    """TRL's batch for K rows per prompt: padded to the longest row of the batch, on the right."""
    k = part[0].num_completions
    rows = [(group.prompt_ids, group.completion_ids[i]) for i in range(k) for group in part]
    tokens = [torch.cat(row) for row in rows]
    batch: dict[str, Any] = {
        "input_ids": pad(tokens, padding_value=0, padding_side="right"),
        "attention_mask": pad([torch.ones_like(row) for row in tokens], padding_value=0, padding_side="right"),
        "completion_mask": pad(
            [torch.cat([torch.zeros_like(prompt), torch.ones_like(ids)]) for prompt, ids in rows],
            padding_value=0,
            padding_side="right",
        ),
        "groups": list(part),
    }
    if with_reference:
        batch["reference_logp"] = torch.stack([g.reference_logp for g in part if g.reference_logp is not None])
    return batch


def _longest_row(group: Group) -> int:
    return len(group.prompt_ids) + max(map(len, group.completion_ids))


def _example(group: Group) -> dict[str, Any]:
    """A row of TRL's tokenised data: the first two completions, the first of them chosen."""
    assert group.reference_logp is not None
    example: dict[str, Any] = {"prompt_ids": group.prompt_ids.tolist()}
    for i, name in enumerate(("chosen", "rejected")):
        example[f"{name}_ids"] = group.completion_ids[i].tolist()
        example[f"ref_{name}_logps"] = float(group.reference_logp[i])
    return example
