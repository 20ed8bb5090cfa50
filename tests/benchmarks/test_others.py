"""The equality checks of `sample` and `score`, the counts of `profile`, and the rendering of the document."""

from __future__ import annotations

import json
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from benchmarks.timing import fastest_of, interleave
from benchmarks.workload import describe_machine, make_config, make_groups, make_model

from benchmarks import all as all_benchmarks
from benchmarks import sample, score, sweep, tables
from exalign.errors import InputError


def test_both_samplers_report_the_model_s_log_probabilities() -> None:
    names = ("exalign", "generate")
    found = sample.compare("tiny", 2, model="tiny", prompts=4, names=names, rounds=0, seconds_each=9)
    assert all(row["difference"] < 1e-4 for row in found["contenders"].values())
    assert found["tokens"] == 4 * 2 * 6


def test_a_sampler_of_another_distribution_is_caught() -> None:
    """Its own log-probs must be the model's; here the model changes between drawing and the plain forward."""

    class Changing(sample.ExalignSampling):
        def draw(self, prompts, rows):  # type: ignore[no-untyped-def]
            drawn = super().draw(prompts, rows)
            with torch.no_grad():
                self.model.lm_head.weight.mul_(1.5)
            return drawn

    plain = make_model(make_config("tiny")).eval()
    groups = make_groups("tiny", prompts=2, k=2, vocabulary=211)
    honest = sample.make_way("exalign", plain, 2, 6)
    assert sample.check(honest, groups) < 1e-4
    with pytest.raises(InputError, match="another distribution"):
        sample.check(Changing("changing", honest.model, 2, 6), groups)


def test_both_scorers_give_the_same_rewards() -> None:
    found = score.compare("tiny", 3, model="tiny", prompts=4, rounds=0, seconds_each=9)
    assert found["contenders"]["padded"]["difference"] < 1e-4


def test_the_sweep_s_slope_of_work_in_prompts_is_one() -> None:
    found = sweep.sweep("prompts", model="tiny", rounds=0, scale=16)
    assert found["work_slope"] == pytest.approx(1.0)
    assert [point["value"] for point in found["points"]] == [2, 4, 8, 16]
    assert all(max(values) >= 8 * min(values) for values in sweep.SWEEPS.values())


def test_turns() -> None:
    """Each contender runs once a round, in turning order, and one that took its time rests."""
    calls: list[str] = []
    work = {name: lambda name=name: calls.append(name) for name in "abc"}  # type: ignore[misc]
    times = interleave(work, {"a": 1.0, "b": 1.0, "c": 50.0}, rounds=2, seconds_each=10)
    assert calls == ["a", "b", "b", "a"]
    assert times["c"].summary()["warm"] == 0 and times["c"].median == 50.0
    assert times["a"].summary()["n"] == 2 and times["a"].median < 1.0


def test_the_only_size_is_not_tried() -> None:
    def fail() -> None:
        raise AssertionError

    assert fastest_of({7: fail}) == 7


def test_the_plan_names_only_benchmarks_that_exist() -> None:
    folder = Path(all_benchmarks.__file__).parent
    assert all((folder / f"{arguments[0]}.py").exists() for arguments in all_benchmarks.plan().values())


def test_the_document_is_rendered_from_results_alone(tmp_path: Path) -> None:
    row = {"label": "exalign", "precision": "fp32", "micro_batch": "768 tokens", "seconds": 2.0, "n": 3, "ratio": 1.0}
    row |= {"fastest": 1.9, "slowest": 2.1, "tokens_per_second": 1234.0, "share_of_peak": 0.83}
    row |= {"difference": {"loss": 0.0, "gradient": 0.0}}
    result = {"benchmark": "step", "shape": "tldr", "k": 4, "prompts": 12, "machine": describe_machine()}
    result["contenders"] = {"exalign": row, "trl-best": row | {"ratio": 10.25, "label": "TRL"}}
    (tmp_path / "step-tldr-4.json").write_text(json.dumps(result))
    document = "Before.\n<!-- step -->\nold\n<!-- /step -->\nBetween.\n<!-- memory -->\n<!-- /memory -->\nAfter.\n"
    made = tables.render(document, tables.read(tmp_path))
    assert "old" not in made and made.startswith("Before.") and made.endswith("After.\n")
    assert "| TL;DR (350 / 40) | 4 | 12 | 2.00 s | 10.2 | – | – | – | 1,234 | 83% |" in made
    assert tables.NOT_MEASURED in made
    assert tables.render(made, tables.read(tmp_path)) == made


def test_every_table_has_its_place_in_the_document() -> None:
    text = tables.DOCUMENT.read_text(encoding="utf-8")
    for name in tables.TABLES:
        assert text.count(f"<!-- {name} -->\n") == 1 and text.count(f"<!-- /{name} -->") == 1
    tables.render(text, {})
    tables.render(text, {}, gpu_alone=True)


def test_an_unknown_way_is_refused_and_vllm_left_out_where_it_is_missing(capsys: pytest.CaptureFixture[str]) -> None:
    assert sample.without_missing(["exalign", "vllm"])[:1] == ["exalign"]
    assert (find_spec("vllm") is None) == (
        "Without vLLM: sample.engine: vLLM is not installed" in capsys.readouterr().err
    )
    with pytest.raises(InputError, match="no way to sample"):
        sample.make_way("guess", make_model(make_config("tiny")), 2, 3)
