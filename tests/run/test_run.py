"""A run is a directory: complete stages are skipped, interrupted ones continue, foreign ones are refused."""

from __future__ import annotations

import gc
import io
import json
import os
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import cycle
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from rich.console import Console
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from exalign import checksums
from exalign.data.batching import Group, group_of
from exalign.data.record import Completion, Record
from exalign.data.store import Header, read_header, read_records, write_records
from exalign.data.synthetic import remark_reward
from exalign.data.tokenization import build_tokenizer
from exalign.errors import InputError
from exalign.evaluation.run_folder import RunFolder
from exalign.evaluation.schema import read_evidence
from exalign.evaluation.verdict import scorer_accuracy
from exalign.judging.pairing import system
from exalign.models.loading import load_policy, load_tokenizer
from exalign.models.logprobs import plain_completion_logprobs
from exalign.models.model_settings import ModelSettings
from exalign.rollout.scorers import open_scorer
from exalign.run import materials
from exalign.run.carry_out import run_recipe
from exalign.run.chat import Speaker
from exalign.run.demo import RECIPE, demo_recipe
from exalign.run.evaluating import _agreement, evaluation_rows, in_order
from exalign.run.materials import prompts_of, records_of
from exalign.run.recipe import Recipe, ScorerSettings, load_recipe, make_recipe
from exalign.run.runner import Run, remove_stage
from exalign.run.search import validation_prompts
from exalign.run.stage_files import stage_checksums
from exalign.run.stages import hold_out, plan
from exalign.storage import fingerprint_path, read_json
from judging.judged_run import judge_run, longer
from run.conftest import tiny_overrides

MakeRecipe = Callable[..., Recipe]


def carry_out(recipe: Recipe, folder: Path, *targets: str, redo: bool = False) -> str:
    printed = io.StringIO()
    Run(recipe, folder, Console(file=printed, width=200), redo).carry_out(plan(recipe), targets)
    return printed.getvalue()


@pytest.fixture(scope="module")
def finished(world: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Recipe, Path]:
    recipe = load_recipe(RECIPE, tiny_overrides(world))
    folder = tmp_path_factory.mktemp("runs") / "tiny"
    run_recipe(recipe, folder=folder)
    return recipe, folder


def test_a_whole_run_leaves_what_the_documentation_promises(finished: tuple[Recipe, Path]) -> None:
    _, folder = finished
    for name in ("recipe.yaml", "environment.json", "report/index.html", "evaluation/evidence.json"):
        assert (folder / name).stat().st_size > 0
    for name in ("sft", "reward", "align/exo-rw", "align/dpo-pref"):
        assert (folder / name / "model" / "model.safetensors").exists()
        assert (folder / name / "metrics.jsonl").exists()
    rollouts = read_records(folder / "scored" / "records")
    assert [len(record.completions) for record in rollouts] == [3] * 24
    assert all(record.rewards is not None for record in rollouts)
    assert read_header(folder / "rollouts" / "records").temperature == 1.0
    samples = read_records(folder / "evaluation" / "exo-rw" / "step-000003" / "samples")
    assert all(c.reference_logprob is not None and c.logprob is not None for r in samples for c in r.completions)


def test_before_the_first_step_every_log_ratio_is_zero(finished: tuple[Recipe, Path]) -> None:
    import json

    _, folder = finished
    first = json.loads((folder / "align" / "exo-rw" / "metrics.jsonl").read_text().splitlines()[0])
    assert abs(first["kl"]) < 1e-5
    assert first["log_ratio_spread"] < 1e-5


def test_a_reward_model_reads_in_another_run_what_it_read_in_its_own(world: Path, tmp_path: Path) -> None:
    """It was trained on prompts cut to four tokens; the other run's longer limit is not its."""
    own = load_recipe(RECIPE, tiny_overrides(world, "data.max_prompt_tokens=4"))
    run_recipe(own, "scored", folder=tmp_path)
    records = read_records(tmp_path / "scored" / "records")
    cut = read_header(tmp_path / "rollouts" / "records").counts["prompts_cut"]
    assert cut > 0
    scored = {"header": read_header(tmp_path / "scored" / "records").counts}
    scored["stage"] = read_json(tmp_path / "scored" / "done.json")["counts"]
    assert [counts["prompts_cut_in_scoring"] for counts in scored.values()] == [cut, cut]
    assert scored["header"]["prompts_cut"] == cut
    scorer = open_scorer(ScorerSettings(reward_model=str(tmp_path / "reward" / "model")))
    assert scorer.score(records) == [pytest.approx(record.rewards, abs=1e-6) for record in records]


def test_who_talks_to_a_run_talks_to_what_it_ships(
    finished: tuple[Recipe, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, folder = finished
    asked: list[str] = []
    monkeypatch.setattr(
        "exalign.run.chat.load_tokenizer", lambda source: asked.append(source) or load_tokenizer(source)
    )
    Speaker.load(str(folder), max_new_tokens=2, temperature=1.0, seed=0, system=None)
    shipped = read_evidence(folder / "evaluation" / "evidence.json").verdict
    assert shipped is not None and asked == [str(folder / shipped.folder)]
    begun = tmp_path / "begun"
    begun.mkdir()
    shutil.copy(folder / "recipe.yaml", begun)
    with pytest.raises(InputError, match="has no evidence"):
        Speaker.load(str(begun), max_new_tokens=2, temperature=1.0, seed=0, system=None)


def test_running_again_skips_everything(finished: tuple[Recipe, Path]) -> None:
    """But the report, which is made again below."""
    recipe, folder = finished
    before = fingerprint_path(folder / "align")
    printed = carry_out(recipe, folder, "evaluation")
    assert printed.count("skipped") == len(plan(recipe)) - 1
    assert fingerprint_path(folder / "align") == before


def test_the_report_shows_what_was_judged_since(finished: tuple[Recipe, Path], tmp_path: Path) -> None:
    recipe, folder = finished
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    assert "judged-by-model" not in (copy / "report" / "index.html").read_text()
    judge_run(copy, "machine", longer, prompts=3)
    carry_out(recipe, copy, "report")
    assert 'id="judged-by-model"' in (copy / "report" / "index.html").read_text()


def test_a_directory_of_another_recipe_is_refused_and_named(finished: tuple[Recipe, Path], tiny: MakeRecipe) -> None:
    _, folder = finished
    with pytest.raises(InputError, match=r"align.exo-rw.beta_pi was 0.5, is 0.25.*--redo"):
        carry_out(tiny("align.exo-rw.beta_pi=0.25"), folder)


def test_redo_makes_again_what_differs_and_nothing_else(
    finished: tuple[Recipe, Path], tiny: MakeRecipe, tmp_path: Path
) -> None:
    _, folder = finished
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    printed = carry_out(tiny("align.exo-rw.beta_pi=0.25"), copy, "align", redo=True)
    again = [line.split()[1] for line in printed.splitlines() if line.startswith("▸")]
    assert again == ["align/exo-rw"]
    assert (copy / "evaluation" / "sft" / "done.json").exists()
    with pytest.raises(InputError, match="no file or folder"):
        run_recipe(tiny("data.sft.source=no/such.jsonl"), folder=copy, redo=True)
    assert (copy / "sft" / "done.json").exists()  # what cannot be made again is not taken away


def test_changed_data_is_noticed(tiny: MakeRecipe, world: Path, tmp_path: Path) -> None:
    data = tmp_path / "sft.jsonl"
    data.write_text((world / "sft.jsonl").read_text())
    recipe = tiny(f"data.sft.source={data}")
    carry_out(recipe, tmp_path / "run", "sft")
    data.write_text("\n".join(data.read_text().splitlines()[:-1]))
    with pytest.raises(InputError, match=r"the content of .*sft\.jsonl changed"):
        carry_out(recipe, tmp_path / "run", "sft")


def test_the_order_of_methods_and_what_else_a_recipe_aligns_change_no_method(
    finished: tuple[Recipe, Path], tiny: MakeRecipe, tmp_path: Path
) -> None:
    _, folder = finished
    alone = tiny()
    alone = alone.model_copy(update={"align": {"exo-rw": alone.align["exo-rw"]}})
    run_recipe(alone, "align", folder=tmp_path / "alone")
    assert fingerprint_path(tmp_path / "alone/align/exo-rw/model/model.safetensors") == fingerprint_path(
        folder / "align/exo-rw/model/model.safetensors"
    )


def test_a_second_process_is_told_and_leaves(tiny: MakeRecipe, tmp_path: Path) -> None:
    run = Run(tiny(), tmp_path / "run")
    with run._locked(), pytest.raises(InputError, match="in use by another exalign process"):
        carry_out(tiny(), tmp_path / "run", "sft")


def test_an_unknown_stage_lists_those_there_are(tiny: MakeRecipe, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no stage .oracle.; a section oracle would make one; it has sft, pre"):
        carry_out(tiny(), tmp_path / "run", "oracle")


def test_killed_while_a_stage_is_removed_what_it_was_made_from_is_left(tmp_path: Path) -> None:
    names = (*"abcdefgh", "done.json", *"ijklmnop")  # in no folder's order the last by chance
    for name in names:
        (tmp_path / name).touch()
    if (process := os.fork()) == 0:
        others = iter(names[1:])
        sys.addaudithook(lambda event, _: os._exit(9) if event == "os.remove" and not next(others, "") else None)
        remove_stage(tmp_path, stays=())
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 9
    assert [path.name for path in tmp_path.iterdir()] == ["done.json"]


@pytest.mark.parametrize(("draws", "per_shard"), [(1, [4, 4, 2]), (3, [3, 3, 3, 1]), (9, [1] * 10)])
def test_a_shard_has_fewer_prompts_where_each_has_many_completions(
    draws: int, per_shard: list[int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(materials, "SHARD", 4)
    monkeypatch.setattr(materials, "SHARD_COMPLETIONS", 8)
    view: Any = SimpleNamespace(counts=Counter())
    drawn = [Record(str(n), "Say it.", tuple(Completion("it") for _ in range(draws))) for n in range(10)]
    for place, records in (("drawn", [Record(one.id, "Say it.") for one in drawn]), ("read", drawn)):
        worked: list[int] = []

        def work(part: Sequence[Record], _: Counter[str], worked: list[int] = worked) -> list[Record]:
            worked.append(len(part))
            return [drawn[int(record.id)] for record in part]

        made = draws if place == "drawn" else 1
        materials.write_shared(view, tmp_path / place, records, work, Header(), draws=made)
        assert worked == per_shard and read_records(tmp_path / place) == drawn


def test_a_world_that_was_replaced_in_part_is_written_again(tmp_path: Path) -> None:
    demo_recipe(tmp_path)
    texts = tmp_path / "world" / "sft.jsonl"
    whole = texts.read_bytes()
    if (process := os.fork()) == 0:
        first = iter([texts])
        sys.addaudithook(lambda event, _: os._exit(9) if event == "os.rename" and not next(first, None) else None)
        demo_recipe(tmp_path, ["seed=1"])
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == 9
    demo_recipe(tmp_path)
    assert texts.read_bytes() == whole


def test_a_leftover_inside_a_leftover_is_removed_with_it(finished: tuple[Recipe, Path], tmp_path: Path) -> None:
    recipe, folder = finished
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    stage = copy / "evaluation" / "density" / "exo-rw"
    (stage / "done.json").rename(stage / "started.json")
    outer = stage / ".samples.1.tmp"
    outer.mkdir()
    (outer / ".part-000000.parquet.1.tmp").touch()
    assert "evaluation/density/exo-rw (continues)" in carry_out(recipe, copy, "evaluation/density")
    assert not list(copy.rglob("*.tmp"))
    assert (stage / "done.json").exists()


def test_density_stages_have_the_final_policys_numbers_on_the_pool(
    finished: tuple[Recipe, Path], tiny: MakeRecipe
) -> None:
    recipe, folder = finished
    pool = read_records(folder / "evaluation" / "pool")
    tokenizer = load_tokenizer(str(folder / "sft" / "model"))
    for method in recipe.align:
        records = read_records(folder / "evaluation" / "density" / method / "samples")
        assert [record.id for record in records] == [record.id for record in pool]  # 4 prompts have a pool
        policy = load_policy(ModelSettings(source=str(folder / "align" / method / "model")), tokenizer).eval()
        groups = [group_of(record, 0) for record in records]
        with torch.no_grad():
            plain = plain_completion_logprobs(policy, groups, temperature=recipe.temperature)
        found = [[c.logprob for c in record.completions] for record in records]
        torch.testing.assert_close(torch.tensor(found), plain, rtol=1e-5, atol=1e-4)
        # What the sampler said when it drew them from the supervised policy.
        for record, drawn in zip(records, pool, strict=True):
            for completion, before in zip(record.completions, drawn.completions, strict=True):
                assert completion.reference_logprob == pytest.approx(before.logprob, abs=1e-4)
                assert completion.reward == before.reward
    density = read_json(folder / "evaluation" / "evidence.json")["density"]
    assert (len(density["prompts"]), density["beta_of"], density["beta"]) == (4, "exo-rw", 0.5 * 0.1)


def test_density_prompts_says_for_how_many_and_0_for_none(
    finished: tuple[Recipe, Path], tiny: MakeRecipe, tmp_path: Path
) -> None:
    assert not [stage for stage in plan(tiny("evaluate.density_prompts=0")) if "density" in stage.name]
    assert not [stage for stage in plan(tiny("evaluate.pool_prompts=0")) if "density" in stage.name]
    _, folder = finished
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    recipe = tiny("evaluate.density_prompts=2")
    printed = carry_out(recipe, copy, "evaluation/density", redo=True)
    assert [line.split()[1] for line in printed.splitlines() if line.startswith("▸")] == [
        f"evaluation/density/{method}" for method in recipe.align
    ]
    assert len(read_records(copy / "evaluation" / "density" / "exo-rw" / "samples")) == 2


def count_of_e(prompts: list[str], completions: list[str]) -> list[float]:
    return [float(completion.count("e")) for completion in completions]


def test_another_judge_judges_the_samples_that_are_there(
    finished: tuple[Recipe, Path], tiny: MakeRecipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, folder = finished
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    monkeypatch.setattr("exalign.run.materials.open_sampler", None)  # nothing is drawn
    recipe = tiny(f"evaluate.scorer={{function: {__name__}:count_of_e}}")
    printed = carry_out(recipe, copy, redo=True)
    made = {line.split()[1] for line in printed.splitlines() if line.startswith("▸")}
    judged = {f"evaluation/{name}" for name in ("prompts", "sft", "pool", *recipe.align)}
    assert made == judged | {f"evaluation/density/{name}" for name in recipe.align} | {"report"}
    for place in ("sft/samples", "exo-rw/step-000003/samples", "pool"):
        before, after = (read_records(run / "evaluation" / place) for run in (folder, copy))
        assert [record.rewards for record in after] == [[c.text.count("e") for c in r.completions] for r in before]
        assert [r.with_rewards(b.rewards or []) for r, b in zip(after, before, strict=True)] == before
    scores = [RunFolder(run).read_evidence().methods[0].points[-1] for run in (folder, copy)]
    assert scores[0].kl == scores[1].kl and scores[0].reward != scores[1].reward


def test_answers_of_their_own_are_what_is_judged_and_change_no_kl(
    finished: tuple[Recipe, Path], tiny: MakeRecipe, tmp_path: Path
) -> None:
    _, folder = finished
    copy = tmp_path / "copy"
    shutil.copytree(folder, copy)
    before = RunFolder(copy).read_evidence()
    recipe = tiny("evaluate.answers={temperature: 0.5, top_p: 0.001}")  # of the likeliest token alone
    printed = carry_out(recipe, copy)
    made = [line.split()[1] for line in printed.splitlines() if line.startswith("▸")]
    places = [f"{below}answers/{name}" for name in ("sft", *recipe.align) for below in ("drawn/", "")]
    assert made == [*(f"evaluation/{place}" for place in places), "report"]
    run, judged = RunFolder(copy), {}
    for name in ("sft", *recipe.align):
        judged[name] = {record.id: record for record in read_records(run.answers(name))}
        for record in judged[name].values():
            assert len({c.text for c in record.completions}) == 1 and len(record.completions) == 2
            assert all(c.reference_logprob is None for c in record.completions)
        assert read_header(run.answers(name)).temperature == 0.5
        assert system(run, name).answers == {key: r.completions[0].text for key, r in judged[name].items()}
    after = run.read_evidence()
    for old, new in zip(before.methods, after.methods, strict=True):
        assert [(p.kl, p.reward) for p in new.points] == [(p.kl, p.reward) for p in old.points]
        pairs = [(r.rewards[0], judged["sft"][key].rewards[0]) for key, r in judged[new.name].items()]
        share = sum((mine > theirs) + (mine == theirs) / 2 for mine, theirs in pairs) / len(pairs)
        assert new.win_rates[0].rate.estimate == pytest.approx(share)
        assert new.points[-1].win_vs_sft == new.win_rates[0]
    texts = {answer.text for answer in after.examples[0].answers if answer.source == "exo-rw"}
    assert texts == {judged["exo-rw"][after.examples[0].id].completions[0].text}
    assert "at a temperature of 0.5 with top-p 0.001, and have no KL" in run.page.read_text()


def test_what_a_copy_in_half_precision_draws_has_the_policys_own_log_ratios(
    tiny: MakeRecipe, world: Path, tmp_path: Path
) -> None:
    carry_out(tiny("sample.precision=bf16"), tmp_path / "run", "evaluation/sft", "evaluation/exo-rw")
    run, tokenizer = RunFolder(tmp_path / "run"), load_tokenizer(str(world / "tokenizer"))
    for record in read_records(run.evaluation / "sft" / "samples"):
        assert all(c.logprob == c.reference_logprob for c in record.completions)
    last = sorted((tmp_path / "run" / "align" / "exo-rw" / "policies").iterdir())[-1]
    policy = load_policy(ModelSettings(source=str(last)), tokenizer)
    for record in read_records(run.evaluation / "exo-rw" / last.name / "samples"):
        own = plain_completion_logprobs(policy, [group_of(record, 0)], temperature=1.0)[0]
        assert [c.logprob for c in record.completions] == pytest.approx(own.tolist(), abs=1e-5)


def test_a_prompts_category_comes_from_its_row(tiny: MakeRecipe, world: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) | {"kind": "poem"} for line in (world / "test.jsonl").read_text().splitlines()]
    (tmp_path / "test.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    data, scorer = f"data.evaluation.source={tmp_path}/test.jsonl", "{function: exalign.data.synthetic:reward}"
    recipe = tiny(data, f"evaluate.scorer={scorer}", "evaluate.category=kind")
    carry_out(recipe, tmp_path / "run", "evaluation/prompts")
    records = read_records(tmp_path / "run" / "evaluation" / "prompts")
    assert {(record.columns or {}).get("kind") for record in records} == {"poem"}
    assert not [name for name in read_json(tmp_path / "run/evaluation/prompts/done.json")["counts"] if "kind" in name]
    with pytest.raises(InputError, match="no evaluation prompt has a column 'king'"):
        carry_out(
            tiny(data, f"evaluate.scorer={scorer}", "evaluate.category=king"), tmp_path / "2", "evaluation/prompts"
        )


def test_the_scorer_is_held_to_held_out_preferences(
    tiny: MakeRecipe, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And each scorer of a sum: here the reward, by a weight of 0, and its contrary."""
    prompts = list(dict.fromkeys(json.loads(line)["prompt"] for line in (world / "test.jsonl").open()))[:6]
    rows = []
    for prompt, agrees in zip(prompts, cycle((True, False, False)), strict=False):
        worse, better = sorted((" was very funny.", " was dull."), key=partial(remark_reward, prompt))
        chosen, rejected = (better, worse) if agrees else (worse, better)
        rows.append({"prompt": prompt, "chosen": chosen, "rejected": rejected})
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    functions = "preferences=null", "reward=null", "score.scorer={function: exalign.data.synthetic:reward}"
    recipe = tiny(*functions, "align.dpo-pref=null", f"data.evaluation.source={tmp_path}/pairs.jsonl")
    carry_out(recipe, tmp_path / "run", "evaluation/prompts")
    counts = read_json(tmp_path / "run" / "evaluation" / "prompts" / "done.json")["counts"]
    assert (counts["pairs_scored"], counts["pairs_scored_right"]) == (len(rows), len(rows[::3]))
    for record, row in zip(read_records(tmp_path / "run" / "evaluation" / "prompts"), rows, strict=True):
        assert [(c.text, c.reward) for c in record.completions] == [
            (row["chosen"], remark_reward(row["prompt"], row["chosen"]))
        ]
    told, doubt = scorer_accuracy(counts)
    assert not told and doubt[0].startswith("The scorer prefers the answer that held-out preferences prefer in 33 % [")
    assert doubt[0].endswith("of 6 pairs, which may be chance: a gain of its rewards may be none.")
    (tmp_path / "contrary.py").write_text(
        "from exalign.data.synthetic import reward\n"
        "def worse(prompts, completions):\n    return [[-r for r in row] for row in reward(prompts, completions)]\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    both = "[{function: contrary:worse}, {function: exalign.data.synthetic:reward, weight: 0}]"
    recipe = tiny(
        *functions, "align.dpo-pref=null", f"data.evaluation.source={tmp_path}/pairs.jsonl", f"evaluate.scorer={both}"
    )
    carry_out(recipe, tmp_path / "sum", "evaluation/prompts")
    told, doubt = scorer_accuracy(read_json(tmp_path / "sum" / "evaluation" / "prompts" / "done.json")["counts"])
    assert "67 %" in doubt[0] and doubt[0].startswith("The scorer prefers") and len(doubt) == 1
    assert [(line.split()[2], "33 %" in line) for line in told] == [
        ("contrary:worse", False), ("exalign.data.synthetic:reward", True)
    ]  # fmt: skip


def test_equal_rewards_of_a_pair_count_half_and_each_rival_is_a_pair() -> None:
    texts = (Completion("a"), Completion("b"), Completion("c"))
    one = Record("0", "", texts, preferred=1)
    found = Counter(_agreement([one], [one.with_rewards([0.0, 1.0, 1.0])], log_odds=False))
    assert found == {"pairs_scored": 2, "pairs_scored_right": 1, "pairs_scored_alike": 1}
    told, doubt = scorer_accuracy({"pairs_scored": 400, "pairs_scored_right": 160, "pairs_scored_alike": 240})
    assert told == ["The scorer prefers the answer that held-out preferences prefer in 70 % [65, 74] of 400 pairs."]
    assert not doubt


def test_rows_without_a_reference_text_take_it_from_no_other(tiny: MakeRecipe, world: Path, tmp_path: Path) -> None:
    prompts = list(dict.fromkeys(json.loads(line)["prompt"] for line in (world / "test.jsonl").open()))[:4]
    rows = [{"prompt": prompt, "chosen": " was very funny.", "rejected": " was dull."} for prompt in prompts]
    rows[1] = {"prompt": prompts[1], "chosen": " was dull.", "rejected": " was dull."}  # equal: no pair
    tie = {"prompt": prompts[2], "completions": [" was dull.", " was fun."], "rewards": [1.0, 1.0]}
    lines = [{"prompt": r["prompt"], "completions": [r["chosen"], r["rejected"]], "preferred": 0} for r in rows]
    lines[2] = {k: v for k, v in tie.items() if k != "rewards"} | {"preferred": "tie"}
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in lines))
    functions = "preferences=null", "reward=null", "score.scorer={function: exalign.data.synthetic:reward}"
    data = f"data.evaluation={{source: {tmp_path}/pairs.jsonl, labels: {{tie: tie}}}}"
    carry_out(tiny(*functions, "align.dpo-pref=null", data), tmp_path / "run", "evaluation/prompts")
    done = read_json(tmp_path / "run" / "evaluation" / "prompts" / "done.json")["counts"]
    kept = [record.rewards for record in read_records(tmp_path / "run" / "evaluation" / "prompts")]
    assert done["prompts_without_reference_text"] == sum(not rewards for rewards in kept) == 1
    assert sum(rewards is not None for rewards in kept) == len(kept) - 1


def test_log_odds_are_held_to_labels() -> None:
    texts = [Record(str(i), "", (Completion("x", reward=label),)) for i, label in enumerate((1.0, 0.0, 1.0, 0.5))]
    told = [record.with_rewards([reward]) for record, reward in zip(texts, (2.0, -1.0, -0.1, 3.0), strict=True)]
    assert Counter(_agreement(texts, told, log_odds=True)) == {"labels_scored": 3, "labels_scored_right": 2}
    assert not [*_agreement(texts, told, log_odds=False)]


def test_the_first_prompt_comes_first_and_is_asked_for_by_how_it_begins(
    tiny: MakeRecipe, world: Path, tmp_path: Path
) -> None:
    carry_out(tiny(), tmp_path / "usual", "evaluation/prompts")
    usual = read_records(tmp_path / "usual" / "evaluation" / "prompts")
    text = usual[-1].prompt
    assert isinstance(text, str)
    carry_out(tiny(f"evaluate.first_prompt={json.dumps(text[:-1])}"), tmp_path / "other", "evaluation/prompts")
    prompts = [record.prompt for record in usual]
    other = [record.prompt for record in read_records(tmp_path / "other" / "evaluation" / "prompts")]
    assert other == [text, *prompts[:-1]]
    with pytest.raises(InputError, match=r"first_prompt: no prompt of the evaluation begins with 'This Fox'"):
        carry_out(tiny("evaluate.first_prompt=This Fox"), tmp_path / "none", "evaluation/prompts")


def test_a_reward_model_from_scratch_has_the_tokenizer_of_the_run(tiny: MakeRecipe, tmp_path: Path) -> None:
    config = "{model_type: gpt2, n_layer: 1, n_embd: 16, n_head: 2, n_positions: 96}"
    carry_out(tiny(f"reward.model={{config: {config}}}"), tmp_path, "reward")
    assert len(load_tokenizer(str(tmp_path / "reward" / "model"))) >= len(
        load_tokenizer(str(tmp_path / "sft" / "model"))
    )


def test_counts_of_every_stage_are_recorded(finished: tuple[Recipe, Path]) -> None:
    _, folder = finished
    counts = read_json(folder / "rollouts" / "done.json")["counts"]
    assert counts["completions"] == 72
    assert counts["prompts"] == 24


def test_a_prompt_is_on_one_side_with_white_space_around_it_or_without() -> None:
    rows = [Record(str(i), f"Question {i // 2}?" + " " * (i % 2), ()) for i in range(40)]
    sides = [{str(row.prompt).strip() for row in side} for side in hold_out(rows, 0.25, 512, "it")]
    assert [len(side) for side in sides] == [15, 5] and not sides[0] & sides[1]
    bare = hold_out([Record(row.id, str(row.prompt).strip(), ()) for row in rows], 0.25, 512, "it")
    assert {row.prompt for row in bare[1]} == sides[1]
    assert [len(side) for side in hold_out(rows[:4], 0.9, 512, "it")] == [2, 2]  # two prompts, one on each side


def test_what_is_held_out_of_preferences_is_held_out_of_everything(tmp_path: Path) -> None:
    """Of the prompts, of given rewards and texts, and of what a search is ranked on; and a prompt is drawn for once."""
    texts = [f"Question {i}?" for i in range(40)]

    def file(name: str, rows: list[dict[str, object]]) -> str:
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(tmp_path / name)

    pairs = [{"prompt": x, "chosen": f"yes {n}", "rejected": "no"} for x in texts for n in range(2)]
    rewards = [{"prompt": x, "completions": ["a", "b"], "rewards": [0.0, 1.0]} for x in texts]
    scored = {"scorer": {"function": "exalign.data.synthetic:reward"}}
    search = {"kl": 1.0, "prompts": 8, "methods": {"exo": {"epochs": {"choices": [1, 2]}}}}
    # White space around a prompt makes it no other.
    prompts = {"source": file("prompts.jsonl", [{"prompt": f"{x} "} for x in texts])}
    values = {
        "name": "it",
        "model": {"source": "gpt2"},
        "data": {"preferences": {"source": file("pairs.jsonl", pairs)}, "held_out": 0.25},
        "score": scored,
        "align": {"exo": {}},
    }
    given = {"rewards": {"source": file("rewards.jsonl", rewards)}, "sft": {"source": file("sft.jsonl", pairs)}}
    recipe = make_recipe(values)
    other = make_recipe(
        {**values, "data": {**values["data"], "prompts": prompts, "validation": prompts}, "search": search}
    )
    third = make_recipe({**values, "data": {**values["data"], **given}, "sft": {}, "score": {}, "evaluate": scored})
    for one in (recipe, other, third):
        run = Run(one, tmp_path / "run", Console(quiet=True))
        stages = {stage.name: stage for stage in plan(one)}
        run.carry_out([*stages.values()], ["preferences"])
        kept = {record.prompt for record in read_records(tmp_path / "run" / "preferences" / "held-out")}
        assert len(kept) == 10
        if one is third:
            run.carry_out([*stages.values()], ["scored"])
            left = [record.prompt for record in read_records(tmp_path / "run" / "scored" / "records")]
            assert read_json(tmp_path / "run" / "scored" / "done.json")["counts"]["rows_held_out"] == 10
        else:
            view = run.view(stages["rollouts"])
            left = [record.prompt for record in prompts_of(view)]
            assert view.counts["rows_held_out"] == (10 if one is other else 0)
        left = [str(prompt).strip() for prompt in left]
        assert len(left) == 30 and not kept & {*left} and len({*left}) == 30
    view = Run(other, tmp_path / "run").view({stage.name: stage for stage in plan(other)}["validation"])
    rows = in_order(evaluation_rows(view), None)
    found = validation_prompts(rows, records_of(view, "validation"), view.counts, used=512, wanted=30)
    assert not kept & {str(record.prompt).strip() for record in found} and view.counts["prompts_of_the_evaluation"] > 0


def test_ids_of_another_tokenizer_are_not_taken_for_those_of_a_model(
    tiny: MakeRecipe, world: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Prompts of another run that are evaluated on, and samples of the policy that a reward model of its own reads."""
    rows = [Record(str(i), f"the film {i}", prompt_ids=(9999,)) for i in range(8)]
    write_records(tmp_path / "rows", rows, Header())
    own = build_tokenizer((world / "sft.jsonl").read_text().splitlines(), vocab_size=300)
    config = AutoConfig.for_model("gpt2", n_layer=1, n_embd=16, n_head=2, vocab_size=len(own), pad_token_id=0)
    for part in (own, AutoModelForCausalLM.from_config(config)):
        part.save_pretrained(tmp_path / "own")
    ids = tuple(load_tokenizer(str(world / "tokenizer")).encode(" was dull.", add_special_tokens=False))
    same = [replace(row, completions=(Completion(" was dull.", ids),)) for row in rows]  # its template may be another
    write_records(tmp_path / "same", same, Header())
    carry_out(tiny(f"data.evaluation.source={tmp_path}/same"), tmp_path / "other", "evaluation/prompts")
    assert {record.prompt_ids for record in read_records(tmp_path / "other" / "evaluation" / "prompts")} == {None}
    recipe = tiny(f"data.evaluation.source={tmp_path}/rows", f"reward.model.source={tmp_path}/own")
    read: list[Group] = []
    monkeypatch.setattr("exalign.run.stages.train_reward_model", lambda *given: read.extend(given[2]))
    carry_out(recipe, tmp_path / "run", "reward", "evaluation/prompts")
    assert {record.prompt_ids for record in read_records(tmp_path / "run" / "evaluation" / "prompts")} == {None}
    texts = [c.text for r in read_records(tmp_path / "run" / "preferences" / "records") for c in r.completions]
    told = [own.decode(ids, skip_special_tokens=True) for group in read for ids in group.completion_ids]
    assert told and all(any(text.startswith(words) for text in texts) for words in told)


def test_a_stage_that_trained_leaves_no_model_in_memory(tiny: MakeRecipe, tmp_path: Path) -> None:
    """Without the collector of circles, which comes when it likes; several methods would stand there together."""

    def models() -> int:
        return sum(isinstance(one, PreTrainedModel) for one in gc.get_objects())

    gc.collect()
    before = models()
    gc.disable()
    try:
        carry_out(tiny(), tmp_path / "run", "sft", "reward", "align/exo-rw")
        assert models() <= before
    finally:
        gc.enable()


def test_the_checksums_of_a_folder_are_read_once_when_its_stage_ends(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not once for each of its files, which would make the end of a stage of n shards cost n²."""
    inner = tmp_path / "stage" / "records"
    inner.mkdir(parents=True)
    for number in range(5):
        (inner / f"part-{number}").write_text(str(number))
    checksums.write_sums(inner)
    (tmp_path / "stage" / "metrics.jsonl").write_text("{}")
    read, read_sums = list[Path](), checksums.read_sums

    def reading(folder: Path) -> dict[str, str]:
        read.append(folder)
        return read_sums(folder)

    monkeypatch.setattr(checksums, "read_sums", reading)
    found = stage_checksums(tmp_path / "stage")
    assert read == [inner]
    assert list(found) == ["metrics.jsonl", "records/SHA256SUMS", *(f"records/part-{number}" for number in range(5))]
    assert all(one.sha256 == checksums.checksum(tmp_path / "stage" / name) for name, one in found.items())
