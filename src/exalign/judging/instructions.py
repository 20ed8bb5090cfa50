"""How the judge is asked, and how its answer is read. Both belong to one convention: the line `Verdict: A|B|tie`."""

from __future__ import annotations

from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

from jinja2 import StrictUndefined, Template, TemplateError, meta
from jinja2.sandbox import ImmutableSandboxedEnvironment

from exalign.data.record import Prompt, spoken
from exalign.errors import InputError
from exalign.judging.comparisons import OTHER, Pair, Side
from exalign.storage import exists

BUILT_IN = ("dialogue", "instruction", "summarisation")
VARIABLES = ("prompt", "messages", "answer_a", "answer_b", "reference")
"""What a template may use. `prompt` is text, `messages` the chat messages or none, `reference` a text or none."""
_REQUIRED = {"answer_a", "answer_b"}
_MARKUP = " \t*_#>`\"'“”‘’[](){}<>.,!-–—\\$"
_SHOWN = {"a": "left", "b": "right", "tie": "tie"}
_NOUNS = ("answer", "response", "summary", "message", "assistant")


@dataclass(frozen=True)
class Instructions:
    """A template of the question, ready to be filled."""

    name: str
    template: Template

    def render(self, pair: Pair, *, left: Side) -> str:
        """The question about `pair` with the system `left` shown as A and the other as B.

        Half of a character, which JSON can spell and nobody can be sent, is a question mark.
        """
        try:
            question = self.template.render(
                prompt=prompt_text(pair.prompt),
                messages=None if isinstance(pair.prompt, str) else list(pair.prompt),
                answer_a=pair.text(left),
                answer_b=pair.text(OTHER[left]),
                reference=pair.reference,
            )
        except (TemplateError, TypeError, ValueError, ArithmeticError, LookupError) as error:
            raise InputError(f"The template {self.name} fails on prompt {pair.prompt_id}: {error}.") from None
        return question.strip().encode("utf-8", "replace").decode()


def load_instructions(template: str) -> Instructions:
    """A built-in template by name, or a Jinja file of the user's.

    An unknown variable, or a template that does not show both answers, is an `InputError`.
    """
    if template in BUILT_IN:
        name = template
        source = (files("exalign.judging") / "templates" / f"{template}.jinja").read_text(encoding="utf-8")
    else:
        path = Path(template)
        if not exists(path):
            raise InputError(f"--template {template}: neither a file nor one of {', '.join(BUILT_IN)}.")
        try:
            name, source = path.stem, path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise InputError(f"The template {path} cannot be read ({error}).") from None
    environment = ImmutableSandboxedEnvironment(undefined=StrictUndefined, autoescape=False)
    try:
        used = meta.find_undeclared_variables(environment.parse(source))
        compiled = environment.from_string(source)
    except TemplateError as error:
        raise InputError(f"The template {template} is not valid Jinja: {error}.") from None
    if unknown := used - set(VARIABLES):
        raise InputError(
            f"The template {template} uses {', '.join(sorted(unknown))}; it may use {', '.join(VARIABLES)}."
        )
    if missing := _REQUIRED - used:
        raise InputError(f"The template {template} does not show {' and '.join(sorted(missing))}.")
    return Instructions(name, compiled)


def prompt_text(prompt: Prompt) -> str:
    """A prompt as a person reads it; chat messages each under the name of their role.

    >>> print(prompt_text(({"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hi"})))
    System: Be kind.
    <BLANKLINE>
    User: Hi
    """
    if isinstance(prompt, str):
        return prompt
    return "\n\n".join(f"{message['role'].capitalize()}: {spoken(message)}" for message in prompt)


def read_verdict(answer: str) -> str:
    """`left` (A), `right` (B), `tie`, or `unreadable`: what the line `Verdict: …` of an answer says.

    Markup around it does not matter. Nothing else is read: an answer without such a line, with a line that says
    something else, or with lines that contradict each other, is unreadable. What stands in `<think>…</think>` is the
    model talking to itself and is skipped.

    >>> read_verdict("B is vague.\\n**Verdict: A**"), read_verdict("Verdict: Summary B."), read_verdict("A, I think")
    ('left', 'right', 'unreadable')
    """
    said = {
        verdict
        for line in answer.rpartition("</think>")[2].partition("<think>")[0].splitlines()
        if (verdict := _verdict_of_line(line)) is not None
    }
    return said.pop() if len(said) == 1 else "unreadable"


def _verdict_of_line(line: str) -> str | None:
    name, colon, value = line.replace("：", ":").partition(":")
    if not colon or name.strip(_MARKUP).casefold() not in ("verdict", "final verdict"):
        return None
    words = value.strip(_MARKUP).casefold().split()
    if len(words) == 2 and words[0] in _NOUNS:
        words = words[1:]
    return _SHOWN.get(words[0].strip(_MARKUP), "unreadable") if len(words) == 1 else "unreadable"
