"""A run folder that language models and people have judged, by the real writers: only who answers is made up."""

from __future__ import annotations

import io
import json
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

from rich.console import Console

from exalign.evaluation.run_folder import RunFolder
from exalign.judging.askers import JudgeSettings
from exalign.judging.comparisons import CRITERIA
from exalign.judging.exchanges import Body, Reply
from exalign.judging.instructions import load_instructions
from exalign.judging.judge import judge_pairs, questions
from exalign.judging.pairing import choose, match_ups
from exalign.judging.study import Store, plan_study

Rule = Callable[[str, str], str]
"""From two texts, what is said about them: A, tie, B, or something that is none of these."""


def longer(a: str, b: str) -> str:
    return "tie" if len(a) == len(b) else ("A" if len(a) > len(b) else "B")


def moody(a: str, b: str) -> str:
    """Unreadable on some answers, for A on some, and for the longer one on the rest."""
    mood = (len(a) + len(b)) % 4
    return ("nobody", "A", longer(a, b), longer(a, b))[mood]


class ByRule:
    """A judge in this process who answers every question by a rule; it costs 7 + 2 tokens."""

    concurrency = 1

    def __init__(self, judge: str, rule: Rule) -> None:
        self.judge, self.rule = judge, rule
        self.texts: dict[str, tuple[str, str]] = {}

    def body(self, question: str) -> Body:
        return {"model": self.judge, "messages": [{"role": "user", "content": question}]}

    async def attempt(self, body: Body) -> Reply:
        a, b = self.texts[body["messages"][0]["content"]]
        message = {"role": "assistant", "content": f"Verdict: {self.rule(a, b)}"}
        usage = {"prompt_tokens": 7, "completion_tokens": 2}
        raw = {"choices": [{"message": message, "finish_reason": "stop"}], "usage": usage}
        return Reply("answered", raw=json.dumps(raw), seconds=0.0)

    async def close(self) -> None:
        pass


def judge_run(run: Path, judge: str, rule: Rule, *, against: str = "sft", prompts: int = 100) -> None:
    """What `exalign judge RUN --against …` leaves behind."""
    instructions, settings = load_instructions("instruction"), JudgeSettings.model_validate({})
    for number, found in enumerate(match_ups(run, against)[1]):
        asker = ByRule(judge, rule)
        pairs = choose(found.pairs, prompts=prompts, seed=0)
        for pair in pairs:
            asker.texts[instructions.render(pair, left="first")] = pair.first_text, pair.second_text
            asker.texts[instructions.render(pair, left="second")] = pair.second_text, pair.first_text
        about = {"first": found.first, "second": found.second, "template": "instruction", "endpoint": None}
        folder = run / "judging" / "llm" / f"{len(judge)}-{rule.__name__}" / f"match-up-{number}"
        asked = questions(pairs, instructions, asker)
        ask = partial(judge_pairs, about=about, others={}, console=Console(file=io.StringIO()))
        # Playwright keeps an event loop running in the thread of the tests; the judge brings one of its own.
        with ThreadPoolExecutor(1) as thread:
            thread.submit(ask, asked, asker, settings, folder).result()


def assess_run(
    run: Path,
    name: str,
    matches: Sequence[tuple[str, str]],
    *,
    rules: dict[str, Rule],
    prompts: int,
    verdicts: int = 10_000,
    comment: str = "",
) -> None:
    """What a study leaves behind in which each person says what a rule of their own says, up to so many verdicts."""
    study = plan_study(run, matches, name=name, num_prompts=prompts, assessors=list(rules))
    RunFolder(run).studies.parent.mkdir(exist_ok=True)
    store = Store(str(RunFolder(run).studies))
    for person, token in store.create(study).items():
        assessor = store.assessor(token)
        assert assessor is not None
        for position in range(1, min(verdicts, store.progress(assessor.id)[1]) + 1):
            task = store.task(assessor.id, position)
            assert task is not None
            verdict = {"A": "left", "tie": "tie", "B": "right"}[rules[person](task.left_text, task.right_text)]
            criteria = {CRITERIA[0]: verdict, CRITERIA[position % 4 + 1]: "tie"}
            store.submit(assessor.id, position, 0, {"verdict": verdict, "criteria": criteria, "comment": comment})
    store.close()


def shorter(a: str, b: str) -> str:
    return longer(b, a)


def first_letter(a: str, b: str) -> str:
    return "tie" if a[:1] == b[:1] else ("A" if a < b else "B")
