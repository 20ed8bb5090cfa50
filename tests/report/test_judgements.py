"""What the page says about judgements: the numbers of the records, and nothing where nobody judged."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from html.parser import HTMLParser

import pytest
from markupsafe import Markup

from exalign.data.store import read_header, read_records, write_records
from exalign.evaluation.run_folder import RunFolder
from exalign.evaluation.schema import Interval, Judgements, Tally
from exalign.judging.agreement import OVERALL, tally
from exalign.judging.comparisons import read_comparisons
from exalign.judging.judgements import read_judgements, stored_studies
from exalign.report.page import render_page
from exalign.report.wording import interval, percent
from report.test_browser import open_page


class Rows(HTMLParser):
    """The rows of the tables in one section, each as its cells' texts."""

    def __init__(self, section: str) -> None:
        super().__init__()
        self.section, self.inside, self.in_cell, self.rows = section, False, False, []

    def handle_starttag(self, tag, attrs):
        if tag == "section":
            self.inside = dict(attrs).get("id") == self.section
        if self.inside and tag == "tr":
            self.rows.append([])
        if self.inside and tag in ("td", "th"):
            self.rows[-1].append("")
            self.in_cell = True

    def handle_endtag(self, tag):
        self.in_cell = self.in_cell and tag not in ("td", "th")

    def handle_data(self, data):
        if self.in_cell:
            self.rows[-1][-1] += data


def rows_of(run, section):
    parser = Rows(section)
    parser.feed((run / "report" / "index.html").read_text())
    return [[re.sub(r"[ \n]+", " ", cell).strip() for cell in row] for row in parser.rows]


def shares(counted):
    return [percent(share) for share in (counted.win, counted.tie, counted.lose)]


NAMES = {"sft": "SFT", "reference": "reference texts"}


def match_up(counted):
    return f"{counted.first} against {NAMES.get(counted.second, counted.second)}"


def test_a_models_verdicts_are_on_the_page(judged_run):
    run, _ = judged_run
    rows = rows_of(run, "judged-by-model")
    files = sorted(run.glob("judging/llm/*/*/verdicts.jsonl"))
    assert len(files) == 4
    for file in files:
        (counted,) = tally(read_comparisons(file))
        expected = [match_up(counted), "", *shares(counted), percent(counted.score)]
        assert expected in [row[:6] for row in rows]


def test_how_far_a_model_can_be_trusted_is_on_the_page(judged_run):
    run, judgements = judged_run
    rows = rows_of(run, "judged-by-model")
    assert sum(one.tally.unreadable for judge in judgements.judges for one in judge.match_ups) > 0
    for judge in judgements.judges:
        for one in judge.match_ups:
            tokens = f"{one.prompt_tokens + one.completion_tokens:,}"
            numbers = [percent(one.flip_rate), percent(one.half_ties), percent(one.shown_first)]
            assert [match_up(one.tally), "16", *numbers, str(one.tally.unreadable), tokens] in rows
    for one in judgements.agreement:
        assert [percent(one.raw), percent(one.without_ties)] in [row[3:5] for row in rows]


def test_what_people_said_is_on_the_page(judged_run):
    run, judgements = judged_run
    rows = rows_of(run, "judged-by-people")
    (said,) = stored_studies(RunFolder(run))
    for counted in tally(said.comparisons, OVERALL):
        verdicts = str(counted.num_judgements)
        assert [match_up(counted), "", *shares(counted), percent(counted.score), verdicts] in rows
    for counted in tally(said.comparisons, "instruction"):
        verdicts = str(counted.num_judgements)
        assert ["follows the instruction", match_up(counted), "", *shares(counted), verdicts] in rows
    (study,) = judgements.studies
    html = (run / "report" / "index.html").read_text()
    assert "3 people gave 54 of 60 verdicts on 10 prompts." in html
    assert f"Krippendorff's alpha is {interval(study.agreement[0].alpha)}" in html.replace("&#39;", "'")


def test_what_a_model_wrote_stands_in_both_orders_below_the_answers_it_is_about(judged_run):
    run, _ = judged_run
    asked = [c for file in run.glob("judging/llm/*/*/comparisons.jsonl") for c in read_comparisons(file)]
    evidence = RunFolder(run).read_evidence()
    assert evidence.judgements.remarks == []
    rows = rows_of(run, "samples")
    for example in evidence.examples:
        texts = {answer.source: answer.text for answer in example.answers}
        wanted = set()
        for c in (c for c in asked if c.prompt_id == example.id):
            a, b = (c.first_text, c.second_text) if c.left == "first" else (c.second_text, c.first_text)
            winner = {"left": "A", "right": "B"}.get(c.shown_verdict, c.shown_verdict)
            wanted.add((a, b, c.answer, winner))
        assert wanted and wanted == {
            (texts[r.a], texts[r.b], r.text, {r.a: "A", r.b: "B"}.get(r.in_favour_of, r.in_favour_of))
            for r in example.remarks
        }
        assert all([r.a, r.b, r.text, r.in_favour_of] in [row[1:] for row in rows] for r in example.remarks)


def test_an_answer_that_was_replaced_since_has_no_remark_beside_it(judged_run, tmp_path):
    shutil.copytree(judged_run[0], tmp_path / "run")
    folder = RunFolder(tmp_path / "run")
    records = [
        replace(record, completions=(replace(record.completions[0], text="anew"), *record.completions[1:]))
        for record in read_records(folder.supervised)
    ]
    header = read_header(folder.supervised)
    shutil.rmtree(folder.supervised)
    write_records(folder.supervised, records, header)
    before, after = judged_run[1].remarks, read_judgements(folder.path).remarks
    assert {"SFT", "reference text"} == {r.b for r in before if r.a == "exo-rw"}
    assert after == [r for r in before if "SFT" not in (r.a, r.b)]


def test_where_nobody_judged_there_is_no_section(evidence_and_page):
    html = evidence_and_page[1].read_text()
    assert "judged-by" not in html
    assert "Judged by" not in html


def text_with(evidence, judgements):
    page = render_page(replace(evidence, judgements=judgements), {"frontier": Markup("")})
    return re.sub(r"\s+", " ", re.sub(r"<[^>]+>", "", page))


def test_what_limits_the_judgements_is_said(evidence_and_page, judged_run):
    evidence, judgements = evidence_and_page[0], judged_run[1]
    (study,) = judgements.studies
    alone = replace(study.agreement[0], alpha=None, pairwise=None, without_ties=None, num_items=0)
    single = replace(study, num_assessors=1, num_asked=None, outdated=7, agreement=[alone])
    judge = judgements.judges[0]
    match_up = replace(judge.match_ups[0], outdated=3, unanswered=2, identical=1, answers_without_usage=4)
    limited = Judgements([replace(judge, match_ups=[match_up])], [single], seed=5)
    text = text_with(evidence, limited)
    assert "1 person gave 54 verdicts on 10 prompts." in text
    assert "nothing is known about their agreement" in text
    assert "7 of the comparisons compare an answer that this run has since replaced" in text
    assert "3 of the pairs compare an answer that this run has since replaced" in text
    assert "2 not yet answered" in text
    assert "1 with the same text twice" in text
    assert "4 answers did not say" in text
    assert "seed 0; 5 for judgements" in text
    assert "Question by question" not in text
    assert "Agreement of judges" not in text


def test_people_alone_have_their_bars_explained(evidence_and_page, judged_run):
    text = text_with(evidence_and_page[0], Judgements([], judged_run[1].studies))
    assert "Judged by a language model" not in text
    assert text.count("Bars: from the left") == 1


def test_bars_are_as_long_as_the_shares(evidence_and_page, judged_run):
    parts = Interval(0.5, 0.4, 0.61, 9), Interval(0.2, None, None, 9), Interval(0.3, 0.0, 0.36, 9)
    tallies = Tally("exo-pref@5", "sft", OVERALL, *parts, parts[0], 9, 0), Tally("a", "b", OVERALL, *[None] * 4, 0, 3)
    judge = judged_run[1].judges[0]
    judge = replace(judge, match_ups=[replace(judge.match_ups[0], tally=each) for each in tallies])
    bar = render_page(replace(evidence_and_page[0], judgements=Judgements([judge])), {})
    assert '<i class="win hollow" style="--c: var(--exo-2); --share: 50.0%"></i>' in bar
    assert '<i class="lose" style="--c: var(--muted); --share: 30.0%"></i>' in bar
    assert '<b class="above" style="--low: 40.0%; --high: 61.0%"></b>' in bar
    assert '<b class="below" style="--low: 0.0%; --high: 36.0%"></b>' in bar
    assert bar.count('class="verdicts"') == 1 and bar.count('<td class="wide-cell"></td>') == 1  # none without verdicts


@pytest.mark.parametrize("width", [1280, 375, 320])
def test_hostile_names_are_inert_and_the_sections_fit(browser, judged_run, width):
    path = judged_run[0] / "report" / "index.html"
    page, asked = open_page(browser, path, width=width)
    page.eval_on_selector_all("details", "all => all.forEach(d => d.open = true)")
    assert page.evaluate("window.hacked") is None
    assert asked == [path.as_uri()]
    assert page.locator("main script, img, iframe, #judged-by-model svg, #judged-by-people svg").count() == 0
    assert "<script>window.hacked = 1</script>" in page.locator("#judged-by-model").text_content()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    left, right = page.locator("#judged-by-model .verdicts").first.evaluate(
        "bar => [bar, ...bar.children].reduce(([l, r], e) => { const b = e.getBoundingClientRect();"
        " return [Math.min(l, b.left), Math.max(r, b.right)]; }, [1e9, 0])"
    )
    assert 0 <= left < right <= width
    page.close()


def test_comments_and_names_of_people_stay_out_of_the_page(judged_run):
    html = (judged_run[0] / "report" / "index.html").read_text()
    people = html[html.index('id="judged-by-people"') : html.index('id="training"')]
    assert "bob" not in people
    assert "private remark" not in people
