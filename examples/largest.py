"""A reward that can be checked: a small model learns from its own answers, by exalign's recipes.

`python examples/largest.py [FOLDER]` asks for the largest of three digits, teaches a model of 0.2 million parameters
from answers of which two in three are random, and aligns it on its own samples by EXO, RLOO and GRPO. The reward
function below reads the column `answer` of the data. Some minutes on a CPU; ends with a report.
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
    """1 for the right answer, else 0."""
    return [float(text.strip() == right) for text, right in zip(completions, answer, strict=True)]


def write_questions(folder: Path, *, wrong: float = 2 / 3, seed: int = 0) -> None:
    """All thousand questions: 128 for the evaluation, the others to learn from, four times each."""
    rng = random.Random(seed)
    asked = [(f"{a} {b} {c} :", str(max(a, b, c))) for a, b, c in itertools.product(range(10), repeat=3)]
    rng.shuffle(asked)
    rows = {
        "evaluation": [{"prompt": prompt, "answer": answer} for prompt, answer in asked[:128]],
        "prompts": [{"prompt": prompt, "answer": answer} for prompt, answer in asked[128:]],
        "sft": [
            {"prompt": prompt, "completion": f" {rng.randrange(10) if rng.random() < wrong else answer}"}
            for prompt, answer in asked[128:]
            for _ in range(4)
        ],
    }
    folder.mkdir(parents=True, exist_ok=True)
    for name, found in rows.items():
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found), encoding="utf-8")


def recipe_of(folder: Path) -> dict[str, object]:
    own = {"learning_rate": 1e-3, "batch_prompts": 64, "epochs": 3, "save_policies": 3}
    return {
        "name": "largest",
        "temperature": 1.0,
        "model": {"config": {"model_type": "gpt2", "n_layer": 2, "n_embd": 96, "n_head": 4, "n_positions": 32}},
        "tokenizer": {"vocab_size": 300},
        "data": {
            **{name: {"source": str(folder / f"{name}.jsonl")} for name in ("sft", "prompts", "evaluation")},
            "max_prompt_tokens": 16,
            "max_completion_tokens": 4,
        },
        "sft": {"learning_rate": 2e-3, "epochs": 4, "batch_prompts": 64},
        "sample": {"num_completions": 8, "max_new_tokens": 4, "batch_completions": 512},
        "score": {"scorer": {"function": "largest:correct"}},
        "align": {
            "exo": {**own, "fresh_every": 1, "beta_r": 0.1},
            "rloo": {**own, "method": "rloo", "beta": 0.1},
            "grpo": {**own, "method": "grpo", "fresh_every": 2, "passes": 2},
        },
        "evaluate": {"prompts": 128, "samples": 4, "pool_prompts": 32, "pool_samples": 64},
    }


if __name__ == "__main__":
    place = Path(sys.argv[1] if len(sys.argv) > 1 else "runs/largest")
    sys.path.insert(0, str(Path(__file__).parent))  # where `largest:correct` is found
    write_questions(place / "data")
    run_recipe(make_recipe(recipe_of(place / "data")), folder=place / "run")
