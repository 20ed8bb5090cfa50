"""A recipe's models without their weights: on torch's meta device, so that every count is that of the real one."""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedConfig
from transformers.pytorch_utils import Conv1D

from exalign.errors import InputError
from exalign.models.capability import base_of
from exalign.models.flops import matrices
from exalign.models.loading import with_lora
from exalign.models.model_settings import ModelSettings

Kind = Literal["policy", "reward model", "classifier"]
_LABELS: dict[Kind, int | None] = {"policy": None, "reward model": 1, "classifier": 2}

PUBLIC_CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "gpt2": {"model_type": "gpt2"},
    "gpt2-large": {"model_type": "gpt2", "n_embd": 1280, "n_layer": 36, "n_head": 20},
    "EleutherAI/pythia-2.8b": {
        "model_type": "gpt_neox",
        "hidden_size": 2560,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "intermediate_size": 10240,
        "vocab_size": 50304,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
    },
    "Qwen/Qwen2.5-7B-Instruct": {
        "model_type": "qwen2",
        "hidden_size": 3584,
        "num_hidden_layers": 28,
        "num_attention_heads": 28,
        "num_key_value_heads": 4,
        "intermediate_size": 18944,
        "vocab_size": 152064,
        "max_position_embeddings": 32768,
        "tie_word_embeddings": False,
    },
}
"""The published configurations of the models that the shipped recipes name: a plan of them needs no hub."""


@dataclass(frozen=True, eq=False)
class Architecture:
    """A model on the meta device, adapters included; `origin` says where its configuration came from."""

    name: str
    module: nn.Module
    origin: str

    @cached_property
    def config(self) -> Any:
        return base_of(self.module).config.get_text_config()

    @cached_property
    def parameters(self) -> int:
        """All of them, tied ones once."""
        return sum(parameter.numel() for parameter in self.module.parameters())

    @cached_property
    def trained(self) -> int:
        return sum(parameter.numel() for parameter in self.module.parameters() if parameter.requires_grad)

    @cached_property
    def weight_bytes(self) -> int:
        return _bytes(self.module.parameters())

    @cached_property
    def trained_bytes(self) -> int:
        return _bytes(parameter for parameter in self.module.parameters() if parameter.requires_grad)

    @cached_property
    def half_copies(self) -> int:
        """Bytes of the bfloat16 copies that autocast makes of float32 matrices, and keeps until the backward pass."""
        return 2 * sum(weight.numel() for _, weight in self._matrices if weight.dtype == torch.float32)

    @cached_property
    def read_bytes(self) -> int:
        """Bytes of all matrices: what one step of decoding reads of the weights."""
        return sum(weight.numel() * weight.element_size() for _, weight in self._matrices)

    @cached_property
    def layers(self) -> list[nn.Module]:
        """The decoder's (or encoder's) blocks."""
        lists = [list(m) for m in base_of(self.module).base_model.modules() if isinstance(m, nn.ModuleList)]
        return max(lists, key=len, default=[])

    @cached_property
    def layer_bytes(self) -> int:
        """Bytes of the weights of one block."""
        return _bytes(self.layers[0].parameters()) if self.layers else 0

    @property
    def trained_share(self) -> float:
        """Bytes of trained weights over all."""
        return self.trained_bytes / self.weight_bytes

    @cached_property
    def feed_forward(self) -> tuple[int, bool]:
        """Width of a block's feed-forward part, and whether it has a gate."""
        widths = (
            getattr(self.config, name, None) for name in ("intermediate_size", "n_inner", "ffn_dim", "hidden_dim")
        )
        names = [name for name, _ in self.layers[0].named_modules()] if self.layers else []
        return int(next(filter(None, widths), 4 * self.hidden)), any("gate" in name for name in names)

    @property
    def shared_inputs(self) -> int:
        """Numbers of one token that go into a block's linear layers: two norms' outputs, the attention's, and F."""
        return 2 * self.hidden + self.config.num_attention_heads * self.head_size + self.feed_forward[0]

    @cached_property
    def cast_inputs(self) -> int:
        """The same under autocast: every trained linear layer has a cast copy of its own, frozen ones keep none."""
        layers = [m for m in self.layers[0].modules() if isinstance(m, nn.Linear | Conv1D)] if self.layers else []
        trained = [layer for layer in layers if layer.weight.requires_grad]
        return sum(m.in_features if isinstance(m, nn.Linear) else m.weight.shape[0] for m in trained)

    @cached_property
    def numbers_of_norms(self) -> int:
        """Numbers that a block's norms keep for one token: their inputs; an RMS norm, spelled out, as many again."""
        norms = [m for m in self.layers[0].modules() if "norm" in type(m).__name__.lower()] if self.layers else []
        twice = any("rms" in type(norm).__name__.lower() for norm in norms)
        return 2 * self.hidden * (2 if twice else 1)

    @property
    def key_heads(self) -> int:
        return int(getattr(self.config, "num_key_value_heads", None) or self.config.num_attention_heads)

    @property
    def hidden(self) -> int:
        return int(self.config.hidden_size)

    @property
    def head_size(self) -> int:
        return int(getattr(self.config, "head_dim", None) or self.hidden // self.config.num_attention_heads)

    @property
    def element_size(self) -> int:
        """Bytes of one number of the weights, and so of keys, values and hidden states in inference."""
        return next(self.module.parameters()).element_size()

    @property
    def precision(self) -> Literal["fp32", "bf16"]:
        """The precision of matrix products without autocast."""
        return "fp32" if self.element_size >= 4 else "bf16"

    @property
    def cache_bytes_per_token(self) -> int:
        """Keys and values of one token: 2 · layers · key heads · head size · bytes."""
        return 2 * int(self.config.num_hidden_layers) * self.key_heads * self.head_size * self.element_size

    @property
    def shares_prompts(self) -> bool:
        """Whether the K completions of a prompt share its computation; an encoder that classifies reads whole rows."""
        return hasattr(base_of(self.module), "score") or base_of(self.module).get_output_embeddings() is not None

    @cached_property
    def _matrices(self) -> list[tuple[bool, torch.Tensor]]:
        return matrices(self.module)


def architecture_of(settings: ModelSettings, kind: Kind, vocabulary: int | None) -> Architecture:
    """The model that these settings load. `vocabulary` is the size of the tokenizer of a model from a config.

    A source whose configuration is neither readable nor built in, or a config that is not valid, is an `InputError`.
    """
    return _architecture(settings.model_dump_json(), kind, vocabulary if settings.source is None else None)


@lru_cache(maxsize=32)
def _architecture(settings_json: str, kind: Kind, vocabulary: int | None) -> Architecture:
    settings = ModelSettings.model_validate_json(settings_json)
    config, origin = _configuration(settings, vocabulary)
    labels = _LABELS[kind]
    if labels is not None:
        config.num_labels = labels
    auto_class: Any = AutoModelForCausalLM if labels is None else AutoModelForSequenceClassification
    try:
        with torch.device("meta"), warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)  # PEFT asks transformers in a way that will go
            model = auto_class.from_config(
                config, dtype=getattr(torch, settings.dtype), trust_remote_code=settings.trust_remote_code
            )
            model = with_lora(model, settings.lora, task="CAUSAL_LM" if labels is None else "SEQ_CLS")
    except (ValueError, TypeError) as error:
        raise InputError(f"No {kind} can be made of {settings.source or 'this config'} ({error}).") from None
    return Architecture(settings.source or str(config.model_type), model, origin)


def _configuration(settings: ModelSettings, vocabulary: int | None) -> tuple[PreTrainedConfig, str]:
    if settings.source is None:
        values = dict(settings.config or {})
        if vocabulary is not None:
            values.setdefault("vocab_size", vocabulary)
        return _from_values(values), "the recipe's config"
    if settings.source.startswith("runs/") and not Path(settings.source).is_dir():
        raise InputError(
            f"There is no folder {settings.source} yet: carry out the run that makes it, then plan with it."
        )
    for local in (True, False):
        try:
            found = AutoConfig.from_pretrained(
                settings.source, trust_remote_code=settings.trust_remote_code, local_files_only=local
            )
            return found, "its own configuration"
        except (OSError, ValueError, KeyError) as error:
            if settings.source in PUBLIC_CONFIGURATIONS:  # without waiting for a hub that may not be reachable
                return _from_values(PUBLIC_CONFIGURATIONS[settings.source]), "its published configuration, built in"
            reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    raise InputError(
        f"The configuration of {settings.source} cannot be read ({reason}); plan with a local folder of it, or with "
        f"one of {', '.join(PUBLIC_CONFIGURATIONS)}."
    )


def _from_values(values: dict[str, Any]) -> PreTrainedConfig:
    try:
        rest = {name: value for name, value in values.items() if name != "model_type"}
        return AutoConfig.for_model(str(values.get("model_type")), **rest)
    except Exception as error:  # transformers raises many kinds here, all of them about the given values
        raise InputError(f"The model config is not valid ({str(error).splitlines()[0]}).") from error


def _bytes(parameters: Iterable[torch.Tensor]) -> int:
    return sum(parameter.numel() * parameter.element_size() for parameter in parameters)
