"""The page over HTTP: who may see what, what a form may say, and that texts stay texts."""

from __future__ import annotations

import re
from urllib.parse import urlencode

import pytest
from sqlalchemy.exc import OperationalError
from starlette.testclient import TestClient

from exalign.errors import InputError
from exalign.judging.assess import allowed_hosts, create_app, read_answer, turns
from exalign.judging.study import Store

HOST = "http://127.0.0.1"


@pytest.fixture
def study(make_study):
    return make_study()


@pytest.fixture
def tokens(store, study):
    return store.create(study)


@pytest.fixture
def client(store, tokens):
    app = create_app(store, allowed_hosts=allowed_hosts("127.0.0.1", None))
    with TestClient(app, base_url=HOST, raise_server_exceptions=False, follow_redirects=False) as client:
        yield client


def form(client, address: str, **fields: str) -> dict[str, str]:
    """The hidden fields of the verdict form at an address, and these."""
    page = client.get(address).text.partition('id="verdict"')[2]
    hidden = dict(re.findall(r'type="hidden" name="(\w+)" value="([^"]*)"', page))
    return {**hidden, **fields}


def test_a_link_leads_to_the_first_open_comparison(client, tokens):
    answer = client.get(f"/a/{tokens['ann']}")
    assert (answer.status_code, answer.headers["location"]) == (303, f"/a/{tokens['ann']}/1")
    assert "Comparison 1 of 12" in client.get(answer.headers["location"]).text


def test_wrong_and_missing_tokens_show_the_same_nothing(client, tokens):
    token = tokens["ann"]
    addresses = ["/", "/a", "/a/", "/a/x", f"/a/{token[:-1]}", f"/a/{token}x", f"/a/{token.swapcase()}/1", "/a/%00/1"]
    addresses += [f"/a/{token}/0", f"/a/{token}/13", f"/a/{token}/99999999999999999999", f"/a/{token}/-1", "/admin"]
    answers = [client.get(address) for address in addresses]
    assert {answer.status_code for answer in answers} == {404}
    assert len({answer.text for answer in answers}) == 1
    assert "Comparison" not in answers[0].text
    assert client.post("/a/x/1", data={"verdict": "left"}).text == answers[0].text


def test_the_page_is_blind(client, tokens, study):
    page = client.get(f"/a/{tokens['ann']}/1").text
    for answer in ("answers prompt",):  # the made-up answers name their systems; take them out, nothing else may
        page = re.sub(rf"\w+ {answer} \d+\.", "", page)
    assert not re.search(r"\b(exo|dpo|ppo|sft)\b", page)


def test_every_response_carries_the_security_headers(client, tokens, store):
    responses = [
        client.get(f"/a/{tokens['ann']}/1"),
        client.get("/nothing"),
        client.get("/static/assess.js"),
        client.post(f"/a/{tokens['ann']}/1", data={}),
        client.get("/", headers={"host": "evil.example"}),
    ]
    assert [r.status_code for r in responses] == [200, 404, 200, 400, 400]
    for response in responses:
        policy = response.headers["content-security-policy"]
        assert "default-src 'none'" in policy
        assert "unsafe" not in policy
        assert "frame-ancestors 'none'" in policy
        assert response.headers["x-content-type-options"] == "nosniff"
        assert response.headers["referrer-policy"] == "same-origin"
    assert responses[0].headers["cache-control"] == "no-store"
    assert "set-cookie" not in responses[0].headers


def test_the_page_has_no_inline_script_or_style(client, tokens):
    page = client.get(f"/a/{tokens['ann']}/1").text
    assert re.findall(r"<script[^>]*>([^<]*)</script>", page) == [""]
    assert not re.search(r"<style|\sstyle=|\son\w+=", page)


def test_a_verdict_leads_on_and_is_stored(client, tokens, store):
    address = f"/a/{tokens['ann']}/1"
    answer = client.post(address, data=form(client, address, verdict="left", safe="tie", comment="a\r\nb"))
    assert (answer.status_code, answer.headers["location"]) == (303, f"/a/{tokens['ann']}/2")
    (comparison,) = store.comparisons("study")
    assert (comparison.judge, comparison.shown_verdict, comparison.comment) == ("ann", "left", "a\nb")
    assert comparison.criteria == {"safe": "tie"}
    page = client.get(address).text
    assert "You have judged this one" in page
    assert re.search(r'id="verdict-left"[^>]* checked', page)


def test_the_script_gets_the_next_address_as_json(client, tokens):
    address = f"/a/{tokens['ann']}/1"
    answer = client.post(address, data=form(client, address, verdict="tie"), headers={"accept": "application/json"})
    assert answer.json() == {"next": f"/a/{tokens['ann']}/2"}


def test_an_old_window_does_not_overwrite_a_newer_verdict(client, tokens, store):
    address = f"/a/{tokens['ann']}/1"
    old = form(client, address, verdict="right")
    client.post(address, data=form(client, address, verdict="left"))
    answer = client.post(address, data=old)
    assert answer.headers["location"] == f"{address}?conflict"
    assert "judged in another window" in client.get(answer.headers["location"]).text
    assert [c.shown_verdict for c in store.comparisons("study")] == ["left"]


def test_one_assessor_cannot_act_for_another(client, tokens, store):
    anns, bobs = f"/a/{tokens['ann']}/1", f"/a/{tokens['bob']}/1"
    fields = form(client, anns, verdict="left")
    assert client.post(bobs, data=fields).status_code == 403
    assert list(store.comparisons("study")) == []


@pytest.mark.parametrize(
    "headers",
    [
        {"origin": "https://evil.example"},
        {"origin": "null"},
        {"origin": "http://["},
        {"sec-fetch-site": "cross-site"},
        {"sec-fetch-site": "same-site"},
    ],
)
def test_a_form_from_another_site_is_refused(client, tokens, store, headers):
    address = f"/a/{tokens['ann']}/1"
    fields = form(client, address, verdict="left")
    for where in (address, f"{address}/draft", f"{address}/undo"):
        assert client.post(where, data=fields, headers=headers).status_code == 403
    assert client.post(address, data=fields, headers={"origin": HOST}).status_code == 303


def test_a_form_without_its_token_is_refused(client, tokens):
    address = f"/a/{tokens['ann']}/1"
    fields = form(client, address, verdict="left")
    for wrong in ("", "0" * 64, "é", fields["form_token"] + "0"):
        assert client.post(address, data={**fields, "form_token": wrong}).status_code == 403


@pytest.mark.parametrize(
    "change",
    [
        {"verdict": ""},
        {"verdict": "first"},
        {"safe": "yes"},
        {"revision": "x"},
        {"revision": "-1"},
        {"revision": "99999999999"},
        {"revision": "٣"},
        {"comment": "x" * 10_001},
        {"comment": "x" * 110_000},
    ],
)
def test_a_form_that_the_page_cannot_have_sent_is_refused(client, tokens, store, change):
    address = f"/a/{tokens['ann']}/1"
    fields = form(client, address, verdict="left")
    assert client.post(address, data={**fields, **change}).status_code == 400
    assert list(store.comparisons("study")) == []


def test_the_longest_comment_is_stored_in_every_script(client, tokens, store):
    address, comment = f"/a/{tokens['ann']}/1", "字" * 10_000
    assert client.post(address, data=form(client, address, verdict="left", comment=comment)).status_code == 303
    assert store.comparisons("study")[0].comment == comment


@pytest.mark.parametrize("body", [b"\xff\xfe=1", b"&".join(b"a%d=1" % i for i in range(99)), b""])
def test_a_body_that_is_no_form_is_refused(client, tokens, body):
    headers = {"content-type": "application/x-www-form-urlencoded"}
    assert client.post(f"/a/{tokens['ann']}/1", content=body, headers=headers).status_code == 400
    fields = urlencode(form(client, f"/a/{tokens['ann']}/1", verdict="left")).encode()
    plain = {"content-type": "text/plain"}
    assert client.post(f"/a/{tokens['ann']}/1", content=fields, headers=plain).status_code == 400


def test_a_draft_is_shown_again_and_ends_with_the_verdict(client, tokens, store):
    address = f"/a/{tokens['ann']}/1"
    fields = form(client, address, verdict="left", fluent="right", comment="<b>half")
    assert client.post(f"{address}/draft", data=fields).status_code == 204
    page = client.get(address).text
    assert re.search(r'id="fluent-right"[^>]* checked', page)
    assert "&lt;b&gt;half</textarea>" in page
    assert list(store.comparisons("study")) == []
    client.post(address, data=fields)
    assert client.post(f"{address}/draft", data={**fields, "comment": "late"}).status_code == 409
    assert "late" not in client.get(address).text


def test_undo_leads_back_and_pressing_it_twice_takes_back_one(client, tokens, store):
    base = f"/a/{tokens['ann']}"
    for position in (1, 2):
        client.post(f"{base}/{position}", data=form(client, f"{base}/{position}", verdict="left"))
    page = client.get(f"{base}/3").text
    assert f'action="{base}/2/undo"' in page
    fields = dict(re.findall(r'type="hidden" name="(\w+)" value="([^"]*)"', page.partition("</header>")[0]))
    for _ in range(2):
        assert client.post(f"{base}/2/undo", data=fields).headers["location"] == f"{base}/2"
    assert len(list(store.comparisons("study"))) == 1
    assert re.search(r'id="verdict-left"[^>]* checked', client.get(f"{base}/2").text)


def test_the_end_thanks_and_lets_one_look_again(client, tokens):
    base = f"/a/{tokens['ann']}"
    for position in range(1, 13):
        last = client.post(f"{base}/{position}", data=form(client, f"{base}/{position}", verdict="tie"))
    assert last.headers["location"] == f"{base}/done"
    assert client.get(base).headers["location"] == f"{base}/done"
    assert "Thank you" in client.get(f"{base}/done").text


def test_a_database_that_is_away_is_said_so_that_the_script_tries_again(client, tokens, store, tmp_path):
    store.close()
    for file in tmp_path.glob("study.sqlite*"):
        file.unlink()
    answer = client.get(f"/a/{tokens['ann']}/1")
    assert answer.status_code == 503
    assert "Nothing that was saved is lost" in answer.text
    with pytest.raises(OperationalError):
        store.progress(1)


def test_an_unknown_choice_is_no_answer():
    assert read_answer({"verdict": "left"}, finished=True) == {"verdict": "left", "criteria": {}, "comment": ""}
    assert read_answer({}, finished=False) == {"verdict": None, "criteria": {}, "comment": ""}
    assert read_answer({}, finished=True) is None
    assert read_answer({"verdict": "left", "helpful": "no"}, finished=False) is None


def test_turns_of_prompts():
    assert turns("Plain\n\nHuman: no") == [("", "Plain\n\nHuman: no")]
    assert turns("Human: a\n\nb\n\nAssistant: c") == [("user", "a\n\nb"), ("assistant", "c")]
    assert turns(({"role": "system", "content": "s"},)) == [("system", "s")]
    assert turns("") == [("", "")]
    call = {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "add", "arguments": {"a": 1}}}]}
    assert turns((call, {**call, "content": "See:"})) == [
        ("assistant", 'add({"a": 1})'), ("assistant", 'See:\nadd({"a": 1})')
    ]  # fmt: skip


def test_only_loopback_is_served_without_an_address():
    assert allowed_hosts("localhost", None) == ["127.0.0.1", "localhost"]
    assert allowed_hosts("0.0.0.0", "https://assess.example.org:8443/x")[-1] == "assess.example.org"
    with pytest.raises(InputError, match="IPv4"):
        allowed_hosts("::1", None)
    for host, url in (
        ("0.0.0.0", None),
        ("example.org", None),
        ("127.0.0.1", "assess.example.org"),
        ("127.0.0.1", "http://[x"),
    ):
        with pytest.raises(InputError, match="--url"):
            allowed_hosts(host, url)


def test_tokens_of_other_studies_in_the_store_open_their_own(client, store, make_study, tokens, study):
    object.__setattr__(study, "name", "second study")
    other: dict[str, str] = Store.create(store, study)
    assert "second study" in client.get(f"/a/{other['ann']}/1").text
    assert "second study" not in client.get(f"/a/{tokens['ann']}/1").text
