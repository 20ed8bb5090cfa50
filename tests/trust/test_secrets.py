"""Keys and passwords go where they are meant to go, and into no file and no message."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from threading import Thread

import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st
from typer.testing import CliRunner

from evaluation.synthetic_run import World, write_run
from exalign.data.reading import DataSettings, read_source
from exalign.errors import InputError
from exalign.evaluation.evidence import build_evidence
from exalign.judging.askers import Endpoint, JudgeSettings, spellings
from exalign.judging.judge import judge
from exalign.judging.judgements import read_judgements
from exalign.judging.study import open_engine
from exalign.models.loading import load_policy
from exalign.models.model_settings import ModelSettings
from exalign.redaction import redact, redact_values
from exalign.report import write_report
from exalign.run.demo import RECIPE
from exalign.run.recipe import dump_recipe, load_recipe
from exalign.training.loop import model_card
from trust.conftest import CANARY, SECRETS, Isolated

KEY = SECRETS["OPENAI_API_KEY"]


def holders(folder: Path, *secrets: str) -> list[str]:
    """The files below `folder` that hold a secret, as it is or as JSON spells it."""
    spelled = [text.encode() for secret in secrets for text in (secret, json.dumps(secret)[1:-1])]
    return [str(p) for p in folder.rglob("*") if p.is_file() and any(text in p.read_bytes() for text in spelled)]


def test_a_run_keeps_no_secret_of_its_environment(isolated: Isolated) -> None:
    assert holders(isolated.folder, CANARY, *SECRETS.values()) == []
    assert CANARY not in isolated.printed


class Parrot(BaseHTTPRequestHandler):
    """An endpoint that repeats the key it was sent: in answers, spelled in other ways, and at the cut of an error."""

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["content-length"])))
        key = self.headers["authorization"].removeprefix("Bearer ")
        self.server.seen[key] += 1  # type: ignore[attr-defined]
        spelled = "".join(rf"\u{ord(character):04X}" for character in key)
        message = f"{key} {key}\\nVerdict: A"
        slashed = key.replace("/", r"\/")
        answer = (
            f'{{"choices": [{{"message": {{"role": "assistant", "content": "{spelled} {slashed} {message}"}}, '
            f'"finish_reason": "stop"}}], "usage": null, "system_fingerprint": "{key}"}}'
        )
        self.send_response(200 if body["model"] == "parrot" else 418)
        self.send_header("content-type", "application/json")
        self.end_headers()
        # An error is stored up to 20,000 characters, the message up to 300: the key stands across both cuts.
        error = json.dumps({"error": {"message": "x" * 290 + key + "y" * (20_000 - 340) + key * 3}})
        self.wfile.write((answer if body["model"] == "parrot" else error).encode())

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture(scope="module")
def parrot() -> Iterator[ThreadingHTTPServer]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), Parrot)
    server.seen = Counter()  # type: ignore[attr-defined]
    Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()


@pytest.mark.parametrize("model", ["parrot", "refuser"])
def test_the_key_of_a_judge_is_in_no_file_and_no_line(
    tmp_path: Path, parrot: ThreadingHTTPServer, monkeypatch: pytest.MonkeyPatch, model: str
) -> None:
    for name, value in SECRETS.items():
        monkeypatch.setenv(name, value)
    run = write_run(tmp_path / "run", World({"exo": (0.9, (1.0,))}, num_prompts=3, pool=0, steps=2))
    app = typer.Typer()
    app.command()(judge)
    address = f"http://127.0.0.1:{parrot.server_port}/v1"
    arguments = [str(run), "--against", "sft", "--endpoint", address, "--model", model, "--attempts", "1"]
    result = CliRunner().invoke(app, arguments)
    if model == "parrot":
        build_evidence(run, num_resamples=10, judgements=read_judgements(run))
        write_report(run)
    assert parrot.seen[KEY] > 0  # type: ignore[attr-defined]
    assert holders(run, CANARY, *SECRETS.values()) == []
    assert CANARY not in result.output
    exchanges = next(run.rglob("exchanges.jsonl")).read_text()
    assert "[key]" in exchanges
    # No part of the key is left at the cut either: of a key cut in two, the beginning would have stayed.
    assert CANARY[:8] not in exchanges
    if model == "parrot":
        assert result.exit_code == 0, result.output
        assert '"verdict": "first"' in next(run.rglob("comparisons.jsonl")).read_text()


@given(st.text("abk/\\\"'-_.+$[", min_size=1, max_size=12), st.lists(st.sampled_from("ujs"), min_size=12, max_size=12))
def test_a_key_is_found_however_json_spells_it(key: str, ways: list[str]) -> None:
    spell = {"u": lambda c: rf"\u{ord(c):04x}", "j": lambda c: json.dumps(c)[1:-1], "s": lambda c: c}
    text = "".join(spell[way](character) for way, character in zip(ways, key, strict=False))
    assert spellings(key).fullmatch(text)


def test_a_key_among_the_request_fields_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", KEY)
    with pytest.raises(InputError, match="remove it") as caught:
        Endpoint("https://example.org/v1", "m", JudgeSettings(request_fields={"extra": {"api_key": KEY}}))
    assert CANARY not in str(caught.value)


@pytest.mark.parametrize(
    "address",
    [
        "ftp://ann:pa55word@example.org/v1",
        "https://ann:pa55word@example.org/v1",
        "https://pa55word@[::1",
        "http://[x",
        "https://example.org/v1?api_key=pa55word",
        "https://example.org/v1#pa55word",
        "https://:@example.org",
    ],
)
def test_an_endpoint_with_credentials_is_refused_without_repeating_them(address: str) -> None:
    with pytest.raises(InputError) as caught:
        Endpoint(address, "m", JudgeSettings())
    assert "pa55word" not in str(caught.value)


WITH_PASSWORD = "https://ann:pa55word@example.org/sets/a.jsonl"


def test_messages_about_addresses_hide_their_passwords(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    attempts = [
        lambda: read_source(DataSettings(source=WITH_PASSWORD), Counter()),
        lambda: load_policy(ModelSettings(source=WITH_PASSWORD), None),  # type: ignore[arg-type]
        lambda: load_recipe(WITH_PASSWORD),
        lambda: load_recipe(RECIPE, [f"data.stf.source={WITH_PASSWORD}"]),
        lambda: load_recipe(RECIPE, [f"seed={WITH_PASSWORD}"]),
        lambda: open_engine("nosuch+driver://ann:pa55word@example.org/db"),
        lambda: open_engine("://ann:pa55word@example.org"),
    ]
    for attempt in attempts:
        with pytest.raises(InputError) as caught:
            attempt()
        assert "pa55word" not in str(caught.value)


def test_dumps_of_settings_hide_passwords() -> None:
    recipe = load_recipe(RECIPE, [f"data.sft.source={WITH_PASSWORD}", f"model.config.mirror={WITH_PASSWORD}"])
    assert recipe.data.sft is not None and recipe.data.sft.source == WITH_PASSWORD
    dumped = json.dumps(dump_recipe(recipe))
    assert "pa55word" not in dumped
    assert dumped.count("https://[redacted]@example.org/sets/a.jsonl") == 2
    card = model_card("t", "d", ModelSettings(config={"mirror": WITH_PASSWORD}), pipeline_tag="text-generation")
    assert "pa55word" not in card


names = st.text("abcXYZ019._-", min_size=1, max_size=8)
passwords = st.text(st.characters(min_codepoint=33, max_codepoint=0x2FF, exclude_characters="/?#"), min_size=4)


@given(
    st.sampled_from(["https", "http", "postgresql+psycopg", "s3"]),
    names,
    passwords,
    names,
    st.text("ab /.", max_size=9),
)
def test_no_password_outlives_redaction(scheme: str, user: str, password: str, host: str, rest: str) -> None:
    password = f"pa55{password}" if password.isprintable() and not any(map(str.isspace, password)) else "pa55word"
    for slashes in ("//", "/"):  # pathlib folds two into one
        address = f"see {scheme}:{slashes}{user}:{password}@{host}/{rest}"
        assert redact(address) == f"see {scheme}:{slashes}[redacted]@{host}/{rest}"
        assert redact_values({address: [address, 1, None]}) == {redact(address): [redact(address), 1, None]}


@given(st.text("abc:/@.?=& \n", max_size=60))
def test_redaction_changes_nothing_else(text: str) -> None:
    """Twice is once, and a text without `:/` and `=` is left alone."""
    once = redact(text)
    assert redact(once) == once
    if ":/" not in text and "=" not in text:
        assert once == text
