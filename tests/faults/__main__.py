"""The faults at full size: `make faults`, or `PYTHONPATH=tests python -m faults --moments 50 --out faults.json`.

Kills every stage until so many kills have hit it at work, damages every file of a run, and takes the judge's endpoint
away for ten minutes; writes what happened as JSON, and into docs/reliability.md the tables made from it.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import tempfile
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from faults.damage import damage_finished, damage_interrupted, damage_quietly
from faults.endpoint import endpoint_away
from faults.kills import kill_stage
from faults.starts import Starter
from faults.tables import DOCUMENT, render
from faults.world import STAGES, World, make_world


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m faults", description=__doc__)
    parser.add_argument("--moments", type=int, default=50, help="kills that must hit each stage at work")
    parser.add_argument("--away", type=float, default=600.0, help="seconds for which the endpoint is away")
    parser.add_argument("--stages", nargs="*", default=[*STAGES], choices=[*STAGES], metavar="STAGE")
    parser.add_argument("--no-damage", action="store_true", help="leave the damaged files out")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("faults.json"))
    arguments = parser.parse_args()
    results: dict[str, Any] = {"machine": _machine(), "moments": arguments.moments, "kills": []}
    with tempfile.TemporaryDirectory(prefix="exalign-faults-") as name:
        place, starter = Path(name), Starter()
        world = make_world(starter, place)
        for stage in arguments.stages:
            rng = random.Random(f"{arguments.seed} {stage}")
            done = kill_stage(starter, world, stage, place / "kills", hits=arguments.moments, rng=rng)
            results["kills"].append(asdict(done))
            _say(
                results, arguments.out, f"{stage}: {done.hits} hits, {len(done.changed)} changed, {done.seconds:.0f} s"
            )
        if not arguments.no_damage:
            results["damage"] = _damage(starter, world, place, random.Random(arguments.seed))
            _say(results, arguments.out, f"damaged files: {len(results['damage'])}")
        if arguments.away:
            (place / "endpoint").mkdir()
            results["endpoint"] = asdict(endpoint_away(starter, place / "endpoint", seconds=arguments.away))
        starter.close()
    _say(results, arguments.out, f"written: {arguments.out}, {DOCUMENT.name}")
    DOCUMENT.write_text(render(DOCUMENT.read_text(encoding="utf-8"), results), encoding="utf-8")
    lost = [done for done in results["kills"] if done["changed"] or done["failures"]]
    silent = [one for one in results.get("damage", []) if not one["kept"]]
    return int(bool(lost or silent))


def _damage(starter: Starter, world: World, place: Path, rng: random.Random) -> list[dict[str, Any]]:
    found = [*damage_finished(starter, world, place, rng=rng), *damage_interrupted(starter, world, place, rng=rng)]
    found += damage_quietly(starter, world, place, rng=rng)
    return [{**asdict(one), "kept": one.kept} for one in found]


def _machine() -> dict[str, Any]:
    return {"system": platform.system(), "python": platform.python_version(), "torch": torch.__version__}


def _say(results: dict[str, Any], path: Path, line: str) -> None:
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    print(time.strftime("%H:%M:%S"), line, flush=True)


if __name__ == "__main__":
    raise SystemExit(main())
