"""Models and tokenizers in and out: an ordinary transformers folder or hub name, or a config trained from scratch.

Every model that leaves this file has dropout 0 everywhere, because a log-ratio log π_θ − log π_sft must be 0 before
the first step: with dropout on, the same weights give log-probs that differ by nats from one pass to the next.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)
from transformers.activations import FastGELUActivation, GELUTanh, NewGELUActivation

from exalign.checksums import write_sums
from exalign.errors import InputError
from exalign.models.model_settings import LoraSettings, ModelSettings
from exalign.storage import atomic_path, exists

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
_DROPOUT_ENDINGS = ("dropout", "pdrop", "dropout_prob", "dropout_rate", "dropout_p")


def load_tokenizer(source: str, *, trust_remote_code: bool = False) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or hub name, with an end-of-sequence token (`InputError` without one).

    A missing padding token becomes the end-of-sequence token; nothing here reads padding, so no result depends on it.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise _unreadable("tokenizer", source, error) from error
    if tokenizer.eos_token_id is None:
        raise InputError(f"The tokenizer {source} has no end-of-sequence token; set eos_token in its configuration.")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    return tokenizer


def load_policy(settings: ModelSettings, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """A causal language model, dropout 0. The caller seeds torch before, for weights that start at random."""
    model = _load(AutoModelForCausalLM, settings, tokenizer, num_labels=None)
    return with_lora(model, settings.lora, task="CAUSAL_LM")


def load_reward_model(settings: ModelSettings, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """A sequence classifier with one label: r(x, y). From a language model the head starts at random (caller seeds).

    A source that already classifies into another number of labels is an `InputError`: its score would be ambiguous.
    """
    return with_lora(_load(AutoModelForSequenceClassification, settings, tokenizer, 1), settings.lora, task="SEQ_CLS")


def load_classifier(settings: ModelSettings, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """A sequence classifier with two labels, whose log-odds are the oracle's reward."""
    return with_lora(_load(AutoModelForSequenceClassification, settings, tokenizer, 2), settings.lora, task="SEQ_CLS")


def save_model(model: nn.Module, tokenizer: PreTrainedTokenizerBase, folder: Path, *, card: str) -> None:
    """Write an ordinary transformers folder atomically: safetensors, tokenizer, `card` as README.md, and SHA256SUMS.

    LoRA adapters are merged into a copy of the weights; the model that was passed in stays as it was.
    """
    plain: Any = copy.deepcopy(model).merge_and_unload() if hasattr(model, "merge_and_unload") else model  # type: ignore[operator]
    with atomic_path(Path(folder)) as temporary:
        temporary.mkdir(parents=True)
        plain.save_pretrained(temporary, safe_serialization=True)
        tokenizer.save_pretrained(temporary)
        (temporary / "README.md").write_text(card, encoding="utf-8")
        write_sums(temporary)


def _load(
    auto_class: Any, settings: ModelSettings, tokenizer: PreTrainedTokenizerBase, num_labels: int | None
) -> PreTrainedModel:
    if (settings.source is None) == (settings.config is None):
        raise InputError("A model needs either source (a folder or hub name) or config (to train from scratch).")
    config = _read_config(settings, tokenizer)
    _check_code(config, settings)
    if num_labels is not None:
        _check_labels(config, settings, num_labels)
        config.num_labels = num_labels
    _silence_dropout(config)
    dtype = _DTYPES[settings.dtype]
    if settings.source is None:
        model = auto_class.from_config(config, dtype=dtype, trust_remote_code=settings.trust_remote_code)
    else:
        model = _from_pretrained(auto_class, settings, config, dtype, new_head=num_labels is not None)
    if model.get_input_embeddings().num_embeddings < len(tokenizer):
        rows = model.get_input_embeddings().num_embeddings
        raise InputError(
            f"The model has {rows} embeddings but the tokenizer {len(tokenizer)} tokens; they do not match."
        )
    for name in ("eos_token_id", "bos_token_id", "pad_token_id"):
        for holder in (model.config, getattr(model, "generation_config", None)):
            if holder is not None and getattr(tokenizer, name) is not None and getattr(holder, name, None) is None:
                setattr(holder, name, getattr(tokenizer, name))
    _quicken_gelu(model)
    _silence_modules(model)
    return model


def _read_config(settings: ModelSettings, tokenizer: PreTrainedTokenizerBase) -> PreTrainedConfig:
    if settings.config is not None:
        values = dict(settings.config)
        model_type = values.pop("model_type", None)
        values.setdefault("vocab_size", len(tokenizer))
        for name in ("eos_token_id", "bos_token_id", "pad_token_id"):
            values.setdefault(name, getattr(tokenizer, name))
        try:
            return AutoConfig.for_model(model_type, **values)
        except Exception as error:  # transformers raises many kinds here, all of them about the given values
            raise InputError(f"The model config is not valid ({first_line(error)}).") from error
    assert settings.source is not None
    try:
        return AutoConfig.from_pretrained(settings.source, trust_remote_code=settings.trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise _unreadable("model", settings.source, error) from error


def _from_pretrained(
    auto_class: Any, settings: ModelSettings, config: PreTrainedConfig, dtype: torch.dtype, *, new_head: bool
) -> PreTrainedModel:
    try:
        model, report = auto_class.from_pretrained(
            settings.source,
            config=config,
            dtype=dtype,
            trust_remote_code=settings.trust_remote_code,
            use_safetensors=True,  # a pickle is never opened, and no service is asked to convert one
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        raise _unreadable("model", str(settings.source), error) from error
    missing = sorted(report["missing_keys"])
    if new_head:
        missing = [name for name in missing if name.startswith(model.base_model_prefix + ".")]
    if missing:
        raise InputError(f"{settings.source} lacks weights that this model needs ({', '.join(missing[:3])}).")
    return model


def _check_code(config: PreTrainedConfig, settings: ModelSettings) -> None:
    """An attention named like a repository is a kernel on a hub: code to download and run."""
    named = str(getattr(config, "_attn_implementation", None) or "")
    if "/" in named and not settings.trust_remote_code:
        raise InputError(f"The model asks for the kernel {named:.90} from a hub, which is code: see trust_remote_code.")


def _check_labels(config: PreTrainedConfig, settings: ModelSettings, num_labels: int) -> None:
    classifies = any("SequenceClassification" in name for name in config.architectures or ())
    if settings.source is not None and classifies and config.num_labels != num_labels:
        kind = "A reward model has one label" if num_labels == 1 else "A classifier has two labels"
        raise InputError(f"{kind}, but {settings.source} has {config.num_labels}; give a model with {num_labels}.")


def with_lora(model: PreTrainedModel, settings: LoraSettings | None, *, task: str) -> PreTrainedModel:
    """The model under PEFT with fresh adapters, or itself without settings; `task` names one of PEFT's task types."""
    if settings is None:
        return model
    from peft import LoraConfig, TaskType, get_peft_model

    config = LoraConfig(
        r=settings.rank,
        lora_alpha=settings.alpha,  # type: ignore[arg-type]  # PEFT divides by the rank: any number serves
        lora_dropout=0.0,
        target_modules=list(settings.targets) if settings.targets else "all-linear",
        task_type=TaskType[task],
    )
    try:
        return get_peft_model(model, config)  # type: ignore[return-value]
    except ValueError as error:
        raise InputError(f"LoRA cannot be applied to this model ({first_line(error)}).") from error


def _silence_dropout(config: PreTrainedConfig) -> None:
    """Set every dropout of a config, and of the configs inside it, to 0."""
    for name, value in list(vars(config).items()):
        if isinstance(value, PreTrainedConfig):
            _silence_dropout(value)
        elif isinstance(value, float) and name.endswith(_DROPOUT_ENDINGS):
            setattr(config, name, 0.0)


def _silence_modules(model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0


def _quicken_gelu(model: nn.Module) -> None:
    """Replace the tanh GELU that is spelled out in many operations by the built-in kernel (equal up to rounding)."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, NewGELUActivation | FastGELUActivation):
                setattr(module, name, GELUTanh())


def _unreadable(kind: str, source: str, error: Exception) -> InputError:
    local = source.startswith((".", "/", "~")) or source.count("/") > 1
    if local and not exists(Path(source)):
        return InputError(f"The {kind} folder {source} does not exist.")
    return InputError(f"Cannot load the {kind} {source}: {first_line(error)}")


def is_folder(source: str) -> bool:
    """Whether `source` is a folder here, rather than the name of something on a hub."""
    path = Path(source)
    return exists(path) and path.is_dir()


def first_line(error: Exception) -> str:
    """What a library's error says, as far as its first line."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
