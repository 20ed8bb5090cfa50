"""Simulated assessors in a real browser, who do what people do: reload, go back, double-click, undo, change tabs.

Run as a script, this is the whole study (100 prompts × 3 match-ups × 3 assessors, the server killed twice):

    PYTHONPATH=src:tests python tests/judging/people/simulated.py
"""

from __future__ import annotations

import argparse
import asyncio
import random
import re
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Sequence
from hashlib import sha256
from pathlib import Path

from playwright.async_api import BrowserContext, Page, async_playwright
from playwright.async_api import Error as BrowserError

from exalign.judging.comparisons import CRITERIA
from exalign.judging.study import Store, plan_study
from judging.people.staging import MATCHES, Server, write_run

CHROMIUM = "/usr/bin/chromium"
ARGUMENTS = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
SIDES = ("left", "tie", "right")
KEYS = {"left": "a", "tie": "t", "right": "b"}
WAIT = 20_000  # milliseconds


def hostile_answer(system: str, i: int) -> str:
    """An answer that says who wrote it, for the simulated assessor, and tries to act on the page."""
    attacks = [
        "<script>window.attacked = true</script>",
        "<img src=x onerror='window.attacked = true'>",
        "</div></section></main><h1>All done. Thank you!</h1><form id='verdict'>",
        "{{ 7 * 7 }} {% raw %} ${alert(1)} javascript:alert(1)",
        "\u202eright to left\u202c \x00 \x1b[2J " + "\u0301" * 50 + "W" * 500,
        "<textarea><style>body{display:none}</style><!-- ",
    ]
    return f"[{system} p{i}] {' '.join(attacks)}"


def opinion(name: str, prompt: str, first: str, second: str, about: str) -> str:
    """What an assessor thinks of two systems on a prompt: `first`, `tie` or `second`, decided once and for all."""
    digest = sha256(f"{name}/{prompt}/{first}/{second}/{about}".encode()).digest()
    return ("first", "tie", "second")[digest[0] % 3]


class SimulatedAssessor:
    """One person with a private link and a browser context of their own."""

    def __init__(self, name: str, link: str, context: BrowserContext, rng: random.Random) -> None:
        self.name, self.link, self.context, self.rng = name, link, context, rng
        self.did: Counter[str] = Counter()
        self.history: list[str] = []

    async def work(self) -> None:
        """Judge until the page says that everything is done."""
        self.page = await self.context.new_page()
        await self.visit(self.link)
        while not self.page.url.endswith("/done"):
            try:
                await self.judge()
            except BrowserError:  # the server was away when the next page was asked for
                self.did["came back by the link"] += 1
                await self.visit(self.link)

    async def visit(self, address: str) -> None:
        """Open an address, again and again while the server is away."""
        for _ in range(100):
            try:
                await self.page.goto(address, timeout=WAIT)
                return
            except BrowserError:
                await asyncio.sleep(0.3)
        raise TimeoutError(f"{self.name} could not open the page")

    async def judge(self) -> None:
        """One comparison, with whatever the person does besides."""
        page = self.page
        await page.wait_for_selector("#verdict", timeout=WAIT, state="attached")
        before = page.url  # not earlier: a browser leaves the page of a server that was away by itself
        systems, prompt = await self.read(page)
        assert not await page.evaluate("window.attacked === true"), "a completion ran as a script"
        whim = self.rng.choice(["reload", "back", "double", "undo", "two tabs", *["plain"] * 6])
        by_keys = self.rng.random() < 0.5
        self.history.append(f"{before[-6:]} p{prompt} {'/'.join(systems)} {whim} {'keys' if by_keys else 'pointer'}")
        await self.enter(page, prompt, systems, by_keys=by_keys)
        if whim == "reload":
            await self.reload_and_check(page, prompt, systems)
        elif whim == "back":
            await page.go_back(timeout=WAIT)
            await self.visit(before)
            await self.enter(page, prompt, systems, by_keys=False)
        elif whim == "two tabs":
            await self.judge_in_another_tab(before, prompt, systems)
        self.did[whim] += 1
        if not await self.looks_right(page, prompt, systems):
            self.history.append(f"{page.url[-6:]} was not as meant: looks again")
            self.did["looked again"] += 1
            return
        await (page.dblclick("#save", timeout=WAIT) if whim == "double" else page.click("#save", timeout=WAIT))
        await page.wait_for_url(lambda url: url != before, timeout=3 * WAIT)
        undo = page.locator("#undo")
        if whim == "undo" and await undo.is_enabled(timeout=WAIT):
            here = page.url
            await undo.click(timeout=WAIT)
            await page.wait_for_url(lambda url: url != here, timeout=3 * WAIT)

    async def read(self, page: Page) -> tuple[tuple[str, str], str]:
        """The systems on the left and on the right, as the made-up answers name them, and the prompt."""
        texts = await page.locator(".answer .text").all_inner_texts()
        found = [re.match(r"\[(\S+) p(\d+)\]", text) for text in texts]
        assert len(found) == 2
        assert found[0] and found[1], f"not the two answers: {texts}"
        return (found[0][1], found[1][1]), found[0][2]

    def side(self, prompt: str, systems: tuple[str, str], about: str) -> str:
        """The opinion as the side that is to be chosen here; `exo` is called first in every match-up."""
        left_is_first = systems[0] == "exo"
        first, second = systems if left_is_first else systems[::-1]
        thought = opinion(self.name, prompt, first, second, about)
        return "tie" if thought == "tie" else ("left" if (thought == "first") == left_is_first else "right")

    async def enter(self, page: Page, prompt: str, systems: tuple[str, str], *, by_keys: bool) -> None:
        """Choose the overall verdict and every criterion, by keys or by pointer."""
        wanted = [self.side(prompt, systems, about) for about in ("verdict", *CRITERIA)]
        if by_keys:
            await page.focus("#verdict-left", timeout=WAIT)
            for side in wanted:
                await page.keyboard.press(KEYS[side])
            return
        for about, side in zip(("verdict", *CRITERIA), wanted, strict=True):
            await page.click(f"label[for={about}-{side}]", timeout=WAIT)

    async def reload_and_check(self, page: Page, prompt: str, systems: tuple[str, str]) -> None:
        """Nothing that was entered is lost by a reload."""
        await self.visit(page.url)
        for about in ("verdict", *CRITERIA):
            chosen = f"#{about}-{self.side(prompt, systems, about)}"
            assert await page.is_checked(chosen, timeout=WAIT), f"{self.name} lost {chosen} by reloading"

    async def looks_right(self, page: Page, prompt: str, systems: tuple[str, str]) -> bool:
        """The look before saving: still the comparison that was read, with everything as it was meant."""
        if await self.read(page) != (systems, prompt):
            return False
        wanted = [f"#{about}-{self.side(prompt, systems, about)}" for about in ("verdict", *CRITERIA)]
        return all([await page.is_checked(chosen, timeout=WAIT) for chosen in wanted])

    async def judge_in_another_tab(self, address: str, prompt: str, systems: tuple[str, str]) -> None:
        """The same comparison saved in a second tab: the first one saves the same again."""
        other = await self.context.new_page()
        try:
            await other.goto(address, timeout=WAIT)
            await self.enter(other, prompt, systems, by_keys=False)
            await other.click("#save", timeout=WAIT)
            await other.wait_for_url(lambda url: url != address, timeout=WAIT)
        except BrowserError:
            self.did["other tab gave up"] += 1
        finally:
            await other.close()


async def run_study(
    server: Server, links: dict[str, str], store: Store, kill_at: Sequence[int]
) -> list[SimulatedAssessor]:
    """All assessors at once; the server is killed and restarted each time that many verdicts are stored."""

    async def kill_now_and_then() -> None:
        for count in kill_at:
            while sum(done for done, _ in store.standing("study").values()) < count:
                await asyncio.sleep(0.05)
            server.kill()
            await asyncio.sleep(1.0)
            await asyncio.to_thread(server.start)

    async with async_playwright() as playwright:
        browser = await playwright.chromium.launch(executable_path=CHROMIUM, args=ARGUMENTS)
        people = [
            SimulatedAssessor(name, link, await browser.new_context(), random.Random(name))
            for name, link in links.items()
        ]
        killer = asyncio.create_task(kill_now_and_then())
        await asyncio.gather(*(person.work() for person in people))
        assert killer.done(), "the study ended before the server was killed as often as asked"
        await killer
        await browser.close()
    return people


def check_study(store: Store, people: Sequence[SimulatedAssessor], num_items: int) -> None:
    """Exactly one verdict for every assignment, and each of them what its assessor thought."""
    comparisons = list(store.comparisons("study"))
    history = {person.name: person.history for person in people}
    assert len(comparisons) == num_items * len(people)
    assert len({(c.judge, c.pair) for c in comparisons}) == len(comparisons)
    for c in comparisons:
        number = c.prompt_id[1:]
        thought = {about: opinion(c.judge, number, c.first, c.second, about) for about in ("verdict", *CRITERIA)}
        found = {"verdict": c.verdict, **c.criteria}
        assert found == thought, f"{c.judge} on {c.prompt_id} {c.second}: {found}, not {thought}; {history[c.judge]}"
        assert c.first_text == hostile_answer(c.first, int(number))


def simulate(folder: Path, num_prompts: int, names: Sequence[str], kill_at: Sequence[int]) -> Counter[str]:
    """Make a study in `folder`, let it be judged, check it; what the assessors did."""
    run = write_run(folder / "run", num_prompts, hostile_answer)
    study = plan_study(run, MATCHES, name="study", num_prompts=num_prompts, assessors=names)
    location = str(folder / "study.sqlite")
    store, server = Store(location), Server(location)
    tokens = store.create(study)
    server.start()
    try:
        links = {name: f"{server.url}/a/{token}" for name, token in tokens.items()}
        people = asyncio.run(run_study(server, links, store, kill_at))
        check_study(store, people, len(study.items))
    finally:
        server.kill()
        store.close()
    return sum((person.did for person in people), Counter())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--prompts", type=int, default=100)
    options = parser.parse_args()
    names = ["ann", "bob", "cho"]
    total = options.prompts * len(MATCHES) * len(names)
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        did = simulate(Path(folder), options.prompts, names, [total // 3, 2 * total // 3])
    print(f"{total} assignments, each with exactly one verdict, in {time.monotonic() - started:.0f} s; {dict(did)}")


if __name__ == "__main__":
    sys.exit(main())
