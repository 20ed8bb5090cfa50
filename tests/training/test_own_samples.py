"""Methods on own samples: where the completions come from, the correction for it, and that a kill changes nothing."""

from __future__ import annotations

import json
import math
import signal
import time
from collections.abc import Sequence
from dataclasses import replace
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn

from exalign.data.batching import Group, group_of, microbatches
from exalign.data.record import Record
from exalign.errors import InputError
from exalign.methods.grpo import GRPO
from exalign.methods.matching import Matching, MatchingTask, pairs_of, train_matching, with_reference_logp
from exalign.methods.method import Method
from exalign.methods.on_policy import OwnSamples
from exalign.methods.rloo import RLOO, PolicyGradientTask
from exalign.models.logprobs import (
    PackedPolicy,
    completion_logprobs,
    plain_completion_logprobs,
    plain_completion_token_logprobs,
)
from exalign.rollout.scorers import WeightedSum
from exalign.rollout.settings import SampleSettings
from training.tiny_world import (
    GoodWords,
    assert_same_outcome,
    by_formula,
    make_material,
    make_policy,
    make_tokenizer,
    read_metrics,
    small_fresh_run,
)

TEMPERATURE = 0.8
GOLDEN = Path(__file__).with_name("golden_own_samples.json")
WAYS: dict[str, Method] = {
    "EXO in rounds": Matching(fresh_every=4, passes=2, beta_pi=0.5),
    "EXO on-policy": Matching(fresh_every=1),
    "DPO on own pairs": Matching(fresh_every=2, target="preference", divergence="forward_kl"),
    "RLOO": RLOO(fresh_every=2),
    "GRPO": GRPO(fresh_every=4, passes=2),
    "GSPO": GRPO(fresh_every=4, passes=2, ratio="sequence", clip=1e-3, scale_by_spread=False),
}


class Alike(GoodWords):
    """All are as good."""

    def score(self, records: Sequence[Record]) -> list[list[float]]:
        return [[1.0] * len(record.completions) for record in records]


class Watching(GoodWords):
    """Keeps what it is given to score: every rollout, with the log-probs that were computed before it."""

    def __init__(self) -> None:
        self.rollouts: list[list[Record]] = []

    def score(self, records: Sequence[Record]) -> list[list[float]]:
        self.rollouts.append(list(records))
        return super().score(records)


def run(settings: Method, folder: Path, **changes: Any) -> tuple[nn.Module, list[list[Record]]]:
    policy: Any = make_policy()
    watching = Watching()
    settings.train(make_material(policy, scorer=watching, **changes), folder)
    return policy, watching.rollouts


def steps(settings: Method, **more: Any) -> Any:
    return settings.model_copy(update={"learning_rate": 1e-2, "batch_prompts": 2, "epochs": 1} | more)


def test_prompts_are_drawn_in_their_turn_from_the_policy_as_it_is(tmp_path: Path) -> None:
    """log q of the second rollout is log π of the policy that the first one's steps ended with, saved after them."""
    settings = steps(WAYS["EXO in rounds"], save_policies=8)
    _, (first, second) = run(settings, tmp_path)
    assert sorted(record.id for record in (*first, *second)) == sorted(f"{i}@0" for i in range(8))
    completions = [completion for record in first for completion in record.completions]
    assert all(c.logprob == c.reference_logprob for c in completions)  # q = π_sft, to the bit: one code path
    assert len(read_metrics(tmp_path)) == 2 * 2 * 2  # rollouts · passes · batches
    before, after = make_policy(), make_policy()
    after.load_state_dict(load_file(tmp_path / "policies" / "step-000004" / "model.safetensors"), strict=False)
    groups = [group_of(record, index, from_proposal=True) for index, record in enumerate(second)]
    with torch.no_grad():
        reference = completion_logprobs(before, groups, temperature=TEMPERATURE)
        proposal = completion_logprobs(after, groups, temperature=TEMPERATURE)
    for row, group in enumerate(groups):
        assert group.reference_logp is not None and group.proposal_logp is not None
        assert torch.allclose(reference[row], group.reference_logp, atol=1e-4)
        assert torch.allclose(proposal[row], group.proposal_logp, atol=1e-4)
        assert not torch.allclose(reference[row], proposal[row], atol=1e-2)


def test_one_rollout_of_all_prompts_is_alignment_on_samples_of_the_supervised_policy(tmp_path: Path) -> None:
    """The samples of the only rollout, given to `train_matching`, lead to the same losses and weights."""
    settings = Matching(learning_rate=1e-3, batch_prompts=8, fresh_every=3, passes=3)
    policy, (drawn,) = run(settings, tmp_path / "fresh")
    scored = [record.with_rewards(row) for record, row in zip(drawn, GoodWords().score(drawn), strict=True)]
    offline = Matching(learning_rate=1e-3, batch_prompts=8, epochs=3, beta_pi=1.0)
    groups = [replace(group_of(record, index), reference_logp=None) for index, record in enumerate(scored)]
    groups = with_reference_logp(make_policy(), groups, offline, temperature=TEMPERATURE)
    at_once = make_policy()
    train_matching(at_once, make_tokenizer(), groups, offline, tmp_path / "once", temperature=TEMPERATURE)
    losses = [[row["loss"] for row in read_metrics(tmp_path / name)] for name in ("fresh", "once")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for ours, theirs in zip(policy.parameters(), at_once.parameters(), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)


def moved(policy: nn.Module) -> Any:
    """The policy in float64, a little away from π_sft."""
    policy.double()
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in policy.parameters():
            parameter.add_(0.05 * torch.randn(parameter.shape, generator=generator, dtype=torch.float64))
    return policy


def own_of(settings: Any, policy: Any, **how: Any) -> tuple[OwnSamples, PackedPolicy]:
    reference: Any = make_policy().double().eval()
    material = make_material(policy, reference=reference, **how)
    module = PackedPolicy(policy)
    compute = settings.compute(TEMPERATURE) if isinstance(settings, RLOO) else None
    return OwnSamples(module, material, settings, compute=compute), module


def sft_of(own: OwnSamples) -> nn.Module:
    assert own.material.reference is not None
    return own.material.reference


def gradient(task: Any, module: PackedPolicy) -> Tensor:
    groups = task.batches[0]
    loss, metrics = task.loss(module, groups)
    weight = task.weight(groups)
    module.zero_grad()
    (loss / weight).backward()
    assert all(bool(value.isfinite()) for value in metrics.values())
    return torch.cat([p.grad.flatten() for p in module.parameters() if p.grad is not None])


def test_on_policy_the_gradient_of_exo_is_that_of_rloo() -> None:
    """`∇EXO = (K−1)/(K β_r) ∇RLOO` on the same samples, through the whole training path; with β_π = 0.3 it is not."""
    beta, policy = 0.2, moved(make_policy())
    common: dict[str, Any] = {"batch_prompts": 8, "fresh_every": 1}
    gradients = []
    for settings in (
        RLOO(**common, beta=beta),
        Matching(**common, beta_r=beta),
        Matching(**common, beta_r=beta, beta_pi=0.3),
    ):
        own, module = own_of(settings, policy)
        own_task: Any = (
            MatchingTask(own.batches, settings, TEMPERATURE, own) if isinstance(settings, Matching) else None
        )
        gradients.append(gradient(own_task or PolicyGradientTask(settings, own), module))  # type: ignore[arg-type]
    rloo, exo, tempered = gradients
    assert torch.allclose(exo, rloo * 3 / 4 / beta, rtol=1e-4, atol=1e-6 * float(exo.abs().max()))
    assert torch.cosine_similarity(tempered, exo, dim=0) < 0.99


@pytest.mark.parametrize("how", [{}, {"scale_by_spread": False}, {"ratio": "sequence"}], ids=str)
def test_grpo_and_its_metrics_by_hand_on_stale_samples(how: dict[str, Any]) -> None:
    settings = GRPO(batch_prompts=8, fresh_every=2, passes=2, clip=0.01, beta=0.3, **how)
    policy = moved(make_policy())
    own, module = own_of(settings, policy)
    groups = own.batches[0]
    sampled = plain_completion_token_logprobs(policy, groups, temperature=TEMPERATURE).detach()
    moved(policy)  # as a step does
    reference = plain_completion_token_logprobs(sft_of(own), groups, temperature=TEMPERATURE).detach()
    logp = plain_completion_token_logprobs(policy, groups, temperature=TEMPERATURE).detach()
    total, clipped, kl = 0.0, 0.0, 0.0
    for row, group in enumerate(groups):
        rewards = group.rewards.double()  # type: ignore[union-attr]
        advantages = rewards - rewards.mean()
        if settings.scale_by_spread:
            advantages /= rewards.std(correction=0) + 1e-4
        weights = (logp[row].sum(-1) - sampled[row].sum(-1)).softmax(0)
        kl += float((weights * (logp[row] - reference[row]).sum(-1)).sum())
        for i, ids in enumerate(group.completion_ids):
            now, old, sft = (values[row, i, : len(ids)] for values in (logp, sampled, reference))
            ratios = (now - old).exp() if settings.ratio == "token" else (now - old).mean().exp()[None]
            surrogates = [min(float(r * advantages[i]), float(r.clamp(0.99, 1.01) * advantages[i])) for r in ratios]
            penalty = float(((sft - now).exp() - (sft - now) - 1).mean())
            total += (-sum(surrogates) / len(surrogates) + 0.3 * penalty) / 4
            out = [
                (a > 0 and r > 1.01) or (a < 0 and r < 0.99)
                for r, a in ((float(r), float(advantages[i])) for r in ratios)
            ]
            clipped += sum(out) / len(out) / 4
    task = PolicyGradientTask(settings, own)
    loss, metrics = task.loss(module, groups)
    assert float(loss.detach()) == pytest.approx(total, rel=1e-5)
    assert float(metrics["clip_fraction"]) == pytest.approx(clipped, abs=1e-6) and clipped > 0
    assert float(metrics["kl"]) == pytest.approx(kl, rel=1e-4)


def test_what_a_rollout_says_of_itself_by_hand() -> None:
    settings = Matching(batch_prompts=8, fresh_every=1)
    policy = moved(make_policy())
    scorer = WeightedSum({"good": (1.0, GoodWords()), "again": (2.0, GoodWords())})
    own, module = own_of(settings, policy, scorer=scorer)
    groups = own.batches[0]
    logp = plain_completion_logprobs(policy, groups, temperature=TEMPERATURE).detach()
    tokens = sum(len(ids) for group in groups for ids in group.completion_ids)
    rewards = torch.stack([group.rewards for group in groups])  # type: ignore[misc]
    cut = [len(ids) == 8 and int(ids[-1]) != 0 for group in groups for ids in group.completion_ids]
    equal = [bool((row == row[0]).all()) for row in rewards]
    assert 0 < sum(cut) < 32
    assert own.numbers.pop("drawing_seconds") > 0 < own.numbers.pop("scoring_seconds")
    assert own.numbers == pytest.approx(
        {
            "reward": float(rewards.mean()),
            "entropy": -float(logp.sum()) / tokens,
            "unfinished": sum(cut) / 32,
            "equal_rewards": sum(equal) / 8,
            "reward/good": float(rewards.mean()) / 3,
            "reward/again": float(rewards.mean()) / 3,
        },
        rel=1e-5,
    )
    task = MatchingTask(own.batches, settings, TEMPERATURE, own)
    metrics = {name: float(value) / 8 for name, value in task.loss(module, groups)[1].items()}
    assert metrics["kl_to_sampled"] == 0 and metrics["logprob_gap"] == pytest.approx(0, abs=1e-6)
    assert metrics["effective_samples"] == pytest.approx(4)
    reference = plain_completion_logprobs(sft_of(own), groups, temperature=TEMPERATURE).detach()
    assert metrics["kl"] == pytest.approx(float((logp - reference).mean()), rel=1e-4)


@pytest.mark.parametrize("method", [Matching, RLOO, GRPO])
def test_log_q_of_one_step_is_the_step_s_own(method: type[Matching | RLOO]) -> None:
    """A rollout that serves one step has the loss, gradient and metrics that it has where log q is computed before."""
    policy = moved(make_policy())
    found = []
    for fresh_every in (1, 2):
        settings = method(batch_prompts=8, fresh_every=fresh_every, passes=fresh_every)
        own, module = own_of(settings, policy)
        assert own.at_once == (fresh_every == 1)
        task: Any = MatchingTask(own.batches, settings, TEMPERATURE, own) if method is Matching else None
        task = task or PolicyGradientTask(settings, own)  # type: ignore[arg-type]
        metrics = {name: float(value) / 8 for name, value in task.loss(module, own.batches[0])[1].items()}
        said = {name: value for name, value in (task.numbers | metrics).items() if "seconds" not in name}
        found.append((gradient(task, module), said))
    (once, said), (before, expected) = found
    assert torch.allclose(once, before, rtol=1e-4, atol=1e-6 * float(before.abs().max()))
    assert said == pytest.approx(expected, rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("settings", [Matching(precision="bf16"), GRPO(precision="bf16")], ids=lambda s: s.label)
def test_how_far_the_sampler_s_log_q_is_from_the_training_path_s(settings: Method) -> None:
    """The sampler draws in float32, the steps compute in bfloat16: their difference is what is told, per token."""
    policy: Any = make_policy()
    own, _ = own_of(settings.model_copy(update={"batch_prompts": 8, "fresh_every": 2, "passes": 2}), policy)
    policy.float()
    groups = own.batches[0]
    logp = plain_completion_logprobs(policy, groups, temperature=TEMPERATURE).detach()
    gaps = [
        abs(float(logp[row, i] - group.proposal_logp[i])) / len(ids)  # type: ignore[index]
        for row, group in enumerate(groups)
        for i, ids in enumerate(group.completion_ids)
    ]
    assert own.numbers["logprob_gap"] == pytest.approx(sum(gaps) / len(gaps), rel=1e-2)
    assert own.numbers["logprob_gap"] > 1e-5


def test_own_pairs_are_two_by_two_and_ties_weigh_nothing() -> None:
    logp, ids = torch.tensor([-1.0, -2.0, -3.0, -4.0]), tuple(torch.tensor([i]) for i in range(4))
    group = Group(7, ids[0], ids, rewards=torch.tensor([0.0, 1.0, 2.0, 2.0]), reference_logp=logp, weight=3.0)
    first, second = pairs_of(group)
    assert [ids.tolist() for ids in first.completion_ids] == [[0], [1]] and first.preferred == 1
    assert first.reference_logp is not None and first.reference_logp.tolist() == [-1.0, -2.0]
    assert (first.weight, second.weight) == (1.5, 0.0)
    settings = Matching(target="preference", divergence="forward_kl", epsilon=1e-6, beta_pi=0.4, fresh_every=1)
    policy = moved(make_policy())
    own, module = own_of(settings.model_copy(update={"batch_prompts": 8}), policy)
    task = MatchingTask(own.batches, settings, TEMPERATURE, own)
    groups = own.batches[0]
    loss, metrics = task.loss(module, groups)
    total, count = 0.0, 0
    logp = plain_completion_logprobs(policy, groups, temperature=TEMPERATURE).detach()
    for row, group in enumerate(groups):
        assert group.rewards is not None and group.reference_logp is not None
        ratios = (logp[row] - group.reference_logp).tolist()
        for i, j in ((0, 1), (2, 3)):
            if group.rewards[i] != group.rewards[j]:
                won, lost = (i, j) if group.rewards[i] > group.rewards[j] else (j, i)
                total += math.log1p(math.exp(-0.4 * (ratios[won] - ratios[lost]))) / 2  # DPO's −log σ
                count += 1
    assert 0 < count < 16
    assert task.weight(groups) == count / 2
    assert float(loss.detach()) == pytest.approx(total, rel=1e-4)
    assert {"accuracy", "kl", "kl_to_sampled"} <= metrics.keys()


def test_ties_weigh_nothing_however_a_step_is_divided() -> None:
    """One decided pair and three ties: the step's weight is one pair, with all in a micro-batch or each in its own."""
    ids, logp = tuple(torch.tensor([i]) for i in range(2)), torch.tensor([-1.0, -2.0])
    rewards = [torch.tensor(pair) for pair in ([0.0, 1.0], [1.0, 1.0], [2.0, 2.0], [0.0, 0.0])]
    groups = [Group(i, ids[0], ids, rewards=pair, reference_logp=logp) for i, pair in enumerate(rewards)]
    own, _ = own_of(Matching(target="preference", fresh_every=1), make_policy())
    task = MatchingTask(own.batches, Matching(target="preference", fresh_every=1), TEMPERATURE, own)
    for budget in (3, 1000):
        assert sum(task.weight(part) for part in microbatches(groups, token_budget=budget)) == 1


def test_two_own_samples_of_a_prompt_are_a_pair(tmp_path: Path) -> None:
    """The usual online DPO: with K = 2 the pairs are as many as the groups, and carry their preference all the same."""
    settings = Matching(target="preference", divergence="forward_kl", fresh_every=1, batch_prompts=4)
    material = make_material(make_policy())
    material = replace(material, sampling=material.sampling.model_copy(update={"num_completions": 2}))
    settings.train(material, tmp_path)
    rows = read_metrics(tmp_path)
    assert rows and all(0 <= row["accuracy"] <= 1 for row in rows)
    assert not {"reward_spread", "effective_samples"} & {*rows[0]}  # of a correction that pairs do not need
    drawn = OwnSamples(PackedPolicy(make_policy()), material, settings)
    assert rows[0]["reward"] == pytest.approx(float(torch.cat([group.rewards for group in drawn.batches[0]]).mean()))


def test_of_a_step_without_a_decided_pair_only_the_loss_is_known(tmp_path: Path) -> None:
    settings = Matching(target="preference", divergence="forward_kl", fresh_every=1, batch_prompts=4)
    material = replace(make_material(make_policy()), scorer=Alike())
    settings.train(material, tmp_path)
    for row in read_metrics(tmp_path):
        assert row["loss"] == 0 and row["grad_norm"] == 0 and row["reward"] == 1 and row["equal_rewards"] == 1
        assert row["kl"] is None and row["accuracy"] is None


def test_killed_in_the_second_rollout_it_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    small_fresh_run(tmp_path / "whole")
    context = ForkServerContext()
    worker = context.Process(target=small_fresh_run, args=(tmp_path / "killed",))
    worker.start()
    deadline = time.monotonic() + 60
    while not (tmp_path / "killed" / "policies" / "step-000005").exists() and time.monotonic() < deadline:
        time.sleep(0.002)
    worker.kill()
    worker.join()
    assert worker.exitcode == -signal.SIGKILL, "the run ended before it could be killed"
    small_fresh_run(tmp_path / "killed")
    assert_same_outcome(tmp_path / "killed", tmp_path / "whole")


@pytest.mark.parametrize(
    ("settings", "sampling", "sentence"),
    [
        (Matching(fresh_every=1, target="preference"), {"num_completions": 3}, "give an even sample.num_completions"),
        (Matching(fresh_every=1), {"num_completions": 1}, "compares at least two"),
        (RLOO(), {"top_k": 4}, "RLOO needs samples of the policy itself"),
        (GRPO(), {"num_completions": 1}, "GRPO compares the completions of a prompt"),
    ],
)
def test_what_cannot_work_is_one_sentence(
    settings: Method, sampling: dict[str, Any], sentence: str, tmp_path: Path
) -> None:
    limits = {"num_completions": 4, "max_new_tokens": 8, "max_prompt_tokens": 8}
    with pytest.raises(InputError, match=sentence):
        run(settings, tmp_path, sampling=SampleSettings(**(limits | sampling)))


def test_a_single_own_sample_is_refused_before_any_is_drawn() -> None:
    problems = Matching(fresh_every=1).sampling_problems(SampleSettings(num_completions=1))
    assert list(problems) == ["compares at least two completions of a prompt; raise sample.num_completions"]


def test_samples_cut_to_their_likely_tokens_are_corrected_by_what_the_sampler_says(tmp_path: Path) -> None:
    sampling = SampleSettings(num_completions=4, max_new_tokens=8, max_prompt_tokens=8, top_k=3)
    _, rollouts = run(steps(WAYS["EXO on-policy"]), tmp_path, sampling=sampling)
    completions = [completion for record in rollouts[0] for completion in record.completions]
    assert all(c.logprob > c.reference_logprob + 1e-3 for c in completions)  # type: ignore[operator]


@pytest.mark.parametrize("way", WAYS)
def test_golden_trace(way: str, tmp_path: Path) -> None:
    """A refactor reproduces these losses. To change them on purpose, write the new ones here and say why."""
    policy: Any = by_formula(make_policy())
    reference: Any = by_formula(make_policy()).eval()
    steps(WAYS[way], learning_rate=1e-3).train(make_material(policy, reference=reference), tmp_path)
    rows, expected = read_metrics(tmp_path), json.loads(GOLDEN.read_text())[way]
    assert len(expected) >= 3
    for name, values in expected.items():
        known = [None if value is None else pytest.approx(value, rel=1e-6, abs=1e-7) for value in values]
        assert [row[name] for row in rows] == known, name
