"""`exalign figures RUN`: every figure names its data, n and interval; what is missing is said with what makes it."""

from __future__ import annotations

import csv
import json
import re
import shutil
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from evaluation.synthetic_run import World, write_run
from exalign.cli import draw_run_figures, main
from exalign.data.store import read_records
from exalign.errors import InputError
from exalign.evaluation.evidence import collect_evidence
from exalign.evaluation.run_folder import RunFolder
from exalign.evaluation.schema import BestOfN, Evidence, Interval, Judgements, MethodEvidence, Tally, WinRate
from exalign.report.figures import CLASSIFIER, draw_density, draw_frontier, draw_reward_against_step
from exalign.report.paper_figures import ablations, draw_ablation, write_paper_figures
from exalign.report.style import drawable, figure_style, looks_of
from exalign.report.verdicts import OVERALL, as_markdown, draw_verdicts, win_table
from judging.judged_run import assess_run, judge_run, longer, moody

METHODS = {"exo-rw": (0.9, (0.6, 1.2)), "exo-rw-2": (0.8, (0.5, 0.8)), "dpo-pref": (0.5, (1.0,)), "ppo": (0.6, (0.9,))}


def with_settings(run: Path) -> Path:
    """exo-rw-2 differs from exo-rw in β_π alone, and ppo is another method."""
    recipe, said = run / "recipe.yaml", RunFolder(run).description("exo-rw-2")
    lines = [line for line in recipe.read_text().splitlines() if not line.startswith("  ppo:")]
    recipe.write_text("\n".join(lines) + "\n  ppo: {method: ppo, target: reward, beta: 0.1}\n")
    said.write_text(said.read_text().replace('"beta_pi": 0.1', '"beta_pi": 0.5'))
    ppo = {"label": "PPO", "family": "ppo", "target": "reward", "settings": {"beta": 0.1}}
    RunFolder(run).description("ppo").write_text(json.dumps(ppo))
    return run


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run that has everything, with its figures."""
    folder = tmp_path_factory.mktemp("runs") / "a run"
    run = with_settings(write_run(folder, World(METHODS, num_prompts=16, pool=32, density=2, steps=20)))
    judge_run(run, "plain | judge", moody)
    assess_run(run, "tasters", [("exo-rw", "dpo-pref"), ("exo-rw", "reference")], rules={"ann": longer}, prompts=6)
    main(["figures", str(run)])
    return run


@pytest.fixture(scope="module")
def evidence(whole: Path) -> Evidence:
    from exalign.judging.judgements import read_judgements

    return collect_evidence(whole, judgements=read_judgements(whole), num_resamples=100)


def texts_of(svg: Path) -> str:
    """The texts of an SVG whose letters are outlines: each stands beside them as a comment."""
    return " ".join(" ".join(re.findall(r"<!--(.*?)-->", svg.read_text(encoding="utf-8"), flags=re.DOTALL)).split())


@pytest.mark.parametrize("number", ["2", "3", "4", "6", "7", "8", "9"])
def test_every_figure_names_its_data_its_n_and_its_interval(whole: Path, number: str) -> None:
    folder = whole / "report" / "figures"
    assert (folder / f"figure-{number}.png").read_bytes().startswith(b"\x89PNG")
    said = texts_of(folder / f"figure-{number}.svg")
    index = (folder / "figures.md").read_text()
    wanted = {"3": "n = 32 samples", "9": "n = 32 samples", "4": "(n = 6)"}.get(number, "n = 16 held-out prompts")
    assert wanted in said
    for text in (said, index):
        assert "Run synthetic" in text
        assert "95 % bootstrap interval" in text
    assert f"figure-{number}.png" in index


def test_the_table_has_every_method_and_best_of_n_in_three_formats(whole: Path, evidence: Evidence) -> None:
    folder = whole / "report" / "figures"
    rows = list(csv.DictReader((folder / "table-1-2.csv").read_text().splitlines()))
    cells = json.loads((folder / "table-1-2.json").read_text())["cells"]
    assert [row["win_rate"] for row in rows] == [str(cell["win_rate"]) for cell in cells]
    by_scorer = [(row["method"], row["against"]) for row in rows if row["by"] == "scorer"]
    against = ("SFT", "reference texts")
    assert by_scorer == [(name, who) for name in (*METHODS, "best of 32") for who in against]
    assert all(float(row["low"]) <= float(row["win_rate"]) <= float(row["high"]) for row in rows)
    assert {row["num_prompts"] for row in rows if row["by"] == "scorer"} == {"16"}
    method = evidence.methods[0]
    assert float(rows[0]["win_rate"]) == method.win_rates[0].rate.estimate
    equal = method.win_rates[0].at_equal_length
    assert equal is not None and float(rows[0]["at_equal_length"]) == equal.estimate
    judged = [row for row in rows if row["by"].startswith("plain | judge")]
    assert [row["method"] for row in judged] == sorted(METHODS)
    tally = evidence.judgements.judges[0].match_ups[0].tally
    assert tally.score is not None
    assert float(judged[0]["win_rate"]) == tally.score.estimate
    markdown = (folder / "table-1-2.md").read_text().splitlines()
    assert r"plain \| judge" in markdown[0]
    assert len({len(re.findall(r"(?<!\\)\|", line)) for line in markdown if line.startswith("|")}) == 1
    assert [line.split("|")[1].strip() for line in markdown if line.startswith("|")][2:] == [*METHODS, "best of 32"]


def test_the_best_method_of_a_column_is_bold_with_its_ties_and_best_of_n_is_not(evidence: Evidence) -> None:
    rates = dict(zip(METHODS, [0.612, 0.6118, 0.58, 0.4, 0.5], strict=False))
    best = BestOfN(8, Interval(1.0, None, None, 9), 1.0, [WinRate("SFT", Interval(0.9, 0.8, 1.0, 9), 0.0, 9, 0)])
    methods = [
        replace(m, win_rates=[WinRate("SFT", Interval(rates[m.name], 0.1, 0.9, 9), 0.0, 9, 0)])
        for m in evidence.methods
    ]
    table = win_table(replace(evidence, methods=methods, best_of_n=[best], judgements=Judgements()))
    rows = [line.split(" | ") for line in as_markdown(table).splitlines()[2:]]
    assert [row[0].strip("| ") for row in rows if "**" in row[1]] == list(METHODS)[:2]  # 61.2 % both
    assert rows[-1] == ["| best of 8", "90.0 [80.0, 100.0] (n 9) |"]
    half = Interval(0.5, 0.4, 0.6, 9)
    said = Tally("best-of-8", "sft", OVERALL, half, half, half, Interval(0.7, 0.6, 0.8, 9), 9, 0)
    match_up = replace(evidence.judgements.judges[0].match_ups[0], tally=said)
    judged = Judgements([replace(evidence.judgements.judges[0], match_ups=[match_up])])
    table = win_table(replace(evidence, methods=methods, best_of_n=[best], judgements=judged))
    assert table.methods[-1] == "best of 8" and len(table.columns) == 2
    assert as_markdown(table).splitlines()[-1] == "| best of 8 | 90.0 [80.0, 100.0] (n 9) | 70.0 [60.0, 80.0] (n 9) |"


def test_the_page_has_the_new_figures_and_the_table(whole: Path) -> None:
    from exalign.evaluation.evidence import build_evidence
    from exalign.judging.judgements import read_judgements
    from exalign.report import write_report

    build_evidence(whole, judgements=read_judgements(whole), num_resamples=50)
    html = write_report(whole).read_text()
    assert 'id="density"' in html
    # Once beside the judge's columns, twice among the scorer's rows.
    assert len(re.findall(r">\s*best of 32\s*</td>", html)) == 3
    for name in ("accuracy", "density"):
        assert (whole / "report" / "figures" / f"{name}.png").exists()


def copied(whole: Path, tmp_path: Path, *without: str) -> Path:
    run = Path(shutil.copytree(whole, tmp_path / "run"))
    for name in ("report", *without):
        shutil.rmtree(run / name)
    return run


def only(sentences: Sequence[str], *words: str) -> str:
    (found,) = [sentence for sentence in sentences if all(word in sentence for word in words)]
    return found


def test_what_an_incomplete_run_lacks_is_said_with_what_makes_it(whole: Path, tmp_path: Path) -> None:
    gone = ("judging", "assessment", "evaluation/pool", "evaluation/density", "evaluation/exo-rw-2", "align/exo-rw-2")
    run = copied(whole, tmp_path, *gone)
    paths, missing = draw_run_figures(run)
    assert {path.name for path in paths if path.suffix == ".png"} == {f"figure-{n}.png" for n in (2, 7, 8)}
    evaluate = f"exalign evaluate {run}/recipe.yaml --run {run}"
    assert evaluate in only(missing, "exo-rw-2 has no evaluated checkpoint")
    assert f"{evaluate} evaluate.density_prompts=4" in only(missing, "Figure 3")
    assert "exalign judge" in only(missing, "Figure 4")
    assert "beta_pi alone" in only(missing, "Figure 6")
    assert evaluate in only(missing, "Figure 9")
    assert f"{evaluate} evaluate.pool_prompts=128" in only(missing, "best of N")
    assert f"exalign judge {run} --against sft" in only(missing, "judge's column against SFT")
    index = (run / "report" / "figures" / "figures.md").read_text()
    assert all(sentence in index for sentence in missing)


def test_the_command_says_what_is_missing_and_writes_where_it_is_told(
    whole: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = copied(whole, tmp_path, "judging", "assessment")
    main(["figures", str(run), "--out", str(tmp_path / "out")])
    said = capsys.readouterr().out
    assert f"wrote {tmp_path}/out/figure-2.png and .svg" in said
    assert "missing Figure 4 needs judgements" in said
    assert not (run / "report").exists()
    assert (tmp_path / "out" / "figure-2.svg").exists()


def test_a_run_without_any_samples_is_one_sentence(whole: Path, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no recipe\.yaml: exalign run RECIPE --run"):
        draw_run_figures(tmp_path)
    run = copied(whole, tmp_path, "evaluation/sft")
    with pytest.raises(InputError, match=r"no samples of the supervised policy yet: exalign evaluate .*recipe\.yaml"):
        draw_run_figures(run)


def test_a_prompt_with_backticks_stays_code(evidence: Evidence, whole: Path, tmp_path: Path) -> None:
    assert evidence.density is not None
    first, *_ = evidence.density.prompts
    density = replace(evidence.density, prompts=[replace(first, prompt="run ``x`` <b>\nnow")])
    write_paper_figures(replace(evidence, density=density), whole, tmp_path)
    assert "\n1. ``` run ``x`` <b> now ```\n" in (tmp_path / "figures.md").read_text()


def test_no_log_odds_no_accuracy(whole: Path, tmp_path: Path) -> None:
    run = copied(whole, tmp_path)
    recipe = run / "recipe.yaml"
    recipe.write_text(recipe.read_text().replace("oracle: {max_tokens: 512}\n", ""))
    assert "log-odds" in only(draw_run_figures(run)[1], "Figure 7")


def test_the_accuracy_frontier_draws_every_checkpoint(evidence: Evidence) -> None:
    for width in (8.8, 3.75):
        with figure_style():
            figure = draw_frontier(evidence, looks_of(evidence.methods), CLASSIFIER, width=width)
        assert figure is not None
        lines = figure.axes[0].lines
        drawn = {tuple(np.round(xy, 9)) for line in lines for xy in zip(*line.get_data(), strict=True)}
        for method in evidence.methods:
            for point in method.points:
                assert point.accuracy is not None
                assert tuple(np.round((point.kl.estimate, point.accuracy.estimate), 9)) in drawn


def test_the_density_figure_draws_the_curves_beside_the_optimum(evidence: Evidence) -> None:
    assert evidence.density is not None
    first = evidence.density.prompts[0]
    few, enough = (replace(c, effective_samples=n) for n in (9.9, 10.0) for c in first.curves[:1])
    prompts = [replace(first, curves=[one, *first.curves[1:]]) for one in (enough, few)]
    with figure_style():
        figure = draw_density(replace(evidence.density, prompts=prompts), looks_of(evidence.methods), width=8.8)
    assert "estimated optimum" not in [line.get_label() for axes in figure.axes[2:] for line in axes.lines]
    assert len(figure.axes) == 2 * len(prompts)
    rewards, preferences = ({str(line.get_label()): line for line in axes.lines} for axes in figure.axes[:2])
    shown = {"SFT", "estimated optimum"}
    assert {name for name in rewards if name[0] != "_"} == {*shown, "exo-rw", "exo-rw-2", "ppo"}
    assert {name for name in preferences if name[0] != "_"} == {*shown, "dpo-pref"}
    for curve in evidence.density.prompts[0].curves:
        line = rewards.get(curve.policy) or preferences[curve.policy]
        np.testing.assert_allclose(line.get_ydata(), curve.ratio)


def test_reward_against_step_has_the_spread_within_prompts(whole: Path, evidence: Evidence) -> None:
    method = evidence.methods[0]
    records = read_records(whole / "evaluation" / "exo-rw" / "step-000020" / "samples")
    spread = np.mean([np.std(record.rewards or [], ddof=1) for record in records])
    assert method.points[-1].reward_std_within == pytest.approx(spread)
    with figure_style():
        figure = draw_reward_against_step(evidence, looks_of(evidence.methods), width=8.8)
    assert figure is not None
    assert [axes.get_title(loc="left") for axes in figure.axes] == list(METHODS)
    band = figure.axes[0].collections[0].get_paths()[0].vertices
    top = max(y for x, y in band if x == 20)
    assert top == pytest.approx(method.points[-1].reward.estimate + spread)


def test_methods_that_differ_in_one_beta_are_found(evidence: Evidence) -> None:
    def differing(name: str, **settings: float | str) -> MethodEvidence:
        return replace(evidence.methods[0], name=name, settings={"target": "reward", **settings})

    methods = [
        differing("a", beta_pi=0.5, beta_r=0.1),
        differing("b", beta_pi=0.1, beta_r=0.1),
        differing("c", beta_pi=0.1, beta_r=0.7),
        differing("d", beta_pi=0.1, beta_r=0.9, learning_rate=1.0),
        replace(differing("not evaluated", beta_pi=0.9, beta_r=0.1), points=[]),
    ]
    found = [(group.setting, [method.name for method in group.methods]) for group in ablations(methods)]
    assert found == [("beta_pi", ["b", "a"]), ("beta_r", ["b", "c"])]
    with figure_style():
        figure = draw_ablation(replace(evidence, methods=methods), width=8.8)
    assert figure is not None
    assert [axes.get_xlabel() for axes in figure.axes[-2:]] == ["β_π", "β_r"]
    (line,) = figure.axes[0].lines
    assert list(line.get_xdata()) == [0.1, 0.5]


def test_an_end_without_a_kl_has_none_beside_it(evidence: Evidence) -> None:
    first = evidence.methods[0]
    methods = [
        replace(first, name=name, settings={"beta_pi": beta}, points=[replace(first.points[-1], kl=kl)])
        for name, beta, kl in (("a", 0.1, Interval(1.5, None, None, 9)), ("b", 0.5, None))
    ]
    with figure_style():
        figure = draw_ablation(replace(evidence, methods=methods), width=8.8)
    assert figure is not None
    assert [text.get_text() for text in figure.axes[0].texts] == ["KL 1.5", "no KL"]


def test_what_a_judge_says_of_methods_that_differ_in_one_beta_is_drawn_too(evidence: Evidence) -> None:
    judge = evidence.judgements.judges[0]
    tally = next(one.tally for one in judge.match_ups if one.tally.second == "sft")
    first = next(method for method in evidence.methods if method.name == tally.first)
    settings = {"target": "reward", "beta_r": 0.1}
    methods = [
        replace(first, settings=settings | {"beta_pi": 0.5}),
        replace(first, name="unjudged", settings=settings | {"beta_pi": 0.1}),
    ]
    other = replace(judge, template="another", match_ups=judge.match_ups)
    judges = [*evidence.judgements.judges, other, replace(other, name="a-name-of-a-judge-as-long-as-the-hub-allows")]
    judged_more = replace(evidence, methods=methods, judgements=replace(evidence.judgements, judges=judges))
    with figure_style():
        figure = draw_ablation(judged_more, width=8.8)
    assert figure is not None and tally.score is not None
    figure.draw_without_rendering()
    for template in (judge.template, other.template):
        said = f"{judge.name}, template “{template}” win rate against SFT"
        (judged,) = (axes for axes in figure.axes if " ".join(axes.get_ylabel().split()) == said)
        assert [*judged.lines[0].get_xdata()] == [0.5] and [*judged.lines[0].get_ydata()] == [tally.score.estimate]
        assert judged.get_xlim() == figure.axes[0].get_xlim()  # of one method alone too
    labels = [axes.yaxis.label.get_window_extent() for axes in figure.axes]
    assert all(above.y0 >= below.y1 for above, below in pairwise(labels))


def test_verdicts_are_drawn_as_they_were_counted(evidence: Evidence) -> None:
    with figure_style():
        figure = draw_verdicts(evidence, looks_of(evidence.methods), width=8.8)
    assert figure is not None
    tally = evidence.judgements.judges[0].match_ups[0].tally
    bars = figure.axes[0].patches[:3]
    wanted = [tally.win, tally.tie, tally.lose]
    assert [bar.get_width() for bar in bars] == pytest.approx([share.estimate for share in wanted if share])
    assert len(figure.axes) == len(evidence.judgements.judges) + len(evidence.judgements.studies)
    win, tie, lose = (Interval(share, None, None, 10) for share in (0.9, 0.0, 0.1))
    without_ties = replace(
        evidence.judgements.judges[0].match_ups[0], tally=replace(tally, win=win, tie=tie, lose=lose)
    )
    judge = replace(evidence.judgements.judges[0], match_ups=[without_ties])
    judged = replace(evidence, judgements=replace(evidence.judgements, judges=[judge], studies=[]))
    with figure_style():
        figure = draw_verdicts(judged, looks_of(evidence.methods), width=8.8)
    assert figure is not None and figure.axes[0].texts[0].get_text() == "90 · 0 · 10  (n = 10)"


def test_a_run_of_preferences_alone_has_no_best_of_n_without_a_pool(evidence: Evidence) -> None:
    table = win_table(replace(evidence, best_of_n=[]))
    assert table.methods == list(METHODS)
    assert table.cell("ppo", ("nobody", "SFT")) is None


def test_letters_without_a_glyph_become_boxes() -> None:
    assert drawable("a漢\u202eb") == "a□[U+202E]b"
