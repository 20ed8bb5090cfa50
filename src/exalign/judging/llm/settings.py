"""What can be set about a judge; every field is an option of `exalign judge` of the same name."""

from __future__ import annotations

from typing import Any

from pydantic import Field

from exalign.settings import Settings


class JudgeSettings(Settings):
    """How a language model is asked to compare answers."""

    template: str = Field(
        "instruction", description="Wording of the question: dialogue, instruction, summarisation, or a Jinja file."
    )
    prompts: int = Field(100, ge=1, description="At most this many prompts of each match-up are judged.")
    seed: int = Field(0, ge=0, description="Chooses the prompts; of one seed, fewer prompts are a subset of more.")
    temperature: float = Field(0.0, ge=0, description="Sampling temperature of the judge; 0 is greedy.")
    max_answer_tokens: int = Field(256, ge=1, description="Longest answer of the judge, in tokens.")
    request_fields: dict[str, Any] = Field(
        default_factory=dict,
        description="JSON object merged into each request to an endpoint; null removes a field, such as max_tokens.",
    )
    concurrency: int = Field(8, ge=1, description="Requests to an endpoint under way at the same time.")
    timeout: float = Field(120.0, gt=0, description="Seconds after which an unanswered request is tried again.")
    attempts: int = Field(6, ge=1, description="How often one question is tried before it is left for the next run.")
    retry_wait: float = Field(
        1.0, gt=0, description="Seconds before the second attempt; doubles with each further one, up to a minute."
    )
    away_wait: float = Field(
        1800.0,
        ge=0,
        description="Seconds to wait, over and over, for an endpoint where nobody answers; that counts as no attempt.",
    )
    key_variable: str = Field(
        "OPENAI_API_KEY", description="Environment variable that holds the endpoint's key; unset means no key is sent."
    )
