"""A reward that can be checked: a small model that adds badly learns from its own answers, with exalign's recipes.

`python examples/sums.py [FOLDER]` makes sums of three digits on the spot, teaches a model of 0.2 million parameters from
answers of which two in three are wrong, and aligns it on its own samples by EXO, RLOO and GRPO at the same β. The
reward function below reads the column `answer` of the data. Two minutes on a CPU; ends with a table and a report.
"""

from __future__ import annotations

import itertools
import json
import random
import sys
from pathlib import Path

from exalign.run.carry_out import run_recipe
from exalign.run.recipe import make_recipe


def correct(prompts: list[str], completions: list[str], answer: list[str]) -> list[float]:
    """1 for the right sum, 0.1 for any number of two digits, else 0."""
    return [
        1.0 if text.strip() == right else 0.1 if text.strip().isdigit() and len(text.strip()) == 2 else 0.0
        for text, right in zip(completions, answer, strict=True)
    ]


def write_sums(folder: Path, *, wrong: float = 2 / 3, seed: int = 0) -> None:
    """All sums of three digits: 128 for the evaluation, the others to learn from, each shown four times."""
    rng = random.Random(seed)
    sums = [(f"{a} + {b} + {c} =", a + b + c) for a, b, c in itertools.product(range(10), repeat=3)]
    rng.shuffle(sums)
    rows = {
        "evaluation": [{"prompt": prompt, "answer": f"{total:02}"} for prompt, total in sums[:128]],
        "prompts": [{"prompt": prompt, "answer": f"{total:02}"} for prompt, total in sums[128:]],
        "sft": [
            {"prompt": prompt, "completion": f" {rng.randrange(28) if rng.random() < wrong else total:02}"}
            for prompt, total in sums[128:]
            for _ in range(4)
        ],
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, found in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found), encoding="utf-8")


def recipe_of(folder: Path) -> dict[str, object]:
    own = {"learning_rate": 3e-4, "batch_prompts": 32, "epochs": 4, "save_policies": 4}
    return {
        "name": "sums",
        "temperature": 1.0,
        "model": {"config": {"model_type": "gpt2", "n_layer": 2, "n_embd": 96, "n_head": 4, "n_positions": 32}},
        "tokenizer": {"vocab_size": 300},
        "data": {
            **{name: {"source": str(folder / f"{name}.jsonl")} for name in ("sft", "prompts", "evaluation")},
            "max_prompt_tokens": 16,
            "max_completion_tokens": 6,
        },
        "sft": {"learning_rate": 2e-3, "epochs": 6, "batch_prompts": 64},
        "sample": {"num_completions": 8, "max_new_tokens": 6, "batch_completions": 256},
        "score": {"scorer": {"function": "sums:correct"}},
        "align": {
            "exo": {**own, "fresh_every": 1, "beta_r": 0.1},
            "rloo": {**own, "method": "rloo", "beta": 0.1},
            "grpo": {**own, "method": "grpo", "fresh_every": 2, "passes": 2},
        },
        "evaluate": {"prompts": 128, "samples": 8, "pool_prompts": 32, "pool_samples": 64},
    }


if __name__ == "__main__":
    place = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/sums")
    sys.path.insert(0, str(Path(__file__).parent))  # where `sums:correct` is found
    write_sums(place / "data")
    run_recipe(make_recipe(recipe_of(place / "data")), folder=place / "run")
