"""Memory that runs out divides the work and changes no number."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch
from torch import Tensor

from exalign.data.batching import Group
from exalign.errors import InputError
from exalign.models.logprobs import PackedPolicy, reference_logprobs
from exalign.models.memory import TooLargeError, computed, fitting, is_out_of_memory
from training.tiny_world import make_groups, make_policy


def tokens(groups: Sequence[Group]) -> int:
    return sum(group.num_tokens for group in groups)


@pytest.mark.parametrize("room", [10**6, 100, 50, 35])
def test_every_group_is_computed_once_whatever_the_room(room: int, caplog: pytest.LogCaptureFixture) -> None:
    groups, tried = make_groups(12), []

    def work(part: Sequence[Group]) -> list[int]:
        tried.append(tokens(part))
        if tokens(part) > room:
            raise torch.OutOfMemoryError("Tried to allocate more than there is.")
        return [group.index for group in part]

    done = list(computed(work, groups, token_budget=160))
    assert all([group.index for group in part] == result for part, result in done)
    assert sorted(index for _, result in done for index in result) == list(range(12))
    failed = [count for count in tried if count > room]
    assert len(failed) == len(caplog.records) <= 3  # 160, 80 and 40 at the most, each once
    assert len(tried) == len(done) + len(failed)


def test_reference_log_probabilities_are_those_of_one_pass() -> None:
    class Cramped(PackedPolicy):
        def forward(self, groups: Sequence[Group], *, temperature: float) -> Tensor:
            if tokens(groups) > 60:
                raise RuntimeError(
                    "[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes"
                )
            return super().forward(groups, temperature=temperature)

    policy, groups = make_policy(), make_groups(9)
    expected = reference_logprobs(PackedPolicy(policy), groups, temperature=0.8, token_budget=10**6)
    found = reference_logprobs(Cramped(policy), groups, temperature=0.8, token_budget=10**6)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)


def test_only_allocations_that_fail_are_out_of_memory() -> None:
    for error in (MemoryError(), RuntimeError("CUDA error: out of range"), ValueError("can't allocate memory")):
        assert not is_out_of_memory(error)
        with pytest.raises(type(error)), fitting(make_groups(2)):
            raise error


def test_the_budget_is_halved_until_the_batch_is_divided_and_one_group_cannot_be() -> None:
    groups = make_groups(2)
    error = TooLargeError(groups)
    assert 2 * error.smaller(4096) >= tokens(groups) > error.smaller(4096)
    assert 4096 % error.smaller(4096) == 0
    with pytest.raises(InputError, match=r"^Row 0 alone, "):
        TooLargeError(groups[:1]).smaller(4096)
