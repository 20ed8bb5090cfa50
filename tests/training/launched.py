"""Trainings that a launcher would start as several processes, in forked ones. Imported by tests and workers."""

from __future__ import annotations

import faulthandler
import json
import os
import signal
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import replace
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed import TCPStore

from exalign.cli import main
from exalign.data.batching import Group
from exalign.data.record import Completion, Record
from exalign.data.store import Header
from exalign.errors import InputError
from exalign.methods.kto import KTO
from exalign.methods.matching import Matching, train_matching, with_reference_logp
from exalign.methods.method import Material
from exalign.methods.reward_model import RewardModel, train_reward_model
from exalign.methods.sft import SFT, train_sft
from exalign.models.loading import load_reward_model
from exalign.models.logprobs import PackedPolicy, completion_logprobs
from exalign.models.model_settings import LoraSettings, ModelSettings
from exalign.processes import failing, join, leads
from exalign.run import materials
from exalign.training.batches import EpochBatches
from exalign.training.loop import train
from exalign.training.train_settings import TrainSettings
from training.tiny_world import CONFIG, make_groups, make_policy, make_tokenizer, small_fresh_run, small_ppo_run

FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
}
LAYOUTS: dict[str, dict[str, str]] = {
    "ddp": {},
    "fsdp2": FSDP2,
    "fsdp2-one-group": {**FSDP2, "FSDP_AUTO_WRAP_POLICY": "NO_WRAP"},
}
UNTIED: dict[str, Any] = {
    "model_type": "llama", "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 32, "tie_word_embeddings": False,
}  # fmt: skip
SMALL: dict[str, Any] = {"learning_rate": 1e-3, "batch_prompts": 3, "checkpoint_every": 2, "save_policies": 2}


def sft(folder: Path, token_budget: int) -> nn.Module:
    """Seven prompts in batches of three: the last step of each epoch has one, so all processes but one are idle."""
    policy, settings = make_policy(), SFT(**SMALL, epochs=2, token_budget=token_budget, weight_decay=0.1)
    train_sft(policy, make_tokenizer(), make_groups(7), settings, folder)
    return policy


def reward(folder: Path, token_budget: int) -> nn.Module:
    torch.manual_seed(0)
    model = load_reward_model(ModelSettings(config=UNTIED), make_tokenizer())
    settings = RewardModel(**SMALL, token_budget=token_budget)
    train_reward_model(model, make_tokenizer(), make_groups(7), settings, folder)
    return model


def align(folder: Path, token_budget: int, *, model: ModelSettings | None = None, **changes: Any) -> nn.Module:
    settings = Matching(**SMALL, token_budget=token_budget, **changes)
    policy = make_policy(settings=model)
    groups = with_reference_logp(policy, make_groups(7), settings, temperature=0.8)
    train_matching(policy, make_tokenizer(), groups, settings, folder, temperature=0.8)
    return policy


def poisoned(folder: Path, token_budget: int, *, gradient: bool = True) -> nn.Module:
    """The loss of one prompt is not a number, and its gradient neither, or finite."""

    class Poisoned:
        batches = EpochBatches(make_groups(7), batch_prompts=3, epochs=1, seed=0)

        def weight(self, groups: Sequence[Group]) -> float:
            return len(groups)

        def loss(self, model: nn.Module, groups: Sequence[Group]) -> tuple[Tensor, dict[str, Tensor]]:
            poison = float("nan") if any(group.index == self.batches[1][0].index for group in groups) else 0.0
            loss = -completion_logprobs(model, groups, temperature=1.0).sum()
            return (loss + loss * poison if gradient else loss + poison), {}

    policy, settings = make_policy(), TrainSettings(**SMALL, token_budget=token_budget)
    train(Poisoned(), PackedPolicy(policy), make_tokenizer(), settings, folder, card="")
    return policy


def kto(folder: Path, token_budget: int) -> nn.Module:
    policy, settings = make_policy(), KTO(**SMALL, token_budget=token_budget)
    groups = with_reference_logp(policy, make_groups(7, num_completions=2), settings, temperature=0.8)
    settings.train(Material(policy, make_tokenizer(), 0.8, groups), folder)  # type: ignore[arg-type]
    return policy


def ppo(folder: Path, token_budget: int, **changes: Any) -> nn.Module:
    """Two rollouts, or three, in the first three steps of which the critic is alone."""
    chosen = {"learning_rate": 1e-3, "critic_learning_rate": 2e-3, "epochs": 1, "critic_steps": 3}
    return small_ppo_run(folder, token_budget=token_budget, **(chosen | changes)).model


TRAININGS: dict[str, Callable[[Path, int], nn.Module]] = {
    "sft": sft,
    "reward": reward,
    "align": lambda folder, budget: align(folder, budget, epochs=2),  # long enough to be killed in its middle
    "align-untied": lambda folder, budget: align(folder, budget, model=ModelSettings(config=UNTIED)),
    "align-lora": lambda folder, budget: align(
        folder, budget, model=ModelSettings(config=CONFIG, lora=LoraSettings(rank=2, dora=True))
    ),
    "align-recomputed": lambda folder, budget: align(folder, budget, gradient_checkpointing=True),
    "align-bf16": lambda folder, budget: align(folder, budget, precision="bf16"),
    "kto": kto,
    "poisoned": poisoned,
    "poisoned-loss": lambda folder, budget: poisoned(folder, budget, gradient=False),
    "ppo": lambda folder, budget: ppo(folder, budget, weight_decay=0.1),
    "ppo-together": lambda folder, budget: ppo(folder, budget, critic_steps=0, weight_decay=0.1),
    "fresh": lambda folder, budget: small_fresh_run(folder, token_budget=budget, learning_rate=1e-3),
    "ppo-odd": lambda folder, budget: ppo(folder, budget, rollout_prompts=3),
}


_stores: list[TCPStore] = []


def run_trainings(folder: Path, names: Sequence[str], token_budget: int = 30) -> None:
    """One after the other in one process; beside each, how many numbers of the trained model this process holds."""
    torch.set_num_threads(1)
    for name in names:
        model = TRAININGS[name](folder / name, token_budget)
        held = sum(getattr(p, "_local_tensor", p).numel() for p in model.parameters())
        whole = sum(parameter.numel() for parameter in model.parameters())
        (folder / f"{name}-{os.environ.get('RANK', '0')}.json").write_text(json.dumps([held, whole]))


def run_command(folder: Path, arguments: list[str]) -> None:
    """The command line, with what it prints in a file for each process."""
    torch.set_num_threads(1)
    with (folder / f"printed-{os.environ['RANK']}").open("w") as stream:
        os.dup2(stream.fileno(), 1)
        os.dup2(stream.fileno(), 2)
        main(arguments)


def refuse_in_the_second(prompts: list[str], completions: list[str]) -> list[float]:
    """A reward function that fails in one process while the other waits for it."""
    if os.environ.get("RANK") == "1":
        raise ValueError("not today")
    return [0.0 for _ in completions]


def run_in_small_shards(folder: Path, arguments: list[str], shard: int) -> None:
    materials.SHARD = shard
    run_command(folder, arguments)


def share_numbers(folder: Path, count: int, shard: int, stops_at: str | None) -> None:
    """`count` records, whose completions say which process wrote them; `stops_at` one of them all processes end."""
    torch.set_num_threads(1)
    join()
    materials.SHARD = shard

    def work(records: Sequence[Record], counts: Counter[str]) -> list[Record]:
        counts["even"] += sum(int(record.id) % 2 == 0 for record in records)
        own = (Completion(os.environ["RANK"]),)
        return [replace(record, completions=own) for record in records]

    class Ending(list[Record]):
        def __getitem__(self, part: Any) -> Any:
            for record in super().__getitem__(part):
                if record.id == stops_at:
                    raise SystemExit(3)
                yield record

    view: Any = SimpleNamespace(counts=Counter())
    records = Ending(Record(str(number), "Say it.") for number in range(count))
    materials.write_shared(view, folder, records, work, Header())
    assert (folder / "header.json").exists()  # for the others too
    if leads():
        (folder / "counted.json").write_text(json.dumps(view.counts))


def run_out_of_memory(folder: Path) -> None:
    """A training whose second process has no room; what ends it is printed as the command line prints it."""
    torch.set_num_threads(1)

    class Cramped:
        batches = EpochBatches(make_groups(6), batch_prompts=6, epochs=1, seed=0)

        def weight(self, groups: Sequence[Group]) -> float:
            return len(groups)

        def loss(self, model: nn.Module, groups: Sequence[Group]) -> tuple[Tensor, dict[str, Tensor]]:
            if os.environ["RANK"] == "1":
                raise torch.OutOfMemoryError("Tried to allocate more than there is.")
            return completion_logprobs(model, groups, temperature=1.0).sum(), {}

    policy, settings = make_policy(), TrainSettings(token_budget=512)
    with (folder / f"printed-{os.environ['RANK']}").open("w") as stream:
        try:
            train(Cramped(), PackedPolicy(policy), make_tokenizer(), settings, folder / "run", card="")
        except InputError as error:
            with failing() as first:
                if first:
                    print(f"error: {error}", file=stream)
            sys.exit(2)


def start(
    workers: ForkServerContext, layout: str, function: Callable[..., None], *arguments: Any, number: int = 2
) -> list[BaseProcess]:
    """`function` in `number` processes that find one another at a store of their parent, as under torchrun."""
    store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    _stores.append(store)
    processes: list[BaseProcess] = [
        workers.Process(target=_process, args=(rank, number, store.port, layout, function, arguments))
        for rank in range(number)
    ]
    for process in processes:
        process.start()
    return processes


def finish(processes: list[BaseProcess], *, seconds: float = 120) -> list[int | None]:
    """Wait for all; those that still run then are killed, and their exit code says so."""
    deadline = time.monotonic() + seconds
    for process in processes:
        process.join(max(0.0, deadline - time.monotonic()))
    for process in processes:
        with suppress(ProcessLookupError):
            if process.is_alive():
                os.kill(process.pid or 0, signal.SIGKILL)
        process.join()
    return [process.exitcode for process in processes]


def _process(
    rank: int, number: int, port: int, layout: str, function: Callable[..., None], arguments: tuple[Any, ...]
) -> None:
    places = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": number, "LOCAL_WORLD_SIZE": number, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in places.items()})
    os.environ.update({"MASTER_ADDR": "127.0.0.1", "OMP_NUM_THREADS": "1", **LAYOUTS[layout]})
    os.environ["TORCHELASTIC_USE_AGENT_STORE"] = "True"
    faulthandler.enable()  # a process that a library's fault ends says where it was
    function(*arguments)
