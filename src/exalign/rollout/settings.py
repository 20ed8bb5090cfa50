"""How completions are drawn, and what gives them their rewards."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import AfterValidator, Field, model_validator

from exalign.settings import CONTENT, FUNCTION, NO_RESULT, Settings, Size, Source

TopP = Annotated[float | None, AfterValidator(lambda value: None if value == 1 else value)]
"""A total probability of tokens that are kept; 1 is all of it, None."""


class VLLMSettings(Settings):
    """vLLM as the engine that samples."""

    cache_gib: float = Field(
        4.0,
        gt=0,
        description="GiB that the engine keeps for the keys and values of what it draws; the weights come on top",
        json_schema_extra=NO_RESULT,
    )
    gpus: int = Field(
        1, ge=1, description="GPUs that one engine is divided over, where there are any", json_schema_extra=NO_RESULT
    )
    logprob_limit: float | None = Field(
        None,
        gt=0,
        description="nats per token: a log-probability of the engine that is further from the training path's is told; "
        "null: 0.02, in half precision 0.1",
        json_schema_extra=NO_RESULT,
    )


class SampleSettings(Settings):
    """How completions are drawn. The temperature is not here: one τ per recipe serves every stage."""

    num_completions: int = Field(4, ge=1, description="K, the completions drawn for each prompt.")
    max_new_tokens: int = Field(
        64, ge=1, description="Longest completion in tokens; a completion that reaches it without ending is `length`."
    )
    max_prompt_tokens: int = Field(
        512, ge=1, description="Longest prompt in tokens; a longer one loses tokens on its left and is counted."
    )
    top_p: TopP = Field(
        None,
        gt=0,
        le=1,
        description="Keep the most probable tokens up to this total probability at each step; none keeps all.",
    )
    top_k: int | None = Field(None, ge=1, description="Keep the k most probable tokens at each step; none keeps all.")
    precision: Literal["fp32", "bf16"] = Field(
        "fp32",
        description="bf16: float32 weights draw as a copy of them in bfloat16, which is faster; the log-probabilities "
        "of what was drawn stay those of training. fp32: weights draw as they are, whatever their type",
    )
    batch_completions: Size = Field(
        "auto",
        description="Completions decoded at the same time; changes speed and memory, never a completion. auto: 64 on a "
        "CPU, and what fits on an accelerator.",
        json_schema_extra=NO_RESULT,
    )
    engine: Literal["auto", "vllm", "exalign"] = Field(
        "auto",
        description="exalign: draw with exalign's own sampler; vllm: with vLLM, whose completions are others; auto: "
        "with vLLM where it is installed and the run begins on CUDA, else with exalign's",
    )
    vllm: VLLMSettings = Field(default_factory=VLLMSettings, description="how vLLM runs", json_schema_extra=NO_RESULT)


class OneScorer(Settings):
    """One source of rewards."""

    stage: str | None = Field(None, pattern="^(reward|oracle)$", description="this run's own stage: reward or oracle")
    reward_model: Source | None = Field(
        None, description="folder or hub name of a sequence classifier with one label", json_schema_extra=CONTENT
    )
    classifier: Source | None = Field(
        None, description="folder or hub name of a classifier; the reward is its log-odds", json_schema_extra=CONTENT
    )
    function: str | None = Field(
        None,
        description="module:function taking prompts, completions and the data's other columns, giving rewards",
        json_schema_extra=FUNCTION,
    )
    positive: str | int | None = Field(
        None, description="name or number of the classifier's positive label; null: the one whose name says so"
    )
    dtype: Literal["float32", "bfloat16"] = Field(
        "float32",
        description="type of a model's weights while it scores, but for its head, which stays in float32: bfloat16 "
        "takes half of the memory, is faster where products in it are, and less exact",
    )

    @model_validator(mode="after")
    def _exactly_one(self) -> OneScorer:
        sources = [name for name in type(self).model_fields if name not in ("positive", "dtype", "weight")]
        if sum(getattr(self, name) is not None for name in sources) != 1:
            raise ValueError(f"give exactly one of {', '.join(name for name in sources if name != 'sum')}")
        if self.positive is not None and self.classifier is None:
            raise ValueError("positive has no effect without classifier; remove it")
        if self.dtype != "float32" and self.function is not None:
            raise ValueError("dtype has no effect on a function; remove it")
        return self


class WeightedScorer(OneScorer):
    """A scorer in a sum."""

    weight: float = Field(1.0, description="what its rewards are multiplied with before they are added")


class ScorerSettings(OneScorer):
    """Where rewards come from: exactly one source, or a list of them, each with a weight, whose rewards are added."""

    sum: tuple[WeightedScorer, ...] | None = Field(
        None,
        strict=False,
        min_length=1,
        description="scorers with a weight each, whose weighted rewards are added; a list in the place of the section "
        "says the same",
    )

    @model_validator(mode="before")
    @classmethod
    def _list_is_a_sum(cls, values: Any) -> Any:
        return {"sum": values} if isinstance(values, list) else values

    @property
    def stages(self) -> tuple[str, ...]:
        """The run's own stages that it scores with."""
        return tuple(dict.fromkeys(part.stage for part in self.sum or (self,) if part.stage is not None))
