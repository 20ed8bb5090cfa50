"""The page in a real browser: a small study by three people at once, and what only a browser can show."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from playwright.sync_api import Browser, Page, expect, sync_playwright

from exalign.judging.study import Store, plan_study
from judging.people.simulated import ARGUMENTS, CHROMIUM, WAIT, hostile_answer, simulate
from judging.people.staging import MATCHES, Server, write_run

pytestmark = pytest.mark.skipif(not Path(CHROMIUM).exists(), reason=f"{CHROMIUM} is not installed")


def test_three_people_at_once_while_the_server_is_killed(tmp_path):
    simulate(tmp_path, 1, ["ann", "bob", "cho"], kill_at=[3])


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        yield browser
        browser.close()


@pytest.fixture
def links(store: Store, make_study, serve: Callable[[str], Server], tmp_path) -> tuple[Server, dict[str, str]]:
    """A study of one's own, on a server that may be killed."""
    tokens = store.create(make_study(num_prompts=2, answer=hostile_answer))
    server = serve(str(tmp_path / "study.sqlite"))
    return server, {name: f"{server.url}/a/{token}" for name, token in tokens.items()}


@pytest.fixture(scope="module")
def shared(tmp_path_factory) -> Iterator[tuple[Store, dict[str, str]]]:
    """A server that nobody kills, with an assessor for each test that only looks."""
    folder = tmp_path_factory.mktemp("shared")
    run = write_run(folder / "run", 2, hostile_answer)
    names = ["keys", "form", "text", "roles", "light", "dark"]
    store = Store(str(folder / "study.sqlite"))
    tokens = store.create(plan_study(run, MATCHES, name="study", num_prompts=2, assessors=names))
    server = Server(str(folder / "study.sqlite")).start()
    yield store, {name: f"{server.url}/a/{token}" for name, token in tokens.items()}
    server.kill()
    store.close()


def open_page(browser: Browser, link: str, **options) -> Page:
    page = browser.new_context(**options).new_page()
    page.set_default_timeout(WAIT)
    page.complaints = []  # type: ignore[attr-defined]
    page.on("console", lambda message: page.complaints.append(message.text))  # type: ignore[attr-defined]
    page.on("pageerror", lambda error: page.complaints.append(str(error)))  # type: ignore[attr-defined]
    page.goto(link)
    return page


def test_keys_draft_a_killed_server_and_undo(browser, links, store):
    server, by_name = links
    page = open_page(browser, by_name["ann"])
    page.keyboard.press("b")
    page.keyboard.press("t")
    expect(page.locator("#verdict-right")).to_be_checked()
    expect(page.locator("#instruction-tie")).to_be_checked()
    expect(page.locator("#reference .text")).to_be_visible()
    page.keyboard.press("r")
    expect(page.locator("#reference .text")).not_to_be_visible()
    page.keyboard.press("c")
    page.keyboard.type("about a, b and t")
    expect(page.locator("#status")).to_have_text("Draft kept.")
    assert page.complaints == []
    server.kill()
    page.keyboard.type("!")
    expect(page.locator("#status")).to_contain_text("server is away")
    page.keyboard.press("Control+Enter")
    expect(page.locator("#status")).to_contain_text("sent again by itself")
    server.start()
    page.wait_for_url(re.compile("/2$"))
    (comparison,) = store.comparisons("study")
    assert (comparison.shown_verdict, comparison.comment) == ("right", "about a, b and t!")
    page.keyboard.press("u")
    page.wait_for_url(re.compile("/1$"))
    expect(page.locator("#comment")).to_have_value("about a, b and t!")
    assert list(store.comparisons("study")) == []
    page.context.close()


def test_what_was_entered_while_the_server_was_away_survives_the_window(browser, links):
    server, by_name = links
    page = open_page(browser, by_name["ann"])
    address = page.url
    server.kill()
    page.keyboard.press("a")
    page.fill("#comment", "written offline")
    context = page.context
    page.close()
    server.start()
    page = context.new_page()
    page.goto(address)
    expect(page.locator("#verdict-left")).to_be_checked()
    expect(page.locator("#comment")).to_have_value("written offline")
    context.close()


def test_keys_can_be_switched_off(browser, shared):
    page = open_page(browser, shared[1]["keys"])
    page.uncheck("#use-keys")
    page.keyboard.press("b")
    expect(page.locator("#verdict-right")).not_to_be_checked()
    page.reload()
    expect(page.locator("#use-keys")).not_to_be_checked()
    page.context.close()


def test_without_a_script_the_page_is_a_form(browser, shared):
    page = open_page(browser, shared[1]["form"], java_script_enabled=False)
    for position in range(1, 7):
        expect(page.locator("h1")).to_have_text(f"Comparison {position} of 6")
        page.locator("label[for=verdict-tie]").click()
        page.locator("#save").click()
    expect(page.locator("h1")).to_have_text("All done. Thank you!")
    assert [c.verdict for c in shared[0].comparisons("study") if c.judge == "form"] == ["tie"] * 6
    page.locator("#undo").click()
    expect(page.locator("h1")).to_have_text("Comparison 6 of 6")
    expect(page.locator("#verdict-tie")).to_be_checked()
    page.context.close()


def test_completions_are_shown_as_text(browser, shared):
    page = open_page(browser, shared[1]["text"])
    shown = []
    for position in range(1, 7):
        page.goto(f"{shared[1]['text']}/{position}")
        assert page.locator("h1").count() == page.locator("form#verdict").count() == page.locator("main").count() == 1
        assert page.locator("main script, main img, main style").count() == 0
        shown += page.locator(".answer .text").all_inner_texts()
    assert any("<script>window.attacked = true</script>" in text for text in shown)
    assert not page.evaluate("window.attacked === true")
    assert page.complaints == []
    page.context.close()


def test_names_roles_and_focus(browser, shared):
    page = open_page(browser, shared[1]["roles"])
    for name in ("Overall", "Follows the instruction", "Correct", "Fluent", "Safe", "Helpful"):
        group = page.get_by_role("group", name=name, exact=True)
        expect(group.get_by_role("radio")).to_have_count(3)
    for name in ("Prompt", "Answer A", "Answer B"):
        expect(page.get_by_role("region", name=name)).to_be_visible()
    expect(page.get_by_role("progressbar", name="Comparisons judged")).to_be_visible()
    expect(page.get_by_role("textbox", name="Comment (optional)")).to_be_visible()
    expect(page.get_by_role("navigation", name="Comparisons")).to_be_visible()
    page.keyboard.press("Tab")
    expect(page.get_by_role("link", name="Skip to the verdict")).to_be_focused()
    page.keyboard.press("a")
    expect(page.locator("#instruction-left")).to_be_focused()
    expect(page.locator("#instruction-left")).not_to_be_checked()
    page.keyboard.press("Enter")
    page.wait_for_url(re.compile("/2$"))
    page.context.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_has_contrast_and_a_phone_shows_everything(browser, shared, scheme):
    phone = {"width": 360, "height": 740}
    page = open_page(browser, shared[1][scheme], viewport=phone, color_scheme=scheme, has_touch=True)
    page.locator("label[for=verdict-left]").tap()
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    contrasts = page.evaluate(_CONTRASTS)
    assert len(contrasts) > 20
    assert min(contrasts.values()) >= 4.5, {k: v for k, v in contrasts.items() if v < 4.5}
    small = page.evaluate(
        "[...document.querySelectorAll('.choices label, #save')].filter(e => e.offsetHeight < 44).length"
    )
    assert small == 0
    page.context.close()


# The contrast of every visible text with the nearest background behind it (WCAG 2 relative luminance).
_CONTRASTS = """() => {
  const numbers = (text) => text.match(/[\\d.]+/g).map(Number);
  const light = (rgb) => rgb.slice(0, 3).map((v) => v / 255)
    .map((v) => v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4)
    .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
  const behind = (element) => {
    for (let e = element; e; e = e.parentElement) {
      const rgb = numbers(getComputedStyle(e).backgroundColor);
      if (rgb.length < 4 || rgb[3] > 0) return rgb;
    }
    return [255, 255, 255];
  };
  const found = {};
  for (const e of document.querySelectorAll("body *")) {
    const own = [...e.childNodes].some((n) => n.nodeType === 3 && n.textContent.trim());
    if (!own || !e.checkVisibility() || e.matches(":disabled")) continue;
    const [a, b] = [light(numbers(getComputedStyle(e).color)), light(behind(e))];
    found[`${e.tagName} ${e.textContent.trim().slice(0, 30)}`] = (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
  }
  return found;
}"""
