"""The page in a real browser: it needs no network, fits phones, and what models wrote stays text."""

from __future__ import annotations

from dataclasses import replace

import pytest

from exalign.report.page import render_page
from exalign.report.wording import percent
from report.conftest import HOSTILE


def open_page(browser, path, *, width=1280, scheme="light"):
    """The opened page, and every address it asked for."""
    page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    asked = []
    page.on("request", lambda request: asked.append(request.url))
    page.goto(path.as_uri())
    return page, asked


def test_it_asks_for_nothing_but_itself(browser, evidence_and_page):
    path = evidence_and_page[1]
    page, asked = open_page(browser, path)
    page.wait_for_load_state("networkidle")
    assert asked == [path.as_uri()]
    page.close()


@pytest.mark.parametrize("width", [1280, 768, 375, 320])
def test_no_horizontal_scrolling(browser, evidence_and_page, hostile_page, width):
    for path in (evidence_and_page[1], hostile_page):
        page, _ = open_page(browser, path, width=width)
        page.eval_on_selector_all("details", "all => all.forEach(d => d.open = true)")
        assert page.evaluate("document.documentElement.scrollWidth") <= width
        page.close()


@pytest.mark.parametrize("width", [1280, 390])
def test_categories_of_prompts_stay_within_the_page(browser, evidence_and_page, tmp_path, width):
    kinds = [*(f"kind {number}" for number in range(8)), "w" * 60]
    known = evidence_and_page[0].methods
    methods = [replace(method, by_category=dict.fromkeys(kinds, method.win_rates)) for method in known]
    path = tmp_path / "page.html"
    path.write_text(render_page(replace(evidence_and_page[0], methods=methods), {}))
    page, _ = open_page(browser, path, width=width)
    main = page.locator("main").bounding_box()
    tables = page.locator("#results table.wins")
    assert tables.count() == len(known[0].win_rates)  # one against each opponent
    for table, against in zip(tables.all(), known[0].win_rates, strict=True):
        box = table.bounding_box()
        assert box["x"] + box["width"] <= main["x"] + main["width"]
        rows = [row.inner_text() for row in table.locator("tbody tr").all()]
        assert rows[0].startswith(f"all prompts n {against.rate.num_prompts}")
        assert [row.split(" n ")[0] for row in rows[1:]] == kinds
        assert all(row.count("%") == len(known) and percent(against.rate) in row for row in rows)
    page.close()


def test_figures_fit_the_screen(browser, evidence_and_page):
    for width, shown, hidden in ((1280, "wide", "narrow"), (375, "narrow", "wide")):
        page, _ = open_page(browser, evidence_and_page[1], width=width)
        assert page.locator(f"#frontier .{shown} svg").first.is_visible()
        assert not page.locator(f"#frontier .{hidden} svg").first.is_visible()
        size = page.locator(f"#frontier .{shown} svg text").first.evaluate(
            "text => parseFloat(getComputedStyle(text).fontSize) * text.ownerSVGElement.getScreenCTM().a"
        )
        assert size > 8
        page.close()


def test_dark_and_light(browser, evidence_and_page):
    seen = {}
    for scheme in ("light", "dark"):
        page, _ = open_page(browser, evidence_and_page[1], scheme=scheme)
        ink = page.locator("#frontier .wide svg text").first.evaluate("text => getComputedStyle(text).fill")
        seen[scheme] = (page.evaluate("getComputedStyle(document.body).backgroundColor"), ink)
        page.close()
    assert seen["light"][0] != seen["dark"][0]
    assert seen["light"][1] != seen["dark"][1]


def test_what_models_wrote_is_inert_and_visible(browser, hostile_page):
    page, asked = open_page(browser, hostile_page)
    assert page.evaluate("window.hacked") is None
    assert asked == [hostile_page.as_uri()]
    assert page.locator("img, iframe, object, article svg, main script").count() == 0
    assert page.locator("script").count() == 1  # the page's own, which its policy knows by its hash
    assert page.evaluate("getComputedStyle(document.body).display") != "none"
    shown = page.locator("article .text").first.text_content()
    for part in ("<script>window.hacked = 1</script>", "</p></article>", "␀␇␛[31m", "[U+202E]desrever", "{{ 7 * 7 }}"):
        assert part in shown
    assert page.locator("#samples article").count() == 2 * page.locator("#samples details").count()
    assert page.locator("#samples .prompt").first.text_content() == shown.strip()
    assert len(shown.strip()) >= len(HOSTILE.strip())
    page.close()


def test_bidirectional_text_does_not_leave_its_box(browser, hostile_page):
    page, _ = open_page(browser, hostile_page)
    assert page.locator("article .text").first.evaluate("e => getComputedStyle(e).unicodeBidi") == "isolate"
    for character in "\u202e\u2066\x00\x07\x1b":
        assert character not in page.content()
    page.close()


@pytest.mark.parametrize("width", [1280, 390])
def test_samples_are_found_by_words_of_their_prompts_and_answers(browser, evidence_and_page, tmp_path, width):
    evidence, _ = evidence_and_page
    first, second, *others = evidence.examples
    answers = [replace(second.answers[0], text="A quagga, said to be <extinct>."), *second.answers[1:]]
    examples = [replace(first, prompt="Which ZEBRA is that?"), replace(second, answers=answers), *others]
    path = tmp_path / "page.html"
    path.write_text(render_page(replace(evidence, examples=examples), {}), encoding="utf-8")
    page, _ = open_page(browser, path, width=width)
    total = page.locator("#samples details").count()
    for words, found in (("zebra", 1), ("<Extinct> quagga", 1), ("zebra quagga", 0), ("", total)):
        page.get_by_label("Search prompts and answers").fill(words)
        assert page.locator("#samples details:visible").count() == found
        assert page.locator("#found").text_content() == (f"{found} of {total}" if words else "")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    page.close()


def test_everything_is_on_paper_too(browser, evidence_and_page, tmp_path):
    page, _ = open_page(browser, evidence_and_page[1])
    page.emulate_media(media="print")
    assert page.locator("#frontier .wide svg").first.is_visible()
    assert page.locator("details:not([open]) .prompt").first.is_visible()
    page.pdf(path=tmp_path / "report.pdf", format="A4")
    assert (tmp_path / "report.pdf").stat().st_size > 20_000
    page.close()
