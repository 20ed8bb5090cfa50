"""One byte changed, or the second half lost, in every file of a run, one after the other."""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from faults.outcome import artefacts, differing
from faults.starts import Starter
from faults.world import World


def flip(path: Path, rng: random.Random) -> None:
    """Change one bit of one byte."""
    content = bytearray(path.read_bytes())
    content[rng.randrange(len(content))] ^= 1 << rng.randrange(8)
    path.write_bytes(content)


def truncate(path: Path, rng: random.Random) -> None:
    """Lose the end, from any byte on."""
    path.write_bytes(path.read_bytes()[: rng.randrange(path.stat().st_size)])


def flip_quietly(path: Path, rng: random.Random) -> None:
    """Change one bit, as a disk does it: size and time of change stay."""
    before = path.stat()
    flip(path, rng)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


Outcomes = Iterator["Outcome"]
DAMAGES: tuple[Callable[[Path, random.Random], None], ...] = (flip, truncate)


INTERRUPTED = {
    "SFT": "sft/policies/step-000006",
    "sample": "rollouts/records/part-000000.parquet",
    "align": "align/fresh/rollouts.json",
    "evaluate": "evaluation/exo-rw/step-000002/samples/header.json",
}
"""Where each stage is killed before its files are damaged: as soon as this one stands."""


@dataclass(frozen=True)
class Outcome:
    """What a command did about one damaged file."""

    run: str
    file: str
    damage: str
    named: bool
    """It left with one sentence that names the file."""
    mended: bool
    """It ended, with the same artefacts as a run that nothing disturbed."""
    printed: str

    @property
    def kept(self) -> bool:
        """The promise: no other result, unless somebody is told."""
        return self.named or self.mended


def damage_finished(starter: Starter, world: World, place: Path, *, rng: random.Random, most: int = 10_000) -> Outcomes:
    """Damage a file of every kind in the finished run (at most `most` of them), and run it again."""
    files = kinds(world.finished)
    files = sorted(rng.sample(files, min(most, len(files))))
    arguments = ["run", world.recipe]
    yield from _damage_each(starter, arguments, ("finished", world.finished, world.finished), place, files, rng)


def damage_interrupted(
    starter: Starter, world: World, place: Path, *, rng: random.Random, most: int = 10_000, stages: Sequence[str] = ()
) -> Outcomes:
    """Damage a file of every kind that a stage under way has written, and let it continue."""
    for stage in stages or INTERRUPTED:
        expected, whole = place / "expected", place / "interrupted"
        world.after(stage, expected)
        command = world.before(stage, whole)
        before = set(artefacts(whole))
        starter.start(command, place / "log")
        while not (whole / INTERRUPTED[stage]).exists():
            assert starter.wait(0.0005) is None, "it ended before it could be interrupted"
        assert starter.kill().killed
        files = [name for name in kinds(whole) if name not in before and not Path(name).name.startswith(".")]
        files = sorted(rng.sample(files, min(most, len(files))))
        yield from _damage_each(starter, command[:2], (f"in {stage}", whole, expected), place, files, rng)


def damage_quietly(starter: Starter, world: World, place: Path, *, rng: random.Random, most: int = 10_000) -> Outcomes:
    """Damage a file that a start takes for unchanged, and carry out again what comes after its stage.

    It is named before it is used, or nobody uses it: then all other artefacts are those of an undisturbed run.
    """
    cases = [(stage, name) for stage in ("sample", "score", "align", "evaluate") for name in _finished(world, stage)]
    for stage, name in rng.sample(cases, min(most, len(cases))):
        folder = place / "quiet"
        world.before(stage, folder)
        flip_quietly(folder / name, rng)
        ended = starter.exalign("run", world.recipe, "--run", folder, log=place / "log")
        subject = folder / name if Path(name).name != "SHA256SUMS" else (folder / name).parent
        named = ended.status == 2 and "Traceback" not in ended.printed and str(subject) in ended.printed
        # The evidence lists stages in the order in which they ended, and those that were kept ended before.
        changed = set(differing(folder, world.finished)) - {"evaluation/evidence.json"}
        unused = ended.status == 0 and changed <= {name}
        yield Outcome(f"quiet, before {stage}", name, "flip_quietly", named, unused, ended.printed)


def _finished(world: World, stage: str) -> list[str]:
    """Files of the stages that stand before `stage` is carried out, one of every kind."""
    undone = world.undone(stage)
    stands = {name for name in world.stages if name not in undone}
    return [name for name in kinds(world.finished) if any(name.startswith(f"{one}/") for one in stands)]


def kinds(folder: Path) -> list[str]:
    """A file of every kind: of those that differ in numbers only (steps, shards), the last one."""
    found = {}
    for name in artefacts(folder):
        found["".join(letter for letter in name if not letter.isdigit())] = name
    return sorted(found.values())


def _damage_each(
    starter: Starter,
    arguments: Sequence[object],
    runs: tuple[str, Path, Path],
    place: Path,
    files: Sequence[str],
    rng: random.Random,
) -> Outcomes:
    """Each of the files of a run, in every way: what the command does about it. `runs`: its name, it, the outcome."""
    run, whole, expected = runs
    folder = place / "damaged"
    for name in files:
        for damage in DAMAGES if (whole / name).stat().st_size else ():
            if folder.exists():
                shutil.rmtree(folder)
            shutil.copytree(whole, folder)
            damage(folder / name, rng)
            ended = starter.exalign(*arguments, "--run", folder, log=place / "log")
            sentence = ended.status == 2 and "Traceback" not in ended.printed
            # A damaged SHA256SUMS is seen as a difference between it and a file beside it.
            subject = folder / name if Path(name).name != "SHA256SUMS" else (folder / name).parent
            mended = ended.status == 0 and not differing(folder, expected)
            yield Outcome(run, name, damage.__name__, sentence and str(subject) in ended.printed, mended, ended.printed)
