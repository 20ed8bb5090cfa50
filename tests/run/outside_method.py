"""A method of alignment that does not come with exalign: maximum likelihood of the best of K."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from pydantic import Field

from exalign.methods.method import Material, Method, TrainsOn
from exalign.methods.sft import SFT, train_sft


class BestOfK(Method):
    """Learns the best of the K completions by maximum likelihood."""

    least: float = Field(-1e9, description="prompts whose best reward is below this are left out")

    @property
    def trains_on(self) -> TrainsOn:
        return "rewards"

    @property
    def label(self) -> str:
        return "best of K"

    def train(self, material: Material, folder: Path) -> Path:
        best = []
        for group in material.groups:
            assert group.rewards is not None
            index = int(group.rewards.argmax())
            if group.rewards[index] >= self.least:
                best.append(replace(group, completion_ids=(group.completion_ids[index],), rewards=None))
        shared = {name: getattr(self, name) for name in SFT.model_fields if name in type(self).model_fields}
        return train_sft(material.policy, material.tokenizer, best, SFT(**shared), folder)
