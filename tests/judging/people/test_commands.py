"""`exalign assess` from the command line."""

from __future__ import annotations

import re
import socket

import pytest
from typer.testing import CliRunner

from exalign.errors import InputError
from exalign.judging.assess import app
from exalign.judging.comparisons import read_comparisons
from exalign.judging.study import Store
from judging.people.staging import Server


def invoke(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], env={"COLUMNS": "160"})
    if result.exception is not None:
        raise result.exception
    return result.output


def test_new_prints_links_that_open_and_export_reads_out_what_was_said(make_run, tmp_path):
    run = make_run(3)
    output = invoke("new", run, "--match", "exo:dpo,exo:sft", "--prompts", 2, "--assessors", "ann, bob", "--seed", 7)
    assert "4 comparisons, 8 assignments" in output
    links = dict(re.findall(r"(\w+)  http://127.0.0.1:8765/a/(\S+)", output))
    assert set(links) == {"ann", "bob"}
    store = Store(str(run / "assessment" / "study.sqlite"))
    for token in links.values():
        person = store.assessor(token)
        for position in (1, 2, 3):
            task = store.task(person.id, position)
            verdict = "left" if task.left_text.startswith("exo") else "right"
            store.submit(person.id, position, 0, {"verdict": verdict, "criteria": {"safe": "tie"}, "comment": ""})
    store.close()
    output = invoke("export", run, "--output", tmp_path / "c.jsonl")
    assert "6 comparisons" in output
    assert "ann: 3 of 4" in output
    assert {c.verdict for c in read_comparisons(tmp_path / "c.jsonl")} == {"first"}
    output = invoke("agreement", run)
    assert "exo : dpo" in output
    assert "exo : sft" in output
    assert "100.0 [34.2, 100.0]" in output  # Wilson's, of two prompts


def test_the_same_seed_makes_the_same_study_and_fewer_judgements_are_shared_out(make_run, tmp_path):
    run = make_run(6)
    shape = ["--match", "exo:dpo", "--prompts", 6, "--assessors", 3, "--per-item", 2, "--store"]
    assert "6 comparisons, 12 assignments" in invoke("new", run, *shape, tmp_path / "a.sqlite", "--seed", 1)
    invoke("new", run, *shape, tmp_path / "b.sqlite", "--seed", 1)
    stores = [Store(str(tmp_path / name)) for name in ("a.sqlite", "b.sqlite")]
    one, two = ([store.task(person, n).left_text for person in (1, 2, 3) for n in (1, 2, 3, 4)] for store in stores)
    assert one == two
    assert stores[0].standing("study") == {f"assessor-{i}": (0, 4) for i in (1, 2, 3)}
    for store in stores:
        store.close()


def test_a_number_is_one_that_can_be_counted_to(make_run):
    assert "  ²  http" in invoke("new", make_run(1), "--match", "exo:dpo", "--prompts", 1, "--assessors", "²")


def test_no_share_is_shown_beyond_what_a_share_can_be(make_run, tmp_path):
    run, store = make_run(5), tmp_path / "study.sqlite"
    output = invoke("new", run, "--match", "exo:dpo", "--prompts", 5, "--assessors", "ann", "--store", store)
    place = Store(str(store))
    person = place.assessor(re.search(r"/a/(\S+)", output)[1])
    for position in range(1, 6):
        task = place.task(person.id, position)
        good = task.left_text.startswith("exo") != (position == 1)
        place.submit(person.id, position, 0, {"verdict": "left" if good else "right", "criteria": {}, "comment": ""})
    place.close()
    output = invoke("agreement", store)
    assert "80.0 [" in output
    assert max(float(high) for high in re.findall(r", ([\d.]+)\]", output)) == 100.0
    assert "[-" not in output


def test_links_lead_to_the_address_that_is_given(make_run):
    output = invoke("new", make_run(1), "--match", "exo:dpo", "--prompts", 1, "--url", "https://a.example/")
    assert len(re.findall(r"  https://a\.example/a/\S+\n", output)) == 3
    assert "127.0.0.1" not in output


def test_link_renews(make_run):
    run = make_run(2)
    old = re.search(r"/a/(\S+)", invoke("new", run, "--match", "exo:dpo", "--prompts", 1, "--assessors", "ann"))[1]
    new = re.fullmatch(r"https://a.example/a/(\S+)\n", invoke("link", run, "ann", "--url", "https://a.example/"))[1]
    store = Store(str(run / "assessment" / "study.sqlite"))
    assert store.assessor(old) is None
    assert store.assessor(new).name == "ann"
    store.close()


def test_help_offers_no_completion_of_its_own():
    output = invoke("--help")
    assert "new" in output
    assert "completion" not in output


def test_wrong_input_is_one_sentence(make_run, tmp_path):
    run = make_run(2)
    with pytest.raises(InputError, match="make a study"):
        invoke("serve", run)
    with pytest.raises(InputError, match=r"--per-item: .* greater than or equal to 1"):
        invoke("new", run, "--match", "exo:dpo", "--per-item", 0)
    with pytest.raises(InputError, match="give a number"):
        invoke("new", run, "--match", "exo:dpo", "--assessors", "ann,,bob")
    with pytest.raises(InputError, match="Cannot write"):
        invoke("new", run, "--match", "exo:dpo", "--prompts", 1, "--store", "/dev/null/study.sqlite")
    invoke("new", run, "--match", "exo:dpo", "--prompts", 1, "--name", "one")
    invoke("new", run, "--match", "exo:dpo", "--prompts", 1, "--name", "two")
    with pytest.raises(InputError, match="say which with --name"):
        invoke("export", run, "--output", tmp_path / "c.jsonl")
    with pytest.raises(InputError, match="three is not one of them"):
        invoke("agreement", run, "--name", "three")
    with pytest.raises(InputError, match="no verdicts yet"):
        invoke("agreement", run, "--name", "two")
    with pytest.raises(InputError, match="already has a study named one"):
        invoke("new", run, "--match", "exo:dpo", "--prompts", 1, "--name", "one")
    (tmp_path / "not.sqlite").write_text("this is not a database, though it is long enough to be looked at" * 9)
    with pytest.raises(InputError, match="cannot be used"):
        invoke("serve", tmp_path / "not.sqlite")


def test_the_server_listens_on_loopback_only_and_keeps_tokens_out_of_its_output(store, make_study, tmp_path):
    token = store.create(make_study(num_prompts=1))["ann"]
    server = Server(str(tmp_path / "study.sqlite"), log=tmp_path / "log").start()
    try:
        with socket.create_connection(("127.0.0.1", server.port), timeout=10) as connection:
            connection.sendall(f"GET /a/{token}/1 HTTP/1.1\r\nHost: 127.0.0.1\r\nConnection: close\r\n\r\n".encode())
            head = connection.makefile("rb").readline()
        assert head.startswith(b"HTTP/1.1 200")
        with pytest.raises(InputError, match="is it taken"):
            invoke("serve", tmp_path / "study.sqlite", "--port", server.port)
        with pytest.raises(ConnectionRefusedError):  # 127.0.0.2 is this machine too, but not what was bound
            socket.create_connection(("127.0.0.2", server.port), timeout=10)
    finally:
        server.kill()
    assert token not in (tmp_path / "log").read_text()
