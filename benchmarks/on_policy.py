"""Steps on own samples: `python -m benchmarks.on_policy --shape hh --k 8 --json`.

exalign's on-policy EXO, RLOO, GRPO and PPO against TRL's `RLOOTrainer` and `GRPOTrainer`: the same weights, prompts, K,
temperature, learning rate and reward (the share of a completion's words with an even number), each as it ships but for
float32 and no checkpointing, TRL at the fastest of several micro-batches. A pass is a short training from the start,
each through its own loop, in turns. The first step of a training is not timed; its samples, which all draw from the
same policy, must have the same mean reward within their error. Drawing, scoring and the rest (log-probabilities,
gradient, optimizer) are told apart. On a machine that does other work too, `--threads 1 --clock cpu` counts the seconds
that it computed.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from accelerate.state import AcceleratorState

from benchmarks.contenders import copy_of, library_copy_of
from benchmarks.timing import count_cpu_seconds, fastest_of, interleave, timed
from benchmarks.workload import (
    SHAPES,
    argument_parser,
    describe_machine,
    make_config,
    make_groups,
    make_model,
    make_tokenizer,
    prepare_process,
)
from exalign.data.record import Record
from exalign.errors import InputError
from exalign.methods.grpo import GRPO
from exalign.methods.matching import Matching
from exalign.methods.method import Material, Method
from exalign.methods.ppo import PPO
from exalign.methods.rloo import RLOO
from exalign.models.model_settings import ModelSettings
from exalign.rollout.settings import SampleSettings

TEMPERATURE, BETA = 1.0, 0.1
PARTS = ("drawing", "scoring", "rest")
ERRORS = 6  # standard errors that first rewards may be apart


def even_words(text: str) -> float:
    """The reward: the share of the words "t0", "t2", … among a completion's."""
    words = text.split()
    return sum(word[-1] in "02468" for word in words) / max(len(words), 1)


class EvenWords:
    def score(self, records: Sequence[Record]) -> list[list[float]]:
        return [[even_words(completion.text) for completion in record.completions] for record in records]


@dataclass
class Training:
    """The task that all share, and of one way to do it what its steps took and had: a list a training."""

    label: str
    model: Any
    prompts: list[str]
    k: int
    tokens: int
    steps: int
    learning_rate: float
    parts: list[dict[str, float]] = field(default_factory=list)
    rewards: list[list[float]] = field(default_factory=list)
    sizes: tuple[int, ...] = (0,)

    @property
    def batch_prompts(self) -> int:
        return len(self.prompts) // self.steps

    def train(self, size: int) -> None:
        """Take all steps from the start and note what each but the first took, and the reward of its samples."""
        raise NotImplementedError

    def note(self, steps: Sequence[tuple[float, float, float]], rewards: list[float]) -> None:
        """Of each step the seconds in all, of drawing, and of scoring."""
        for whole, drawing, scoring in steps[1:]:
            self.parts.append(dict(zip(PARTS, (drawing, scoring, whole - drawing - scoring), strict=True)))
        self.rewards.append(rewards)


@dataclass
class ExalignTraining(Training):
    method: Method = field(default_factory=RLOO)

    def train(self, size: int) -> None:
        critic = {name: getattr(self.model.config, name) for name in ("n_layer", "n_embd", "n_head", "vocab_size")}
        material = Material(
            library_copy_of(self.model),
            make_tokenizer(self.model.config.vocab_size - 1),
            TEMPERATURE,
            prompts=[Record(str(index), prompt) for index, prompt in enumerate(self.prompts)],
            sampling=SampleSettings(
                num_completions=self.k, max_new_tokens=self.tokens, batch_completions=256, engine="exalign"
            ),
            scorer=EvenWords(),
            reference=library_copy_of(self.model).eval(),
            critic=ModelSettings(config={"model_type": "gpt2", **critic}),
        )
        own = {"batch_prompts": self.batch_prompts, "learning_rate": self.learning_rate, "schedule": "constant"}
        with TemporaryDirectory() as folder:
            self.method.model_copy(update=own | {"save_policies": 1}).train(material, Path(folder))
            rows = [json.loads(line) for line in Path(folder, "metrics.jsonl").read_text().splitlines()]
        taken = [(row["seconds"], row["drawing_seconds"], row["scoring_seconds"]) for row in rows]
        self.note(taken, [row["reward"] for row in rows])


@dataclass
class TRLTraining(Training):
    trainer: str = "RLOO"

    def __post_init__(self) -> None:
        rows = self.k * self.batch_prompts
        self.sizes = tuple(size for size in (rows // 4, rows // 2, rows) if size and rows % size == 0)

    def train(self, size: int) -> None:
        import trl
        from datasets import Dataset
        from transformers import TrainerCallback

        base, seconds, rewards = getattr(trl, f"{self.trainer}Trainer"), [], []
        current = {"drawing": 0.0, "scoring": 0.0}

        class Timed(base):  # type: ignore[misc, valid-type]
            def _generate(self, *given: Any, **named: Any) -> Any:
                found: list[Any] = []
                current["drawing"] += timed(lambda: found.append(base._generate(self, *given, **named)))
                return found[0]

            def _calculate_rewards(self, *given: Any, **named: Any) -> Any:
                found: list[Any] = []
                current["scoring"] += timed(lambda: found.append(base._calculate_rewards(self, *given, **named)))
                return found[0]

        class Clock(TrainerCallback):
            def on_step_begin(self, *_: Any, **__: Any) -> None:
                current.update(drawing=0.0, scoring=0.0, begun=time.perf_counter())

            def on_step_end(self, *_: Any, **__: Any) -> None:
                whole = time.perf_counter() - current["begun"]
                seconds.append((whole, current["drawing"], current["scoring"]))

        def reward(completions: list[str], **_: Any) -> list[float]:
            values = [even_words(text) for text in completions]
            rewards.append(statistics.mean(values))
            return values

        AcceleratorState._reset_state()
        with TemporaryDirectory() as folder:
            copy_of(self.model).save_pretrained(folder)  # its reference is read from where the policy was
            settings = getattr(trl, f"{self.trainer}Config")(
                output_dir=folder, use_cpu=True, report_to=[], bf16=False, gradient_checkpointing=False,
                per_device_train_batch_size=size, gradient_accumulation_steps=self.k * self.batch_prompts // size,
                num_generations=self.k, max_completion_length=self.tokens, temperature=TEMPERATURE, beta=BETA,
                learning_rate=self.learning_rate, lr_scheduler_type="constant", max_steps=self.steps,
                save_strategy="no", disable_tqdm=True, logging_strategy="no",
            )  # fmt: skip
            trainer = Timed(
                model=folder,
                reward_funcs=reward,
                args=settings,
                train_dataset=Dataset.from_list([{"prompt": prompt} for prompt in self.prompts]),
                processing_class=make_tokenizer(self.model.config.vocab_size - 1),
                callbacks=[Clock()],
            )
            trainer.train()
        self.note(seconds, rewards)


WAYS: dict[str, Callable[..., Training]] = {
    "exo": lambda **task: ExalignTraining("exalign, EXO", method=Matching(fresh_every=1, beta_r=BETA), **task),
    "rloo": lambda **task: ExalignTraining("exalign, RLOO", method=RLOO(beta=BETA), **task),
    "grpo": lambda **task: ExalignTraining("exalign, GRPO", method=GRPO(beta=BETA), **task),
    "ppo": lambda **task: ExalignTraining("exalign, PPO", method=_ppo(task), **task),
    "trl-rloo": lambda **task: TRLTraining("TRL, RLOOTrainer", trainer="RLOO", **task),
    "trl-grpo": lambda **task: TRLTraining("TRL, GRPOTrainer", trainer="GRPO", **task),
}


def _ppo(task: dict[str, Any]) -> PPO:
    together = len(task["prompts"]) // task["steps"]
    return PPO(beta=BETA, rollout_prompts=together, passes=1, critic_learning_rate=task["learning_rate"])


def compare(
    shape: str, k: int, *, model: str, prompts: int, steps: int, names: Sequence[str], rounds: int, seconds_each: float
) -> dict[str, Any]:
    """Let each train, check that the first samples have the same reward, and time the trainings in turns."""
    plain = make_model(make_config(model)).eval()
    groups = make_groups(shape, prompts=prompts * steps, k=1, vocabulary=plain.config.vocab_size - 1)
    texts = [" ".join(f"t{token}" for token in group.prompt_ids.tolist()) for group in groups]
    task = {"model": plain, "prompts": texts, "k": k, "tokens": SHAPES[shape][1], "steps": steps}
    task["learning_rate"] = 1e-3
    for name in names:
        if name not in WAYS:
            raise InputError(f"There is no way called {name!r}; there are {', '.join(WAYS)}.")
    ways = {name: WAYS[name](**task) for name in names}
    sizes = {n: fastest_of({s: lambda w=w, s=s: w.train(s) for s in w.sizes}) for n, w in ways.items()}  # type: ignore[misc]
    for way in ways.values():
        way.parts.clear()
        way.rewards.clear()
    work = {n: lambda w=w, s=sizes[n]: w.train(s) for n, w in ways.items()}  # type: ignore[misc]
    times = interleave(work, {name: timed(one) for name, one in work.items()}, rounds=rounds, seconds_each=seconds_each)
    check([way.rewards[0][0] for way in ways.values()], samples=prompts * k, words=SHAPES[shape][1])
    rows: dict[str, Any] = {}
    for name, way in ways.items():
        median = {part: statistics.median(step[part] for step in way.parts) for part in PARTS}
        seconds = statistics.median(sum(step.values()) for step in way.parts)
        rows[name] = {
            "label": way.label, "rows_at_once": sizes[name], "seconds": seconds, "parts": median,
            "n": len(way.parts), "trainings": times[name].summary(), "samples_per_second": prompts * k / seconds,
            "first_reward": statistics.mean(run[0] for run in way.rewards),
            "last_reward": statistics.mean(run[-1] for run in way.rewards),
        }  # fmt: skip
    for row in rows.values():
        row["ratio"] = row["seconds"] / rows[names[0]]["seconds"]
    about = {"benchmark": "on_policy", "shape": shape, "k": k, "model": model, "prompts": prompts, "steps": steps}
    return {**about, "machine": describe_machine(), "contenders": rows}


def check(first: Sequence[float], *, samples: int, words: int) -> None:
    """Means of as many samples of as many words, each even with probability one half, must agree."""
    allowed = ERRORS * (2 * 0.25 / (samples * words)) ** 0.5
    if max(first) - min(first) > allowed:
        raise InputError(f"First rewards of {min(first):.4f} and {max(first):.4f} are not of one policy and reward.")


def show(result: dict[str, Any]) -> str:
    lines = [
        f"on-policy, {result['shape']}, K = {result['k']}, {result['prompts']} prompts a step, {result['steps']} steps",
        f"{'':20}{'n':>4}{'seconds':>10}{'ratio':>8}" + "".join(f"{part:>9}" for part in (*PARTS, "first", "last")),
    ]
    for row in result["contenders"].values():
        parts = "".join(f"{row['parts'][part]:>9.3f}" for part in PARTS)
        lines.append(
            f"{row['label']:20}{row['n']:>4}{row['seconds']:>10.3f}{row['ratio']:>8.2f}{parts}"
            f"{row['first_reward']:>9.3f}{row['last_reward']:>9.3f}"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argument_parser(__doc__ or "")
    parser.add_argument("--shape", choices=SHAPES, default="hh", help="mean lengths; completions have at most theirs")
    parser.add_argument("--k", type=int, default=8, help="completions per prompt")
    parser.add_argument("--prompts", type=int, default=4, help="prompts a step")
    parser.add_argument("--steps", type=int, default=3, help="steps of a training")
    parser.add_argument("--contenders", default=",".join(WAYS), help="the first is the base of ratios")
    parser.add_argument("--rounds", type=int, default=2, help="most trainings of each after the first")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="which seconds are counted")
    parser.add_argument("--seconds-each", type=float, default=60, help="a contender that took as long rests")
    given = parser.parse_args(arguments)
    prepare_process(given.threads)
    if given.clock == "cpu":
        count_cpu_seconds()  # in the trainings too
    result = compare(
        given.shape,
        given.k,
        model=given.model,
        prompts=given.prompts,
        steps=given.steps,
        names=given.contenders.split(","),
        rounds=given.rounds,
        seconds_each=given.seconds_each,
    )
    result["clock"] = given.clock
    print(json.dumps(result) if given.json else show(result))


if __name__ == "__main__":
    main()
