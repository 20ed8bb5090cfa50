"""The sample table: the same prompts answered by every policy, chosen by chance and never by reward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from exalign.data.record import Completion, Prompt, Record
from exalign.evaluation.schema import Answer, Example
from exalign.evaluation.tables import log_ratio

REFERENCE = "reference text"


def choose_examples(
    prompts: Sequence[Record], answers: Mapping[str, Sequence[Record]], *, num_examples: int, seed: int
) -> list[Example]:
    """`num_examples` prompts drawn with `seed` from those that every policy answered, with each one's first sample.

    `answers` maps a policy's name to its records; `prompts` may carry a reference text each.
    """
    by_id = {name: {r.id: r for r in records if r.completions} for name, records in answers.items()}
    known = {record.id: record for records in answers.values() for record in records}
    known.update({record.id: record for record in prompts})
    shared = [key for key in known if all(key in records for records in by_id.values())]
    if not by_id or not shared:
        return []
    drawn = np.random.default_rng(seed).permutation(len(shared))[:num_examples]
    examples = []
    for key in (shared[i] for i in sorted(drawn)):
        rows = [_answer(name, records[key].completions[0]) for name, records in by_id.items()]
        if known[key].completions and any(record.id == key for record in prompts):
            rows.insert(0, _answer(REFERENCE, known[key].completions[0]))
        examples.append(Example(key, render_prompt(known[key].prompt), rows))
    return examples


def render_prompt(prompt: Prompt) -> str:
    """A prompt as plain text: chat messages one after the other, each under its role.

    >>> print(render_prompt(({"role": "user", "content": "Hi"},)))
    [user]
    Hi
    """
    if isinstance(prompt, str):
        return prompt
    return "\n\n".join(f"[{message.get('role')}]\n{message.get('content')}" for message in prompt)


def _answer(source: str, completion: Completion) -> Answer:
    return Answer(source, completion.text, completion.reward, log_ratio(completion), completion.finish_reason)
