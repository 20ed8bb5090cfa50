"""Talk to a model in the terminal, or to two side by side."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from rich.columns import Columns
from rich.console import Console
from rich.panel import Panel
from rich.text import Text

from exalign.data.record import Record
from exalign.device import device
from exalign.errors import InputError
from exalign.evaluation.run_folder import RunFolder
from exalign.models.loading import load_policy, load_tokenizer
from exalign.models.model_settings import ModelSettings
from exalign.rollout.sampler import GroupedSampler
from exalign.rollout.scorers import max_positions
from exalign.rollout.settings import SampleSettings
from exalign.storage import exists, whole_characters
from exalign.terminal import shown

NEW = "/new"
FAR = 32768
"""Tokens of a conversation with a model that has no last position."""


@dataclass
class Speaker:
    """A model with its own side of the conversation; one without a chat template continues each text by itself."""

    source: str
    sampler: GroupedSampler
    template: bool
    system: str | None
    turns: list[dict[str, Any]] = field(default_factory=list)
    asked: int = 0

    @classmethod
    def load(cls, source: str, *, max_new_tokens: int, temperature: float, seed: int, system: str | None) -> Speaker:
        source = _policy(source)
        tokenizer = load_tokenizer(source)
        policy = load_policy(ModelSettings(source=source), tokenizer)
        longest = (max_positions(policy) or FAR) - max_new_tokens
        if longest < 1:
            raise InputError(f"{source} has {max_positions(policy)} positions; lower --max-new-tokens.")
        settings = SampleSettings(num_completions=1, max_new_tokens=max_new_tokens, max_prompt_tokens=longest)
        model: Any = policy.to(device()).eval()  # type: ignore[arg-type]
        sampler = GroupedSampler(model, tokenizer, settings, temperature=temperature, seed=seed)
        return cls(source, sampler, bool(tokenizer.chat_template), system)

    def answer(self, text: str) -> str:
        """What the model says to a text, after all that was said before."""
        if not self.turns and self.system:
            self.turns.append({"role": "system", "content": whole_characters(self.system)})
        text = whole_characters(text)  # a terminal hands on bytes that are no UTF-8 as halves of some
        self.turns.append({"role": "user", "content": text})
        self.asked += 1
        self.sampler.counts.clear()  # what they say is of this answer
        prompt = tuple(self.turns) if self.template else text
        (record,) = self.sampler.sample([Record(f"turn-{self.asked}", prompt)])
        said = record.completions[0].text
        self.turns.append({"role": "assistant", "content": said})
        return said


def _policy(source: str) -> str:
    """`source`; of a run's folder, the policy that its report ships."""
    run = RunFolder(Path(source))
    if not exists(run.recipe):
        return source
    found = run.read_evidence().verdict
    if found is None:
        raise InputError(f"The report of {source} names no policy to ship; give one, as {source}/align/METHOD/model.")
    return str(run.policy_source(f"{found.method}@{found.step}"))


def chat(speakers: Sequence[Speaker], console: Console) -> None:
    """Ask, answer, and so on, until the input ends; `/new` begins again."""
    for speaker in speakers:
        kind = "" if speaker.template else ", which has no chat template: it continues each text by itself"
        kind += ", without --system" if speaker.system and not speaker.template else ""
        console.print(shown(f"• {speaker.source}{kind}", "dim"), soft_wrap=True)
    console.print(shown(f"{NEW} begins again, Ctrl-D ends", "dim"))
    for text in _asked(console):
        if text == NEW:
            for speaker in speakers:
                speaker.turns.clear()
            continue
        width = max((console.width - 1) // len(speakers) - 1, 20)
        panels = []
        for one in speakers:
            said = Text("\n").join(map(shown, one.answer(text).strip().split("\n")))
            name = "/".join(Path(one.source).parts[-2:])  # the last two of a path, the model's own of a hub
            panels.append(Panel(said, title=shown(name), width=width))
        console.print(Columns(panels, padding=(0, 1)))
        for one in speakers:
            if one.sampler.counts["prompts_cut"]:
                console.print(
                    shown(f"{one.source} has no room for all of it: the beginning is cut; {NEW} begins again")
                )


def _asked(console: Console) -> Iterator[str]:
    while True:
        try:
            text = console.input("› ").strip()
        except EOFError:
            return
        except UnicodeDecodeError:
            console.print("That was not UTF-8, and is not asked.")
            continue
        if text:
            yield text
