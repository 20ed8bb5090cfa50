"""What the settings of other trainers are called here, for `exalign recipe --explain` and for messages about them."""

from __future__ import annotations

from typing import Any

from exalign.methods.method import available

_DPO, _EXO = "divergence: forward_kl, target: preference", "divergence: reverse_kl, target: preference"

SETTINGS = {
    "model_name_or_path base_model": "model.source",
    "use_peft finetuning_type": "model.lora: {rank: 16}; without it all weights are trained",
    "lora_r lora_rank r": "model.lora.rank",
    "lora_alpha": "model.lora.alpha",
    "lora_target lora_target_modules target_modules": "model.lora.targets",
    "use_dora": "model.lora.dora",
    "merge_lora": "model.lora.save: merged, or adapter for the adapter alone",
    "adapter_name_or_path": "model.source, a whole model or an adapter, which is merged into its base",
    "lora_dropout": "none: dropout is 0 everywhere, or log-ratios would not be 0 before the first step",
    "load_in_4bit load_in_8bit quantization_bit": "model.source, stored in 4 bits, with model.lora: {save: adapter}",
    "model_init_kwargs torch_dtype": "model.dtype, and model.trust_remote_code",
    "attn_implementation": "none: one attention shares a prompt among its completions, where the model allows it",
    "ref_model": "none: the reference is the model that alignment starts from, and is computed once",
    "precompute_ref_log_probs": "none: on given samples they are computed once, before training",
    "template": "none: the chat template of the tokenizer, and tokenizer.chat_template_kwargs",
    "dataset dataset_name train_file": "data.preferences.source; or that of data.sft, data.prompts, data.rewards",
    "dataset_config": "data.preferences.name, the configuration of a hub data set",
    "max_length max_seq_length cutoff_len sequence_len": "data.max_prompt_tokens and data.max_completion_tokens",
    "max_prompt_length": "data.max_prompt_tokens",
    "max_completion_length": "data.max_completion_tokens for data, sample.max_new_tokens for samples",
    "num_generations": "sample.num_completions (K)",
    "per_device_eval_batch_size": "sample.batch_completions",
    "temperature": "temperature, at the top of the recipe: τ of samples, log-probabilities and reference",
    "use_vllm": "sample.engine: vllm",
    "ppo": "each method is a section of align, as align: {ppo: {method: ppo}}",
    "dpo": f"each method is a section of align, as align: {{dpo: {{{_DPO}}}}}",
    "exo": f"each method is a section of align, as align: {{exo: {{{_EXO}}}}}",
    "loss_type pref_loss f_divergence_type": "divergence and target; dpo, exo and others are below",
    "beta pref_beta": "beta_pi (β_π), or beta of a method that is not matching (λ of method: orpo is its weight)",
    "simpo_gamma gamma_beta_ratio": "gamma, of method: simpo, in nats: β times the ratio",
    "label_smoothing": "epsilon (ε), the mass that a preference leaves the other completions",
    "rpo_alpha dpo_alpha pref_ftx": "none; sft is a stage of its own",
    "per_device_train_batch_size gradient_accumulation_steps train_batch_size": "batch_prompts, the whole step over "
    "all devices; token_budget says how much of it is computed at once",
    "num_train_epochs num_epochs": "epochs",
    "max_steps": "none: epochs, and data.preferences.limit",
    "lr": "learning_rate",
    "lr_scheduler_type": "schedule: constant, linear or cosine",
    "warmup_ratio warmup_steps": "warmup_fraction, a share of the steps",
    "optim": "none: AdamW",
    "adam_beta1 adam_beta2": "adam_betas, both in one list",
    "bf16 fp16": "precision: bf16; weights stay float32",
    "deepspeed": "none: with accelerate launch FSDP2 divides a model over GPUs",
    "save_steps save_total_limit": "checkpoint_every; save_policies says how many models are kept",
    "logging_steps": "none: every step is in metrics.jsonl",
    "eval_strategy eval_steps": "none: held-out pairs are measured at every saved policy (save_policies)",
    "resume_from_checkpoint": "none: the same command again goes on from the last checkpoint",
    "push_to_hub": "none: the command exalign push RUN METHOD NAME",
    "report_to": "trackers",
    "output_dir": "the option --run DIR",
    "kl_coef init_kl_coef": "beta, of method: ppo and rloo",
    "cliprange epsilon_high": "clip, of method: ppo, rloo and grpo, the same on both sides",
    "num_iterations num_ppo_epochs": "passes",
    "steps_per_generation rounds": "fresh_every, in optimizer steps",
    "scale_rewards": "scale_by_spread, of method: grpo",
    "importance_sampling_level": "ratio, of method: grpo",
    "reward_funcs": "score.scorer: {function: module:function}, or a list of scorers",
    "reward_weights": "score.scorer, a list of scorers with a weight each",
    "vf_coef": "none: method: ppo trains its critic by a critic_learning_rate of its own",
}
"""Names that are no settings here, or mean something else, and what to write."""

LOSSES = {
    "sigmoid dpo": f"is {_DPO}",
    "exo_pair exo": f"is {_EXO}",
    "cdpo": f"is {_DPO}, and epsilon",
    "robust": f"is not offered; nearest is {_DPO}, and epsilon",
    "js js_divergence": "is divergence: jensen_shannon, target: preference",
    "sigmoid_norm": "is method: dpo_norm",
    "hinge slic sppo_hard nca_pair bco_pair apo_zero": f"is not offered; nearest is {_DPO}",
    "aot discopop": f"is not offered; nearest is {_EXO}, whose optimal margin is finite too",
    "kto_pair": "is method: kto",
    "apo_zero_unpaired bco": "is not offered; nearest is method: kto",
    "reinforce_plus_plus": "is not offered; nearest is method: rloo",
    "gspo": "is method: grpo, ratio: sequence",
}
"""Losses and methods by their names elsewhere; one that has become a method here is found first."""


def meaning(name: str, value: Any = None) -> str | None:
    """What a familiar setting is here, with the loss that it names; None for one that is not known."""
    if name in ("loss_type", "pref_loss") and (loss := loss_meaning(value)) is not None:
        return loss
    return _found(name, SETTINGS)


def loss_meaning(value: Any) -> str | None:
    """What a familiar loss or method is here, or which is nearest; None for one that is not known."""
    name = str(value[0] if isinstance(value, list) and value else value).casefold()
    if name in available():
        return f"write method: {name}"
    found = _found(name, LOSSES)
    return found and f"{name} {found}"


def _found(name: str, table: dict[str, str]) -> str | None:
    return next((here for names, here in table.items() if name in names.split()), None)
