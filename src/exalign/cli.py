"""The command line: one command per stage of a recipe, and a few to look at things."""

from __future__ import annotations

import io
import json
import logging
import os
import sys
import traceback
import warnings
from collections import Counter
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console
from rich.text import Text
from typer.core import TyperGroup

from exalign.errors import InputError
from exalign.judging.judge import grade_judge, judge
from exalign.processes import failing, leads, several
from exalign.run.plan import plan
from exalign.terminal import shown

if TYPE_CHECKING:
    from exalign.run.recipe import Recipe


class Interrupted(Exception):  # noqa: N818 - Ctrl-C is no error
    """Ctrl-C, with the sentence that says what stands; of KeyboardInterrupt Typer would make a bare status."""


class _Commands(TyperGroup):
    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt as error:
            raise Interrupted(str(error) or "Interrupted; the same command continues where it was.") from None


app = typer.Typer(
    name="exalign",
    cls=_Commands,
    help="Align language models with human preferences, exactly and efficiently, and prove what was achieved.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
)
BEGIN, STAGE, RESULT, JUDGE, LOOK = (
    "Begin", "Stage by stage", "Results", "Language models and people as judges", "Look and measure"
)  # fmt: skip
console = Console()

RecipeFile = Annotated[Path, typer.Argument(help="A recipe, for example recipes/demo.yaml.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Settings to change: align.exo-rw.beta_pi=0.5")
]
Folder = Annotated[
    Path | None,
    typer.Option("--run", help="The run's directory (default: a run beside the recipe, of its name, else runs/NAME)."),
]
Redo = Annotated[bool, typer.Option("--redo", help="Make again what was made from other settings or data.")]
Recover = Annotated[
    bool,
    typer.Option(
        "--recover",
        help="Go on where a training stopped, from its last good checkpoint, with a lower learning_rate.",
    ),
]

STAGES = {
    "run": (
        (),
        "Carry out a whole recipe, from data to report. What is done is skipped, what was interrupted continues.",
    ),
    "sft": (("sft",), "Fine-tune the supervised policy."),
    "reward": (("reward",), "Train the reward model on the preferences."),
    "sample": (("rollouts",), "Sample K completions per prompt from the supervised policy."),
    "score": (("scored",), "Score the samples."),
    "search": (("search",), "Search for the settings of the methods that the recipe's search names."),
    "evaluate": (("evaluation",), "Sample and score every aligned policy on held-out prompts."),
    "report": (("report",), "Write the evidence and the report."),
}


def _carry_out(recipe: Path, overrides: list[str] | None, run: dict[str, Any], *targets: str) -> None:
    from exalign.run.recipe import load_recipe

    loaded = load_recipe(recipe, overrides or ())
    beside = recipe.with_suffix("")  # as `exalign align MODEL DATA --out DIR` leaves them
    if run["folder"] is None and (beside / "recipe.yaml").is_file():
        run["folder"] = beside
    _run(loaded, run, *targets)


def _run(recipe: Recipe, run: dict[str, Any], *targets: str) -> None:
    from exalign.run.carry_out import carry_out  # what is wrong with a recipe is said before torch is loaded
    from exalign.run.runner import Run

    _quiet_libraries()
    carry_out(Run(recipe, console=console, **run), *targets)


Model = Annotated[str, typer.Argument(help="Folder or hub name of a chat model.")]
Data = Annotated[
    str, typer.Argument(help="Preference pairs, scored completions, or prompts: a file, folder or hub name.")
]
Out = Annotated[Path | None, typer.Option("--out", help="The folder of the result (default: runs/MODEL-DATA).")]
Reading = Annotated[
    list[str] | None,
    typer.Argument(metavar="[KEY=VALUE]...", help="More of the data: columns.prompt=question limit=999 split=train"),
]
Reward = Annotated[str | None, typer.Option(help="For prompts: module:function that gives completions their rewards.")]
RewardModel = Annotated[str | None, typer.Option(help="For prompts: a reward model that does.")]
Methods = Annotated[
    str | None, typer.Option("--method", help="exo (if not said), dpo, simpo, …; several are compared: exo,dpo.")
]


@app.command("align", rich_help_panel=BEGIN)
def align_(
    model: Annotated[str, typer.Argument(metavar="MODEL|RECIPE", help="A chat model, or a recipe (.yaml).")],
    data: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[DATA] [KEY=VALUE]...",
            help="Its data; more of it (columns.prompt=question limit=999), and settings of the recipe to change.",
        ),
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "--run", help="The folder of the result (default: runs/MODEL-DATA; a recipe's as in exalign run)."
        ),
    ] = None,
    method: Methods = None,
    reward: Reward = None,
    reward_model: RewardModel = None,
    redo: Redo = False,
    recover: Recover = False,
) -> None:
    """Align a model on a data file: choose a recipe, train, evaluate, report. Or every method of a RECIPE.yaml."""
    given = data or []
    if Path(model).suffix in (".yaml", ".yml"):
        if method is not None or reward is not None or reward_model is not None:
            raise InputError(
                "--method, --reward and --reward-model are for a model and its data; a recipe says it all."
            )
        _carry_out(Path(model), given, {"folder": out, "redo": redo, "recover": recover}, "align")
        return
    if not given:
        raise InputError(f"Give the data too: exalign align {model} DATA, or a recipe that ends in .yaml.")
    if redo or recover:
        raise InputError("--redo and --recover are for a recipe: exalign run RECIPE.")
    from exalign.run.begin import align

    _quiet_libraries()
    how: dict[str, Any] = {"methods": _chosen(method), "reward": reward, "reward_model": reward_model}
    align(model, given[0], out=out, overrides=given[1:], console=console, **how)


@app.command("new", rich_help_panel=BEGIN)
def new(
    model: Model,
    data: Data,
    settings: Reading = None,
    out: Out = None,
    method: Methods = None,
    reward: Reward = None,
    reward_model: RewardModel = None,
) -> None:
    """Write the recipe that `exalign align MODEL DATA` would carry out, and nothing else."""
    from exalign.run.begin import begin, write_down

    _quiet_libraries()
    methods = _chosen(method)
    begun = begin(model, data, settings or (), out=out, methods=methods, reward=reward, reward_model=reward_model)
    write_down(begun, console)


def _chosen(method: str | None) -> list[str]:
    return list(dict.fromkeys(name.strip() for name in (method or "exo").split(",")))


@app.command("evidence", rich_help_panel=BEGIN)
def evidence_(
    policies: Annotated[
        list[str],
        typer.Argument(
            metavar="NAME=MODEL[,MODEL...] [KEY=VALUE]...",
            help="Policies by a name of yours, several of one name being checkpoints in their order: dpo=out/dpo; and "
            "more of the data: columns.prompt=question limit=999.",
        ),
    ],
    reference: Annotated[str, typer.Option(help="What they were trained from: folder or hub name.")],
    prompts: Annotated[str, typer.Option(help="Held-out prompts or preference pairs: a file, folder or hub name.")],
    out: Out = None,
    reward: Reward = None,
    reward_model: RewardModel = None,
) -> None:
    """The evidence for models that were trained elsewhere: reward against KL, win rates, the optimum, samples."""
    from exalign.run.begin import evidence, of_data

    _quiet_libraries()
    reading, named = of_data(policies), dict[str, list[str]]()
    for text in policies:
        name, _, places = text.partition("=")
        if not (name and places):
            raise InputError(f"{text}: a policy is given as NAME=MODEL, its checkpoints as NAME=MODEL,MODEL.")
        if text not in reading:
            named.setdefault(name, []).extend(places.split(","))
    evidence(
        reference, named, prompts, out=out, reward=reward, reward_model=reward_model, reading=reading, console=console
    )


def _add_stage(name: str, targets: tuple[str, ...], text: str) -> None:
    def command(
        recipe: RecipeFile,
        overrides: Overrides = None,
        run: Folder = None,
        redo: Redo = False,
        recover: Recover = False,
    ) -> None:
        _carry_out(recipe, overrides, {"folder": run, "redo": redo, "recover": recover}, *targets)

    more, panel = (" Stages it needs run first unless they are done.", STAGE) if targets else ("", BEGIN)
    app.command(name, help=text + more, rich_help_panel=panel)(command)


for _name, (_targets, _text) in STAGES.items():
    _add_stage(_name, _targets, _text)


@app.command(rich_help_panel=BEGIN)
def demo(
    overrides: Overrides = None,
    run: Annotated[Path, typer.Option("--run", help="The run's directory.")] = Path("runs/demo"),
    redo: Redo = False,
    recover: Recover = False,
) -> None:
    """Align a small model on a synthetic world, offline, in a few minutes, from data to report."""
    from exalign.run.demo import demo_recipe

    _run(demo_recipe(run, overrides or ()), {"folder": run, "redo": redo, "recover": recover})


shipped = typer.Typer(invoke_without_command=True, help="List the recipes that come with exalign, or copy one.")
app.add_typer(shipped, name="recipes", rich_help_panel=BEGIN)


@shipped.callback()
def recipes_(context: typer.Context) -> None:
    if context.invoked_subcommand is None:
        from exalign.run.demo import recipes

        for name, what in recipes().items():
            console.print(shown(name, "bold").append(f"  {what}", style="not bold"), soft_wrap=True)


@shipped.command("copy")
def copy_(
    name: Annotated[str, typer.Argument(help="A recipe that `exalign recipes` lists.")],
    target: Annotated[Path | None, typer.Argument(help="The file to write (default: NAME.yaml).")] = None,
) -> None:
    """Write a recipe that comes with exalign here, to be edited and run."""
    from exalign.run.demo import copy_recipe

    console.print(shown(f"wrote {copy_recipe(name, target)}"), soft_wrap=True)


@app.command(rich_help_panel=LOOK)
def recipe(
    path: Annotated[
        Path | None, typer.Argument(help="A recipe to check and print in full; with --explain a section, as align.")
    ] = None,
    overrides: Overrides = None,
    explain: Annotated[bool, typer.Option("--explain", help="Print every setting there is, with its meaning.")] = False,
    schema: Annotated[bool, typer.Option("--schema", help="Print the JSON schema of recipes, for editors.")] = False,
) -> None:
    """Check a recipe and print it with every default, or explain all settings."""
    from exalign.run.explain import print_recipe, print_settings, recipe_schema
    from exalign.run.recipe import load_recipe

    if schema:
        if path is not None or explain:
            raise InputError("--schema is that of every recipe; give it alone.")
        typer.echo(json.dumps(recipe_schema(), indent=2, ensure_ascii=False))
    elif explain:
        if overrides:
            raise InputError(f"--explain takes one section at most; {overrides[0]} is one more.")
        print_settings(console, None if path is None else str(path))
    elif path is None:
        raise InputError("Give a recipe to print, or --explain for every setting there is.")
    else:
        print_recipe(load_recipe(path, overrides or ()), console)


@app.command(rich_help_panel=LOOK)
def inspect(
    data: Annotated[str, typer.Argument(help="A file, a folder or a hub data set.")],
    settings: Annotated[
        list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="More of the source: prompt_tokens=10 limit=99")
    ] = None,
    *,
    model: Annotated[str, typer.Option("--model", help="The model or tokenizer whose tokens are shown.")],
    rows: Annotated[int, typer.Option(min=1, help="Rows to show.")] = 3,
    split: Annotated[str | None, typer.Option(help="Split of a hub data set or folder.")] = None,
    columns: Annotated[
        list[str] | None, typer.Option(metavar="OURS=THEIRS", help="As data's columns: prompt=question; repeatable.")
    ] = None,
    max_prompt_tokens: Annotated[int, typer.Option(min=2)] = 512,
    max_completion_tokens: Annotated[int, typer.Option(min=1)] = 512,
) -> None:
    """Show exactly which tokens are prompt, which are completion, what was cut, and the counts."""
    from exalign.data.inspection import inspect_records, render_inspection
    from exalign.data.reading import read_source, settings_of
    from exalign.data.tokenization import TokenLimits
    from exalign.models.loading import load_tokenizer
    from exalign.run.begin import with_messages

    _quiet_libraries()
    tokenizer = load_tokenizer(model)
    source, _ = with_messages(settings_of(data, columns or (), settings or (), split), tokenizer)
    if source.chat:
        console.print("Prompts are read as messages of a chat; chat=false reads them as text.", style="dim")
    limits = TokenLimits(max_prompt_tokens=max_prompt_tokens, max_completion_tokens=max_completion_tokens)
    counts: Counter[str] = Counter()
    records = read_source(source, counts, tokenizer)
    found = inspect_records(records, tokenizer, limits=limits, counts=counts, num_rows=rows)
    if not counts["rows"]:
        left = " after skip and share" if source.skip or source.share < 1 else ""
        raise InputError(f"{data} has no rows{left}.")
    console.print(render_inspection(found))


@app.command("chat", rich_help_panel=RESULT)
def chat_(
    model: Annotated[str, typer.Argument(help="A policy's folder or hub name; of a run, what it ships.")],
    against: Annotated[str | None, typer.Option(help="A second one, whose answers stand beside.")] = None,
    system: Annotated[str | None, typer.Option(help="What the conversation begins with.")] = None,
    temperature: Annotated[float, typer.Option(min=1e-3, help="τ of sampling.")] = 0.7,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 256,
    seed: Annotated[int, typer.Option(min=0)] = 0,
) -> None:
    """Talk to a model in the terminal, or to two side by side."""
    from exalign.run.chat import Speaker, chat

    _quiet_libraries()
    speak = partial(Speaker.load, temperature=temperature, seed=seed, max_new_tokens=max_new_tokens, system=system)
    chat([speak(source) for source in (model, against) if source is not None], console)


def _version(asked: bool) -> None:
    if asked:
        from exalign import __version__

        typer.echo(f"exalign {__version__}")
        raise typer.Exit


@app.callback()
def main_options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Say the version, and end.")
    ] = False,
) -> None:
    pass


@app.command(rich_help_panel=LOOK)
def bench(
    model: Annotated[str, typer.Argument(help="Folder or hub name of a policy.")],
    prompts: Annotated[int, typer.Option(min=1)] = 8,
    k: Annotated[int, typer.Option("--k", min=2, help="Completions of each prompt.")] = 4,
    prompt_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each prompt.")] = 350,
    completion_tokens: Annotated[int, typer.Option(min=1, help="Tokens of each completion.")] = 40,
) -> None:
    """Measure training and sampling on your model and shape: tokens/s, and the share of this machine's peak."""
    from exalign.models.model_settings import ModelSettings
    from exalign.run.bench import BenchShape, bench_table
    from exalign.run.bench import bench as measure

    _quiet_libraries()
    shape = BenchShape(
        prompts=prompts, num_completions=k, prompt_tokens=prompt_tokens, completion_tokens=completion_tokens
    )
    console.print(bench_table(shape, *measure(ModelSettings(source=model), shape)))


@app.command(rich_help_panel=RESULT)
def figures(
    run: Annotated[Path | None, typer.Argument(help="A run's directory; without it Figures 1 and 5 are drawn.")] = None,
    out: Annotated[
        Path | None, typer.Option(help="The folder for the files (default: figures, or RUN/report/figures).")
    ] = None,
) -> None:
    """Draw the paper's figures: Figures 2 to 9 and Tables 1, 2 of a run; without one, Figures 1 and 5, exactly."""
    paths, missing = (_exact_figures(out or Path("figures")), []) if run is None else draw_run_figures(run, out)
    for path in paths:
        console.print(shown(f"wrote {path}{' and .svg' if path.suffix == '.png' else ''}"), soft_wrap=True)
    for sentence in missing:
        console.print(Text.assemble(("missing", "yellow"), " ", shown(sentence)), soft_wrap=True)


def draw_run_figures(run: Path, out: Path | None = None) -> tuple[list[Path], list[str]]:
    """Draw what the run has the data for into `out` (by default `RUN/report/figures`); see `write_paper_figures`.

    A directory that holds no run, or no samples of the supervised policy, which everything is compared with, is an
    `InputError`.
    """
    from exalign.evaluation.evidence import collect_evidence
    from exalign.evaluation.run_folder import RunFolder
    from exalign.judging.judgements import read_judgements
    from exalign.report.paper_figures import evaluate_command, write_paper_figures

    folder, recipe = RunFolder(run), RunFolder(run).recipe_values()
    if not recipe:
        raise InputError(
            f"{run} is no run's directory, for it has no recipe.yaml: exalign run RECIPE --run {run} makes one."
        )
    if not (folder.supervised / "header.json").is_file():
        raise InputError(f"{run} has no samples of the supervised policy yet: {evaluate_command(run)} draws them.")
    evidence = collect_evidence(run, seed=int(recipe.get("seed") or 0), judgements=read_judgements(run))
    return write_paper_figures(evidence, run, folder.figures if out is None else out)


def _exact_figures(folder: Path) -> list[Path]:
    """Figures 1 and 5, the theorems' and on-policy gradients, as PNG and SVG in `folder`: seconds, always the same."""
    from exalign.exact.bimodal import objective_figure, two_mode_figure
    from exalign.exact.convergence import gradient_error_figure, on_policy_figure
    from exalign.report.paper_figures import draw_divergences, draw_error_against_k
    from exalign.report.style import save_figure

    any_policy, one_mode = objective_figure()
    densities = {"figure-1": two_mode_figure(), "figure-5-any-policy": any_policy, "figure-5-one-mode": one_mode}
    figures = {name: draw_divergences(**asdict(shown)) for name, shown in densities.items()}
    figures["theorems"] = draw_error_against_k(gradient_error_figure())
    figures["on-policy"] = draw_error_against_k(on_policy_figure())
    return [save_figure(figure, folder, name) for name, figure in figures.items()]


@app.command(rich_help_panel=RESULT)
def compare(
    runs: Annotated[list[Path], typer.Argument(help="Directories of finished runs, as of several seeds.")],
    kl: Annotated[str, typer.Option(help="KLs in nats at which rewards are compared.")] = "1,2,4",
    out: Annotated[Path | None, typer.Option(help="A Markdown file; by default the tables are printed.")] = None,
    figure: Annotated[Path | None, typer.Option(help="A folder for a figure of the differences.")] = None,
) -> None:
    """Compare runs: the reward of every method at equal KL in every run, and the mean over the runs."""
    from exalign.evaluation.across_runs import read_runs
    from exalign.report.compare import tables
    from exalign.storage import write_text

    try:
        kls = [float(part) for part in kl.split(",")]
    except ValueError:
        raise InputError(f"--kl {kl} is not a list of numbers, as in 1,2,4.") from None
    found = read_runs(runs, kls)
    text = tables(found, kls)
    if out is None:
        typer.echo(text, nl=False)
    else:
        write_text(out, text)
        console.print(shown(f"wrote {out}"), soft_wrap=True)
    if figure is not None:
        from exalign.report.compare import STEPS, write_differences

        reached = [p.nats for run in found for m in run.evidence.methods for p in m.points if p.kl] or kls
        finely = [min(max(kls), max(reached)) * step / STEPS for step in range(1, STEPS + 1)]
        path = write_differences(read_runs(runs, finely), figure)
        said = "no figure: in no run are there EXO and another method, as DPO or PPO, on one target"
        # Not into the Markdown that may be piped elsewhere.
        typer.echo(shown(f"wrote {path} and .svg" if path else said).plain, err=out is None)


@app.command(rich_help_panel=RESULT)
def select(
    run: Annotated[Path, typer.Argument(help="The directory of a finished run.")],
    kl_budget: Annotated[float, typer.Option(help="Nats from the supervised policy that a checkpoint may be away.")],
) -> None:
    """Name each method's best checkpoint within a KL budget, and the folder to load it from."""
    from exalign.evaluation.verdict import select as selected_within
    from exalign.report.compare import selection_table

    selected, without = selected_within(run, kl_budget)
    if selected:
        console.print(selection_table(selected, run))
    for method in without:
        console.print(shown(f"{method} has no checkpoint within {kl_budget:g} nats"), soft_wrap=True)


@app.command("benchmark", rich_help_panel=RESULT)
def benchmark_(
    model: Annotated[str, typer.Argument(metavar="RUN|MODEL", help="A finished run, or a model's folder or hub name.")],
    tasks: Annotated[str, typer.Option(help="Tasks or groups of lm-eval: hellaswag,arc_easy.")],
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first so many documents of each task.")] = None,
    include_path: Annotated[Path | None, typer.Option(help="A folder with tasks of your own, as YAML.")] = None,
    method: Annotated[str | None, typer.Option(help="One method of the run (default: all).")] = None,
    against: Annotated[str | None, typer.Option(help="For a model: the one it started from.")] = None,
    num_fewshot: Annotated[
        int | None, typer.Option(min=0, help="Examples before each question (default: the task's).")
    ] = None,
    chat_template: Annotated[
        bool, typer.Option("--chat-template", help="Ask through the model's chat template.")
    ] = False,
) -> None:
    """What was lost: tasks of lm-eval before and after alignment, of every method of a run, or of any model."""
    from exalign.evaluation.run_folder import RunFolder
    from exalign.models.model_settings import ModelSettings
    from exalign.run.benchmark import benchmark_run, benchmark_table, compare, find_tasks
    from exalign.storage import exists

    run = RunFolder(Path(model))
    is_run = exists(run.recipe)
    if against is not None if is_run else method is not None:
        raise InputError("--against is for a model, --method for a run, which is measured against where it started.")
    _quiet_libraries()
    how = {"limit": limit, "num_fewshot": num_fewshot, "apply_chat_template": chat_template}
    find = partial(find_tasks, tasks, include_path, **how)
    if is_run:
        console.print(benchmark_table(benchmark_run(run, method, find)))
        console.print(shown(f"wrote {run.benchmark}; exalign report RECIPE shows it"), soft_wrap=True)
    else:
        before = None if against is None else ModelSettings(source=against)
        console.print(benchmark_table(compare(find(), before, {model: ModelSettings(source=model)}, {})))


@app.command(rich_help_panel=RESULT)
def push(
    run: Annotated[Path, typer.Argument(help="The directory of a finished run.")],
    method: Annotated[str, typer.Argument(help="One of its methods.")],
    name: Annotated[str, typer.Argument(help="The repository on the hub, as ME/MODEL; it is made if need be.")],
    step: Annotated[
        int | None, typer.Option(help="An evaluated step (default: the one the report ships, else the last).")
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Make the repository a private one.")] = False,
    preview: Annotated[
        bool, typer.Option("--preview", help="Print the card and the list of files; upload nothing.")
    ] = False,
) -> None:
    """Publish a policy on the hub, with a card of what it was made from and what it achieved."""
    from exalign.run.publish import publish

    _quiet_libraries()
    found = publish(run, method, name, step=step, private=private, preview=preview)
    for line in (found if preview else f"published {found}").splitlines():
        console.print(shown(line), soft_wrap=True)


@app.command(rich_help_panel=RESULT)
def verify(run: Annotated[Path, typer.Argument(help="A run's directory.")]) -> None:
    """Read every file of a run and compare it with what was written; a start compares sizes and times alone."""
    from exalign.run.stage_files import verify as verified

    found = verified(run)
    for path in found.damaged:
        console.print(shown(f"! {path} is {'damaged' if path.exists() else 'missing'}", "yellow"), soft_wrap=True)
    if found.damaged:
        raise InputError(
            f"{len(found.damaged)} of {found.files:,} files of {run} are not what was written; restore them, or delete "
            "them and pass --redo to make their stages again."
        )
    console.print(f"✓ {found.files:,} files, {found.size:,} bytes: all are what was written", soft_wrap=True)


@app.command(
    context_settings={"allow_extra_args": True, "ignore_unknown_options": True},
    add_help_option=False,
    help="Judge by people: a blind study on a web page (new, serve, export, agreement; see assess --help).",
    rich_help_panel=JUDGE,
)
def assess(context: typer.Context) -> Any:
    try:
        from exalign.judging.assess import app as people
    except ModuleNotFoundError as error:
        raise InputError(f"assess needs {error.name}: pip install 'exalign[people]'.") from None
    return people(args=context.args, prog_name="exalign assess", standalone_mode=False)


app.command("plan", rich_help_panel=LOOK)(plan)
app.command("judge", rich_help_panel=JUDGE)(judge)
app.command("grade-judge", rich_help_panel=JUDGE)(grade_judge)


def main(arguments: list[str] | None = None) -> None:
    """Run the command line: an `InputError` is one sentence and status 2, Ctrl-C one sentence and status 130."""
    if isinstance(sys.stdout, io.TextIOWrapper):  # no work ends because a terminal's encoding has no τ
        sys.stdout.reconfigure(errors="backslashreplace")
    try:
        status = app(args=arguments, standalone_mode=False)
    except InputError as error:
        _fail(str(error), 2)
    except Interrupted as error:
        _fail(str(error), 130)
    except Exception as error:
        usage = hasattr(error, "show")  # Typer carries its own copy of click, whose usage errors show themselves
        if not usage and not several():
            raise
        with failing() as first:
            if first:
                error.show() if usage else traceback.print_exc()  # type: ignore[attr-defined]
        status = 2 if usage else 1
    if status:  # what a command that ends with typer.Exit returns
        sys.exit(status)


def _quiet_libraries() -> None:
    """Bars for every file that a library reads or writes would drown what a stage says; so would as many voices as
    there are processes.
    """
    import transformers

    os.environ.setdefault("HF_DATASETS_DISABLE_PROGRESS_BARS", "1")  # importing datasets to say so takes a second
    if not leads():
        logging.disable(logging.WARNING)
        warnings.simplefilter("ignore")
    # A decoder of last resort hands on the cache under the name that all releases know.
    warnings.filterwarnings("ignore", message=".*past_key_values.* is deprecated", category=FutureWarning)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    logging.getLogger("huggingface_hub").setLevel(logging.ERROR)  # which tells every attempt to reach it


def _fail(sentence: str, status: int) -> None:
    line = Text.assemble(("error:", "bold red"), " ", shown(sentence))
    with failing() as first:
        Console(stderr=True, quiet=not first).print(line, soft_wrap=True)
    sys.exit(status)
