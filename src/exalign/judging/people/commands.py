"""`exalign assess`: make a study for people, show it to them, and read out what they said."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer
from pydantic import Field
from rich.console import Console
from rich.table import Table

from exalign.errors import InputError
from exalign.evaluation.schema import Interval
from exalign.judging.agreement import agreement
from exalign.judging.comparison import CRITERIA, Comparison, write_comparisons
from exalign.judging.llm.options import read_settings, with_settings
from exalign.judging.people.server import serve
from exalign.judging.people.store import Store
from exalign.judging.people.study import parse_matches, plan_study
from exalign.judging.tally import OVERALL, tally
from exalign.settings import Settings
from exalign.terminal import escape_controls, shown

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Judge by people: a blind study on a web page.")
Where = Annotated[
    str, typer.Argument(help="A run folder (its assessment/study.sqlite), an SQLite file, or a database URL.")
]
Named = Annotated[str | None, typer.Option("--name", help="Which study of the store; needed where it holds several.")]
DEFAULT_PORT = 8765
LOOPBACK = f"http://127.0.0.1:{DEFAULT_PORT}"


class StudySettings(Settings):
    """What can be set about a study; every field is an option of `exalign assess new` of the same name."""

    prompts: int = Field(100, ge=1, description="Prompts, the same for every match-up.")
    per_item: int | None = Field(
        None, ge=1, description="Judgements per comparison; by default everybody judges everything."
    )
    name: str = Field("study", description="Name of the study, shown to assessors.")
    seed: int = Field(0, description="Chooses prompts, sides and orders.")


@app.command("new")
@with_settings(StudySettings)
def new_study(
    run: Annotated[Path, typer.Argument(help="The run folder with evaluation samples.")],
    match: Annotated[str, typer.Option(help="Match-ups FIRST:SECOND,…: methods, METHOD@STEP, sft or reference.")],
    assessors: Annotated[str, typer.Option(help="How many people, or their names separated by commas.")] = "3",
    store: Annotated[str | None, typer.Option(help="SQLite file or database URL instead of the run's own.")] = None,
    url: Annotated[str, typer.Option(help="The address by which assessors reach the page.")] = LOOPBACK,
    **options: Any,
) -> None:
    """Make a study and print each assessor's private link, once: only hashes of the tokens are stored."""
    settings = read_settings(StudySettings, options)
    study = plan_study(
        run,
        parse_matches(match),
        name=settings.name,
        num_prompts=settings.prompts,
        assessors=_names(assessors),
        per_item=settings.per_item,
        seed=settings.seed,
    )
    place = Store(store or str(_default_store(run)))
    tokens = place.create(study)
    typer.echo(f"{len(study.items)} comparisons, {len(study.assignments)} assignments in {place.location}.")
    for key, count in study.counts.items():
        typer.echo(f"  {key}: {count}")
    typer.echo("Private links, shown only now:")
    for person, token in tokens.items():
        typer.echo(f"  {escape_controls(person)}  {_link(url, token)}")


@app.command("link")
def renew_link(
    where: Where,
    assessor: Annotated[str, typer.Argument(help="Name of the assessor.")],
    name: Named = None,
    url: Annotated[str, typer.Option(help="The address by which assessors reach the page.")] = LOOPBACK,
) -> None:
    """Print a new private link for an assessor; the old one stops working."""
    place, study = _open(where, name)
    typer.echo(_link(url, place.renew_token(study, assessor)))


@app.command("serve")
def serve_study(
    where: Where,
    host: Annotated[str, typer.Option(help="Address to bind to; loopback unless told otherwise.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=1, max=65535, help="Port to bind to.")] = DEFAULT_PORT,
    url: Annotated[
        str | None, typer.Option(help="The address by which assessors reach the page, if not this machine's.")
    ] = None,
) -> None:
    """Serve the page until interrupted."""
    place = _open_store(where)
    place.check()
    typer.echo(f"Serving {place.location} on http://{host}:{port} (Ctrl+C ends it; nothing is lost).")
    serve(place, host=host, port=port, url=url)


@app.command("export")
def export_study(
    where: Where,
    output: Annotated[Path, typer.Option(help="The file of comparisons to write (JSON Lines).")],
    name: Named = None,
) -> None:
    """Write every verdict as a comparison record."""
    place, study = _open(where, name)
    comparisons = list(place.comparisons(study))
    write_comparisons(output, comparisons)
    typer.echo(f"{len(comparisons)} comparisons in {output}.")
    _print_standing(place, study)


@app.command("agreement")
def study_agreement(where: Where, name: Named = None) -> None:
    """Print win, tie and lose per match-up, and how far the assessors agree, overall and per criterion."""
    place, study = _open(where, name)
    comparisons = list(place.comparisons(study))
    _print_standing(place, study)
    if not comparisons:
        raise InputError(f"Study {study} has no verdicts yet.")
    console = Console()
    console.print(_tally_table(comparisons))
    console.print(_agreement_table(comparisons))


def _tally_table(comparisons: Sequence[Comparison]) -> Table:
    table = Table("match-up", "criterion", "win %", "tie %", "lose %", "win + tie/2 %", "verdicts")
    for criterion in (OVERALL, *CRITERIA):
        for row in tally(comparisons, criterion):
            shares = [_percent(value) for value in (row.win, row.tie, row.lose, row.score)]
            table.add_row(shown(f"{row.first} : {row.second}"), criterion, *shares, str(row.num_judgements))
    return table


def _agreement_table(comparisons: Sequence[Comparison]) -> Table:
    table = Table("criterion", "Krippendorff's alpha", "equal pairs %", "without ties %", "items", "assessors")
    for criterion in (OVERALL, *CRITERIA):
        found = agreement(comparisons, criterion)
        numbers = [_number(found.alpha), _percent(found.pairwise), _percent(found.without_ties)]
        table.add_row(criterion, *numbers, str(found.num_items), str(len(found.judges)))
    return table


def _percent(value: Interval | None) -> str:
    return _number(value, scale=100, digits=1)


def _number(value: Interval | None, *, scale: float = 1, digits: int = 3) -> str:
    if value is None:
        return "–"
    if value.low is None or value.high is None:
        return f"{value.estimate * scale:.{digits}f}"
    low, high = value.low * scale, value.high * scale
    return f"{value.estimate * scale:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def _print_standing(place: Store, study: str) -> None:
    for person, (done, total) in place.standing(study).items():
        typer.echo(f"  {escape_controls(person)}: {done} of {total}")


def _link(url: str, token: str) -> str:
    return f"{url.rstrip('/')}/a/{token}"


def _names(text: str) -> list[str]:
    if text.strip().isdigit():
        if not 1 <= int(text) <= 1000:
            raise InputError(f"--assessors {text}: between 1 and 1000 people, please.")
        return [f"assessor-{i}" for i in range(1, int(text) + 1)]
    names = [name.strip() for name in text.split(",")]
    if not all(names):
        raise InputError(f"--assessors {text!r}: give a number, or names separated by commas.")
    return names


def _default_store(run: Path) -> Path:
    return run / "assessment" / "study.sqlite"


def _open_store(where: str) -> Store:
    if "://" not in where:
        path = _default_store(Path(where)) if Path(where).is_dir() else Path(where)
        if not path.is_file():
            raise InputError(f"{path} does not exist; make a study with `exalign assess new`.")
        where = str(path)
    return Store(where)


def _open(where: str, name: str | None) -> tuple[Store, str]:
    place = _open_store(where)
    studies = place.check()
    if name is None and len(studies) == 1:
        return place, studies[0]
    if name not in studies:
        asked = "say which with --name" if name is None else f"{name} is not one of them"
        raise InputError(f"{place.location} holds the studies {', '.join(studies)}; {asked}.")
    return place, name
