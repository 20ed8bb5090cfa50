"""The first recipe for a model and a data file: what `exalign align MODEL DATA` chooses, writes down and says."""

from __future__ import annotations

import os
import re
import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from transformers import PreTrainedTokenizerBase

from exalign.data.reading import DataSettings, data_suffix, prompt_digest, read_source, settings_of, whole
from exalign.data.record import Record
from exalign.data.shapes import as_messages
from exalign.data.tokenization import TokenLimits, tokenize_records
from exalign.device import device, device_memory
from exalign.errors import InputError
from exalign.methods.method import available, method_class
from exalign.models.loading import check_weights, load_tokenizer, policy_skeleton, read_config
from exalign.models.model_settings import ModelSettings
from exalign.processes import leads
from exalign.rollout.scorers import FunctionScorer
from exalign.run.carry_out import carry_out
from exalign.run.recipe import EvaluateSettings, make_recipe, with_overrides
from exalign.run.runner import Run
from exalign.storage import exists, write_text
from exalign.strict_yaml import dump_yaml
from exalign.terminal import shown

LOOKED_AT = 2000
"""Rows that are read to see what the data is, and of these as many as are tokenised to choose lengths."""
TOKENISED = 500
BYTES_PER_PARAMETER = 16
"""Weights, gradients and AdamW's two moments in float32, where all weights are trained."""
EVALUATED = 64
DIVERGENCES = {"exo": "reverse_kl", "dpo": "forward_kl"}
Target = Literal["preference", "reward", "label"]
"""What methods learn from: preferences, rewards of several answers to a prompt, or labels of one."""


@dataclass(frozen=True)
class Begun:
    """A recipe as a mapping, the file it stands in, and why it is what it is, in a line for each choice."""

    values: dict[str, Any]
    file: Path
    folder: Path
    reasons: list[str]


def align(
    model: str,
    data: str,
    *,
    out: str | Path | None = None,
    methods: Sequence[str] = ("exo",),
    reward: str | None = None,
    reward_model: str | None = None,
    overrides: Sequence[str] = (),
    console: Console | None = None,
) -> Run:
    """Align `model` on `data` without a recipe: choose one, write it beside the result, carry it out.

    `model` is a folder or hub name, `data` a file, folder or hub name of preference pairs, scored completions, or
    prompts; with the last, `reward` (module:function) or `reward_model` says what is good. `methods` are exo, dpo and
    others that fit the data, several to compare them. `overrides` are KEY=VALUE: those of the data
    (columns.prompt=question, split=train) go into the recipe that is chosen, those of the recipe change it. The result
    is in `out` (default runs/MODEL-DATA), the recipe in the file of that name with `.yaml`, to be
    edited for the next time.
    """
    ours = of_data(overrides)
    begun = begin(model, data, ours, out=out, methods=methods, reward=reward, reward_model=reward_model)
    return _carried_out(begun, [text for text in overrides if text not in ours], console)


def of_data(overrides: Sequence[str]) -> list[str]:
    """Those KEY=VALUE that are settings of a data source."""
    return [text for text in overrides if re.split(r"[.=]", text)[0] in DataSettings.model_fields]


def begin(
    model: str,
    data: str,
    reading: Sequence[str] = (),
    *,
    out: str | Path | None = None,
    methods: Sequence[str] = ("exo",),
    reward: str | None = None,
    reward_model: str | None = None,
) -> Begun:
    """Look at the data, read as the settings KEY=VALUE of its source say, and the model, and choose; write nothing."""
    model, scorer = os.path.expanduser(model), _scorer(reward, reward_model)
    settings, records = _rows(model, data, reading)
    values: dict[str, Any] = {"model": {"source": model}}
    target, what = _sources(values, settings, records, scorer, methods)
    reasons = [what + _read_as(settings), _lengths(values, model, records), _weights(values, model)]
    reasons.append(_methods(values, methods, target, len(records)))
    _evaluation(values, scorer)
    return _begun(values, out, f"{_stem(model)}-{_stem(settings.source)}", reasons)


def evidence(
    reference: str,
    policies: Mapping[str, Sequence[str]],
    prompts: str,
    *,
    out: str | Path | None = None,
    reward: str | None = None,
    reward_model: str | None = None,
    reading: Sequence[str] = (),
    console: Console | None = None,
) -> Run:
    """The evidence of a run for policies that were trained elsewhere: choose a recipe, write it beside, carry it out.

    `policies` are folders or hub names, LoRA adapters too, by a name; several of one name are checkpoints in the order
    of training. `reference` is what they were trained from, whose answers they are compared with. `prompts` names
    held-out prompts, or preference pairs, which are enough where nothing scores: `reward` (module:function) or
    `reward_model`. `reading` are KEY=VALUE settings of that data.
    """
    reference, scorer = os.path.expanduser(reference), _scorer(reward, reward_model)
    settings, records = _rows(reference, prompts, reading)
    if scorer is None and not any(record.preferred is not None for record in records):
        raise InputError(
            f"{settings.source} has no preference pairs: say what is good with --reward module:function or "
            "--reward-model MODEL."
        )
    for place in chain.from_iterable(policies.values()):
        check_weights(os.path.expanduser(place))
    used = min(len(records), EVALUATED)
    values: dict[str, Any] = {"model": {"source": reference}, "data": {"evaluation": _said(settings)}}
    reasons = [f"data: {used} of the {_some(records)} rows of {settings.source}{_read_as(settings)}"]
    reasons.append(_lengths(values, reference, records))
    parameters, memory, size = _size(reference)
    if 2 * 4 * parameters > memory / 2:
        values["model"]["dtype"] = "bfloat16"
        said = "in bfloat16, which rounds KLs: two models in float32 would take more than half of the memory"
        reasons.append(f"weights: {said} ({size})")
    if _computes_in_half():
        values["sample"]["precision"] = "bf16"
    values["align"] = {name: {"method": "given", "policies": list(places)} for name, places in policies.items()}
    reasons.append(f"policies: {', '.join(policies)}; {reference}, which they are compared with, is called SFT")
    values["evaluate"] = {} if scorer is None else {"scorer": scorer}
    _evaluation(values, scorer)
    return _carried_out(_begun(values, out, f"evidence-{_stem(settings.source)}", reasons), (), console)


def _carried_out(begun: Begun, overrides: Sequence[str], console: Console | None) -> Run:
    console = (console or Console()) if leads() else Console(quiet=True)
    recipe, is_new = with_overrides(begun.values, overrides, "the recipe chosen"), not exists(begun.file)
    if not recipe.align:
        raise InputError(
            "Nothing is left to align: the recipe chosen holds no method any more; add one, as align.dpo={}."
        )
    write_down(begun, console, overrides)
    run = Run(recipe, begun.folder, console)
    try:
        carry_out(run)
    except InputError:
        if is_new and leads() and not exists(run.path("recipe.yaml")):  # nothing was begun
            begun.file.unlink(missing_ok=True)
        raise
    return run


def _scorer(reward: str | None, reward_model: str | None) -> dict[str, Any] | None:
    if reward is not None and reward_model is not None:
        raise InputError("Give --reward or --reward-model, not both.")
    if reward is not None:
        FunctionScorer(reward)  # before anything is written
        return {"function": reward}
    if reward_model is not None:
        check_weights(os.path.expanduser(reward_model))
        config = read_config(ModelSettings(source=os.path.expanduser(reward_model)), None)
        half = _computes_in_half() and config.dtype == torch.bfloat16
        return {"reward_model": reward_model} | ({"dtype": "bfloat16"} if half else {})
    return None


def _rows(model: str, data: str, reading: Sequence[str]) -> tuple[DataSettings, list[Record]]:
    """How the data is read, and its first rows."""
    settings = settings_of(data, (), reading)
    check_weights(model)
    settings, records = with_messages(settings, load_tokenizer(model))
    if not records:
        raise InputError(
            f"{settings.source} has no usable rows; exalign inspect {settings.source} --model {model} shows what is "
            "in each."
        )
    return settings, records


def with_messages(settings: DataSettings, tokenizer: PreTrainedTokenizerBase) -> tuple[DataSettings, list[Record]]:
    """The settings and the first rows, with prompts that are text as messages where the tokenizer has a chat template.

    Not where `chat` is set, and not of texts whose beginning is the prompt.
    """
    records = list(islice(read_source(whole(settings), Counter()), LOOKED_AT))
    asked = "chat" in settings.model_fields_set or settings.prompt_tokens is not None
    if asked or not tokenizer.chat_template or not any(isinstance(r.prompt, str) and r.prompt.strip() for r in records):
        return settings, records
    return settings.model_copy(update={"chat": True}), [as_messages(record, Counter()) for record in records]


def _said(settings: DataSettings) -> dict[str, Any]:
    """What of a source is not its default, and a `chat` that was said to be false."""
    said = settings.model_dump(mode="json", exclude_defaults=True)
    return said | ({"chat": settings.chat} if "chat" in settings.model_fields_set else {})


def _read_as(settings: DataSettings) -> str:
    how = "; prompts go through the model's chat template as messages of the user, or turns of Human and Assistant"
    return f"{how} (chat=false: as text)" if settings.chat else ""


def _some(records: Sequence[Record]) -> str:
    return f"{len(records):,}" + ("+" if len(records) == LOOKED_AT else "")


def _begun(values: dict[str, Any], out: str | Path | None, named: str, reasons: list[str]) -> Begun:
    name = re.sub(r"[^A-Za-z0-9._-]+", "-", named).strip("-._")[:90] or "aligned"
    values = {"name": name, **values}
    make_recipe(values, "the recipe chosen")
    folder = Path(out).expanduser() if out is not None else Path("runs") / name
    if folder.name in ("", ".."):
        raise InputError(f"--out {out} has no name, by which the recipe stands beside it; name one, as runs/{name}.")
    return Begun(values, folder.with_name(f"{folder.name}.yaml"), folder, reasons)


def write_down(begun: Begun, console: Console, overrides: Sequence[str] = ()) -> None:
    """Write the recipe and say what was chosen; one that stands there and was edited is an `InputError`.

    `overrides` are not written: they belong to the command that carries it out.
    """
    text = "# Chosen by exalign; every setting may be changed: exalign recipe --explain\n" + dump_yaml(begun.values)
    where = [] if begun.folder == Path("runs") / begun.values["name"] else ["--run", str(begun.folder)]
    again = shlex.join(["exalign", "run", str(begun.file), *where, *overrides])
    if exists(begun.file) and begun.file.read_text(encoding="utf-8", errors="replace") != text:
        raise InputError(
            f"{begun.file} is there already, edited or chosen for other data or options: carry it out with "
            f"{again}, remove it, or choose another place with --out."
        )
    write_text(begun.file, text)
    for reason in begun.reasons:
        console.print(shown(f"• {reason}"), soft_wrap=True)
    console.print(shown(f"• recipe: {begun.file}; edit it and carry it out with {again}"), soft_wrap=True)


def _stem(name: str) -> str:
    path = Path(name)
    return path.name[: len(path.name) - len(data_suffix(path) or "")] or path.absolute().name


def _sources(
    values: dict[str, Any],
    settings: DataSettings,
    records: Sequence[Record],
    scorer: dict[str, Any] | None,
    methods: Sequence[str],
) -> tuple[Target, str]:
    """What the methods learn from, and what the data is and how it is used."""
    source = _said(settings)
    pairs = sum(record.preferred is not None for record in records)
    ranked = sum(record.rewards is not None and len(record.completions) > 1 for record in records)
    some = _some(records)
    if len({prompt_digest(record) for record in records}) < 2:
        raise InputError(f"{settings.source} has one prompt, so none can be held out for the evidence; give more.")
    # Half of EVALUATED prompts for the evidence, where these are between a twentieth and a fifth of all.
    share = round(min(max(0.05, EVALUATED / 2 / len(records)), 0.2), 2)
    own = scorer is not None and any(_on_own_samples(name) for name in methods)
    if pairs + ranked >= len(records) / 2 and (pairs or scorer is None) and not own:
        what = "preference pairs" if pairs >= ranked else "prompts with scored completions, used as pairs"
        values["data"] = {"preferences": source, "held_out": share}
        most = EVALUATED if device().type == "cpu" else EvaluateSettings().pairs
        kept_out = f"{share:.0%} of the prompts, at most {most}, are held out"
        return "preference", f"data: {some} {what}; {kept_out} and never trained on"
    labelled = scorer is None and any(record.rewards is not None for record in records)
    if labelled and set(methods) != {"kto"}:
        raise InputError(
            f"{settings.source} has one answer with a reward or label to each prompt, which --method kto takes; or say "
            "what is good with --reward module:function or --reward-model MODEL, and own samples are drawn and scored."
        )
    if scorer is None and not labelled:
        raise InputError(
            f"{settings.source} has {some} rows without a preference or rewards: say what is good with --reward "
            "module:function or --reward-model MODEL, or give rows with prompt, chosen and rejected."
        )
    kept = max(min(round(share * len(records)), EVALUATED), 1)
    used, start = "rewards" if (ranked and not own) or labelled else "prompts", settings.skip
    rows = sum(len(record.completions) for record in records[:kept]) if settings.join else kept
    rest = {} if settings.limit is None else {"limit": max(settings.limit - rows, 1)}
    values["data"] = {used: {**source, "skip": start + rows, **rest}}
    values["data"]["evaluation"] = {**source, "skip": start, "limit": rows}
    if scorer is not None:
        values["score" if used == "prompts" else "evaluate"] = {"scorer": scorer}
    what = "prompts; 4 completions of each are drawn and scored"
    if used == "rewards":
        what = "answers with a label" if labelled else "prompts with scored completions"
    held = {prompt_digest(record) for record in records[:kept]}
    twice = sum(prompt_digest(record) in held for record in records[kept:])
    again = f", but {twice:,} later rows have their prompts and are trained on: remove them" if twice else ""
    return (
        "label" if labelled else "reward",
        f"data: {some} {what}; the first {rows} rows are held out for the evidence{again}",
    )


def _lengths(values: dict[str, Any], model: str, records: Sequence[Record]) -> str:
    """Limits that leave 99 of 100 texts whole, as far as the model's positions allow."""
    tokenizer = load_tokenizer(model)
    config = policy_skeleton(ModelSettings(source=model)).config.get_text_config()
    positions = getattr(config, "max_position_embeddings", None) or 4096
    some = records[:: max(len(records) // TOKENISED, 1)][:TOKENISED]
    limits = TokenLimits(max_prompt_tokens=positions, max_completion_tokens=positions)
    groups = list(tokenize_records(some, tokenizer, counts=Counter(), limits=limits))
    if not groups:
        raise InputError("No row can be tokenised; exalign inspect DATA --model MODEL shows what happens to each.")
    prompts = sorted(len(group.prompt_ids) for group in groups)
    completions = sorted(len(ids) for group in groups for ids in group.completion_ids)
    longest = [lengths[int(0.99 * (len(lengths) - 1))] if lengths else 256 for lengths in (prompts, completions)]
    prompt, completion = (min(-(-length // 32) * 32, positions // 2) for length in longest)
    values["data"] |= {"max_prompt_tokens": prompt, "max_completion_tokens": completion}
    values["sample"] = {"max_new_tokens": min(completion, 128)}
    drawn = f"samples up to {values['sample']['max_new_tokens']} (sample.max_new_tokens)"
    answers = f", answers up to {completion}" if completions else ""
    return f"lengths: prompts up to {prompt} tokens{answers} (99 of 100 rows are shorter), {drawn}"


def _weights(values: dict[str, Any], model: str) -> str:
    """All weights where they, their gradients and AdamW's moments take at most half of the memory, else LoRA."""
    parameters, memory, size = _size(model)
    fits = BYTES_PER_PARAMETER * parameters <= memory / 2
    if not fits:
        values["model"] |= {"lora": {"rank": 16}, **({} if 4 * parameters <= memory / 2 else {"dtype": "bfloat16"})}
    return f"weights: {'all are trained' if fits else 'LoRA of rank 16'} ({size})"


def _size(model: str) -> tuple[int, float, str]:
    """The model's parameters, the bytes of memory here, and both in words."""
    parameters = sum(parameter.numel() for parameter in policy_skeleton(ModelSettings(source=model)).parameters())
    here = device()
    memory = device_memory(here) or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    where = "GPU" if here.type == "cuda" else here.type.upper()
    return parameters, memory, f"{parameters / 1e6:,.0f} million parameters, {memory / 2**30:,.0f} GiB on the {where}"


def _computes_in_half() -> bool:
    """Whether there is an accelerator that has instructions for bfloat16, unlike a T4."""
    kind = device().type
    return kind != "cpu" and (kind != "cuda" or torch.cuda.is_bf16_supported(including_emulation=False))


def _methods(values: dict[str, Any], names: Sequence[str], target: Target, rows: int) -> str:
    batch = next(size for size in (64, 32, 16, 8, 4) if size == 4 or rows >= 24 * size)
    rate = 1e-4 if "lora" in values["model"] else 5e-6
    steps: dict[str, Any] = {"learning_rate": rate, "batch_prompts": batch, "save_policies": 3}
    if _computes_in_half():
        steps |= {"precision": "bf16"}
        values["sample"]["precision"] = "bf16"
    takes = {"preferences"} if target == "preference" else {"rewards"}
    if "prompts" in values["data"]:
        takes.add("prompts")
    known = {name: _own(name, target) for name in (*DIVERGENCES, *available()) if name not in ("given", "matching")}
    methods = {name: method_class(own.get("method", "matching"))(**own) for name, own in known.items()}
    fitting = [name for name, method in methods.items() if method.trains_on in takes and target != "label"] or ["kto"]
    for name in names:
        if name not in fitting:
            why = "does not train on what the data gives" if name in methods else "is none"
            raise InputError(f"--method {name[:100]} {why}; here there are {', '.join(fitting)}.")
    suffix = "-pref" if target == "preference" else "-rw"
    values["align"] = {name + suffix * (name in DIVERGENCES): known[name] | steps for name in names}
    lines = "; ".join(methods[name].line for name in names)
    others = f" (--method {','.join(fitting[:2])} compares two)" if len(names) == 1 < len(fitting) else ""
    return f"method: {lines}; one epoch in steps of {batch} prompts{others}"


def _on_own_samples(name: str) -> bool:
    return name in available() and name != "given" and method_class(name)().trains_on == "prompts"


def _own(name: str, target: Target) -> dict[str, Any]:
    """The settings of a method by its name, or of EXO and DPO, which are two divergences of one."""
    if name not in DIVERGENCES:
        return {"method": name, **({"target": "reward"} if name == "kto" and target == "label" else {})}
    if target == "preference":
        known = {"divergence": DIVERGENCES[name], "target": "preference", "beta_pi": 0.5}
        return known | ({"epsilon": 0.0} if name == "dpo" else {})
    # Whatever the scale of the rewards, the optimum that is aimed at is about a nat away.
    return {"divergence": DIVERGENCES[name], "target": "reward", "beta_pi": 1.0, "beta_r_std": 0.7}


def _evaluation(values: dict[str, Any], scorer: dict[str, Any] | None) -> None:
    values.setdefault("evaluate", {}).update({"prompts": EVALUATED, "samples": 2})
    if device().type == "cpu" or "preferences" not in values["data"]:
        values["evaluate"]["pairs"] = EVALUATED
    if scorer is not None:
        small = {"pool_prompts": 16, "pool_samples": 32, "density_prompts": 2}
        values["evaluate"] |= small if device().type == "cpu" else {"pool_prompts": EVALUATED}
