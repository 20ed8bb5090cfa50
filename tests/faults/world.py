"""A whole run in seconds: the demo's world, a model of one layer, every kind of stage, each with several parts.

Small numbers, but nothing is simpler than in a long run: there are several shards of samples, several checkpoints and
policies of every training, a pool, a method of each kind, and PPO.
"""

from __future__ import annotations

import shutil
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from exalign.data.synthetic import write_world
from exalign.run.recipe import load_recipe
from exalign.run.stages import plan
from exalign.storage import read_sealed
from faults.starts import Starter

RECIPE = """
name: faults
seed: 0
temperature: 1.0
model: {{config: {{model_type: gpt2, n_layer: 1, n_embd: 16, n_head: 2, n_positions: 96}}}}
tokenizer: {{source: {world}/tokenizer}}
data:
  sft: {{source: {world}/sft.jsonl}}
  prompts: {{source: {world}/prompts.jsonl}}
  evaluation: {{source: {world}/test.jsonl}}
  max_prompt_tokens: 24
  max_completion_tokens: 56
sft: {{learning_rate: 3e-3, epochs: 2, batch_prompts: 8, checkpoint_every: 3, save_policies: 2}}
preferences: {{scorer: {{function: "exalign.data.synthetic:reward"}}}}
reward: {{learning_rate: 1e-3, epochs: 1, batch_prompts: 16, checkpoint_every: 3}}
sample: {{num_completions: 2, max_new_tokens: 6}}
score: {{scorer: {{stage: reward}}}}
align:
  exo-rw: {{learning_rate: 1e-3, batch_prompts: 64, beta_pi: 0.5, checkpoint_every: 2, save_policies: 2}}
  dpo-pref:
    {{learning_rate: 1e-3, batch_prompts: 32, beta_pi: 0.5, divergence: forward_kl, target: preference,
     checkpoint_every: 2}}
  fresh: {{learning_rate: 1e-3, batch_prompts: 64, fresh_every: 2, passes: 2, checkpoint_every: 1}}
  ppo:
    {{method: ppo, learning_rate: 1e-3, critic_learning_rate: 1e-3, batch_prompts: 32, rollout_prompts: 64, passes: 1,
     save_policies: 1, checkpoint_every: 1}}
evaluate:
  {{scorer: {{function: "exalign.data.synthetic:reward"}}, prompts: 8, samples: 2, pool_prompts: 4, pool_samples: 8}}
"""

RECIPE_FILE = "recipe.yaml"

STAGES = {
    "SFT": ("sft", ("sft",)),
    "reward": ("reward", ("preferences", "reward")),
    "sample": ("sample", ("rollouts",)),
    "score": ("score", ("scored",)),
    "align": ("align", ("reference", "align/exo-rw", "align/dpo-pref", "align/fresh")),
    "PPO": ("align", ("align/ppo",)),
    "evaluate": ("evaluate", ("evaluation",)),
    "whole run": ("run", ("",)),
}
"""What is killed: the command, and the folders that it has to fill again."""


@dataclass(frozen=True)
class World:
    """The recipe and a finished run that nothing disturbed."""

    recipe: Path
    finished: Path
    stages: dict[str, tuple[str, ...]]
    """What every stage needs."""

    def before(self, stage: str, folder: Path) -> list[str]:
        """Copy of the finished run as it was before `stage`, as `folder`; the command that carries the stage out."""
        command, _ = STAGES[stage]
        if folder.exists():
            shutil.rmtree(folder)
        if stage != "whole run":
            shutil.copytree(self.finished, folder)
        for name in self.undone(stage):
            shutil.rmtree(folder / name, ignore_errors=True)
        (folder / "evaluation" / "evidence.json").unlink(missing_ok=True)
        return [command, str(self.recipe), "--run", str(folder)]

    def after(self, stage: str, folder: Path) -> float:
        """The finished run as it was after `stage`, as `folder`; returns how long the stage worked."""
        if folder.exists():
            shutil.rmtree(folder)
        shutil.copytree(self.finished, folder)
        work = {name for name in self.stages if any(name.startswith(place) for place in STAGES[stage][1])}
        for name in self.undone(stage) - work:
            shutil.rmtree(folder / name, ignore_errors=True)
        if "report" not in work:
            (folder / "evaluation" / "evidence.json").unlink()
            with suppress(OSError):
                (folder / "evaluation").rmdir()
        return sum(read_sealed(folder / name / "done.json")["seconds"] for name in work)

    def undone(self, stage: str) -> set[str]:
        """The stages that `stage` carries out, and all that come after them."""
        undone = {name for name in self.stages if any(name.startswith(place) for place in STAGES[stage][1])}
        while more := {name for name, needs in self.stages.items() if name not in undone and undone & set(needs)}:
            undone |= more
        return undone


def make_world(starter: Starter, folder: Path) -> World:
    """Write the recipe and carry it out, undisturbed."""
    recipe = make_recipe(folder)
    ended = starter.exalign("run", recipe, "--run", folder / "finished", log=folder / "log")
    assert ended.status == 0, ended.printed
    return finished_world(folder)


def finished_world(folder: Path) -> World:
    """What `make_world` made in `folder`."""
    recipe = folder / RECIPE_FILE
    return World(recipe, folder / "finished", {stage.name: stage.needs for stage in plan(load_recipe(recipe))})


def make_recipe(folder: Path) -> Path:
    """Write the world and its recipe below `folder`; return the recipe's path."""
    write_world(folder / "world", num_sft=96, num_prompts=320, num_test=12)
    path = folder / RECIPE_FILE
    path.write_text(RECIPE.format(world=folder / "world"))
    return path
