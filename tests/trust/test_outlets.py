"""What models, data sets and people wrote is shown as text wherever it comes out: it is never obeyed.

On a terminal, nothing but rich's own colours may be an escape sequence; on a page, the tags are those that harmless
texts would give; in a file of records, every record is one line.
"""

from __future__ import annotations

import io
import json
import re
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from contextlib import redirect_stderr
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from markupsafe import Markup
from rich.console import Console

from exalign.cli import main
from exalign.data.inspection import inspect_records, render_inspection
from exalign.data.record import Completion, Record
from exalign.data.tokenization import TokenLimits
from exalign.evaluation.schema import (
    Answer,
    Curve,
    Evidence,
    Example,
    FrontierPoint,
    Interval,
    Judgements,
    MethodEvidence,
    ModelJudge,
    ModelMatchUp,
    Stage,
    Tally,
    WinRate,
)
from exalign.judging.assess import CHOICES, QUESTIONS, _tally_table, create_app, turns
from exalign.judging.comparisons import Comparison, Pair, read_comparisons, write_comparisons
from exalign.judging.judge import _print_grade, _print_summaries
from exalign.judging.study import Store, Task
from exalign.report.figures import draw_frontier
from exalign.report.page import render_page
from exalign.report.style import figure_style, inline_svg, looks_of
from exalign.report.wording import visible
from exalign.run.runner import Run
from exalign.run.runner import Stage as RunStage
from exalign.terminal import escape_controls, shown
from exalign.training.loop import TrainingProgress

ATTACKS = (
    "\x1b[2J\x1b]8;;http://evil\x07click\x1b]8;;\x07",
    "\x9b31mred\x85\x00\x08\r",
    "\u202eesrever\u2066\u200b\ufeff\u2028\u2029",
    "[bold]x[/bold][/][link=http://evil]y[/link]\\[red]\\",
    "[/dim]",
    "<script>alert(1)</script><img src=x onerror=alert(1)>",
    "'\"><svg onload=alert(1)>{{ 7 * 7 }}{% raw %}&lt;-->]]></style></title>",
    "=cmd|' /C calc'!A0",
    ":warning:",
    "\ud800\udfff\ue000",
)
pieces = st.sampled_from(ATTACKS) | st.text(max_size=8) | st.sampled_from(list("<>&'\"[]\\{}%\x1b\u202e\n\t"))
texts = st.lists(pieces, min_size=1, max_size=4).map("".join)
storable = texts.map(lambda text: text.encode("utf-8", "replace").decode())
"""Without lone surrogates, which no reader lets through."""
few = settings(max_examples=25)

_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


def printed(*objects: Any, plain: bool = True) -> str:
    """What a colour terminal is sent, without the colours; with `plain` what a file is sent."""
    console = Console(
        file=io.StringIO(), force_terminal=not plain, width=100, color_system=None if plain else "truecolor"
    )
    for thing in objects:
        console.print(thing, soft_wrap=True)
    return checked(console.file.getvalue())  # type: ignore[attr-defined]


def checked(output: str) -> str:
    """The output without colours, after looking for anything that could steer a terminal."""
    rest = _COLOURS.sub("", output)
    assert rest.replace("\n", "") == escape_controls(rest.replace("\n", ""))
    return rest


@few
@given(texts, st.booleans())
def test_a_text_on_a_terminal_is_its_own_spelling(text: str, plain: bool) -> None:
    assert printed(shown(text, "bold"), plain=plain) == escape_controls(text) + "\n"
    assert "\n" not in escape_controls(text)


@few
@given(storable.map(lambda text: text.replace("\0", "")))  # what an argument of a process can hold
def test_an_error_is_one_line(text: str) -> None:
    with redirect_stderr(io.StringIO()) as stream, pytest.raises(SystemExit) as ended:
        main(["recipe", f"nowhere/{text}"])
    assert ended.value.code == 2
    assert "Traceback" not in stream.getvalue()
    assert checked(stream.getvalue()).count("\n") == 1


class Letters:
    """A tokenizer whose tokens are the characters of its texts."""

    bos_token_id, eos_token_id, unk_token_id, chat_template = None, 0, None, None

    def __call__(self, text: str, **_: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(character) + 1 for character in text]}

    def encode(self, text: str, **_: Any) -> list[int]:
        return self(text)["input_ids"]

    def decode(self, ids: list[int], **_: Any) -> str:
        return "".join(chr(i - 1) if i else "\x1b[0m" for i in ids)

    def convert_ids_to_tokens(self, token: int) -> str:
        return self.decode([token])


@few
@given(texts, texts, texts)
def test_inspected_tokens_are_spelled_out(name: str, prompt: str, text: str) -> None:
    record = Record(name, prompt, (Completion(text, finish_reason="stop"), Completion("b")), preferred=0)
    limits = TokenLimits(max_prompt_tokens=50, max_completion_tokens=50)
    found = inspect_records([record], Letters(), limits=limits, counts=Counter())  # type: ignore[arg-type]
    for plain in (True, False):
        assert "completion 1 (preferred)" in printed(render_inspection(found), plain=plain)


@settings(max_examples=12)
@given(storable)
def test_progress_and_stages_show_names_only(name: str) -> None:
    console = Console(file=io.StringIO(), width=200)
    with TrainingProgress(name, num_steps=1, done=0, visible=True, console=console) as progress:
        progress.say(name)
        progress.update({"step": 1, "loss": 0.5})
    assert escape_controls(name) in checked(console.file.getvalue())  # type: ignore[attr-defined]
    with tempfile.TemporaryDirectory() as folder:
        console = Console(file=io.StringIO(), width=200, force_terminal=True)
        recipe: Any = SimpleNamespace(name="x", threads=None, model_dump_json=lambda **_: "{}")
        odd = RunStage("a", (), (), lambda view: view.counts.update({name: 1}))
        run = Run(recipe, Path(folder), console)
        run.carry_out([odd])
        run.carry_out([odd])
        output = checked(console.file.getvalue())  # type: ignore[attr-defined]
    assert escape_controls(name.replace("_", " ")) in output
    assert "skipped" in output


def compared(text: str, judge: str = "ann") -> Comparison:
    return Comparison("0", text, text, "sft", text, "b", judge=judge, verdict="first", left="first", comment=text)


@few
@given(storable)
def test_tables_of_judgements_show_names_only(name: str) -> None:
    tally_table = printed(_tally_table([compared(name)]), plain=False)
    assert "overall" in tally_table
    console = Console(file=io.StringIO(), width=400, force_terminal=True)
    agreement = {"with": [name], "pairs": 1, "kappa": None, "alpha": None, "theirs_among_themselves": None}
    entry = {**agreement, "raw": None, "without_ties": None}
    interval = {"estimate": 0.5, "low": 0.1, "high": 0.9, "num_prompts": 1}
    shares = dict.fromkeys(("win", "tie", "lose", "score", "flip_rate", "shown_first"), interval)
    row = {**shares, "first": name, "second": "sft", "length_controlled": None, "unreadable_pairs": 0, "pairs": 1}
    row = {**row, "tokens": {"prompt": 1, "completion": 1}, "agreement": [entry]}
    _print_summaries(console, [row])
    _print_grade(console, row)
    assert escape_controls(name) in checked(console.file.getvalue())  # type: ignore[attr-defined]


@few
@given(storable)
def test_a_record_of_a_judgement_is_one_line_and_comes_back(text: str) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "comparisons.jsonl"
        write_comparisons(path, [compared(text), compared(text, judge="bob")])
        assert len(path.read_text(encoding="utf-8").splitlines()) == 2
        assert path.read_bytes().isascii()
        assert read_comparisons(path)[0] == compared(text)


class Tags(HTMLParser):
    """The tags of a page with the names of their attributes, and its text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, tuple[str, ...]]] = []
        self.text = ""
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, tuple(name for name, _ in attributes)))

    def handle_comment(self, data: str) -> None:
        self.tags.append(("comment", ()))

    def handle_data(self, data: str) -> None:
        self.text += data


def evidence(text: str, method: str = "exo") -> Evidence:
    """Evidence in which everything that could come from elsewhere is `text`."""
    span = Interval(1.0, 0.5, 1.5, 3)
    share = Interval(0.5, 0.25, 0.75, 3)
    point = FrontierPoint(1, span, span, 1.0, 4)
    tally = Tally(text, text, "overall", share, share, share, share, 3, 0)
    match_up = ModelMatchUp(tally, 3, 0, 0, share, share, share, share, 5, 6, 0, 0)
    rates = [WinRate(text, share, 0.5, 3, 0)]
    return Evidence(
        name=text,
        policy=text,
        temperature=1.0,
        kl_budget=1.0,
        confidence=0.95,
        num_resamples=10,
        seed=0,
        num_prompts=3,
        sft=replace(point, step=0),
        methods=[MethodEvidence(method, text, text, True, [point], rates, gain=span, settings={"divergence": text})],
        equal_kl=None,
        comparisons=[],
        optimum=None,
        best_of_n=[],
        examples=[Example(text, text, [Answer(method, text, 1.0, 0.5, "length"), Answer(text, text)])],
        curves=[Curve(text, 1, [1.0], {text: [None]})],
        stages=[Stage(text, 1.0, {text: 3})],
        record_counts={text: {text: 1}},
        notes=[text],
        environment={text: {text: [text]}},
        recipe=text,
        judgements=Judgements([ModelJudge(text, text, [match_up])], notes=[text]),
    )


HARMLESS = Tags(render_page(evidence("harmless"), {"frontier": Markup("")}))


@few
@given(storable)
def test_the_report_has_the_tags_of_a_harmless_one_and_the_whole_text(text: str) -> None:
    page = Tags(render_page(evidence(f"t{text}"), {"frontier": Markup("")}))
    assert page.tags == HARMLESS.tags
    assert " ".join(visible(f"t{text}").split()) in " ".join(page.text.split())


@pytest.mark.parametrize("text", [attack for attack in ATTACKS if attack.isprintable()])
def test_a_figure_has_no_markup_of_a_name(text: str) -> None:
    def tags(name: str) -> Counter[str]:
        found = evidence("x", method=name)
        with figure_style():
            figure = draw_frontier(found, looks_of(found.methods), width=8.8)
            figure.draw_without_rendering()
        svg = inline_svg(figure, "frontier", name)
        assert "onload" not in re.sub(r">[^<]*<", "><", svg)
        return Counter(element.tag for element in ElementTree.fromstring(svg).iter())

    names = {"script", "img", "image", "foreignObject", "a"}
    assert not {tag.partition("}")[2] for tag in tags(text)} & names


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """The templates of the assessment page, with the settings that the application gives them."""
    store = Store(str(tmp_path_factory.mktemp("store") / "study.sqlite"))
    yield create_app(store, allowed_hosts=["127.0.0.1"]).state.pages
    store.close()


def task_page(pages: Any, text: str) -> Tags:
    pair = Pair("0", ({"role": text, "content": text},), text, "sft", text, text, reference=text)
    task = Task(1, 0, pair, left="first", answer=None, draft=None)
    given_before = {"verdict": CHOICES[0], "criteria": {}, "comment": text}
    here = {"study": text, "base": "/a/x", "form_token": "0", "done": 0, "total": 2, "previous": None}
    page = pages.get_template("task.html").render(
        task=task,
        turns=turns(pair.prompt),
        given=given_before,
        questions=QUESTIONS,
        conflict=False,
        max_comment=100,
        **here,
    )
    return Tags(page)


@few
@given(storable)
def test_the_assessment_page_has_the_tags_of_a_harmless_one(pages: Any, text: str) -> None:
    page = task_page(pages, f"t{text}")
    assert page.tags == task_page(pages, "harmless").tags
    assert f"t{text}".replace("\r\n", "\n").replace("\r", "\n") in page.text.replace("\r\n", "\n").replace("\r", "\n")


def test_a_recipe_that_is_printed_can_be_read_again(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from exalign.run.demo import RECIPE
    from exalign.run.recipe import load_recipe

    attack = json.dumps("[/dim][link=http://evil]" + "\u202e\x1b[2J" + "long " * 60)
    main(["recipe", str(RECIPE), f"model.config.note={attack}"])
    output = checked(capsys.readouterr().out)
    (tmp_path / "again.yaml").write_text(output, encoding="utf-8")
    assert (
        load_recipe(tmp_path / "again.yaml").model.config
        == load_recipe(RECIPE, [f"model.config.note={attack}"]).model.config
    )
