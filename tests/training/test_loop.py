"""Laws of the loop: what changes the result of a step, and what must not."""

from __future__ import annotations

import io
import math
import warnings
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from rich.console import Console
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from torch import nn

from exalign.data.batching import Group
from exalign.errors import InputError
from exalign.methods.matching import Matching, MatchingTask, train_matching, with_reference_logp
from exalign.methods.sft import SFT, MaximumLikelihood, train_sft
from exalign.models.loading import load_policy
from exalign.models.logprobs import PackedPolicy, completion_logprobs
from exalign.models.model_settings import LoraSettings, ModelSettings
from exalign.training.batches import EpochBatches
from exalign.training.loop import TrainingProgress, accumulate
from exalign.training.optimizer import learning_rate_factor
from training.tiny_world import (
    CONFIG,
    make_groups,
    make_policy,
    make_tokenizer,
    read_metrics,
)


def all_in_one(groups: list[Group]) -> EpochBatches:
    return EpochBatches(groups, batch_prompts=len(groups), epochs=1, seed=0)


def referenced(policy: nn.Module, groups: list[Group], *, temperature: float = 0.8) -> list[Group]:
    """References as another policy would give them, so that log-ratios are not 0."""
    return with_reference_logp(make_policy(seed=3).to(policy.dtype), groups, Matching(), temperature=temperature)


def test_the_agreement_of_a_step_is_the_cosine_of_its_halves_gradients() -> None:
    policy = make_policy().double()
    groups = referenced(policy, make_groups(7))
    task, module = MatchingTask(all_in_one(groups), Matching(), 0.8), PackedPolicy(policy)

    def gradient(part: list[Group], **how: bool) -> tuple[torch.Tensor, dict[str, float]]:
        policy.zero_grad()
        values = accumulate(Accelerator(cpu=True), module, task, part, 200, **how)
        return torch.cat([parameter.grad.flatten() for parameter in policy.parameters()]), values

    halves = [gradient(part)[0] for part in (groups[:3], groups[3:])]
    whole, values = gradient(groups, agreement=True)
    torch.testing.assert_close(whole, gradient(groups)[0], rtol=1e-10, atol=1e-12)
    assert values["gradient_agreement"] == pytest.approx(float(torch.cosine_similarity(*halves, dim=0)), rel=1e-6)
    assert "gradient_agreement" not in gradient(groups)[1]


def test_the_agreement_counts_a_weight_that_only_one_half_moves() -> None:
    """By hand: halves with gradients (1, 0) and (1, 2) have a cosine of 1/√5."""

    class Two(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = (torch.nn.Parameter(torch.zeros(())) for _ in range(2))

    class Halves:
        def weight(self, groups: list[Group]) -> float:
            return float(len(groups))

        def loss(self, model: Two, groups: list[Group]) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
            return (model.a + 2 * model.b if groups[0].index else model.a + 0), {}

    module, groups = Two(), make_groups(2)
    values = accumulate(Accelerator(cpu=True), module, Halves(), groups, 10**6, agreement=True)
    assert values["gradient_agreement"] == pytest.approx(5**-0.5, rel=1e-6)


@pytest.mark.parametrize("task_name", ["align", "sft"])
def test_one_pass_of_16_prompts_equals_16_passes_of_one(task_name: str) -> None:
    """float64: the loss to 1e-12, every gradient to 1e-12 of its size. Ragged K and lengths, so means would differ."""
    policy = make_policy().double()
    groups = referenced(policy, make_groups(16))
    batches = all_in_one(groups)
    task = MatchingTask(batches, Matching(), 0.8) if task_name == "align" else MaximumLikelihood(batches)
    module = PackedPolicy(policy)
    values, gradients = {}, {}
    for name, token_budget in (("1 x 16", 10**6), ("16 x 1", 1), ("some", 60)):
        policy.zero_grad()
        values[name] = accumulate(Accelerator(cpu=True), module, task, batches[0], token_budget)
        gradients[name] = torch.cat([parameter.grad.flatten() for parameter in policy.parameters()])
    for other in ("16 x 1", "some"):
        assert values[other] == pytest.approx(values["1 x 16"], rel=1e-6 if task_name == "align" else 1e-12)
        assert values[other]["loss"] == pytest.approx(values["1 x 16"]["loss"], rel=1e-12)
        difference = (gradients[other] - gradients["1 x 16"]).norm()
        assert float(difference) < 1e-12 * float(gradients["1 x 16"].norm())


def test_gradient_is_that_of_the_mean_over_prompts() -> None:
    policy = make_policy().double()
    groups = referenced(policy, make_groups(5))
    task = MatchingTask(all_in_one(groups), Matching(), 0.8)
    accumulate(Accelerator(cpu=True), PackedPolicy(policy), task, groups, 40)
    accumulated = [parameter.grad.clone() for parameter in policy.parameters()]
    policy.zero_grad()
    mean = sum(task.loss(policy, [group])[0] for group in groups) / len(groups)
    mean.backward()
    for parameter, gradient in zip(policy.parameters(), accumulated, strict=True):
        torch.testing.assert_close(parameter.grad, gradient, rtol=1e-9, atol=1e-14)


def test_schedule_values_by_formula() -> None:
    def factors(schedule: str) -> list[float]:
        return [learning_rate_factor(s, num_steps=10, warmup_steps=2, schedule=schedule) for s in range(10)]

    assert factors("constant") == pytest.approx([1 / 3, 2 / 3] + [1.0] * 8)
    assert factors("linear") == pytest.approx([1 / 3, 2 / 3] + [1 - i / 8 for i in range(8)])
    assert factors("cosine") == pytest.approx([1 / 3, 2 / 3] + [(1 + math.cos(math.pi * i / 8)) / 2 for i in range(8)])


def test_schedule_counts_optimizer_steps_not_micro_batches(tmp_path: Path) -> None:
    rates = []
    for token_budget in (1, 10**6):
        settings = SFT(learning_rate=0.5e-3, batch_prompts=4, epochs=2, warmup_fraction=0.34, token_budget=token_budget)
        folder = tmp_path / str(token_budget)
        train_sft(make_policy(), make_tokenizer(), make_groups(10), settings, folder)
        rates.append([row["learning_rate"] for row in read_metrics(folder)])
    assert rates[0] == rates[1]
    expected = [learning_rate_factor(s, num_steps=6, warmup_steps=2, schedule="cosine") for s in range(6)]
    assert rates[0] == pytest.approx([0.5e-3 * factor for factor in expected])


def test_policies_are_closer_at_first_and_the_last_is_the_model(tmp_path: Path) -> None:
    policy = make_policy()
    settings = SFT(learning_rate=1e-2, batch_prompts=2, save_policies=2)
    folder = tmp_path / "sft"
    assert train_sft(policy, make_tokenizer(), make_groups(9), settings, folder) == folder / "model"
    assert sorted(path.name for path in (folder / "policies").iterdir()) == ["step-000002", "step-000005"]
    groups = make_groups(3, seed=1)
    expected = completion_logprobs(policy, groups, temperature=1.0)
    for path, same in (("model", True), ("policies/step-000005", True), ("policies/step-000002", False)):
        saved = load_policy(ModelSettings(source=str(folder / path)), make_tokenizer())
        found = completion_logprobs(saved, groups, temperature=1.0)
        assert torch.allclose(found, expected, atol=1e-6) is same


def test_lora_trains_adapters_only_and_saves_plain_weights(tmp_path: Path) -> None:
    policy = make_policy(settings=ModelSettings(config=CONFIG, lora=LoraSettings(rank=4)))
    before = {name: parameter.clone() for name, parameter in policy.named_parameters()}
    settings = SFT(learning_rate=1e-2, batch_prompts=4, epochs=2, checkpoint_every=1)
    train_sft(policy, make_tokenizer(), make_groups(12), settings, tmp_path)
    changed = {name for name, parameter in policy.named_parameters() if not torch.equal(parameter, before[name])}
    trainable = {name for name, parameter in policy.named_parameters() if parameter.requires_grad}
    assert changed == trainable
    rows = read_metrics(tmp_path)
    assert rows[-1]["loss"] < rows[0]["loss"]
    saved = load_policy(ModelSettings(source=str(tmp_path / "model")), make_tokenizer())
    assert not any("lora" in name for name, _ in saved.named_parameters())
    groups = make_groups(3, seed=1)
    found, expected = (completion_logprobs(model, groups, temperature=1.0) for model in (saved, policy))
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    again = make_policy(settings=ModelSettings(config=CONFIG, lora=LoraSettings(rank=4)))
    train_sft(again, make_tokenizer(), make_groups(12), settings, tmp_path)
    assert all(torch.equal(p, q) for p, q in zip(again.parameters(), policy.parameters(), strict=True))


def losses_of_sft(folder: Path, **changes: object) -> list[float]:
    settings = SFT(learning_rate=1e-2, batch_prompts=4, **changes)  # type: ignore[arg-type]
    train_sft(make_policy(), make_tokenizer(), make_groups(16), settings, folder)
    return [row["loss"] for row in read_metrics(folder)]


def test_gradient_checkpointing_changes_memory_not_the_result(tmp_path: Path) -> None:
    """With it the inside of every block runs a second time in the backward pass, and gives the same."""
    runs = {}
    for recompute in (False, True):
        policy, calls = make_policy(), []
        policy.base_model.h[0].ln_1.register_forward_pre_hook(lambda *_, calls=calls: calls.append(1))
        settings = SFT(learning_rate=1e-2, batch_prompts=4, gradient_checkpointing=recompute)
        train_sft(policy, make_tokenizer(), make_groups(16), settings, tmp_path / str(recompute))
        runs[recompute] = len(calls), [row["loss"] for row in read_metrics(tmp_path / str(recompute))]
    assert runs[True][1] == pytest.approx(runs[False][1], rel=1e-5)
    assert runs[True][0] - runs[False][0] == 4  # one more per step; the model's trial runs are in both


def test_bfloat16_products_keep_float32_weights(tmp_path: Path) -> None:
    expected = losses_of_sft(tmp_path / "fp32")
    found = losses_of_sft(tmp_path / "bf16", precision="bf16")
    assert found == pytest.approx(expected, rel=2e-2)
    assert found != expected
    saved = load_policy(ModelSettings(source=str(tmp_path / "bf16" / "model")), make_tokenizer())
    assert {parameter.dtype for parameter in saved.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("capability", "precision", "warned"), [("AVX2", "bf16", 1), ("AVX512", "bf16", 0), ("AVX2", "fp32", 0)]
)
def test_bfloat16_on_a_processor_without_it_is_warned_of(
    capability: str, precision: str, warned: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: capability)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        losses_of_sft(tmp_path, precision=precision)
    assert sum("no bfloat16 instructions" in str(warning.message) for warning in caught) == warned


@pytest.mark.parametrize("change", [{"weight_decay": 0.5}, {"max_grad_norm": 0.01}, {"adam_betas": (0.5, 0.6)}])
def test_settings_of_the_optimizer_act(change: dict[str, object], tmp_path: Path) -> None:
    expected, found = losses_of_sft(tmp_path / "default"), losses_of_sft(tmp_path / "changed", **change)
    assert found[0] == expected[0]  # nothing acts before the first step
    assert found[-1] != expected[-1]


def test_tensorboard_gets_every_metric_and_some_of_what_was_trained_on(tmp_path: Path) -> None:
    folder = tmp_path / "align"
    settings = Matching(batch_prompts=4, epochs=2, save_policies=2, trackers=("tensorboard",))
    groups, tokenizer = referenced(make_policy(), make_groups(8)), make_tokenizer()
    train_matching(make_policy(), tokenizer, groups, settings, folder, temperature=0.8)
    (file,) = (folder / "exalign").glob("events*")
    events = EventAccumulator(str(file)).Reload()
    for name in ("loss", "kl", "grad_norm", "reward_correlation"):
        written = [row[name] for row in read_metrics(folder)]
        assert [event.value for event in events.Scalars(name)] == pytest.approx(written, rel=1e-6)
    shown = events.Tensors("rows/text_summary")
    saved = [int(path.name[5:]) for path in sorted((folder / "policies").iterdir())]
    assert [event.step for event in shown] == saved
    table = shown[-1].tensor_proto.string_val[0].decode()
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]
    known = {
        (tokenizer.decode(group.prompt_ids), tokenizer.decode(ids, skip_special_tokens=True), round(float(reward), 4))
        for group in groups
        for ids, reward in zip(group.completion_ids, group.rewards, strict=True)
    }
    assert len(rows) >= 4 * 3
    assert {(prompt, completion, float(reward)) for prompt, completion, reward in rows} <= known


def test_unknown_tracker_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="'wanb' is not installed"):
        train_sft(make_policy(), make_tokenizer(), make_groups(4), SFT(trackers=("wanb",)), tmp_path)


def test_no_groups_is_an_input_error(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="nothing to train on"):
        train_matching(make_policy(), make_tokenizer(), [], Matching(), tmp_path, temperature=1.0)


def test_each_epoch_visits_every_group_once_in_another_order() -> None:
    batches = EpochBatches(make_groups(7), batch_prompts=3, epochs=2, seed=5)
    assert [len(batches[step]) for step in range(len(batches))] == [3, 3, 1, 3, 3, 1]
    epochs = [[group.index for step in steps for group in batches[step]] for steps in ((0, 1, 2), (3, 4, 5))]
    assert sorted(epochs[0]) == sorted(epochs[1]) == list(range(7))
    assert epochs[0] != epochs[1]


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_shows_numbers_and_a_quiet_line_where_there_is_no_terminal(terminal: bool) -> None:
    written = io.StringIO()
    console = Console(file=written, force_terminal=terminal, width=100)
    with TrainingProgress("sft", num_steps=50, done=0, visible=True, console=console) as progress:
        for step in range(1, 51):
            progress.update({"step": step, "loss": 1 / step})
    text = written.getvalue()
    assert "50/50" in text
    assert "loss 0.02" in text
    if not terminal:
        assert len(text.splitlines()) == 2  # the first step and the last: the rest came too soon after
