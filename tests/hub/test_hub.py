"""The hub as people use it, against a server on this machine that speaks its interface; each load is a process."""

from __future__ import annotations

import base64
import hashlib
import json
import os
import shutil
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from transformers import AutoConfig, AutoModelForCausalLM

from evaluation.synthetic_run import World, write_run
from exalign.data.synthetic import build_tokenizer
from exalign.errors import InputError
from exalign.evaluation.evidence import build_evidence
from exalign.evaluation.run_folder import RunFolder
from exalign.report.wording import interval
from exalign.run.publish import publish

COMMIT = "0123456789abcdef0123456789abcdef01234567"
MODEL = """
from exalign.models.loading import load_policy, load_tokenizer
from exalign.models.model_settings import ModelSettings
tokenizer = load_tokenizer("{name}")
print(load_policy(ModelSettings(source="{name}"), tokenizer).num_parameters(), len(tokenizer))
"""
DATA = """
from collections import Counter
from exalign.data.reading import DataSettings, read_source
print([record.prompt for record in read_source(DataSettings(source="{name}"), Counter())])
"""


class Hub:
    """Repositories as folders `models/…`, `datasets/…`; `refused` ones answer 403, and `cut` breaks off files."""

    def __init__(self, root: Path) -> None:
        self.refused: set[str] = set()
        self.cut = False
        owner = self

        class Handler(BaseHTTPRequestHandler):
            def answer(self) -> None:
                length = int(self.headers.get("content-length") or 0)
                body = self.rfile.read(length).decode() if length else ""
                status, headers, content = owner.reply(root, unquote(self.path), body)
                self.send_response(status)
                for name, value in headers.items():
                    self.send_header(name, value)
                self.send_header("content-length", str(len(content)))
                self.end_headers()
                if self.command != "HEAD":
                    cut = owner.cut and "/resolve/" in self.path and len(content) > 2000
                    self.wfile.write(content[: len(content) // 2] if cut else content)
                    self.close_connection = True

            do_GET = do_HEAD = do_POST = answer  # noqa: N815

            def log_message(self, *_: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.address = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True).start()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def reply(self, root: Path, path: str, body: str) -> tuple[int, dict[str, str], bytes]:
        address = urlsplit(path)
        parts = address.path.strip("/").split("/")
        api = parts[0] == "api"
        parts = parts[api:]
        if parts == ["validate-yaml"]:
            return 200, {}, dumped({"errors": [], "warnings": []})
        if parts == ["repos", "create"]:
            asked = json.loads(body)
            made = root / "models" / asked["organization"] / asked["name"]
            made.mkdir(parents=True, exist_ok=True)
            return 200, {}, dumped({"url": f"{self.address}/{asked['organization']}/{asked['name']}"})
        kind = parts.pop(0) if parts[0] in ("models", "datasets") else "models"
        name, rest = "/".join(parts[:2]), parts[2:]
        folder = root / kind / name
        if not folder.is_dir():
            return 404, {"X-Error-Code": "RepoNotFound"}, b""
        if name in self.refused:
            return 403, {"X-Error-Code": "GatedRepo"}, b""
        if rest[:1] == ["preupload"]:
            asked = [{"path": file["path"], "uploadMode": "regular"} for file in json.loads(body)["files"]]
            return 200, {}, dumped({"files": [{**file, "shouldIgnore": False} for file in asked]})
        if rest[:1] == ["commit"]:
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    (folder / line["value"]["path"]).write_bytes(base64.b64decode(line["value"]["content"]))
            made_url = f"{self.address}/{name}/commit/{COMMIT}"
            return 200, {}, dumped({"commitUrl": made_url, "commitOid": COMMIT, "pullRequestUrl": None})
        files = sorted(file for file in folder.rglob("*") if file.is_file())
        if rest[:1] == ["resolve"]:
            file = folder.joinpath(*rest[2:])
            if not file.is_file():
                return 404, {"X-Error-Code": "EntryNotFound", "X-Repo-Commit": COMMIT}, b""
            content = file.read_bytes()
            return 200, {"ETag": f'"{hashlib.sha256(content).hexdigest()}"', "X-Repo-Commit": COMMIT}, content
        names = [file.relative_to(folder).as_posix() for file in files]
        if rest[:1] == ["tree"]:
            below = folder.joinpath(*rest[2:])
            if not below.is_dir():
                return 404, {"X-Error-Code": "EntryNotFound"}, b""
            deep = "recursive=true" in address.query.lower()
            return 200, {}, dumped([entry_of(file, folder) for file in (below.rglob if deep else below.glob)("*")])
        if rest[:1] == ["paths-info"]:
            return 200, {}, dumped([entry_of(file, folder) for file in files if file.name in unquote(body)])
        if rest and rest[0] != "revision":
            return 404, {"X-Error-Code": "EntryNotFound"}, b""
        siblings = [{"rfilename": name} for name in names]
        return 200, {}, dumped({"id": name, "sha": COMMIT, "siblings": siblings, "private": False, "gated": False})


def entry_of(file: Path, folder: Path) -> dict[str, Any]:
    kind = "directory" if file.is_dir() else "file"
    return {"type": kind, "path": file.relative_to(folder).as_posix(), "size": file.stat().st_size, "oid": COMMIT}


def dumped(value: Any) -> bytes:
    return json.dumps(value).encode()


@pytest.fixture(scope="module")
def repositories(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("hub")
    model = root / "models" / "someone" / "tiny"
    tokenizer = build_tokenizer(["Some text to make a tokenizer of."], vocab_size=300)
    config = AutoConfig.for_model("gpt2", n_layer=1, n_head=1, n_embd=8, n_positions=32, vocab_size=len(tokenizer))
    AutoModelForCausalLM.from_config(config).save_pretrained(model)
    tokenizer.save_pretrained(model)
    shards = root / "datasets" / "someone" / "pairs" / "data"
    shards.mkdir(parents=True)
    for number in range(2):
        rows = {"prompt": [f"p{number}"], "chosen": ["yes"], "rejected": ["no"]}
        pq.write_table(pa.table(rows), shards / f"train-0000{number}-of-00002.parquet")
    for part, file in (("first-base", "train"), ("second-base", "train"), ("whole", "preference")):
        (root / "datasets" / "someone" / "parts" / part).mkdir(parents=True)
        line = json.dumps({"prompt": part, "chosen": "yes", "rejected": "no"})
        (root / "datasets" / "someone" / "parts" / part / f"{file}.jsonl").write_text(line + "\n")
    return root


@pytest.fixture
def hub(repositories: Path):
    made = Hub(repositories)
    yield made
    made.close()


def load(code: str, name: str, address: str, home: Path) -> str:
    """What a process prints that loads `name`, or the `InputError` it ends with."""
    program = "from exalign.errors import InputError\ntry:\n" + "".join(
        f"    {line}\n" for line in code.format(name=name).strip().splitlines()
    )
    program += "except InputError as error:\n    print('refused:', error)\n"
    env = {**os.environ, "HF_ENDPOINT": address, "HF_HOME": str(home), "HF_HUB_DISABLE_XET": "1"}
    env |= {"PYTHONPATH": os.pathsep.join(sys.path), "HF_HUB_DOWNLOAD_TIMEOUT": "5", "HF_HUB_ETAG_TIMEOUT": "5"}
    env.pop("HF_HUB_OFFLINE", None)
    ended = subprocess.run([sys.executable, "-c", program], env=env, capture_output=True, text=True, timeout=300)
    assert ended.returncode == 0, ended.stderr[-2000:]
    return ended.stdout.strip().splitlines()[-1]


def test_a_model_and_its_tokenizer_are_loaded_once_and_then_without_the_hub(hub: Hub, tmp_path: Path) -> None:
    first = load(MODEL, "someone/tiny", hub.address, tmp_path)
    assert first == "3384 280"  # parameters, tokens
    hub.close()
    assert load(MODEL, "someone/tiny", hub.address, tmp_path) == first
    assert load(MODEL, "someone/other", hub.address, tmp_path) == (
        "refused: The Hugging Face hub did not deliver the tokenizer someone/other, and it is not whole in the cache; "
        "check the connection, or give a local folder."
    )


def test_a_data_set_of_two_shards_is_loaded_once_and_then_without_the_hub(hub: Hub, tmp_path: Path) -> None:
    assert load(DATA, "someone/pairs", hub.address, tmp_path) == "['p0', 'p1']"
    hub.close()
    assert load(DATA, "someone/pairs", hub.address, tmp_path) == "['p0', 'p1']"


def test_one_folder_of_a_data_set_is_read(hub: Hub, tmp_path: Path) -> None:
    code = DATA.replace('source="{name}"', 'source="{name}", data_dir="second-base"')
    assert load(code, "someone/parts", hub.address, tmp_path) == "['second-base']"
    whole = code.replace("second-base", "whole")  # no word of it names a split
    assert load(whole, "someone/parts", hub.address, tmp_path) == "['whole']"
    other = code.replace("second-base", "third-base")
    assert load(other, "someone/parts", hub.address, tmp_path) == (
        "refused: The data set someone/parts has no folder third-base; correct `data_dir`."
    )
    hub.close()
    assert load(code, "someone/parts", hub.address, tmp_path) == "['second-base']"


def test_a_policy_is_published_with_its_card_and_loaded_again(hub: Hub, repositories: Path, tmp_path: Path) -> None:
    write_run(tmp_path / "run", World(methods={"exo-rw": (0.5, (1.0, 2.0))}, num_prompts=6, pool=16, steps=2))
    evidence = build_evidence(tmp_path / "run", num_resamples=20)
    chosen = evidence.methods[0].points[0].step
    for step in (point.step for point in evidence.methods[0].points):
        shutil.copytree(
            repositories / "models/someone/tiny", RunFolder(tmp_path / "run").policy("exo-rw", step), dirs_exist_ok=True
        )
    code = f"from exalign.run.publish import publish\nfrom pathlib import Path\nrun = Path('{tmp_path}/run')\n"
    published = f"print(publish(run, 'exo-rw', '{{name}}', step={chosen}))\n"
    assert load(code + published + MODEL, "me/aligned", hub.address, tmp_path / "home") == "3384 280"
    card = (repositories / "models/me/aligned/README.md").read_text()
    front = yaml.safe_load(card.split("---")[1])
    assert front["library_name"] == "transformers" and "exalign" in front["tags"]
    assert f"| {interval(evidence.methods[0].points[0].kl)} |" in card
    assert str(tmp_path) not in card
    with pytest.raises(InputError, match="'dpo' is no evaluated method of this run; there are exo-rw"):
        publish(tmp_path / "run", "dpo", "me/other")
    with pytest.raises(InputError, match="exo-rw was not evaluated at step 999"):
        publish(tmp_path / "run", "exo-rw", "me/other", step=999)


def test_what_is_gated_or_missing_is_one_sentence_that_says_what_to_do(hub: Hub, tmp_path: Path) -> None:
    for code, kind in ((MODEL, "tokenizer"), (DATA, "data set")):
        assert load(code, "someone/none", hub.address, tmp_path) == (
            f"refused: There is no {kind} someone/none on the Hugging Face hub, or none that you may read; "
            "check its name."
        )
    hub.refused = {"someone/tiny", "someone/pairs"}
    for code, kind, name in ((MODEL, "tokenizer", "someone/tiny"), (DATA, "data set", "someone/pairs")):
        said = load(code, name, hub.address, tmp_path)
        assert said.startswith(f"refused: The {kind} {name} is gated on the Hugging Face hub: accept its terms at ")
        assert "HF_TOKEN" in said


def test_a_connection_that_is_cut_is_one_sentence(hub: Hub, tmp_path: Path) -> None:
    hub.cut = True
    said = load(MODEL, "someone/tiny", hub.address, tmp_path)
    assert said.startswith("refused: ")
    assert "someone/tiny" in said
