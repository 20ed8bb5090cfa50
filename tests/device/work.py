"""Every stage of a recipe at its smallest, as functions that give numbers: on the CPU, or `apart` on the device."""

from __future__ import annotations

import importlib
import inspect
import sys
import textwrap
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import nn

from exalign.data.batching import Group
from exalign.data.record import Completion, Record
from exalign.device import device
from exalign.methods.grpo import GRPO
from exalign.methods.matching import Matching, MatchingTask, train_matching, with_reference_logp
from exalign.methods.method import Method
from exalign.methods.on_policy import OwnSamples
from exalign.methods.oracle import BinaryCrossEntropy, Oracle, train_classifier
from exalign.methods.ppo import PPO, PPOTask, train_ppo
from exalign.methods.reward_model import BradleyTerry, RewardModel, train_reward_model
from exalign.methods.rloo import RLOO, PolicyGradientTask
from exalign.methods.sft import SFT, MaximumLikelihood, train_sft
from exalign.models.heads import ActorCritic, PackedScorer
from exalign.models.loading import load_classifier, load_policy, load_reward_model
from exalign.models.logprobs import PackedPolicy
from exalign.models.model_settings import LoraSettings, ModelSettings
from exalign.rollout.sampler import GroupedSampler
from exalign.rollout.scorers import ClassifierScorer, RewardModelScorer, WeightedSum
from exalign.rollout.settings import SampleSettings
from exalign.training.batches import EpochBatches
from exalign.training.distributed import make_accelerator
from exalign.training.loop import Task, accumulate
from exalign.training.optimizer import adamw, set_learning_rate
from training.tiny_world import make_groups, make_material, make_prompts, make_tokenizer, read_metrics

LLAMA: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 64, "intermediate_size": 96, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "max_position_embeddings": 64,
}  # fmt: skip
GPT2: dict[str, Any] = {"model_type": "gpt2", "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 64}
CONFIGS: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "gpt2": GPT2,
    "narrow heads": GPT2 | {"n_head": 4},
    "three heads": GPT2 | {"n_embd": 48, "n_head": 3},
    "windows": LLAMA | {"model_type": "mistral", "sliding_window": 6},
    "windows and caps": LLAMA | {"model_type": "gemma2", "sliding_window": 6, "query_pre_attn_scalar": 8},
    "no shared prompts": {"model_type": "bloom", "hidden_size": 32, "n_layer": 2, "n_head": 2},
}
STEPS: dict[str, Any] = {"batch_prompts": 6, "token_budget": 64, "checkpoint_every": 1, "learning_rate": 1e-3}


def settings_of(name: str, **more: Any) -> ModelSettings:
    return ModelSettings(config=CONFIGS[name], **more)


def policy_of(name: str, **more: Any) -> Any:
    torch.manual_seed(0)
    return load_policy(settings_of(name, **more), make_tokenizer())


def scalar_model(name: str = "llama") -> Any:
    torch.manual_seed(0)
    return load_reward_model(settings_of(name), make_tokenizer())


def losses(folder: Path) -> list[float]:
    return [row[name] for row in read_metrics(folder) for name in ("loss", "grad_norm")]


def aligned(folder: Path, name: str = "llama", lora: bool = False, dtype: str = "float32", **more: Any) -> list[float]:
    settings = Matching(**STEPS | more)
    made = {"lora": LoraSettings(rank=4) if lora else None, "dtype": dtype}
    groups = with_reference_logp(policy_of(name, dtype=dtype).to(device()), make_groups(12), settings, temperature=0.8)
    train_matching(policy_of(name, **made), make_tokenizer(), groups, settings, folder, temperature=0.8)
    return losses(folder)


def supervised(folder: Path, name: str = "llama") -> list[float]:
    train_sft(policy_of(name), make_tokenizer(), make_groups(12), SFT(**STEPS, train_on_prompts=True), folder)
    return losses(folder)


def reward_model(folder: Path, name: str = "llama") -> list[float]:
    train_reward_model(scalar_model(name), make_tokenizer(), make_groups(12), RewardModel(**STEPS), folder)
    return losses(folder)


def one_text_each(count: int) -> list[Group]:
    return [replace(group, completion_ids=group.completion_ids[:1]) for group in make_groups(count)]


def oracle_model() -> Any:
    torch.manual_seed(0)
    return load_classifier(settings_of("llama"), make_tokenizer())


def oracle(folder: Path) -> list[float]:
    settings = Oracle(model=settings_of("llama"), **STEPS)
    train_classifier(oracle_model(), make_tokenizer(), one_text_each(12), [0, 1] * 6, settings, folder)
    return losses(folder)


def sampler_of(name: str, **more: Any) -> GroupedSampler:
    settings = SampleSettings(num_completions=4, max_new_tokens=12, max_prompt_tokens=16, **more)
    model = policy_of(name).to(device()).eval()
    return GroupedSampler(model, make_tokenizer(), settings, temperature=1.0, seed=0)


def drawn(folder: Path | None = None, name: str = "llama", **more: Any) -> list[float]:
    records = list(sampler_of(name, **more).sample(make_prompts(6)))
    return [x for record in records for c in record.completions for x in (*c.token_ids, c.logprob)]  # type: ignore[misc]


def decoder_of(name: str) -> str:
    """Which way of decoding serves the model; a slower one would give the same numbers."""
    return type(sampler_of(name)._decoder).__name__


def scored(folder: Path) -> list[float]:
    """By a sum of a reward model and a classifier, of texts that were drawn before."""
    records = list(sampler_of("gpt2").sample(make_prompts(6)))
    models = [model.to(device()) for model in (scalar_model(), oracle_model())]
    scorers = RewardModelScorer(models[0], make_tokenizer()), ClassifierScorer(models[1], make_tokenizer(), 1)
    rewards = WeightedSum({"reward": (1.0, scorers[0]), "log-odds": (2.0, scorers[1])}).score(records)
    return [reward for row in rewards for reward in row]


def encoder_scored(folder: Path) -> list[float]:
    """By an encoder, which reads padded rows."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    torch.manual_seed(0)
    config = {"model_type": "bert", "max_position_embeddings": 64} | sizes
    model = load_reward_model(ModelSettings(config=config), make_tokenizer()).to(device())
    records = [replace(record, completions=(Completion("w3 w4"), Completion("w5"))) for record in make_prompts(4)]
    return [reward for row in RewardModelScorer(model, make_tokenizer()).score(records) for reward in row]


def ppo(folder: Path, **more: Any) -> list[float]:
    settings = PPO(**STEPS | {"batch_prompts": 3, "rollout_prompts": 6, "passes": 2, "target_kl": 0.1} | more)
    module = ActorCritic(policy_of("llama"), scalar_model())
    train_ppo(module, material(module.model), settings, folder)
    return losses(folder)


def own_samples(folder: Path, method: type[Method] = Matching, **more: Any) -> list[float]:
    method(**STEPS | {"fresh_every": 2} | more).train(material(policy_of("llama")), folder)
    return losses(folder)


def material(policy: Any) -> Any:
    return make_material(policy, count=6, reference=policy_of("llama").eval())


TRAINED: dict[str, Callable[[], nn.Module]] = {
    "sft": lambda: PackedPolicy(policy_of("llama")),
    "reward model": lambda: PackedScorer(scalar_model()),
    "oracle": lambda: PackedScorer(oracle_model()),
    "exo": lambda: PackedPolicy(policy_of("llama")),
    "dpo": lambda: PackedPolicy(policy_of("windows and caps")),
    "padded rows": lambda: PackedPolicy(policy_of("no shared prompts")),
}


def task_of(kind: str, count: int) -> tuple[Task, nn.Module, Sequence[Group]]:
    """What a stage trains with, the model on the device."""
    module = TRAINED[kind]().to(device()).train()
    groups: Sequence[Group] = one_text_each(count) if kind == "oracle" else make_groups(count)
    batches = EpochBatches(groups, batch_prompts=count, epochs=1, seed=0)
    if kind == "sft":
        return MaximumLikelihood(batches), module, groups
    if kind == "reward model":
        return BradleyTerry(batches), module, groups
    if kind == "oracle":
        return BinaryCrossEntropy(batches, [0, 1] * count), module, groups
    settings = Matching(target="preference", divergence="forward_kl") if kind == "dpo" else Matching()
    groups = [replace(group, reference_logp=torch.zeros(group.num_completions)) for group in groups]
    return MatchingTask(batches, settings, 1.0), module, groups


def each(cost: Callable[..., Any], *cases: tuple[Any, ...]) -> list[Any]:
    """What every case costs, one after the other in the same process; the first meets it as it was started."""
    return [cost(*case) for case in cases]


def cost_of_micro_batch(kind: str, count: int) -> dict[str, int]:
    from device.pretend import ASKED, counted

    task, module, groups = task_of(kind, count)
    with counted() as found:
        task.loss(module, groups)[0].backward()
    return dict(found) | {"asked": dict(ASKED)}  # type: ignore[dict-item]


OWN: dict[str, type[Method]] = {"exo": Matching, "rloo": RLOO, "grpo": GRPO}


def cost_of_own_micro_batch(kind: str, count: int) -> dict[str, int]:
    """Of a step on own samples, after they were drawn; the policy, and PPO's critic, on the device."""
    from device.pretend import ASKED, counted

    of = {"batch_prompts": count, "learning_rate": 1e-3}
    module: Any = PackedPolicy(policy_of("llama")) if kind in OWN else ActorCritic(policy_of("llama"), scalar_model())
    given = make_material(module.to(device()).model, count=count, reference=policy_of("llama").eval())
    task: Any
    if kind == "ppo":
        task = PPOTask(module, given, PPO(**of, rollout_prompts=count))
    else:
        settings: Any = OWN[kind](**of, fresh_every=1)
        compute = None if kind == "exo" else settings.compute(given.temperature)
        own = OwnSamples(module, given, settings, compute=compute)
        task = MatchingTask(own.batches, settings, 0.8, own) if kind == "exo" else PolicyGradientTask(settings, own)
    groups = task.batches[0]
    with counted() as found:
        task.loss(module, groups)[0].backward()
    return dict(found) | {"asked": dict(ASKED)}  # type: ignore[dict-item]


def chosen_sizes(folder: Path) -> tuple[int, int]:
    """The token budget of a training and the completions decoded together, where the settings leave them to choose."""
    aligned(folder, token_budget="auto")
    return read_metrics(folder)[0]["token_budget"], sampler_of("llama")._room


def cost_of_step(kind: str, count: int, token_budget: int, folder: Path) -> tuple[int, dict[str, int]]:
    """The number of micro-batches, and what they, the clipping and the optimizer's step cost together."""
    from device.pretend import ASKED, counted
    from exalign.data.batching import microbatches
    from exalign.training.distributed import whole_number

    task, module, groups = task_of(kind, count)
    accelerator = make_accelerator(folder, precision="fp32", trackers=(), some_left_out=False)
    optimizer: Any = adamw(module, betas=(0.9, 0.95), weight_decay=0.0, device=accelerator.device)
    module, optimizer = accelerator.prepare(module, optimizer)
    for _ in range(2):  # the first makes the optimizer's state
        with counted() as found:
            set_learning_rate(optimizer, 1e-3)
            accumulate(accelerator, module, task, groups, token_budget)
            whole_number(accelerator.clip_grad_norm_(module.parameters(), 1.0))
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
    return len(microbatches(groups, token_budget=token_budget)), dict(found) | {"asked": dict(ASKED)}  # type: ignore[dict-item]


def cost_of_decoding(prompts: int, completions: int) -> list[dict[str, int]]:
    """What each step of the sampler costs, one after the other, of prompts that enter together."""
    from device.pretend import counted

    settings = SampleSettings(num_completions=completions, max_new_tokens=6, max_prompt_tokens=16)
    sampler = GroupedSampler(
        policy_of("llama").to(device()).eval(), make_tokenizer(), settings, temperature=1.0, seed=0
    )
    sampler._eos_ids = frozenset()
    costs: list[dict[str, int]] = []
    step = sampler._step

    def with_costs(running: Any) -> None:
        with counted() as found:
            step(running)
        costs.append(dict(found))

    sampler._step = with_costs  # type: ignore[method-assign]
    list(sampler.sample([Record(str(i), "w3 w4 w5") for i in range(prompts)]))
    return costs


STAGES: dict[str, Callable[[Path], list[float]]] = {
    "sft": supervised,
    "reward model": reward_model,
    "oracle": oracle,
    "scoring": scored,
    "scoring by an encoder": encoder_scored,
    "ppo": ppo,
    "ppo, critic first": lambda folder: ppo(folder, critic_steps=1),
    "exo on own samples": own_samples,
    "dpo on own pairs": lambda folder: own_samples(folder, target="preference", divergence="forward_kl"),
    "rloo": lambda folder: own_samples(folder, RLOO),
    "grpo": lambda folder: own_samples(folder, GRPO, passes=2),
    "dpo": lambda folder: aligned(folder, target="preference", divergence="forward_kl"),
    "exo, sizes left to choose": lambda folder: aligned(folder, token_budget="auto"),
    "exo, checkpointing": lambda folder: aligned(folder, gradient_checkpointing=True),
    "lora": lambda folder: aligned(folder, lora=True),
    **{f"exo, {name}": lambda folder, name=name: aligned(folder, name) for name in CONFIGS},  # type: ignore[misc]
    **{f"sampling, {name}": lambda folder, name=name: drawn(folder, name) for name in CONFIGS},  # type: ignore[misc]
    "sampling, top-k and top-p": lambda folder: drawn(folder, top_k=5, top_p=0.9),
    "sampling, few at a time": lambda folder: drawn(folder, batch_completions=8),
}
HALF: dict[str, Callable[[Path], list[float]]] = {
    "bf16": lambda folder: aligned(folder, precision="bf16"),
    "bf16 weights": lambda folder: aligned(folder, dtype="bfloat16"),
    "lora on bf16": lambda folder: aligned(folder, lora=True, dtype="bfloat16"),
}


def numbers_of(stage: str, folder: Path) -> list[float]:
    return (STAGES | HALF)[stage](folder)


def whole_run(world: Path, folder: Path) -> list[str]:
    """The stages of a run of the demo's recipe at its smallest, PPO and own samples among them, as the command does."""
    from exalign.run.carry_out import run_recipe
    from exalign.run.recipe import load_recipe
    from run.conftest import ALIGN, RECIPE, tiny_overrides

    own = f"own: {ALIGN}fresh_every: 2}}, ppo: {{batch_prompts: 8, method: ppo}}}}"
    small = "model.config={model_type: gpt2, n_layer: 1, n_embd: 32, n_head: 2, n_positions: 96}"
    overrides = tiny_overrides(world, f"align={{exo: {ALIGN}target: reward}}, {own}", small)
    run_recipe(load_recipe(RECIPE, overrides), folder=folder)
    assert (folder / "report" / "index.html").exists()
    return sorted(str(done.parent.relative_to(folder)) for done in folder.rglob("done.json"))


def mutated(module: str, name: str, old: str, new: str) -> str:
    """Run what uses the function after the change, on the device: what it raises."""
    from device.pretend import DeviceMixError

    found = importlib.import_module(f"exalign.{module}")
    *owner, last = name.split(".")
    place = getattr(found, owner[0]) if owner else found
    function = getattr(place, last)
    source = textwrap.dedent(inspect.getsource(function))
    assert old in source, (name, old)
    made: dict[str, Any] = {}
    code = "from __future__ import annotations\n" + source.replace(old, new)
    exec(compile(code, str(found.__file__), "exec"), vars(found), made)
    for user in [place, *(m for n, m in sys.modules.items() if n.startswith("exalign"))]:
        if getattr(user, last, None) is function:
            setattr(user, last, made[last])
    try:
        for kind in ("exo", "sft", "reward model", "padded rows"):
            task, model, groups = task_of(kind, 4)
            task.loss(model, groups)[0].backward()
        drawn()
    except DeviceMixError as error:
        return str(error)
    return "nothing"
