"""Maximum likelihood, the reward model and the classifier, each against a computation by hand."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import nn

from exalign.data.batching import Group
from exalign.errors import InputError
from exalign.methods.oracle import BinaryCrossEntropy, Oracle, train_classifier
from exalign.methods.reward_model import BradleyTerry, RewardModel, train_reward_model
from exalign.methods.sft import SFT, train_sft
from exalign.models.heads import completion_outputs
from exalign.models.loading import load_classifier, load_reward_model
from exalign.models.model_settings import ModelSettings
from exalign.objectives import preference_accuracy
from training.tiny_world import CONFIG, GOOD_WORD, make_groups, make_policy, make_tokenizer, read_metrics


def plain_nats(policy: nn.Module, group: Group) -> tuple[float, int]:
    """−log π(y|x) summed over all completions, one token after the other, and the number of tokens."""
    nats, tokens = 0.0, 0
    for completion in group.completion_ids:
        ids = torch.cat([group.prompt_ids, completion])
        logits = policy(ids[None]).logits[0].double()
        for position in range(len(group.prompt_ids), len(ids)):
            nats -= float(logits[position - 1].log_softmax(0)[ids[position]])
            tokens += 1
    return nats, tokens


def test_sft_loss_is_nats_per_completion_token(tmp_path: Path) -> None:
    policy, groups = make_policy(), make_groups(6)
    with torch.no_grad():
        sums = [plain_nats(policy, group) for group in groups]
    expected = sum(nats for nats, _ in sums) / sum(tokens for _, tokens in sums)
    settings = SFT(learning_rate=1e-2, batch_prompts=6, epochs=20, token_budget=40)
    train_sft(policy, make_tokenizer(), groups, settings, tmp_path)
    rows = read_metrics(tmp_path)
    assert rows[0]["loss"] == pytest.approx(expected, rel=1e-5)
    assert rows[0]["tokens"] == sum(group.num_tokens for group in groups)
    assert rows[-1]["loss"] < expected - 0.1


def test_learning_the_prompts_too_is_every_token_but_the_first_once(tmp_path: Path) -> None:
    policy, groups = make_policy(), make_groups(6)  # with up to four completions: their prompt counts once
    with torch.no_grad():
        sums = [plain_nats(policy, group) for group in groups]
        prompts = [
            plain_nats(policy, replace(group, prompt_ids=group.prompt_ids[:1], completion_ids=(group.prompt_ids[1:],)))
            for group in groups
        ]
    nats, tokens = (sum(pair[place] for pair in (*sums, *prompts)) for place in (0, 1))
    settings = SFT(learning_rate=1e-2, batch_prompts=12, train_on_prompts=True)
    train_sft(policy, make_tokenizer(), groups, settings, tmp_path)
    (row,) = read_metrics(tmp_path)
    assert row["loss"] == pytest.approx(nats / tokens, rel=1e-5)


def small_scorer(*, labels: int) -> nn.Module:
    torch.manual_seed(0)
    load = load_reward_model if labels == 1 else load_classifier
    return load(ModelSettings(config=CONFIG), make_tokenizer())


def separable(count: int, *, seed: int = 0) -> list[Group]:
    """Two completions of random words; only the preferred one, at either place, holds the good word."""
    groups = []
    for group in make_groups(count, num_completions=2, seed=seed):
        preferred = group.index * 7 % 3 % 2
        completions = [torch.where(ids == GOOD_WORD, GOOD_WORD + 1, ids) for ids in group.completion_ids]
        completions[preferred][0] = GOOD_WORD
        groups.append(replace(group, completion_ids=tuple(completions), preferred=preferred, rewards=None))
    return groups


def test_reward_model_learns_what_separates(tmp_path: Path) -> None:
    model = small_scorer(labels=1)
    settings = RewardModel(learning_rate=1e-2, batch_prompts=16, epochs=6)
    train_reward_model(model, make_tokenizer(), separable(64), settings, tmp_path)
    rows = read_metrics(tmp_path)
    assert rows[-1]["accuracy"] > 0.95
    assert rows[-1]["margin"] > rows[0]["margin"] + 1
    assert rows[-1]["loss"] < 0.3 < rows[0]["loss"]
    unseen = separable(32, seed=9)
    with torch.no_grad():
        rewards = completion_outputs(model, unseen)[..., 0]
    right = [int(row.argmax()) == group.preferred for row, group in zip(rewards, unseen, strict=True)]
    assert sum(right) >= 30


@pytest.mark.parametrize("labels", [1, 2])
def test_a_row_of_weight_2_counts_as_that_row_twice_and_one_of_weight_0_not_at_all(labels: int) -> None:
    model, rows = small_scorer(labels=labels), separable(3)
    if labels == 2:
        rows = [replace(row, completion_ids=row.completion_ids[:1], preferred=None) for row in rows]
    kind = BradleyTerry(None) if labels == 1 else BinaryCrossEntropy(None, [0, 1, 1])  # type: ignore[arg-type]
    weighted = [replace(row, weight=weight) for row, weight in zip(rows, (2.0, 1.0, 0.0), strict=True)]
    (loss, seen), (expected, told) = kind.loss(model, weighted), kind.loss(model, [rows[0], rows[0], rows[1]])
    assert kind.weight(weighted) == 3
    assert loss.item() == pytest.approx(expected.item(), rel=1e-6)
    assert float(seen["accuracy"]) == pytest.approx(float(told["accuracy"]))


def test_preference_accuracy_by_hand() -> None:
    rewards = torch.tensor([[2.0, 1.0, 3.0], [0.0, 0.0, 99.0]])
    mask = torch.tensor([[True, True, True], [True, True, False]])
    accuracy, margin = preference_accuracy(rewards, torch.tensor([0, 1]), mask)
    assert accuracy.tolist() == [0.5, 0.5]  # beats one of two; a tie, the third place being no completion
    assert margin.tolist() == [0.0, 0.0]


def test_reward_model_needs_preferences(tmp_path: Path) -> None:
    groups = separable(3)
    groups[1] = replace(groups[1], preferred=None)
    with pytest.raises(InputError, match="Row 1 has no preference"):
        train_reward_model(small_scorer(labels=1), make_tokenizer(), groups, RewardModel(), tmp_path)


def labelled(count: int) -> tuple[list[Group], list[int]]:
    """Texts (prompt: the end token) and whether they hold the good word; groups in another order than the labels."""
    groups, labels = [], []
    for group in separable(count):
        text = group.completion_ids[group.index % 2]
        labels.append(int(bool((text == GOOD_WORD).any())))
        groups.append(Group(group.index, torch.tensor([0]), (text,)))
    return groups[::-1], labels


def test_classifier_learns_labels_addressed_by_index(tmp_path: Path) -> None:
    groups, labels = labelled(64)
    assert 16 < sum(labels) < 48
    settings = Oracle(model=ModelSettings(config=CONFIG), learning_rate=1e-2, batch_prompts=16, epochs=6)
    train_classifier(small_scorer(labels=2), make_tokenizer(), groups, labels, settings, tmp_path)
    rows = read_metrics(tmp_path)
    assert rows[-1]["accuracy"] > 0.95
    assert rows[-1]["loss"] < 0.3


def test_first_loss_of_the_classifier_by_hand(tmp_path: Path) -> None:
    groups, labels = labelled(5)
    model = small_scorer(labels=2)
    with torch.no_grad():
        log_p = completion_outputs(model, groups)[:, 0].log_softmax(dim=1)
    expected = -sum(float(row[labels[group.index]]) for row, group in zip(log_p, groups, strict=True)) / 5
    train_classifier(
        model, make_tokenizer(), groups, labels, Oracle(model=ModelSettings(config=CONFIG), batch_prompts=5), tmp_path
    )
    assert read_metrics(tmp_path)[0]["loss"] == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("bad", [[0, 1], [0, 1, 2], [0, 1, -1]])
def test_classifier_refuses_other_labels(bad: list[int], tmp_path: Path) -> None:
    groups, _ = labelled(3)
    with pytest.raises(InputError, match="Row 2 is not one text with a label 0 or 1"):
        train_classifier(
            small_scorer(labels=2), make_tokenizer(), groups, bad, Oracle(model=ModelSettings(config=CONFIG)), tmp_path
        )
