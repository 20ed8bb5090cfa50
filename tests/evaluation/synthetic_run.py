"""A run folder whose truth is known, written as a real run writes it.

Rewards of π_sft are N(m_x, 1) for a prompt x. A method with efficiency e, at distance s, shifts a latent Gaussian by
s: its samples have log π_θ − log π_sft = s z − s²/2 with z ~ N(s, 1), so KL = s²/2, and reward m_x + e z + √(1 − e²) w.
The best possible is e = 1: reward √(2 KL) above π_sft. On the pool's samples, which have reward m_x + u, the last
checkpoint of a method has the same log-ratio s z − s²/2 with z = e u + √(1 − e²) v, v ~ N(0, 1).
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from exalign.data.record import Completion, Prompt, Record
from exalign.data.store import Header, write_records
from exalign.data.store import read_records as read

SENTENCE = "the film was a quiet surprise with warm acting and its slow story asks for more patience than most have"
WORDS = SENTENCE.split()


@dataclass(frozen=True)
class World:
    """What to write. `methods` maps a name to (efficiency, distances of its checkpoints)."""

    methods: Mapping[str, tuple[float, Sequence[float]]] = field(
        default_factory=lambda: {
            "exo-rw": (0.92, (0.5, 0.9, 1.3, 1.6)),
            "dpo-rw": (0.70, (0.5, 1.0, 1.5, 1.9)),
            "exo-pref": (0.80, (0.4, 0.7, 1.0, 1.2)),
            "dpo-pref": (0.60, (0.4, 0.8, 1.2, 1.4)),
        }
    )
    num_prompts: int = 48
    num_samples: int = 4
    pool: int = 64
    density: int = 3
    reference_texts: bool = True
    ragged: bool = False
    steps: int = 120
    hostile_text: str | None = None
    chat: bool = False
    seed: int = 0
    scorer: bool = True
    pairs: int = 0
    """Held-out preference pairs, on which a method's margin is N(efficiency · distance, 1)."""


def write_run(run: Path, world: World) -> Path:
    """Write the run folder and return it."""
    generator = np.random.default_rng(world.seed)
    levels = generator.normal(0.3, 0.8, world.num_prompts)
    _write_evaluation(run, world, levels, generator)
    _write_training(run, world, generator)
    run.joinpath("recipe.yaml").write_text(_recipe(world), encoding="utf-8")
    environment = {"python": "3.11.9", "torch": "2.13.0", "device": "cpu", "threads": 2, "started": "2026-01-01"}
    run.joinpath("environment.json").write_text(json.dumps(environment), encoding="utf-8")
    return run


def _write_evaluation(run: Path, world: World, levels: np.ndarray, generator: np.random.Generator) -> None:
    header = Header(model="sft/model", temperature=0.8, seed=0, counts={"prompts_cut": 3, "unfinished": 11})
    evaluation = run / "evaluation"
    prompts = []
    for i, level in enumerate(levels):
        texts = (Completion(_text(generator, 30), reward=float(level + 0.4)),) if world.reference_texts else ()
        prompts.append(Record(f"p{i}", _prompt(world, generator), texts))
    write_records(evaluation / "prompts", prompts, header)
    bare = [Record(record.id, record.prompt) for record in prompts]
    write_records(evaluation / "sft" / "samples", _samples(world, bare, levels, 0.0, 0.0, generator), header)
    for name, (efficiency, distances) in world.methods.items():
        for i, distance in enumerate(distances):
            step = round(world.steps * (i + 1) / len(distances))
            records = _samples(world, bare, levels, efficiency, distance, generator)
            write_records(evaluation / name / f"step-{step:06d}" / "samples", records, header)
    if world.pairs:
        _write_pairs(evaluation / "pairs", world)
    if not world.scorer:
        for folder in [evaluation / "prompts", *evaluation.glob("**/samples")]:
            bare = [replace(r, completions=tuple(replace(c, reward=None) for c in r.completions)) for r in read(folder)]
            write_records(folder, bare, header)
    elif world.pool:
        pool = [
            Record(
                record.id,
                record.prompt,
                tuple(Completion("", reward=float(level + z)) for z in generator.normal(size=world.pool)),
            )
            for record, level in zip(bare, levels, strict=True)
        ]
        write_records(evaluation / "pool", pool, header)
        _write_density(evaluation / "density", world, pool[: world.density], levels)


def _write_pairs(folder: Path, world: World) -> None:
    generator = np.random.default_rng(world.seed + 2)
    for name, (efficiency, distances) in world.methods.items():
        for i, distance in enumerate(distances):
            records = []
            for pair in range(world.pairs):
                ratios = (efficiency * distance + generator.normal() - distance, -distance)
                completions = tuple(
                    Completion(_text(generator, 9), logprob=r - 30, reference_logprob=-30.0) for r in ratios
                )
                records.append(Record(f"pair{pair}", _text(generator, 10), completions, preferred=0))
            step = round(world.steps * (i + 1) / len(distances))
            write_records(folder / name / f"step-{step:06d}", records, Header())


def _write_density(folder: Path, world: World, pool: Sequence[Record], levels: np.ndarray) -> None:
    generator = np.random.default_rng(world.seed + 1)
    references = [-60 + 15 * generator.normal(size=len(record.completions)) for record in pool]
    for name, (efficiency, distances) in world.methods.items():
        distance = distances[-1]
        records = []
        for record, level, reference in zip(pool, levels, references, strict=False):
            u = np.array(record.rewards) - level
            z = efficiency * u + math.sqrt(1 - efficiency**2) * generator.normal(size=len(u))
            logps = zip(record.completions, reference + distance * z - distance**2 / 2, reference, strict=True)
            completions = tuple(replace(c, logprob=float(p), reference_logprob=float(r)) for c, p, r in logps)
            records.append(replace(record, completions=completions))
        write_records(folder / name / "samples", records, Header(temperature=0.8))


def _samples(
    world: World,
    prompts: Sequence[Record],
    levels: np.ndarray,
    efficiency: float,
    distance: float,
    generator: np.random.Generator,
) -> list[Record]:
    records = []
    for record, level in zip(prompts, levels, strict=True):
        count = int(generator.integers(1, world.num_samples + 1)) if world.ragged else world.num_samples
        completions = []
        for _ in range(count):
            z, w = generator.normal(distance), generator.normal()
            length = int(generator.integers(12, 60))
            reference = -2.5 * length + generator.normal()
            text = world.hostile_text if world.hostile_text is not None else _text(generator, length)
            completions.append(
                Completion(
                    text=text,
                    token_ids=tuple(range(length)),
                    finish_reason="stop" if generator.random() < 0.9 else "length",
                    logprob=reference + distance * z - distance**2 / 2,
                    reference_logprob=reference,
                    reward=float(level + efficiency * z + math.sqrt(1 - efficiency**2) * w),
                )
            )
        records.append(Record(record.id, record.prompt, tuple(completions)))
    return records


def _write_training(run: Path, world: World, generator: np.random.Generator) -> None:
    stages = {"sft": 45.2, "preferences": 12.9, "reward": 20.1, "rollouts": 33.3, "scored": 5.5}
    for stage, seconds in stages.items():
        _done(run / stage, seconds, {"rows": 400, "pairs_equal": 7} if stage == "preferences" else {"rows": 400})
    for stage, start in (("sft", 4.5), ("reward", 0.69)):
        _metrics(run / stage, [{"loss": start * math.exp(-i / 60) + 0.1 * generator.random()} for i in range(120)])
    for name in world.methods:
        folder = run / "align" / name
        rows = []
        for i in range(world.steps):
            done = i / world.steps
            rows.append(
                {
                    "loss": 1.2 - 0.7 * done + 0.1 * generator.normal(),
                    "kl": 3 * done**1.5 + 0.05 * generator.random(),
                    "log_ratio_spread": 2 * done,
                    "saturated": 0.02 * done,
                    "reward_spread": 9 + generator.normal(),
                    "reward": 0.3 + done + 0.1 * generator.normal(),
                    "grad_norm": 1 + generator.random(),
                    "learning_rate": 1e-4 * (1 - done),
                    "completion_tokens": 40 - 4 * done,
                    "skipped": 0,
                    "tokens": 2000,
                    "tokens_per_second": 5000 + 100 * generator.random(),
                    "seconds": 0.4,
                }
            )
        _metrics(folder, rows)
        (folder / "model").mkdir()
        settings = _settings(name)
        family, target = "exo" if settings["divergence"] == "reverse_kl" else "dpo", settings["target"]
        described = {"label": family.upper(), "family": family, "target": target, "settings": settings}
        described["beta"] = settings["beta_pi"] * settings["beta_r"] if target == "reward" else None
        (folder / "method.json").write_text(json.dumps(described), encoding="utf-8")
        _done(folder, 60 + 10 * generator.random(), {"groups": 400, "completions_cut": 5})
    _done(run / "evaluation", 80.0, {})


def _metrics(folder: Path, rows: Sequence[dict[str, float]]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps({"step": i + 1, **row}) for i, row in enumerate(rows)]
    folder.joinpath("metrics.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")


def _done(folder: Path, seconds: float, counts: dict[str, int]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    value = {"fingerprint": "0123456789abcdef", "counts": counts, "seconds": seconds}
    folder.joinpath("done.json").write_text(json.dumps(value), encoding="utf-8")


def _prompt(world: World, generator: np.random.Generator) -> Prompt:
    text = world.hostile_text if world.hostile_text is not None else _text(generator, 10)
    return ({"role": "system", "content": "Be kind."}, {"role": "user", "content": text}) if world.chat else text


def _text(generator: np.random.Generator, length: int) -> str:
    return " ".join(generator.choice(WORDS, length))


def _recipe(world: World) -> str:
    lines = [
        "name: synthetic",
        "seed: 0",
        "temperature: 0.8",
        *(["oracle: {max_tokens: 512}"] if world.scorer else []),
        "evaluate:",
        "  kl_budget: 0.8",
        "align:",
    ]
    for name in world.methods:
        lines.append(f"  {name}: {{{', '.join(f'{key}: {value}' for key, value in _settings(name).items())}}}")
    return "\n".join(lines) + "\n"


def _settings(name: str) -> dict[str, str | float]:
    divergence = "reverse_kl" if name.startswith("exo") else "forward_kl"
    target = "preference" if "pref" in name else "reward"
    return {"divergence": divergence, "target": target, "beta_pi": 0.1, "beta_r": 0.1}
