"""Scoring samples with a reward model: `python -m benchmarks.score --shape tldr --k 8 --json`.

exalign's packed scoring against the padded forward of transformers' sequence classifier at the best of several batch
sizes, rows sorted by length. Both must give the same rewards, or nothing is timed.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification

from benchmarks.contenders import GPT2_SIZES
from benchmarks.timing import fastest_of, interleave, timed
from benchmarks.workload import (
    SHAPES,
    argument_parser,
    describe_machine,
    make_config,
    make_groups,
    make_tokenizer,
    prepare_process,
)
from exalign.data.batching import Group, microbatches
from exalign.errors import InputError
from exalign.models.flops import forward_flops, matmul_peak
from exalign.models.heads import completion_outputs
from exalign.models.loading import load_reward_model
from exalign.models.model_settings import ModelSettings

TOLERANCE = 1e-4  # of a reward, as a share of the rewards' spread
PADDING_ID = 0


class ExalignScoring:
    label, unit, sizes = "exalign", "tokens", (1024, 2048, 4096)

    def __init__(self, model: Any) -> None:
        config = {name: getattr(model.config, name) for name in GPT2_SIZES}
        settings = ModelSettings(config={"model_type": "gpt2", **config})
        self.model = load_reward_model(settings, make_tokenizer(model.config.vocab_size - 1)).eval()
        self.model.load_state_dict(model.state_dict())

    def score(self, groups: Sequence[Group], size: int) -> Tensor:
        found: dict[int, Tensor] = {}
        for part in microbatches(groups, token_budget=size):
            found |= {g.index: row for g, row in zip(part, completion_outputs(self.model, part)[..., 0], strict=True)}
        return torch.stack([found[group.index] for group in groups])


class PaddedScoring:
    label, unit, sizes = "transformers, padded rows", "rows", (4, 8, 16)

    def __init__(self, model: Any) -> None:
        self.model = model

    def score(self, groups: Sequence[Group], size: int) -> Tensor:
        rows = [torch.cat([group.prompt_ids, ids]) for group in groups for ids in group.completion_ids]
        order = sorted(range(len(rows)), key=lambda i: len(rows[i]))
        rewards = torch.empty(len(rows))
        for begin in range(0, len(order), size):
            part = order[begin : begin + size]
            ids = torch.nn.utils.rnn.pad_sequence([rows[i] for i in part], batch_first=True, padding_value=PADDING_ID)
            lengths = torch.tensor([len(rows[i]) for i in part])
            mask = (torch.arange(ids.shape[1]) < lengths[:, None]).long()
            rewards[torch.tensor(part)] = self.model(input_ids=ids, attention_mask=mask, use_cache=False).logits[:, 0]
        return rewards.view(len(groups), -1)


@torch.inference_mode()
def compare(shape: str, k: int, *, model: str, prompts: int, rounds: int, seconds_each: float) -> dict[str, Any]:
    """Check that both give the same rewards, then time them in turns; a difference is an `InputError`."""
    config = make_config(model)
    config.num_labels, config.pad_token_id = 1, PADDING_ID
    torch.manual_seed(0)
    plain = AutoModelForSequenceClassification.from_config(config).eval()
    groups = make_groups(shape, prompts=prompts, k=k, vocabulary=config.vocab_size)
    for group in groups:  # the padding id is what transformers finds a row's end by
        for ids in group.completion_ids:
            ids[ids == PADDING_ID] = 1
    ways = {"exalign": ExalignScoring(plain), "padded": PaddedScoring(plain)}
    few = groups[: max(1, len(groups) // 4)]
    sizes, first, work, found = {}, {}, {}, {}
    for name, way in ways.items():
        tries: dict[int, Callable[[], object]] = {s: lambda way=way, s=s: way.score(few, s) for s in way.sizes}  # type: ignore[misc]
        sizes[name] = fastest_of(tries)
        work[name] = lambda name=name, way=way: found.__setitem__(name, way.score(groups, sizes[name]))  # type: ignore[misc]
        first[name] = timed(work[name])
    difference = float((found["exalign"] - found["padded"]).abs().max() / found["padded"].std())
    if not difference <= TOLERANCE:
        raise InputError(f"The two ways give different rewards ({difference:.1e} of their spread); nothing was timed.")
    times = interleave(work, first, rounds=rounds, seconds_each=seconds_each)
    flops, peak, base = forward_flops(plain, groups), matmul_peak(plain), times["exalign"].median
    tokens = sum(group.num_tokens for group in groups)
    rows = {
        name: {
            "label": way.label,
            "micro_batch": f"{sizes[name]} {way.unit}",
            **times[name].summary(),
            "ratio": times[name].median / base,
            "tokens_per_second": tokens / times[name].median,
            "share_of_peak": flops / times[name].median / peak,
            "difference": difference,
        }
        for name, way in ways.items()
    }
    about = {"benchmark": "score", "shape": shape, "k": k, "model": model, "prompts": prompts, "tokens": tokens}
    return {**about, "peak_gflops": {"fp32": peak / 1e9}, "machine": describe_machine(), "contenders": rows}


def show(result: dict[str, Any]) -> str:
    lines = [
        f"score, {result['shape']}, K = {result['k']}, {result['prompts']} prompts, {result['tokens']} tokens",
        f"{'':30}{'micro-batch':>14}{'n':>4}{'seconds':>10}{'ratio':>8}{'peak':>7}",
    ]
    for row in result["contenders"].values():
        lines.append(
            f"{row['label']:30}{row['micro_batch']:>14}{row['n']:>4}{row['seconds']:>10.3f}{row['ratio']:>8.2f}"
            f"{row['share_of_peak']:>7.0%}"
        )
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> None:
    parser = argument_parser(__doc__ or "")
    parser.add_argument("--shape", choices=SHAPES, default="tldr", help="mean lengths")
    parser.add_argument("--k", type=int, default=4, help="completions per prompt")
    parser.add_argument("--prompts", type=int, default=32, help="prompts")
    parser.add_argument("--rounds", type=int, default=5, help="most passes of each after the compared one")
    parser.add_argument("--seconds-each", type=float, default=30, help="a contender that took as long rests")
    given = parser.parse_args(arguments)
    prepare_process(given.threads)
    result = compare(
        given.shape,
        given.k,
        model=given.model,
        prompts=given.prompts,
        rounds=given.rounds,
        seconds_each=given.seconds_each,
    )
    print(json.dumps(result) if given.json else show(result))


if __name__ == "__main__":
    main()
