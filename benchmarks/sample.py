"""Drawing K completions per prompt: `python -m benchmarks.sample --shape tldr --k 8 --json`.

exalign's sampler against transformers' `generate(num_return_sequences=K)` at the best of several batch sizes, its
continuous batching, and vLLM where it is installed (`make test-vllm` builds an environment with its build for CPUs),
whose times have the handing over of the weights in them, as a step on-policy has, and not the start of the engine. Same
weights, prompts, temperature and number of tokens: no token ends a completion, for none of them. First the log-probs
that exalign reports, and those of what the others drew, are compared with a plain forward.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Callable, Sequence
from typing import Any, Literal

import torch
from transformers import ContinuousBatchingConfig, GenerationConfig

from benchmarks.contenders import copy_of, library_copy_of
from benchmarks.timing import count_cpu_seconds, fastest_of, interleave, timed
from benchmarks.workload import (
    SHAPES,
    argument_parser,
    describe_machine,
    make_config,
    make_groups,
    make_model,
    make_tokenizer,
    prepare_process,
)
from exalign.data.batching import Group
from exalign.data.record import Record
from exalign.errors import InputError
from exalign.models.flops import forward_flops, matmul_peak
from exalign.models.logprobs import plain_completion_logprobs
from exalign.rollout.rollout import open_sampler
from exalign.rollout.settings import SampleSettings
from exalign.rollout.vllm import check_installed

WAYS = "exalign,generate,continuous,vllm"
TEMPERATURE = 0.8
TOLERANCE = 1e-3  # nats per sequence, float32
LIVE_ROWS = (64, 128, 256)  # completions decoded at once
PAGE_TOKENS, BATCH_TOKENS = 32, 512  # of transformers' continuous batching


class Sampling:
    """One way to draw: `draw(prompts, rows)` with about `rows` completions at once gives token ids, K per prompt."""

    sizes: tuple[int, ...] = LIVE_ROWS

    def __init__(self, label: str, model: Any, k: int, tokens: int) -> None:
        self.label, self.model, self.k, self.tokens = label, model, k, tokens

    def draw(self, prompts: Sequence[Group], rows: int) -> list[list[list[int]]]:
        raise NotImplementedError


class ExalignSampling(Sampling):
    engine: Literal["vllm", "exalign"] = "exalign"
    logprobs: list[list[float]]

    def draw(self, prompts: Sequence[Group], rows: int) -> list[list[list[int]]]:
        longest = max(len(group.prompt_ids) for group in prompts)
        settings = SampleSettings(
            num_completions=self.k,
            max_new_tokens=self.tokens,
            max_prompt_tokens=longest,
            batch_completions=rows or 1,
            engine=self.engine,
        )
        tokenizer = make_tokenizer(self.model.config.vocab_size)
        sampler = open_sampler(self.model, tokenizer, settings, temperature=TEMPERATURE, seed=0)
        records = [Record(str(group.index), "", prompt_ids=tuple(group.prompt_ids.tolist())) for group in prompts]
        drawn = list(sampler.sample(records))
        self.logprobs = [[float(c.logprob or 0.0) for c in record.completions] for record in drawn]
        return [[list(c.token_ids or ()) for c in record.completions] for record in drawn]


class VLLMSampling(ExalignSampling):
    engine = "vllm"
    sizes = (0,)  # it decides itself


class Generate(Sampling):
    def draw(self, prompts: Sequence[Group], rows: int) -> list[list[list[int]]]:
        torch.manual_seed(0)
        drawn: list[list[list[int]]] = []
        size = max(1, rows // self.k)
        for begin in range(0, len(prompts), size):
            drawn += self.batch(prompts[begin : begin + size])[0]
        return drawn

    def batch(self, part: Sequence[Group], *, scores: bool = False) -> tuple[list[list[list[int]]], Any]:
        """Left padding, as transformers asks for; the scores are logits / τ of every step."""
        longest = max(len(group.prompt_ids) for group in part)
        ids = torch.zeros(len(part), longest, dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, group in enumerate(part):
            ids[row, longest - len(group.prompt_ids) :] = group.prompt_ids
            mask[row, longest - len(group.prompt_ids) :] = 1
        settings = generation_config(self.k, self.tokens)
        found = self.model.generate(
            input_ids=ids.to(self.model.device),
            attention_mask=mask.to(self.model.device),
            generation_config=settings,
            output_scores=scores,
            return_dict_in_generate=True,
        )
        new = found.sequences[:, longest:].view(len(part), self.k, -1).tolist()
        return new, found.scores


class ContinuousBatching(Sampling):
    """With a cache for `rows` completions: left to itself it takes most of the machine's memory, and then is slow."""

    sizes = (16, 64)
    logprobs: list[list[float]]

    def draw(self, prompts: Sequence[Group], rows: int) -> list[list[list[int]]]:
        longest = max(len(group.prompt_ids) for group in prompts) + self.tokens
        logging.getLogger("ContinuousBatchingLogger").setLevel(logging.ERROR)
        found = self.model.generate_batch(
            inputs=[group.prompt_ids.tolist() for group in prompts],
            generation_config=generation_config(self.k, self.tokens),
            continuous_batching_config=ContinuousBatchingConfig(
                page_size=PAGE_TOKENS,
                num_blocks=rows * (longest // PAGE_TOKENS + 1),
                max_batch_tokens=BATCH_TOKENS,
                return_logprobs=True,
                seed=0,
            ),
        )
        outputs = list(found.values())
        if len(outputs) != len(prompts) * self.k:
            raise InputError(f"transformers' continuous batching gave {len(outputs)} completions; see its messages.")
        self.logprobs = [[sum(o.logprobs) for o in outputs[i : i + self.k]] for i in range(0, len(outputs), self.k)]
        return [[list(o.generated_tokens) for o in outputs[i : i + self.k]] for i in range(0, len(outputs), self.k)]


def generation_config(k: int, tokens: int) -> GenerationConfig:
    """Plain sampling at τ; nothing ends a completion."""
    return GenerationConfig(
        do_sample=True,
        temperature=TEMPERATURE,
        top_k=0,
        top_p=1.0,
        num_return_sequences=k,
        max_new_tokens=tokens,
        min_new_tokens=None,
        eos_token_id=None,
        pad_token_id=0,
    )


def compare(
    shape: str, k: int, *, model: str, prompts: int, names: Sequence[str], rounds: int, seconds_each: float
) -> dict[str, Any]:
    """Check the log-probs, then time the ways in turns; a difference is an `InputError`."""
    plain = make_model(make_config(model)).eval()
    groups = make_groups(shape, prompts=prompts, k=k, vocabulary=plain.config.vocab_size)
    ways = {name: make_way(name, plain, k, SHAPES[shape][1]) for name in names}
    difference = {name: check(way, groups[:3]) for name, way in ways.items()}
    sizes, first, work = {}, {}, {}
    for name, way in ways.items():
        few = groups[: max(1, len(groups) // 4)]
        tries: dict[int, Callable[[], object]] = {
            size: lambda way=way, size=size, few=few: way.draw(few, size)  # type: ignore[misc]
            for size in way.sizes
        }
        sizes[name] = fastest_of(tries)
        work[name] = lambda way=way, size=sizes[name]: way.draw(groups, size)  # type: ignore[misc]
        first[name] = timed(work[name])
    times = interleave(work, first, rounds=rounds, seconds_each=seconds_each)
    peak, tokens = matmul_peak(plain), prompts * k * SHAPES[shape][1]
    drawn = as_groups(groups, ways[names[0]].draw(groups, sizes[names[0]]))
    flops, base = forward_flops(plain, drawn), times[names[0]].median
    rows = {
        name: {
            "label": way.label,
            "rows_at_once": sizes[name],
            **times[name].summary(),
            "ratio": times[name].median / base,
            "tokens_per_second": tokens / times[name].median,
            "share_of_peak": flops / times[name].median / peak,
            "difference": difference[name],
        }
        for name, way in ways.items()
    }
    about = {"benchmark": "sample", "shape": shape, "k": k, "model": model, "prompts": prompts, "tokens": tokens}
    return {**about, "peak_gflops": {"fp32": peak / 1e9}, "machine": describe_machine(), "contenders": rows}


def without_missing(names: Sequence[str]) -> list[str]:
    """The names, less `vllm` where it is not installed, which is said."""
    if "vllm" in names:
        try:
            check_installed()
        except InputError as error:
            print(f"Without vLLM: {error}", file=sys.stderr)
            return [name for name in names if name != "vllm"]
    return list(names)


def make_way(name: str, plain: Any, k: int, tokens: int) -> Sampling:
    if name in ("exalign", "vllm"):
        model = library_copy_of(plain).eval()
        # The library gives a model its tokenizer's end token; here nothing ends a completion.
        model.config.eos_token_id = model.generation_config.eos_token_id = None
        if name == "vllm":
            return VLLMSampling("vLLM, CPU build", model, k, tokens)
        return ExalignSampling("exalign", model, k, tokens)
    if name == "generate":
        return Generate("generate(num_return_sequences=K)", copy_of(plain).eval(), k, tokens)
    if name == "continuous":
        return ContinuousBatching("transformers' continuous batching", copy_of(plain).eval(), k, tokens)
    raise InputError(f"There is no way to sample called {name!r}.")


@torch.no_grad()
def check(way: Sampling, groups: Sequence[Group]) -> float:
    """Largest difference, in nats, between a log-prob from the sampling pass and one of a plain padded forward."""
    few = list(groups)
    if isinstance(way, Generate):
        drawn, scores = way.batch(few, scores=True)
        steps = torch.stack(scores, dim=1).log_softmax(-1)
        flat = torch.tensor(drawn).flatten(0, 1)
        reported = steps.gather(2, flat.unsqueeze(2)).sum((1, 2)).view(len(few), way.k)
    else:
        drawn = way.draw(few, way.sizes[0])
        reported = torch.tensor(way.logprobs)  # type: ignore[attr-defined]
    for completions in drawn:
        if len(completions) != way.k or any(len(ids) != way.tokens for ids in completions):
            raise InputError(f"{way.label} did not draw {way.k} completions of {way.tokens} tokens.")
    plain = plain_completion_logprobs(way.model, as_groups(few, drawn), temperature=TEMPERATURE)
    difference = float((plain - reported).abs().max())
    if not difference <= TOLERANCE:
        raise InputError(f"{way.label} draws from another distribution than the model's ({difference:.1e} nats off).")
    return difference


def as_groups(prompts: Sequence[Group], drawn: list[list[list[int]]]) -> list[Group]:
    return [
        Group(group.index, group.prompt_ids, tuple(torch.tensor(ids) for ids in completions))
        for group, completions in zip(prompts, drawn, strict=True)
    ]


def show(result: dict[str, Any]) -> str:
    lines = [
        f"sample, {result['shape']}, K = {result['k']}, {result['prompts']} prompts, {result['tokens']} drawn tokens",
        f"{'':36}{'rows':>6}{'n':>4}{'seconds':>10}{'ratio':>8}{'tokens/s':>10}{'peak':>7}",
    ]
    for row in result["contenders"].values():
        lines.append(
            f"{row['label']:36}{row['rows_at_once'] or '':>6}{row['n']:>4}{row['seconds']:>10.3f}{row['ratio']:>8.2f}"
            f"{row['tokens_per_second']:>10.0f}{row['share_of_peak']:>7.0%}"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argument_parser(__doc__ or "")
    parser.add_argument("--shape", choices=SHAPES, default="tldr", help="mean lengths; completions have exactly theirs")
    parser.add_argument("--k", type=int, default=4, help="completions per prompt")
    parser.add_argument("--prompts", type=int, default=64, help="prompts")
    parser.add_argument("--contenders", default=WAYS, help="the first is the base of ratios")
    parser.add_argument("--rounds", type=int, default=3, help="most passes of each after the first")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall", help="which seconds are counted")
    parser.add_argument("--seconds-each", type=float, default=30, help="a contender that took as long rests")
    given = parser.parse_args(arguments)
    prepare_process(given.threads)
    if given.clock == "cpu":
        count_cpu_seconds()
    result = compare(
        given.shape,
        given.k,
        model=given.model,
        prompts=given.prompts,
        names=without_missing(given.contenders.split(",")),
        rounds=given.rounds,
        seconds_each=given.seconds_each,
    )
    result["clock"] = given.clock
    print(json.dumps(result) if given.json else show(result))


if __name__ == "__main__":
    main()
