"""Models and tokenizers in and out: an ordinary transformers folder or hub name, or a config trained from scratch.

Every model that leaves this file has dropout 0 everywhere, because a log-ratio log π_θ − log π_sft must be 0 before
the first step: with dropout on, the same weights give log-probs that differ by nats from one pass to the next.
"""

from __future__ import annotations

import copy
import difflib
import json
import logging
import os
import re
import warnings
from collections.abc import Collection, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, suppress
from functools import cache
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)
from transformers.activations import FastGELUActivation, GELUTanh, NewGELUActivation
from transformers.pytorch_utils import Conv1D
from transformers.quantizers import AutoHfQuantizer
from transformers.utils import cached_file
from transformers.utils.peft_utils import find_adapter_config_file

from exalign.checksums import check_folder, write_sums
from exalign.data.batching import Group
from exalign.data.tokenization import end_ids, eos_id
from exalign.errors import InputError, first_line, hub_sentence
from exalign.models.capability import base_of, device_of, evaluating, trial_ids
from exalign.models.heads import completion_outputs
from exalign.models.logprobs import completion_logprobs
from exalign.models.memory import is_out_of_memory, release_memory
from exalign.models.model_settings import LoraSettings, ModelSettings, adapter_base
from exalign.models.prefix_tree import unflatten
from exalign.processes import leads, several
from exalign.storage import atomic_path, exists, is_lfs_pointer, read_object, write_json

logger = logging.getLogger(__name__)

_DROPOUT_ENDINGS = ("dropout", "pdrop", "dropout_prob", "dropout_rate", "dropout_p", "layerdrop", "jitter_noise")


def load_tokenizer(
    source: str,
    *,
    trust_remote_code: bool = False,
    chat_template_kwargs: dict[str, Any] | None = None,
    speaks: bool = True,
) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or hub name, for a model that `speaks` with an end-of-sequence token (`InputError`
    without one).

    An adapter that comes without one has its base's. A missing padding token becomes the end-of-sequence token;
    nothing here reads padding, so no result depends on it.
    `chat_template_kwargs` are settings of its chat template, say {"enable_thinking": False}, for every text of it.
    """
    _check_files(source, but=".safetensors")
    if (base := _adapter_base(source)) is not None and not _has_tokenizer(source):
        source = base
    try:
        tokenizer = _openai_tokenizer(source) or AutoTokenizer.from_pretrained(
            source, trust_remote_code=trust_remote_code
        )
    except Exception as error:  # transformers, tokenizers and the hub's client raise many kinds
        raise _unreadable("tokenizer", source, error) from error
    if speaks and tokenizer.eos_token_id is None:
        raise InputError(f"The tokenizer {source} has no end-of-sequence token; set eos_token in its configuration.")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.chat_template_kwargs = dict(chat_template_kwargs or {})
    return tokenizer


def _has_tokenizer(source: str) -> bool:
    if os.path.isdir(source):
        return any(Path(source).glob("*token*"))
    with suppress(OSError, ValueError):
        return bool(cached_file(source, "tokenizer_config.json"))
    return False


def _openai_tokenizer(source: str) -> PreTrainedTokenizerBase | None:
    """GPT-2's tokenizer in the two files as OpenAI published them, where a folder has no others."""
    files = [Path(source) / name for name in ("encoder.json", "vocab.bpe")]
    if not all(map(exists, files)) or any(exists(Path(source) / name) for name in ("tokenizer.json", "vocab.json")):
        return None
    inner = Tokenizer(models.BPE.from_file(*map(str, files)))
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    end = "<|endoftext|>"
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token=end, eos_token=end, unk_token=end, clean_up_tokenization_spaces=False
    )


def load_policy(settings: ModelSettings, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """A causal language model, dropout 0. The caller seeds torch before, for weights that start at random.

    With `lora.save: adapter` what `save_model` writes of it is its adapter, on `settings.source`.
    """
    check_base(settings)
    loaded = _load(AutoModelForCausalLM, settings, tokenizer, num_labels=None)
    if settings.lora is not None:
        check_quantised(loaded.config, settings)
    model = with_lora(loaded, settings.lora, task="CAUSAL_LM")
    if settings.saves_adapter:
        base = str(settings.source)
        model.peft_config["default"].base_model_name_or_path = os.path.abspath(base) if os.path.isdir(base) else base
        model.saved_as_adapter = True  # type: ignore[assignment]
    return model


def load_reward_model(settings: ModelSettings, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """A sequence classifier with one label: r(x, y). From a language model the head starts at random (caller seeds).

    A source that already classifies into another number of labels is an `InputError`: its score would be ambiguous.
    """
    return with_lora(_load(AutoModelForSequenceClassification, settings, tokenizer, 1), settings.lora, task="SEQ_CLS")


def load_classifier(settings: ModelSettings, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """A sequence classifier with two labels, whose log-odds are the oracle's reward."""
    return with_lora(_load(AutoModelForSequenceClassification, settings, tokenizer, 2), settings.lora, task="SEQ_CLS")


def load_scoring_model(
    source: str,
    tokenizer: PreTrainedTokenizerBase,
    *,
    num_labels: int | None = None,
    dtype: Literal["float32", "bfloat16"] = "float32",
) -> PreTrainedModel:
    """A sequence classifier as it was made, to score with: a head that is not among its weights is an `InputError`.

    `num_labels` is for an adapter's folder, whose own configuration does not say. In `bfloat16` the head stays in
    float32: rounded to 8 bits, different rewards of a prompt would be ties.
    """
    _refuse_code(source)
    settings, adapted = ModelSettings(source=source, dtype=dtype), _adapter_base(source) is not None
    labels = num_labels if adapted else None
    model = _load(AutoModelForSequenceClassification, settings, tokenizer, labels, new_head=False)
    body = model.base_model
    if dtype != "float32" and body is not model:
        for head in (part for part in model.children() if part is not body):
            head.float().register_forward_pre_hook(_in_float32)
    return model


def _in_float32(_: nn.Module, given: tuple[Any, ...]) -> tuple[Any, ...]:
    return tuple(v.float() if isinstance(v, torch.Tensor) and v.is_floating_point() else v for v in given)


def policy_skeleton(settings: ModelSettings, tokenizer: PreTrainedTokenizerBase | None = None) -> PreTrainedModel:
    """The language model that a source or a config (with its tokenizer) describes, without its weights."""
    config = read_config(settings, tokenizer)
    with torch.device("meta"):
        return _from_config(AutoModelForCausalLM, settings, config, torch.float32)


def check_weights(source: str) -> None:
    """Raise what loading the weights of a folder, or of the base of its adapter, would raise, as their heads tell."""
    if os.path.isfile(source):
        raise InputError(f"{source} is a file; a model is a folder, or a name on the hub, and comes before its data.")
    if exists(Path(source) / "recipe.yaml"):
        raise InputError(f"{source} is a run; name one of its policies, as {source}/align/METHOD/model.")
    base = _adapter_base(source)
    if base is not None:
        if _adapter_base(base) is not None:
            raise InputError(
                f"The adapter {source} stands on {base}, an adapter itself; merge that into its model first."
            )
        check_weights(base)
    if not os.path.isdir(source):
        return
    folder, name = Path(source), "model" if base is None else "adapter_model"
    index = folder / f"{name}.safetensors.index.json"
    try:
        files = set(json.loads(index.read_bytes())["weight_map"].values()) if exists(index) else ()
        for file in sorted(files) or [f"{name}.safetensors"]:
            if not exists(folder / file):
                pickled = any(path.suffix in (".bin", ".pt", ".pth") for path in folder.iterdir())
                said = "; weights that are pickled are not opened" if pickled else ""
                raise InputError(f"{source} has no {file}{said}.")
            # safetensors says of a file that may not be read that there is none.
            with (folder / file).open("rb"), safe_open(folder / file, framework="pt"):
                pass
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError, SafetensorError) as error:
        raise _unreadable("model", source, error) from error


def untrainable(dtype: torch.dtype) -> str | None:
    """Why weights of this type cannot be trained here, or None where they can."""
    if dtype == torch.float16:
        return "gradients in float16 would be lost below 6e-8"
    if dtype == torch.bfloat16 and several():
        return "weights of 16 bits are trained by a single process"
    if dtype == torch.bfloat16 and not hasattr(torch.Tensor, "grad_dtype"):
        return f"torch {torch.__version__} cannot sum their gradients in float32"
    return None


def check_trainable(settings: ModelSettings, where: str, *, head: bool) -> None:
    """Weights of this type can be trained here, which is known before anything is loaded; `where` names the setting.

    With a new `head` some of the model's own weights are trained beside adapters too.
    """
    reason = None if settings.lora is not None and not head else untrainable(getattr(torch, settings.dtype))
    if reason is not None:
        instead = "set dtype: float32 (precision may be bf16)" + ("" if head else ", or train LoRA adapters")
        raise InputError(f"{where}.dtype = {settings.dtype}: {reason}; {instead}.")


def check_base(settings: ModelSettings) -> None:
    """An adapter that is saved alone needs a whole model to stand on; else this is an `InputError`."""
    if not settings.saves_adapter:
        return
    if settings.source is None:
        raise InputError("lora.save = adapter: a model from a config lies in no folder for the adapter to name.")
    if _adapter_base(settings.source) is not None:
        raise InputError(
            f"lora.save = adapter: {settings.source} is an adapter itself, and one on another is read by no library; "
            "set save: merged."
        )


def save_model(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    folder: Path,
    *,
    card: str,
    rows: Sequence[Group] = (),
) -> None:
    """Write an ordinary transformers folder atomically: safetensors, tokenizer, `card` as README.md, and SHA256SUMS.

    LoRA adapters are merged into a copy of the weights, or are all that is written (see `load_policy`); the model that
    was passed in stays as it was. A model with a scalar head gets a padding id that ends no text. What is written must
    give the numbers of `model` on `rows` (see `verify_saved`), or nothing is.
    """
    alone = hasattr(model, "saved_as_adapter")
    plain: Any = model if alone else _whole(model)
    # No layer is resized here, which PEFT would ask the hub about.
    options = {"save_embedding_layers": False} if alone else {}
    with atomic_path(Path(folder)) as temporary:
        temporary.mkdir(parents=True)
        with _own_padding(plain, tokenizer) as (state, its_tokenizer):
            plain.save_pretrained(temporary, state_dict=state, safe_serialization=True, **options)
            its_tokenizer.save_pretrained(temporary)
        del plain, state
        (temporary / "README.md").write_text(card, encoding="utf-8")
        if rows:
            verify_saved(temporary, model, rows)
        write_sums(temporary)


def save_apart(model: Any, folder: Path) -> None:
    """Write weights and configuration for a program that reads them again and again: adapters merged, nothing tied.

    Where head and embedding are one matrix, such a program may renew one of the two only. Each of several processes
    writes its own.
    """
    plain = _whole(model)
    if is_quantised(plain.config):
        raise InputError("vLLM gets no quantised weights from here: remove sample.engine, or name a whole model.")
    state, head = plain.state_dict(), plain.get_output_embeddings()
    name = next(f"{name}.weight" for name, module in plain.named_modules() if module is head)
    state[name] = state[name].clone()
    plain.should_save_on_this_rank = lambda is_main_process: True  # transformers would write in the first process alone
    try:
        plain.save_pretrained(folder, state_dict=state, safe_serialization=True)
    finally:
        del plain.should_save_on_this_rank
    config = read_object(folder / "config.json")
    for part in (value for value in config.values() if isinstance(value, dict) and "tie_word_embeddings" in value):
        part["tie_word_embeddings"] = False
    write_json(folder / "config.json", config | {"tie_word_embeddings": False})


def _whole(model: Any) -> Any:
    """The model, or a copy with its adapters merged."""
    return _merged(copy.deepcopy(model)) if hasattr(model, "merge_and_unload") else model


def _merged(model: Any) -> PreTrainedModel:
    """The model without PEFT's shell, its adapters added to its weights."""
    with _between_libraries():
        return model.merge_and_unload()


def _between_libraries() -> AbstractContextManager[Any]:
    """Without what transformers says to PEFT about names that it is going to change."""
    return warnings.catch_warnings(action="ignore", category=FutureWarning)


@contextmanager
def _own_padding(
    model: Any, tokenizer: PreTrainedTokenizerBase
) -> Iterator[tuple[dict[str, Tensor] | None, PreTrainedTokenizerBase]]:
    """Weights and tokenizer to save for a model that reads the last token of a text that is not padding.

    Where padding is a token that ends a text, or is unknown, transformers would read the token before it; so a token of
    its own becomes the padding, with a row of zeros in the embedding where there is none left. In memory nothing is
    different afterwards. What a model pads with and calls its first token ends its samples too: <|endoftext|> of Qwen.
    And the tokenizer, which may be another's than the model was made with, is to pad with what the model takes for it.
    """
    text = model.config.get_text_config()
    named = (getattr(text, name, None) for name in ("bos_token_id", "eos_token_id"))
    used = {None, eos_id(tokenizer), *(token for ids in named for token in (ids if isinstance(ids, list) else [ids]))}
    if not hasattr(model, "score") or (text.pad_token_id not in used and text.pad_token_id == tokenizer.pad_token_id):
        yield None, tokenizer
        return
    tokenizer = copy.deepcopy(tokenizer)
    if tokenizer.pad_token_id in used:
        names = ("<|pad|>", "<|padding|>", "<|exalign_pad|>")
        tokenizer.add_special_tokens({"pad_token": next(n for n in names if n not in tokenizer.get_vocab())})
    state, embedding = model.state_dict(), model.get_input_embeddings().weight
    more = len(tokenizer) - len(embedding)
    if more > 0:
        for name, parameter in model.named_parameters(remove_duplicate=False):
            if parameter is embedding:
                state[name] = torch.cat([parameter.detach(), parameter.new_zeros(more, parameter.shape[1])])
    # A model's embedding and its configuration, the one of its text among them, may know the size.
    holders = {id(config): config for config in (model.config, model.config.get_text_config())}.values()
    before = [dict(vars(config)) for config in holders]
    for config in holders:
        config.pad_token_id = tokenizer.pad_token_id
        if more > 0 and getattr(config, "vocab_size", None) is not None:
            config.vocab_size = len(tokenizer)
    try:
        yield state, tokenizer
    finally:
        for config, values in zip(holders, before, strict=True):
            for name in ("pad_token_id", "vocab_size"):
                if name in values:
                    setattr(config, name, values[name])


def verify_saved(folder: Path, model: nn.Module, rows: Sequence[Group]) -> None:
    """Load a saved model as anybody would, with transformers alone, an adapter with PEFT, and compare it with `model`.

    On a few rows a language model must give log π(y|x) (τ = 1), a classifier the outputs of its head. May differ: the
    square root of the type's rounding, in nats per token or relative to the largest output: half of the digits, far
    more than another order of summation costs and far less than another model. Anything else is an `InputError`.
    """
    # A few of them: for a large model on a CPU each takes its time.
    rows = [Group(g.index, g.prompt_ids, g.completion_ids[:4]) for g in rows[:4]]
    base = base_of(model)
    scores = hasattr(base, "score") or hasattr(base, "classifier")
    with evaluating(model), torch.no_grad():
        expected = completion_outputs(model, rows) if scores else completion_logprobs(model, rows, temperature=1.0)
    found = _as_anybody(folder, base, rows, scores=scores, device=device_of(model))
    expected, found = expected.double().cpu(), found.double().cpu()
    tokens = torch.ones_like(expected)
    if not scores:
        lengths = torch.tensor([len(ids) for group in rows for ids in group.completion_ids]).double()
        tokens = unflatten(lengths, rows).clamp(min=1)
    coarse = torch.finfo(base.dtype).eps
    if device_of(model).type == "cuda" and torch.get_float32_matmul_precision() != "highest":
        coarse = max(coarse, 2.0**-10)  # TF32 rounds so
    tolerance = coarse**0.5 * (expected.abs() / tokens).max().clamp(min=1.0)
    wrong = ((found - expected).abs() / tokens).nan_to_num(nan=torch.inf)
    if bool((wrong > tolerance).any()):
        at = int(wrong.flatten().argmax())
        what = "an output" if scores else "a log-probability"
        raise InputError(
            f"The model cannot be saved as it was trained: what was written of {type(base).__name__} gives {what} of "
            f"{found.flatten()[at].item():.4f} in transformers where training has "
            f"{expected.flatten()[at].item():.4f}; the checkpoints hold it as it was trained."
        )


def some_rows(model: nn.Module, tokenizer: PreTrainedTokenizerBase) -> list[Group]:
    """Texts of no meaning, each ended, where a training has none at hand to verify its model on."""
    ids, end = trial_ids(base_of(model), 12), torch.tensor([eos_id(tokenizer)])
    return [Group(0, ids[:4], (torch.cat([ids[4:9], end]), torch.cat([ids[9:], end])))]


def _as_anybody(folder: Path, base: Any, rows: Sequence[Group], *, scores: bool, device: torch.device) -> Tensor:
    """What a saved model gives for the rows, by its own forward; where the accelerator has no room for it, on a CPU."""
    auto: Any = AutoModelForSequenceClassification if scores else AutoModelForCausalLM
    if (folder / "adapter_config.json").exists():
        from peft import AutoPeftModelForCausalLM

        auto = AutoPeftModelForCausalLM  # transformers 5.23 by itself leaves out what DoRA adds
    # The code of a model that needs its own is running already.
    trust_remote_code = type(base).__module__.startswith("transformers_modules")
    with _between_libraries():
        plain = auto.from_pretrained(folder, trust_remote_code=trust_remote_code).eval()
    _keep_differentiable(plain)
    try:
        plain.to(device)
        return _forward(plain, rows, scores=scores)
    except RuntimeError as error:
        if not is_out_of_memory(error) or device.type == "cpu":
            raise
    plain.to("cpu")
    release_memory()
    return _forward(plain, rows, scores=scores)


@torch.no_grad()
def _forward(plain: Any, groups: Sequence[Group], *, scores: bool) -> Tensor:
    """Log-probabilities `[B, K]` or outputs `[B, K, num_labels]` by a model's own forward, a text at a time.

    Outputs are those of the text with padding behind it, as in a batch.
    """
    found = []
    for prompt, ids in ((group.prompt_ids, ids) for group in groups for ids in group.completion_ids):
        text = torch.cat([prompt, ids])
        padding = plain.config.get_text_config().pad_token_id
        padded = text if padding is None or not scores else torch.cat([text, text.new_tensor([padding])])
        mask = (torch.arange(len(padded)) < len(text)).long()
        logits = plain(input_ids=padded[None].to(plain.device), attention_mask=mask[None].to(plain.device)).logits[0]
        if scores:
            found.append(logits)
            continue
        logp = logits[len(prompt) - 1 : -1].double().log_softmax(-1)
        found.append(logp.gather(1, ids[:, None].to(logp.device)).sum())
    return unflatten(torch.stack(found), groups)


def _load(
    auto_class: Any,
    settings: ModelSettings,
    tokenizer: PreTrainedTokenizerBase,
    num_labels: int | None,
    *,
    new_head: bool = True,
) -> PreTrainedModel:
    """`new_head`: a sequence classifier may be made of a language model."""
    if (settings.source is None) == (settings.config is None):
        raise InputError("A model needs either source (a folder or hub name) or config (to train from scratch).")
    config = read_config(settings, tokenizer)
    _check_code(config, settings)
    if num_labels is not None:
        _check_labels(config, settings, num_labels)
        config.num_labels = num_labels
    _silence_dropout(config)
    dtype = getattr(torch, settings.dtype)
    if settings.source is None:
        model = _from_config(auto_class, settings, config, dtype)
    else:
        check_weights(settings.source)
        adapter = _adapter_base(settings.source)
        whole = settings if adapter is None else settings.model_copy(update={"source": adapter})
        head = num_labels is not None and (new_head or adapter is not None)
        model = _from_pretrained(auto_class, whole, config, dtype, new_head=head)
        _keep_differentiable(model)
        if adapter is not None:
            model = _adapted(model, settings.source, tokenizer)
    embedding: Any = model.get_input_embeddings()
    if isinstance(embedding, nn.Embedding):
        embedding.padding_idx = None  # else the row of a token that ends texts and is padding too would take no steps
    rows = embedding.weight.shape[0]
    if rows < len(tokenizer):
        raise InputError(
            f"The model has {rows} embeddings but the tokenizer {len(tokenizer)} tokens; they do not match."
        )
    _know_special_tokens(model, tokenizer, trained=new_head)
    _make_savable(model)
    _quicken_gelu(model)
    for module in model.modules():
        if isinstance(module, nn.modules.dropout._DropoutNd):
            module.p = 0.0
    return model


def _know_special_tokens(model: Any, tokenizer: PreTrainedTokenizerBase, *, trained: bool) -> None:
    """Give a model the special tokens of its tokenizer that it does not know, with those that end its answers.

    A scalar head that is to be trained has no padding where that is what ends a text, see `_own_padding`.
    """
    scores, held = hasattr(model, "score"), getattr(model, "generation_config", None)
    for name in ("eos_token_id", "bos_token_id", "pad_token_id"):
        known = getattr(tokenizer, name)
        if known is None or (scores and not trained and name == "pad_token_id"):
            continue
        for holder in (model.config, held):
            if holder is not None and getattr(holder, name, None) is None:
                setattr(holder, name, known)
    if held is not None:
        ends = held.eos_token_id if isinstance(held.eos_token_id, list) else [held.eos_token_id]
        more = sorted(end_ids(tokenizer).difference(ends))
        held.eos_token_id = [*ends, *more] if more else held.eos_token_id
    text = model.config.get_text_config()
    if scores and trained and text.pad_token_id == tokenizer.eos_token_id:
        model.config.pad_token_id = text.pad_token_id = None


def _make_savable(model: Any) -> None:
    """Mend settings for generation with which transformers would read a model and refuse to write it.

    Those among the model's own settings move to where they belong; a temperature or top_p without sampling, which many
    published models have, is meant for sampling. Whatever is left goes, but for what ends a text.
    """
    held = getattr(model, "generation_config", None)
    for name, value in model.config._get_generation_parameters().items():
        if held is not None and getattr(held, name, None) is None:
            setattr(held, name, value)
        delattr(model.config, name)
    if held is None:
        return
    for do_sample in (held.do_sample, True):
        held.do_sample = do_sample
        try:
            return held.validate(strict=True)
        except ValueError:
            continue
    ids = {name: getattr(held, name) for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model.generation_config = type(held)(**ids)
    logger.warning("generation_config.json contradicts itself; of it, only the ids of special tokens are kept.")


def read_config(settings: ModelSettings, tokenizer: PreTrainedTokenizerBase | None) -> PreTrainedConfig:
    """The configuration of a source, of an adapter's base, or of a model from scratch, which needs its tokenizer."""
    if settings.config is not None:
        assert tokenizer is not None
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
    source = _adapter_base(settings.source) or settings.source
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=settings.trust_remote_code)
    except Exception as error:  # transformers raises many kinds here too
        if source != settings.source:
            why = str(_unreadable("model", source, error))
            raise InputError(f"{settings.source} holds a LoRA adapter alone, to be added to its base. {why}") from error
        raise _unreadable("model", source, error) from error
    if is_quantised(config):
        try:
            AutoHfQuantizer.from_config(config.quantization_config, pre_quantized=True).validate_environment()
        except Exception as error:  # of each kind of quantisation its own
            raise InputError(f"{source} has quantised weights: {first_line(error)}") from error
    return config


def is_quantised(config: PreTrainedConfig) -> bool:
    """Whether the weights are stored in few bits, so that they cannot be trained and nothing be merged into them."""
    return getattr(config, "quantization_config", None) is not None


def _keep_differentiable(model: nn.Module) -> None:
    """Keep bitsandbytes 0.50 from packing 4 bits anew at a first pass on a CPU: that way has no gradient, silently."""
    modules: list[Any] = [module for module in model.modules() if hasattr(module, "support_avx512bf16_for_cpu")]
    for module in modules:
        module.support_avx512bf16_for_cpu = False


def check_quantised(config: PreTrainedConfig, settings: ModelSettings, where: str = "model") -> None:
    """An `InputError` for a training on quantised weights whose result is to be saved whole."""
    if is_quantised(config) and not settings.saves_adapter:
        raise InputError(
            f"{where}: {settings.source} has quantised weights, which take no steps and no merged adapter: set "
            "model.lora.save: adapter, and train SFT, reward models and classifiers on whole models."
        )


def _check_kind(auto_class: Any, config: PreTrainedConfig) -> None:
    own_code = auto_class.__name__ in (getattr(config, "auto_map", None) or {})
    if type(config) not in auto_class._model_mapping and not own_code:
        kind = "causal language model" if auto_class is AutoModelForCausalLM else "model that can score texts"
        raise InputError(f"A {config.model_type} is no {kind}; name one that is (gpt2, llama, qwen3, …).")


def _from_config(auto_class: Any, settings: ModelSettings, config: PreTrainedConfig, dtype: torch.dtype) -> Any:
    _check_kind(auto_class, config)
    try:
        return auto_class.from_config(config, dtype=dtype, trust_remote_code=settings.trust_remote_code)
    except Exception as error:  # an architecture without such a head, or numbers that do not fit each other
        raise InputError(f"No such model can be made of this config ({first_line(error)[:200]}).") from error


def _from_pretrained(
    auto_class: Any, settings: ModelSettings, config: PreTrainedConfig, dtype: torch.dtype, *, new_head: bool
) -> PreTrainedModel:
    _check_files(str(settings.source))
    _check_kind(auto_class, config)
    try:
        model, report = auto_class.from_pretrained(
            settings.source,
            config=config,
            dtype=dtype,
            trust_remote_code=settings.trust_remote_code,
            use_safetensors=True,  # a pickle is never opened, and no service is asked to convert one
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # they are in the report
        )
    except Exception as error:  # transformers raises many kinds here, all of them about what it was given
        raise _unreadable("model", str(settings.source), error) from error
    if getattr(model, "_hf_peft_config_loaded", False):
        raise InputError(
            f"{settings.source} holds an adapter beside a whole model, which transformers would add to it; move "
            "adapter_config.json away, or the model."
        )
    for name, there, wanted in sorted(report["mismatched_keys"]):
        raise InputError(
            f"{settings.source}: {name} has the shape {tuple(there)}, where config.json asks for {tuple(wanted)}."
        )
    missing = sorted(report["missing_keys"])
    if new_head:
        missing = [name for name in missing if name.startswith(model.base_model_prefix + ".")]
    if missing:
        what = "is no reward model or classifier" if "score.weight" in missing else "is not whole"
        raise InputError(f"{settings.source} {what}: it lacks weights that are needed ({', '.join(missing[:3])}).")
    if (surplus := sorted(report["unexpected_keys"])) and not new_head:
        logger.warning("%s: %d weights are not used, as %s.", settings.source, len(surplus), surplus[0])
    return model


def _adapter_base(source: str) -> str | None:
    """The model that a LoRA adapter was trained on, where `source` holds an adapter alone; else None."""
    if exists(Path(source)):
        return adapter_base(Path(source))
    found = _hub_adapter(source)
    return None if found is None else adapter_base(Path(found).parent)


@cache
def _hub_adapter(source: str) -> str | None:
    """The file that describes an adapter, of a hub name that has no whole model beside it."""
    whole = None
    with suppress(OSError, ValueError):
        whole = cached_file(source, "config.json")
    with suppress(OSError, ValueError):  # where the hub cannot be asked, this finds nothing, and what loads it says why
        return None if whole else find_adapter_config_file(source)
    return None


def _adapted(model: PreTrainedModel, source: str, tokenizer: PreTrainedTokenizerBase) -> PreTrainedModel:
    """The model with a LoRA adapter merged into its weights, and the tokens that were added for it."""
    from peft import PeftConfig, get_peft_model

    try:
        cached_file(source, "adapter_model.safetensors")  # a pickle is never opened
        config = PeftConfig.from_pretrained(source)
        config.megatron_config = None  # which names a module to import
        if config.is_prompt_learning:
            raise ValueError("prompts and prefixes that were learnt cannot be merged into weights")
        if len(tokenizer) > model.get_input_embeddings().weight.shape[0]:  # type: ignore[index]
            model.resize_token_embeddings(len(tokenizer), mean_resizing=False)
        untied = untie(model, getattr(config, "target_modules", None) or ())
        if untied and getattr(config, "ensure_weight_tying", False):
            raise ValueError("adapters that keep head and embedding tied cannot be merged into them")
        with _between_libraries():
            adapted: Any = get_peft_model(model, config)
            report = adapted.load_adapter(source, "default")
        lost = [*report.missing_keys, *(name for name in report.unexpected_keys if ".lora_" in name)]
        if lost:
            raise ValueError(f"{len(lost)} of its weights have no counterpart, as {lost[0]}")
        return adapted if is_quantised(model.config) else _merged(adapted).requires_grad_(True)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        raise InputError(f"The adapter {source} does not fit its base ({first_line(error)[:200]}).") from error


def _refuse_code(source: str) -> None:
    """A scorer's own Python code is not run; that a model needs it is known from its configuration."""
    try:
        values, _ = PreTrainedConfig.get_config_dict(_adapter_base(source) or source)
    except (OSError, ValueError) as error:
        raise _unreadable("model", source, error) from error
    auto, known = values.get("auto_map") or {}, str(values.get("model_type")) in CONFIG_MAPPING
    if "AutoModelForSequenceClassification" in auto or (auto and not known):
        raise InputError(
            f"{source} comes with Python code of its own (auto_map), which is not run to score; load it in a reward "
            "function of yours, and name that as function: module:function."
        )


def _check_files(source: str, *, but: str = "") -> None:
    """A folder of a model that is not what its SHA256SUMS says is an `InputError`; one process of several looks."""
    if leads() and os.path.isdir(source):
        try:
            check_folder(Path(source), but=but)
        except OSError as error:
            raise InputError(f"Cannot read the files of {source}: {first_line(error)}.") from error


def _check_code(config: PreTrainedConfig, settings: ModelSettings) -> None:
    """An attention named like a repository is a kernel on a hub: code to download and run."""
    named = str(getattr(config, "_attn_implementation", None) or "")
    if "/" in named and not settings.trust_remote_code:
        raise InputError(f"The model asks for the kernel {named:.90} from a hub, which is code: see trust_remote_code.")


def _check_labels(config: PreTrainedConfig, settings: ModelSettings, num_labels: int) -> None:
    classifies = any("SequenceClassification" in str(name) for name in config.architectures or ())
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
        use_dora=settings.dora,
        fan_in_fan_out=any(isinstance(module, Conv1D) for module in model.modules()),
        target_modules=list(settings.targets) if settings.targets else "all-linear",
        task_type=TaskType[task],
    )
    untie(model, settings.targets or ())
    try:
        with _between_libraries():
            adapted: Any = get_peft_model(model, config)
    except ValueError as error:
        raise InputError(f"LoRA cannot be applied to this model ({first_line(error)}).") from error
    for name, lengths in adapted.named_parameters():
        if "lora_magnitude_vector" in name and not lengths.is_meta and bool((lengths == 0).any()):
            layer = name.removeprefix("base_model.model.").partition(".lora_")[0]
            raise InputError(
                f"lora.dora: {layer} has outputs without any weight, which have no direction; leave it out."
            )
    return adapted


def untie(model: PreTrainedModel, targets: str | Collection[str]) -> bool:
    """Give the head weights of its own where adapters are meant for it or the embedding, and both are one matrix.

    What is added to one would otherwise be added to the other when the adapters are merged. As PEFT does, `targets` are
    compared with the last parts of a module's name, one text as a regular expression with all of it. Returns whether
    it did.
    """
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or getattr(head, "weight", None) is not embedding.weight:
        return False
    names = [name for name, module in model.named_modules() if module is head or module is embedding]
    if isinstance(targets, str):
        meant = any(re.fullmatch(targets, name) for name in names)
    else:
        meant = any(name == target or name.endswith(f".{target}") for name in names for target in targets)
    if meant:
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=head.weight.requires_grad)
        model.config.tie_word_embeddings = model.config.get_text_config().tie_word_embeddings = False
    return meant


def _silence_dropout(config: PreTrainedConfig) -> None:
    """Set every dropout of a config, and of the configs inside it, to 0."""
    for name, value in list(vars(config).items()):
        if isinstance(value, PreTrainedConfig):
            _silence_dropout(value)
        elif isinstance(value, float) and name.endswith(_DROPOUT_ENDINGS):
            setattr(config, name, 0.0)


def _quicken_gelu(model: nn.Module) -> None:
    """Replace the tanh GELU that is spelled out in many operations by the built-in kernel (equal up to rounding)."""
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, NewGELUActivation | FastGELUActivation):
                setattr(module, name, GELUTanh())


def _unreadable(kind: str, source: str, error: Exception) -> InputError:
    local = source.startswith((".", "/", "~")) or source.count("/") > 1
    folder = Path(source)
    if not exists(folder):
        if local:
            return InputError(f"The {kind} folder {source} does not exist.")
        if (sentence := hub_sentence(kind, source, error)) is not None:
            here = difflib.get_close_matches(source, [path.name for path in Path().glob("*/")], n=1)
            return InputError(sentence + (f" There is a folder {here[0]} here." if here else ""))
    with suppress(OSError):  # a file that cannot be read is what the error is about
        for path in sorted(folder.glob("*")):
            if path.is_file() and is_lfs_pointer(path):
                return InputError(
                    f"{path} is a Git LFS pointer, not the file: run `git lfs pull` in {source}, or download it again."
                )
    if kind == "tokenizer" and ("backend tokenizer" in str(error) or "tiktoken" in str(error)):
        if exists(folder / "tokenizer.model"):
            return InputError(
                f"The tokenizer {source} is a SentencePiece file (tokenizer.model), which needs the package "
                "sentencepiece: pip install sentencepiece."
            )
        return InputError(
            f"{source} holds no tokenizer that can be read: there must be a tokenizer.json, or a vocab.json with a "
            "merges.txt; name one in tokenizer.source."
        )
    return InputError(f"Cannot load the {kind} {source}: {first_line(error)}")
