"""What the page says, without a browser."""

from __future__ import annotations

import csv
import re
import subprocess
import sys
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from evaluation.synthetic_run import World, write_run
from exalign.data.store import read_header, read_records, write_records
from exalign.errors import InputError
from exalign.evaluation.evidence import build_evidence
from exalign.evaluation.schema import (
    Benchmark,
    BenchmarkRow,
    Comparison,
    EqualKL,
    Evidence,
    FrontierPoint,
    Gap,
    Interval,
    MethodEvidence,
    Standing,
    Verdict,
)
from exalign.report import write_report
from exalign.report.page import headline, render_page, shipped
from exalign.report.wording import describe, number, visible


def text_of(page):
    return page.read_text(encoding="utf-8")


def test_no_reference_leads_outside(evidence_and_page):
    html = text_of(evidence_and_page[1])
    for address in re.findall(r'(?:src|href|action|data)\s*=\s*"([^"]*)"', html):
        assert address.startswith("#"), address
    assert "@import" not in html
    assert not re.search(r"url\((?!#)", html)
    assert html.count("<script") == 1 and "unsafe-inline'; script-src 'sha256-" in html


def test_ids_are_unique_and_references_resolve(evidence_and_page):
    html = text_of(evidence_and_page[1])
    ids = re.findall(r'\bid="([^"]+)"', html)
    assert len(ids) == len(set(ids))
    wanted = set(re.findall(r'href="#([^"]+)"', html)) | set(re.findall(r"url\(#([^)]+)\)", html))
    assert wanted <= set(ids)


def test_every_tag_is_closed(evidence_and_page):
    opened: list[str] = []

    class Checker(HTMLParser):
        def handle_starttag(self, tag, attrs):
            if tag not in {"meta", "br", "input"}:
                opened.append(tag)

        def handle_endtag(self, tag):
            assert opened.pop() == tag

    Checker().feed(text_of(evidence_and_page[1]))
    assert opened == []


def test_it_holds_what_was_promised(evidence_and_page):
    evidence, page = evidence_and_page
    html = text_of(page)
    for method in evidence.methods:
        assert method.name in html
    for part in ("pairs equal: 7", "prompts cut: 3", "divergence: reverse_kl", "2.13.0", "45.2 s", "reference texts"):
        assert part in html
    assert headline(evidence).title in re.sub(r"<[^>]+>", "", html)
    assert "nan" not in re.findall(r"\bnan\b", html.lower())


def test_the_data_of_the_figures_is_beside_them(evidence_and_page):
    evidence, folder = evidence_and_page[0], evidence_and_page[1].parent / "figures"
    tables = {
        name: list(csv.DictReader((folder / f"{name}.csv").read_text().splitlines()))
        for name in ("checkpoints", "optimum", "training")
    }
    points = [(m.name, p) for m in evidence.methods for p in m.points]
    assert [(row["method"], int(row["step"])) for row in tables["checkpoints"][1:]] == [(m, p.step) for m, p in points]
    for row, (_, point) in zip(tables["checkpoints"][1:], points, strict=True):
        assert (float(row["kl"]), float(row["kl.low"])) == (point.kl.estimate, point.kl.low)
        assert float(row["reward.high"]) == point.reward.high
    curve = evidence.curves[0]
    losses = [float(row["loss"]) for row in tables["training"] if row["stage"] == curve.stage]
    assert losses == curve.values["loss"]
    assert [float(r["beta"]) for r in tables["optimum"] if r["beta"]] == [p.beta for p in evidence.optimum.points]


def test_figures_are_saved(evidence_and_page):
    folder = evidence_and_page[1].parent / "figures"
    names = {"frontier", "accuracy", "density", "checkpoints", "alignment", "stages"}
    drawn = {path.name for path in folder.iterdir() if path.suffix != ".csv"}
    assert drawn == {f"{n}.{kind}" for n in names for kind in ("png", "svg")}
    assert (folder / "frontier.png").read_bytes().startswith(b"\x89PNG")


def test_what_was_lost_is_told_where_it_was_measured(evidence_and_page):
    evidence = evidence_and_page[0]
    assert 'id="benchmark"' not in text_of(evidence_and_page[1])
    lost = BenchmarkRow(
        "exo-rw@40", "arc<b>", "acc", True, (0.5, 0.01), (0.56, 0.02), Interval(-0.06, -0.09, -0.03, 900), True
    )
    rows = [lost, replace(lost, metric="bits", higher_is_better=False, paired=False)]
    rows += [replace(lost, difference=Interval(-0.06, None, None, 900), before=(0.56, None))]
    assert [row.outcome for row in rows] == ["lost", "gained", "may be chance"]
    html = render_page(replace(evidence, benchmark=Benchmark("lm-eval 1", 900, rows, outdated=["SFT"])), {})
    text = re.sub(r"\s+", " ", re.sub(r"<[^>]+>", " ", html[html.index('id="benchmark"') :]))
    assert "by lm-eval 1, before (SFT) and after, on the first 900 documents" in text
    assert "exo-rw step 40 arc&lt;b&gt; acc 0.560 ± 0.020 0.500 ± 0.010 −0.060 [−0.090, −0.030] n 900 lost" in text
    assert "n 900, not paired gained" in text and "0.560 0.500 ± 0.010 −0.060 n 900 may be chance" in text
    assert "SFT: the run has since replaced this" in text


def test_importing_the_report_does_not_load_torch():
    code = "import sys, exalign.report; sys.exit('torch' in sys.modules or 'transformers' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize(
    "world",
    [
        World(methods={}, num_prompts=4, pool=0, reference_texts=False),
        World(methods={"my_method.2": (0.5, (1.0,))}, num_prompts=1, num_samples=1, pool=2, steps=1),
        World(methods={f"m{i}": (0.1 * i, (3.0 * i,)) for i in range(1, 10)}, num_prompts=5, pool=8, steps=3),
    ],
    ids=["nothing aligned", "one prompt, one sample", "nine methods far away"],
)
def test_odd_runs_have_a_page(tmp_path, world):
    run = write_run(tmp_path / "run", world)
    build_evidence(run, num_resamples=20)
    assert "</html>" in text_of(write_report(run))


def test_without_evidence_it_says_so(tmp_path):
    with pytest.raises(InputError, match="has no evidence; finish it with exalign run"):
        write_report(tmp_path)


def span(estimate, low, high):
    return Interval(estimate, low, high, 100)


def method(name, family="other", target=None, gain=None, gap=None):
    points = [FrontierPoint(10, span(1.0, 0.9, 1.1), span(2.0, 1.8, 2.2), 1.0, 400)]
    label = "" if family == "other" else family.upper()
    return MethodEvidence(name, family, target, True, points, [], gain=gain, gap=gap, label=label)


def evidence_of(methods, *, standings=(), comparisons=(), left_out=()):
    equal = EqualKL(2.0, list(standings), list(left_out)) if standings else None
    nothing = {"optimum": None, "best_of_n": [], "examples": [], "curves": [], "stages": [], "record_counts": {}}
    sft = FrontierPoint(0, span(0.2, 0.1, 0.3), span(0.0, 0.0, 0.0), 1.0, 400)
    return Evidence(
        name="x",
        policy=None,
        temperature=1.0,
        kl_budget=None,
        confidence=0.95,
        num_resamples=10,
        seed=0,
        num_prompts=100,
        sft=sft,
        methods=list(methods),
        equal_kl=equal,
        comparisons=list(comparisons),
        notes=[],
        environment={},
        recipe="",
        **nothing,
    )


EXO, DPO = method("exo-rw", "exo", "reward"), method("dpo-rw", "dpo", "reward")


def duel(first, second, difference):
    standings = [Standing(first, span(1.5, 1.4, 1.6), None), Standing(second, span(1.2, 1.1, 1.3), difference)]
    return evidence_of([EXO, DPO], standings=standings, comparisons=[Comparison(first, second, 2.0, difference)])


def test_the_headline_says_it_when_exo_loses():
    said = headline(duel("dpo-rw", "exo-rw", span(0.3, 0.1, 0.5)))
    assert said.title == "dpo-rw gets the most reward for its KL."
    assert any("DPO (dpo-rw) is ahead of EXO (exo-rw)" in sentence for sentence in said.sentences)


def test_the_headline_claims_nothing_that_may_be_chance():
    said = headline(duel("exo-rw", "dpo-rw", span(0.1, -0.1, 0.3)))
    assert said.title == "At equal KL, exo-rw and dpo-rw are level."
    text = " ".join(said.sentences)
    assert "may be chance" in text
    assert "are level" in text
    assert "is ahead" not in text


def test_only_those_at_the_top_are_called_level():
    standings = [
        Standing("a", span(1.5, 1.4, 1.6), None),
        Standing("b", span(1.4, 1.3, 1.5), span(0.1, -0.1, 0.3)),
        Standing("c", span(0.5, 0.4, 0.6), span(1.0, 0.9, 1.1)),
    ]
    methods = [method(name) for name in "abc"]
    said = headline(evidence_of(methods, standings=standings))
    assert said.title == "At equal KL, a is level with b, and ahead of c."  # b's lead over c was not measured


def test_a_method_that_gets_more_further_away_is_not_hidden():
    evidence = duel("dpo-rw", "exo-rw", span(0.3, 0.1, 0.5))
    end = replace(EXO.points[0], reward=span(3.0, 2.9, 3.1))
    said = headline(replace(evidence, methods=[replace(EXO, points=[end]), DPO]))
    assert said.title == "At KL 2.0 dpo-rw leads; exo-rw goes further and gets more."
    assert any("At the end of training exo-rw has the most reward" in sentence for sentence in said.sentences)


def test_a_lead_without_an_interval_is_no_lead():
    alone = Interval(0.5, None, None, 1)
    evidence = duel("exo-rw", "dpo-rw", alone)
    assert "level" in headline(evidence).title
    standings = [Standing("exo-rw", alone, None), Standing("dpo-rw", alone, alone)]
    text = " ".join(headline(replace(evidence, equal_kl=EqualKL(2.0, standings))).sentences)
    assert "the next; one prompt gives no interval, so the order may be chance" in text


@pytest.mark.parametrize(
    ("gain", "title"),
    [
        (span(0.5, 0.4, 0.6), "exo-rw raises the reward."),
        (span(0.0, -0.1, 0.1), "exo-rw does not measurably change the reward."),
        (span(-0.5, -0.6, -0.4), "exo-rw lowers the reward."),
        (None, "exo-rw does not measurably change the reward."),
    ],
)
def test_a_single_method(gain, title):
    assert headline(evidence_of([replace(EXO, gain=gain)])).title == title


def test_each_scorer_of_a_sum_is_shown(tmp_path):
    """With its mean, and its win rates against whom it scored: here against nothing but the supervised policy."""
    run = write_run(tmp_path / "run", World(num_prompts=6, pool=0))
    for folder in run.glob("evaluation/*/**/samples"):
        known = read_records(folder)
        rewards = [[c.reward or 0.0 for c in r.completions] for r in known]
        with_parts = [[{"fun": 0.625, "rival": -reward, "all": reward} for reward in row] for row in rewards]
        parted = [r.with_each("parts", parts) for r, parts in zip(known, with_parts, strict=True)]
        write_records(folder, parted, read_header(folder))
    (exo, *_) = build_evidence(run, num_resamples=20).methods
    against_sft = next(rate for rate in exo.win_rates if rate.opponent == "SFT")
    assert [(name, [rate.opponent for rate in rates]) for name, rates in exo.by_part.items()] == [
        ("fun", ["SFT"]), ("rival", ["SFT"]), ("all", ["SFT"])
    ]  # fmt: skip
    assert exo.by_part["fun"][0].rate.estimate == 0.5
    assert exo.by_part["rival"][0].rate.estimate == pytest.approx(1 - against_sft.rate.estimate)
    html = text_of(write_report(run))
    assert "<small>fun 0.625" in html and "<th>rival<small>against SFT</small></th>" in html
    assert "<th>all<small>against SFT</small></th>" not in html  # it has all the weight: the scorer's column again


def test_left_out_and_unfinished_methods_are_named():
    standings = [Standing("exo-rw", span(1.5, 1.4, 1.6), None)]
    methods = [EXO, replace(DPO, finished=False), method("still")]
    said = headline(evidence_of(methods, standings=standings, left_out=["still"]))
    text = " ".join(said.sentences)
    assert "at their best too close to the supervised policy: still" in text
    assert "Stopped before the end of training: dpo-rw." in text
    assert "only method" in said.title


def test_what_is_missing_to_the_optimum_is_said_of_the_method_that_leads():
    """Gaps at different KLs say nothing of who is closer."""
    near, far = Gap(0.1, span(0.1, 0.0, 0.2), False), Gap(1.0, span(0.4, 0.3, 0.5), True)
    methods = [replace(EXO, gap=far), replace(DPO, gap=near)]
    standings = [
        Standing("exo-rw", span(1.0, 0.9, 1.1), None),
        Standing("dpo-rw", span(0.8, 0.7, 0.9), span(0.2, 0.1, 0.3)),
    ]
    assert "best possible" not in " ".join(headline(evidence_of(methods)).sentences)  # nobody leads
    text = " ".join(headline(evidence_of(methods, standings=standings)).sentences)
    assert "The best possible policy at KL 1.00 is estimated ≈ 0.40 [0.30,\N{NO-BREAK SPACE}0.50] above exo-rw." in text


def test_a_method_in_words():
    settings = {"divergence": "jensen_shannon", "beta_pi": 0.5, "beta_r": 0.1, "epsilon": 1e-3}
    assert describe(replace(EXO, settings=settings)) == "EXO, reward target, β_π 0.5, β_r 0.1"
    other = replace(method("js", target="preference"), settings=settings)
    assert describe(other) == "js, preference target, β_π 0.5, ε 0.001"
    assert describe(replace(other, line="what it says of itself")) == "what it says of itself"


def test_visible_keeps_ordinary_text():
    text = "Tabs\tand\nlines, emoji 🙂, עברית, العربية, 中文"
    assert visible(text) == text


@pytest.mark.parametrize(
    "character", [chr(c) for c in (0, 1, 8, 0xB, 0x1B, 0x7F, 0x9B, 0x202E, 0x2066, 0x200B, 0xFEFF)]
)
def test_visible_shows_what_hides(character):
    assert character not in visible(f"a{character}b")
    assert len(visible(f"a{character}b")) >= 3


def test_numbers_keep_their_size():
    for value in (0.0, 1e-7, 0.00123, 0.5, 9.999, 123.4, 1e6):
        assert float(number(value).replace(",", "").replace("−", "-")) == pytest.approx(value, rel=0.01)
        if value:
            assert number(-value) == "−" + number(value).replace("e-", "e−")


def test_no_checkpoint_is_called_no_better_that_was_not_looked_at(evidence_and_page):
    """A gain that is certain beyond the budget, or among those passed over, is not denied."""
    evidence, _ = evidence_and_page
    name = evidence.methods[0].name
    verdict = Verdict(name, evidence.methods[0].points[0].step, "align/x", None, certain=False)

    def title(**changed):
        return shipped(replace(evidence, verdict=replace(verdict, **changed))).title

    assert title() == "No checkpoint is measurably better than the supervised policy."
    assert title(within=0.5) == "No checkpoint within 0.5 nats is measurably better than the supervised policy."
    assert "No checkpoint whose KL is not wasted is measurably better" in title(passed_over=2)
