"""A policy of a run on the hub, with a card that says what it was made from, how, and what it achieved."""

from __future__ import annotations

from hashlib import sha256
from pathlib import Path
from typing import Any

import yaml

from exalign.checksums import NAME, read_sums, sums_text
from exalign.data.reading import looks_local
from exalign.errors import InputError, hub_sentence
from exalign.evaluation.run_folder import RunFolder
from exalign.evaluation.schema import Evidence, FrontierPoint, MethodEvidence
from exalign.models.model_settings import adapter_base
from exalign.redaction import redact_values
from exalign.report.wording import interval, number, percent
from exalign.storage import exists


def publish(
    run: Path, method: str, name: str, *, step: int | None = None, private: bool = False, preview: bool = False
) -> str:
    """Upload a method's policy to the repository NAME of the hub, in one commit; the address of it. A `preview` is the
    card and the files with their bytes, of which nothing is uploaded.

    `step` is one of those evaluated (of a sweep its number); None: the one that the report ships, else the last. A run
    without evidence, an unknown method or step, and a hub that refuses are `InputError`s.
    """
    from huggingface_hub import CommitOperationAdd, HfApi

    folder = RunFolder(run)
    evidence = folder.read_evidence()
    found, point = chosen(evidence, method, step)
    place = folder.policy(method, point.step)
    if not (place / "config.json").is_file() and not (place / "adapter_config.json").is_file():
        raise InputError(f"{place} holds no model of this run: there is nothing to upload.")
    if (base := adapter_base(place)) is not None and _is_local(base):
        raise InputError(f"{place} is an adapter on {base}, which nobody else has; align again with lora.save: merged.")
    files = [file for file in sorted(place.rglob("*")) if file.is_file() and file.name != "README.md"]
    page = card(evidence, found, point, folder.recipe_values(), adapter=base is not None)
    if preview:
        listed = "".join(f"{file.relative_to(place).as_posix()}  {file.stat().st_size:,} bytes\n" for file in files)
        return f"{page}\n{listed}"
    whole: dict[str, str | bytes] = {file.relative_to(place).as_posix(): str(file) for file in files}
    whole["README.md"] = page.encode()
    if sums := read_sums(place):  # with which a downloaded folder is compared
        whole[NAME] = sums_text({**sums, "README.md": sha256(page.encode()).hexdigest()}).encode()
    parts = [CommitOperationAdd(name, content) for name, content in whole.items()]
    api = HfApi()
    try:
        address = api.create_repo(name, private=private, exist_ok=True)
        api.create_commit(address.repo_id, parts, commit_message=f"{found.called} by exalign, {found.at(point.step)}")
    except Exception as error:
        lost = "The hub cannot be reached, or takes nothing from you."
        said = lost if hub_sentence("model", name, error) else " ".join(str(error).split())[:200]
        raise InputError(
            f"{name} was not uploaded: {said} Writing needs a token: hf auth login, or HF_TOKEN."
        ) from None
    return str(address)


def chosen(evidence: Evidence, method: str, step: int | None = None) -> tuple[MethodEvidence, FrontierPoint]:
    """A method and its checkpoint at `step`, without one that which the report ships, else the last."""
    found = next((each for each in evidence.methods if each.name == method and each.points), None)
    if found is None:
        known = ", ".join(each.name for each in evidence.methods if each.points) or "none"
        raise InputError(f"{method[:100]!r} is no evaluated method of this run; there are {known}.")
    if step is None:
        shipped = evidence.verdict
        step = shipped.step if shipped is not None and shipped.method == method else found.points[-1].step
    point = next((each for each in found.points if each.step == step), None)
    if point is None:
        raise InputError(f"{method} was not evaluated at step {step}; {[each.step for each in found.points]} were.")
    return found, point


def card(
    evidence: Evidence, method: MethodEvidence, point: FrontierPoint, recipe: dict[str, Any], *, adapter: bool = False
) -> str:
    """The model card in Markdown: front matter, what was made from what, results with intervals, warnings, settings.

    Data and models that are files or folders of a machine are not named.
    """
    base = (recipe.get("model") or {}).get("source")
    base = None if base is None or _is_local(base) else base
    data = sorted({name for name in _sources(recipe.get("data") or {}) if not _is_local(name)})
    front = {
        "library_name": "peft" if adapter else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["exalign", "alignment"],
    }
    front |= ({"base_model": base} if base else {}) | ({"datasets": data} if data else {})
    settings = yaml.safe_dump(redact_values(_unnamed(method.settings)), sort_keys=False, allow_unicode=True)
    parts = [
        f"---\n{yaml.safe_dump(front, sort_keys=False)}---\n# {base or evidence.name}, aligned by {method.called}",
        f"{method.line or method.called}, {method.at(point.step)}. It started from the supervised policy, "
        f"{base or 'a model of the run'}, to which KL is measured; data: {', '.join(data) or 'local files'}. Trained "
        "and evaluated with exalign.",
        f"## Results\nOn {evidence.num_prompts:,} held-out prompts at τ = {evidence.temperature or 1:g}; in brackets "
        f"{100 * evidence.confidence:.0f} % intervals over prompts.\n\n{_results(evidence, point)}",
    ]
    if evidence.warnings:
        parts.append("## To be known before use\n" + "\n".join(f"- {sentence}" for sentence in evidence.warnings))
    parts.append(f"## Settings\n```yaml\n{settings}```")
    return "\n\n".join(parts) + "\n"


def _results(evidence: Evidence, point: FrontierPoint) -> str:
    sft = evidence.sft
    rows = [("KL to the supervised policy (nats)", "0", interval(point.kl))]
    if point.reward is not None:
        rows.append(("mean reward", interval(sft.reward if sft else None), interval(point.reward)))
        rows.append(("gain in reward", "–", interval(point.gain)))
    if point.win_vs_sft is not None:
        rows.append(("win rate against the supervised policy", "–", percent(point.win_vs_sft.rate)))
    if point.held_out is not None:
        rows.append(("held-out pairs right", "–", percent(point.held_out.accuracy)))
    rows.append(("tokens of an answer", number(sft.tokens if sft else None), number(point.tokens)))
    lines = ["| | supervised policy | this model |", "|---|---|---|"]
    return "\n".join(lines + [f"| {' | '.join(row)} |" for row in rows])


def _is_local(name: str) -> bool:
    """Whether this is a file or folder, here or where the run was made."""
    return exists(Path(name)) or looks_local(name)


def _unnamed(value: Any) -> Any:
    """Settings without the names of local models."""
    if not isinstance(value, dict):
        return value
    local = {"source"} if _is_local(str(value.get("source"))) else set()
    return {name: "a local model" if name in local else _unnamed(inner) for name, inner in value.items()}


def _sources(value: Any) -> list[str]:
    """Every `source` in the recipe's data."""
    if isinstance(value, list):
        return [name for each in value for name in _sources(each)]
    if not isinstance(value, dict):
        return []
    own = [str(value["source"])] if "source" in value else []
    return own + [name for each in value.values() for name in _sources(each)]
