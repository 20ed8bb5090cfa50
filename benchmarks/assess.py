"""How fast the assessment page is with many assessors at once, on loopback.

    python benchmarks/assess.py                     # 200 assessors without a pause: throughput
    python benchmarks/assess.py --think 5           # 200 assessors who think for 5 s on average: what a person waits

Each assessor fetches a page, sends a draft and the verdict, and follows to the next page, through its own connection.
The server is a process of its own, as `exalign assess serve` starts it, on SQLite (every verdict synced to disk) or any
database by --store. Prints median and 95th percentile of the time per request, and the throughput; stops by itself.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import re
import socket
import ssl
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

import httpx

from exalign.judging.comparisons import Pair
from exalign.judging.study import Store, Study, assign

# One for all: making a TLS context takes longer than everything that is measured, and none is used.
NO_TLS = ssl.create_default_context()
WORDS = [
    "a",
    "garden",
    "on",
    "the",
    "balcony",
    "needs",
    "sun",
    "water",
    "patience",
    "and",
    "good",
    "soil",
    "in",
    "a",
    "deep",
    "pot",
]


def make_study(num_assessors: int, num_items: int) -> Study:
    """A study with answers of about 200 words."""
    rng = random.Random(0)

    def text() -> str:
        return " ".join(rng.choices(WORDS, k=200))

    items = tuple(
        Pair(f"p{i}", ({"role": "user", "content": text()},), "exo", "dpo", text(), text(), reference=text())
        for i in range(num_items)
    )
    people = tuple(f"assessor-{i}" for i in range(num_assessors))
    assignments = assign(num_items, num_assessors, num_assessors, num_matches=1, seed=0)
    return Study(f"benchmark {time.time()}", 0, people, items, assignments, {})


async def assess(link: str, think: float, deadline: float, times: dict[str, list[float]]) -> None:
    """One assessor until the deadline or the end of the study."""
    rng = random.Random(link)
    async with httpx.AsyncClient(timeout=60, verify=NO_TLS) as client:

        async def ask(kind: str, method: str, address: str, **rest: object) -> httpx.Response:
            started = time.perf_counter()
            answer = await client.request(method, address, **rest)  # type: ignore[arg-type]
            times[kind].append(time.perf_counter() - started)
            assert answer.status_code in (200, 204, 303), f"{answer.status_code} for {method} {kind}"
            return answer

        base = link.partition("/a/")[0]
        await asyncio.sleep(rng.uniform(0, think))
        address = base + (await ask("start", "GET", link)).headers["location"]
        while time.monotonic() < deadline and not address.endswith("/done"):
            page = (await ask("page", "GET", address)).text.partition('id="verdict"')[2]
            fields = dict(re.findall(r'type="hidden" name="(\w+)" value="([^"]*)"', page))
            await asyncio.sleep(think * rng.uniform(0.5, 1.5))
            form = {**fields, "verdict": rng.choice(["left", "tie", "right"]), "comment": ""}
            await ask("draft", "POST", f"{address}/draft", data=form)
            answer = await ask("verdict", "POST", address, data=form)
            address = base + answer.headers["location"]


def run(options: argparse.Namespace, location: str) -> dict[str, list[float]]:
    store = Store(location)
    study = make_study(options.assessors, options.items)
    tokens = store.create(study)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = "from exalign.judging.assess import app; app()"
    server = subprocess.Popen(
        [sys.executable, "-c", command, "serve", location, "--port", str(port)], stdout=subprocess.DEVNULL
    )
    times: dict[str, list[float]] = defaultdict(list)
    try:
        for _ in range(300):
            try:
                httpx.get(f"http://127.0.0.1:{port}/")
                break
            except httpx.TransportError:
                time.sleep(0.1)
        links = [f"http://127.0.0.1:{port}/a/{token}" for token in tokens.values()]

        async def everybody() -> None:
            deadline = time.monotonic() + options.seconds
            await asyncio.gather(*(assess(link, options.think, deadline, times) for link in links))

        started = time.perf_counter()
        asyncio.run(everybody())
        times["wall"].append(time.perf_counter() - started)
        stored = sum(done for done, _ in store.standing(study.name).values())
        assert stored == len(times["verdict"]), f"{stored} verdicts stored of {len(times['verdict'])} confirmed"
    finally:
        server.terminate()
        server.wait(timeout=30)
        store.close()
    return times


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--assessors", type=int, default=200)
    parser.add_argument("--items", type=int, default=50, help="comparisons per assessor at most")
    parser.add_argument("--seconds", type=float, default=20, help="stop after this long")
    parser.add_argument("--think", type=float, default=0, help="mean seconds between a page and its verdict")
    parser.add_argument("--store", help="database URL; a temporary SQLite file by default")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        times = run(options, options.store or str(Path(folder) / "study.sqlite"))
    wall = times.pop("wall")[0]
    print(f"{options.assessors} assessors, thinking {options.think} s, {wall:.1f} s")
    for kind, values in times.items():
        cuts = statistics.quantiles(values, n=20)
        p50, p95 = 1000 * statistics.median(values), 1000 * cuts[-1]
        print(f"  {kind:8} n {len(values):6}  p50 {p50:7.1f} ms  p95 {p95:7.1f} ms")
    print(
        f"  {sum(map(len, times.values())) / wall:.0f} requests/s, {len(times['verdict']) / wall:.1f} verdicts/s stored"
    )


if __name__ == "__main__":
    main()
