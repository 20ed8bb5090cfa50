"""Alignment in rounds: where the completions come from, the correction for it, and that a kill changes nothing."""

from __future__ import annotations

import json
import signal
import time
from dataclasses import replace
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any

import pytest
import torch

from exalign.data.batching import group_of
from exalign.data.store import read_records
from exalign.errors import InputError
from exalign.methods.matching import Matching, train_matching, train_rounds, with_reference_logp
from exalign.models.logprobs import completion_logprobs
from training.tiny_world import (
    assert_same_outcome,
    by_formula,
    make_material,
    make_policy,
    make_tokenizer,
    read_metrics,
    small_rounds_run,
)

TEMPERATURE = 0.8
GOLDEN = Path(__file__).with_name("golden_rounds.json")


def rounds_of(folder: Path) -> list[Path]:
    return sorted((folder / "rollouts").iterdir())


def test_the_prompts_are_dealt_out_and_the_first_round_is_the_supervised_policys(tmp_path: Path) -> None:
    small_rounds_run(tmp_path)
    drawn = [read_records(path) for path in rounds_of(tmp_path)]
    assert [len(records) for records in drawn] == [4, 4]
    assert sorted(record.id for records in drawn for record in records) == sorted(f"{i}@0" for i in range(8))
    first, second = ([c for record in records for c in record.completions] for records in drawn)
    assert all(c.logprob == c.reference_logprob for c in first)  # q = π_sft, to the bit: one code path
    assert any(abs(c.logprob - c.reference_logprob) > 1e-3 for c in second)
    assert len(read_metrics(tmp_path)) == 2 * 2 * 2  # rounds · epochs · steps


def test_proposal_and_reference_of_a_round_are_those_of_the_policies_then(tmp_path: Path) -> None:
    """log q of the second round is log π of the policy that the first round ended with, saved after its steps."""
    small_rounds_run(tmp_path)
    before = make_policy()
    after = make_policy()
    from safetensors.torch import load_file

    saved = load_file(tmp_path / "policies" / "step-000004" / "model.safetensors")
    after.load_state_dict(saved, strict=False)
    groups = [group_of(r, i, from_proposal=True) for i, r in enumerate(read_records(rounds_of(tmp_path)[1]))]
    with torch.no_grad():
        reference = completion_logprobs(before, groups, temperature=TEMPERATURE)
        proposal = completion_logprobs(after, groups, temperature=TEMPERATURE)
    for row, group in enumerate(groups):
        assert group.reference_logp is not None and group.proposal_logp is not None
        assert torch.allclose(reference[row], group.reference_logp, atol=1e-4)
        assert torch.allclose(proposal[row], group.proposal_logp, atol=1e-4)


def test_one_round_is_alignment_on_samples_of_the_supervised_policy(tmp_path: Path) -> None:
    """The samples of the only round, given to `train_matching`, lead to the same losses and weights."""
    policy: Any = make_policy()
    settings = Matching(learning_rate=1e-3, batch_prompts=8, epochs=3)
    train_rounds(make_material(policy), settings, tmp_path / "rounds")
    (drawn,) = rounds_of(tmp_path / "rounds")
    groups = [replace(group_of(r, i), reference_logp=None) for i, r in enumerate(read_records(drawn))]
    groups = with_reference_logp(make_policy(), groups, settings, temperature=TEMPERATURE)
    at_once = make_policy()
    train_matching(at_once, make_tokenizer(), groups, settings, tmp_path / "once", temperature=TEMPERATURE)
    losses = [[row["loss"] for row in read_metrics(tmp_path / name)] for name in ("rounds", "once")]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    for ours, theirs in zip(policy.parameters(), at_once.parameters(), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)


def test_a_run_killed_in_its_second_round_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    small_rounds_run(tmp_path / "whole")
    context = ForkServerContext()
    worker = context.Process(target=small_rounds_run, args=(tmp_path / "killed",))
    worker.start()
    deadline = time.monotonic() + 60
    while not (tmp_path / "killed" / "rollouts" / "round-001").exists() and time.monotonic() < deadline:
        time.sleep(0.002)
    worker.kill()
    worker.join()
    assert worker.exitcode == -signal.SIGKILL, "the run ended before it could be killed"
    small_rounds_run(tmp_path / "killed")
    assert_same_outcome(tmp_path / "killed", tmp_path / "whole")


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"target": "preference"}, "rounds above 1 need target 'reward'"),
        ({"rounds": 9}, "rounds is 9, but there are 8 prompts"),
    ],
)
def test_what_rounds_cannot_do_is_one_sentence(changes: dict[str, Any], sentence: str, tmp_path: Path) -> None:
    settings = Matching(**{"rounds": 2} | changes)
    policy: Any = make_policy()
    with pytest.raises(InputError, match=sentence):
        train_rounds(make_material(policy), settings, tmp_path)


def test_golden_trace(tmp_path: Path) -> None:
    """A refactor reproduces these losses. To change them on purpose, write the new ones here and say why."""
    policy, reference = (by_formula(make_policy()) for _ in range(2))
    settings = Matching(learning_rate=1e-3, batch_prompts=2, epochs=2, rounds=2)
    train_rounds(make_material(policy, reference=reference.eval()), settings, tmp_path)
    rows, expected = read_metrics(tmp_path), json.loads(GOLDEN.read_text())
    for name in ("loss", "kl", "grad_norm"):
        assert [row[name] for row in rows] == pytest.approx(expected[name], rel=1e-6, abs=1e-7)
