"""The hub as people use it, against a server on this machine that speaks its interface; each load is a process.

A test has an owner of repositories for itself, who has what all have, so that it finds nothing in the cache of another.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
import yaml
from peft import LoraConfig, get_peft_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

from evaluation.synthetic_run import World, write_run
from exalign.checksums import check_folder, read_sums, write_sums
from exalign.cli import app
from exalign.data.synthetic import build_tokenizer
from exalign.errors import InputError
from exalign.evaluation.evidence import build_evidence
from exalign.evaluation.run_folder import RunFolder
from exalign.models.loading import save_model
from exalign.report import write_report
from exalign.report.wording import interval
from exalign.run.publish import card as publish_card
from exalign.run.publish import publish
from faults.starts import Starter

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


TASK = """
task: quiz
dataset_path: g/quiz
dataset_name: hard
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: answer
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""
CARD = """---
configs:
- config_name: hard
  data_files:
  - {split: test, path: hard/test-*}
---
"""
BENCHMARK = """
from functools import partial
import lm_eval.tasks
from exalign.cli import main
lm_eval.tasks.TaskManager = partial(lm_eval.tasks.TaskManager, include_defaults=False)  # 14,000 names take ten seconds
main({arguments})
"""


class Hub:
    """Repositories as folders `models/…`, `datasets/…` of any owner, which it `refuses`, or `cut`s the files of."""

    def __init__(self, root: Path) -> None:
        self.refuses = self.cut = False
        self._port, owner = 0, self

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

        self._handler = Handler
        self.open()

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self._port}"

    def open(self) -> None:
        self._server = ThreadingHTTPServer(("127.0.0.1", self._port), self._handler)
        self._port = self._server.server_address[1]
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
            (root / "models" / asked["name"]).mkdir(parents=True, exist_ok=True)
            return 200, {}, dumped({"url": f"{self.address}/{asked['organization']}/{asked['name']}"})
        kind = parts.pop(0) if parts[0] in ("models", "datasets") else "models"
        name, rest = "/".join(parts[:2]), parts[2:]
        folder = root / kind / parts[1] if len(parts) > 1 else root / "none"
        if not folder.is_dir():
            return 404, {"X-Error-Code": "RepoNotFound"}, b""
        if self.refuses:
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
    model = root / "models" / "tiny"
    tokenizer = build_tokenizer(["Some text to make a tokenizer of."], vocab_size=300)
    config = AutoConfig.for_model("gpt2", n_layer=1, n_head=1, n_embd=8, n_positions=32, vocab_size=len(tokenizer))
    AutoModelForCausalLM.from_config(config).save_pretrained(model)
    tokenizer.save_pretrained(model)
    shards = root / "datasets" / "pairs" / "data"
    shards.mkdir(parents=True)
    for number in range(2):
        rows = {"prompt": [f"p{number}"], "chosen": ["yes"], "rejected": ["no"]}
        pq.write_table(pa.table(rows), shards / f"train-0000{number}-of-00002.parquet")
    for part, file in (("first-base", "train"), ("second-base", "train"), ("whole", "preference")):
        (root / "datasets" / "parts" / part).mkdir(parents=True)
        line = json.dumps({"prompt": part, "chosen": "yes", "rejected": "no"})
        (root / "datasets" / "parts" / part / f"{file}.jsonl").write_text(line + "\n")
    return root


@pytest.fixture(scope="module")
def server(repositories: Path) -> Hub:
    server = Hub(repositories)
    server.close()
    return server


@pytest.fixture
def hub(server: Hub) -> Iterator[Hub]:
    server.refuses = server.cut = False
    server.open()
    yield server
    server.close()


@pytest.fixture(scope="module")
def online(server: Hub, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Starter]:
    """Starts processes for which this is the hub."""
    home = str(tmp_path_factory.mktemp("home"))
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("HF_HUB_OFFLINE", raising=False)
        waits = {"HF_HUB_DOWNLOAD_TIMEOUT": "5", "HF_HUB_ETAG_TIMEOUT": "5"}
        starter = Starter(HF_ENDPOINT=server.address, HF_HOME=home, HF_HUB_DISABLE_XET="1", **waits)
    yield starter
    starter.close()


Load = Callable[[str, str], str]


@pytest.fixture
def load(online: Starter, tmp_path: Path) -> Load:
    """What a process prints that loads a name, or the `InputError` it ends with."""

    def load(code: str, name: str) -> str:
        # The hub's client waits 23 s in all between its attempts at a file.
        program = "import time\ntime.sleep = lambda _: None\nfrom exalign.errors import InputError\ntry:\n" + "".join(
            f"    {line}\n" for line in code.format(name=name).strip().splitlines()
        )
        program += "except InputError as error:\n    print('refused:', error)\n"
        ended = online.python(program, tmp_path / "log")
        assert ended.status == 0, ended.printed
        return ended.printed.strip().splitlines()[-1]

    return load


def test_a_model_and_its_tokenizer_are_loaded_once_and_then_without_the_hub(hub: Hub, load: Load) -> None:
    first = load(MODEL, "a/tiny")
    assert first == "3384 280"  # parameters, tokens
    hub.close()
    assert load(MODEL, "a/tiny") == first
    assert load(MODEL, "a/other") == (
        "refused: The Hugging Face hub did not deliver the tokenizer a/other, and it is not whole in the cache; "
        "check the connection, or give a local folder."
    )


def test_a_data_set_of_two_shards_is_loaded_once_and_then_without_the_hub(hub: Hub, load: Load) -> None:
    assert load(DATA, "b/pairs") == "['p0', 'p1']"
    hub.close()
    assert load(DATA, "b/pairs") == "['p0', 'p1']"


def test_one_folder_of_a_data_set_is_read(hub: Hub, load: Load) -> None:
    code = DATA.replace('source="{name}"', 'source="{name}", data_dir="second-base"')
    assert load(code, "c/parts") == "['second-base']"
    whole = code.replace("second-base", "whole")  # no word of it names a split
    assert load(whole, "c/parts") == "['whole']"
    other = code.replace("second-base", "third-base")
    assert load(other, "c/parts") == "refused: The data set c/parts has no folder third-base; correct `data_dir`."
    hub.close()
    assert load(code, "c/parts") == "['second-base']"


def test_a_policy_is_published_with_its_card_and_loaded_again(
    hub: Hub, load: Load, repositories: Path, tmp_path: Path
) -> None:
    write_run(tmp_path / "run", World(methods={"exo-rw": (0.5, (1.0, 2.0))}, num_prompts=6, pool=16, steps=2))
    evidence = build_evidence(tmp_path / "run", num_resamples=20)
    chosen = evidence.methods[0].points[0].step
    for step in (point.step for point in evidence.methods[0].points):
        policy = RunFolder(tmp_path / "run").policy("exo-rw", step)
        shutil.copytree(repositories / "models/tiny", policy, dirs_exist_ok=True)
        (policy / "README.md").write_text("what the training wrote")
        write_sums(policy)
    code = f"from exalign.run.publish import publish\nfrom pathlib import Path\nrun = Path('{tmp_path}/run')\n"
    published = f"print(publish(run, 'exo-rw', '{{name}}', step={chosen}))\n"
    assert load(code + published + MODEL, "f/aligned") == "3384 280"
    card = (repositories / "models/aligned/README.md").read_text()
    assert "README.md" in read_sums(repositories / "models/aligned")
    check_folder(repositories / "models/aligned")
    preview = publish(tmp_path / "run", "exo-rw", "f/never", step=chosen, preview=True)
    assert preview.startswith(card) and "model.safetensors  " in preview and "README.md  " not in preview
    arguments = ["push", str(tmp_path / "run"), "exo-rw", "f/never", "--step", str(chosen), "--preview"]
    assert CliRunner().invoke(app, arguments).output == preview
    assert not (repositories / "models/never").exists()
    front = yaml.safe_load(card.split("---")[1])
    assert front["library_name"] == "transformers" and "exalign" in front["tags"]
    assert f"| {interval(evidence.methods[0].points[0].kl)} |" in card
    assert str(tmp_path) not in card
    own = {"critic": {"source": str(tmp_path)}, "other": {"source": "g/critic"}}
    told = replace(evidence.methods[0], settings=own)
    written = publish_card(evidence, told, told.points[0], RunFolder(tmp_path / "run").recipe_values())
    assert str(tmp_path) not in written and "g/critic" in written
    elsewhere = {
        "model": {"source": "/home/ann/model"},
        "data": {"prompts": [{"source": "secret.csv"}, {"source": "g/h"}]},
    }
    own = {"critic": {"source": "/home/ann/critic"}}  # of a machine where this one looks for nothing
    written = publish_card(evidence, replace(told, settings=own), told.points[0], elsewhere)
    assert "ann" not in written and "secret" not in written and "data: g/h." in written
    adapter = RunFolder(tmp_path / "run").policy("exo-rw", chosen)
    shutil.rmtree(adapter)
    base = AutoModelForCausalLM.from_pretrained(repositories / "models/tiny")
    adapted = get_peft_model(base, LoraConfig(r=2, task_type="CAUSAL_LM"))
    adapted.peft_config["default"].base_model_name_or_path = "f/tiny"
    adapted.save_pretrained(adapter, save_embedding_layers=False)
    assert load(code + published + MODEL, "f/adapter") == "3384 280"
    card = (repositories / "models/adapter/README.md").read_text()
    assert yaml.safe_load(card.split("---")[1])["library_name"] == "peft"
    with pytest.raises(InputError, match="'dpo' is no evaluated method of this run; there are exo-rw"):
        publish(tmp_path / "run", "dpo", "f/other")
    with pytest.raises(InputError, match="exo-rw was not evaluated at step 999"):
        publish(tmp_path / "run", "exo-rw", "f/other", step=999)


def test_what_was_lost_on_a_task_from_the_hub_is_in_the_report(
    hub: Hub, online: Starter, repositories: Path, tmp_path: Path
) -> None:
    """Two models by hand: one to which all tokens are alike picks the short choice, one that loves `!` the other."""
    pytest.importorskip("lm_eval", reason="the harness is in the extra 'lm-eval'")
    run = RunFolder(write_run(tmp_path / "run", World(methods={"exo-rw": (0.5, (1.0,))}, num_prompts=6, pool=0)))
    run.recipe.write_text(run.recipe_text() + f"model: {{source: {tmp_path}/alike}}\n")
    policy = AutoModelForCausalLM.from_pretrained(repositories / "models/tiny")
    tokenizer = AutoTokenizer.from_pretrained(repositories / "models/tiny")
    with torch.no_grad():
        for weight in policy.parameters():
            weight.zero_()
        policy.transformer.ln_f.bias[0] = 1.0  # what the head reads, whatever came before
        save_model(policy, tokenizer, tmp_path / "alike", card="")
        policy.transformer.wte.weight[tokenizer.convert_tokens_to_ids("!"), 0] = 10.0
    save_model(policy, tokenizer, run.policy("exo-rw", 120), card="")
    (repositories / "datasets/quiz/hard").mkdir(parents=True)
    rows = [{"question": f"{n}?", "choices": ["xyz", "!" * 9], "answer": int(n > 3)} for n in range(6)]
    pq.write_table(pa.Table.from_pylist(rows), repositories / "datasets/quiz/hard/test-00000-of-00001.parquet")
    (repositories / "datasets/quiz/README.md").write_text(CARD)
    (tmp_path / "quiz.yaml").write_text(TASK)
    build_evidence(run.path, num_resamples=20)
    command = ["benchmark", str(run.path), "--tasks", "quiz", "--include-path", str(tmp_path)]
    ended = online.python(BENCHMARK.format(arguments=command), tmp_path / "log")
    assert ended.status == 0 and "What was lost" in ended.printed, ended.printed
    build_evidence(run.path, num_resamples=20)
    page = write_report(run.path).read_text()
    assert 'id="benchmark"' in page and "quiz" in page
    found = run.read_benchmark()
    assert found is not None
    (row,) = found.rows
    assert (row.policy, row.task, row.metric, row.paired) == ("exo-rw@120", "quiz", "acc", True)
    assert row.before is not None and row.difference is not None
    assert [row.before[0], row.after[0]] == pytest.approx([4 / 6, 2 / 6])  # four were lost and two were won
    error = math.sqrt((4 * (2 / 3) ** 2 + 2 * (4 / 3) ** 2) / 5 / 6)
    assert [row.difference.estimate, row.difference.high] == pytest.approx([-1 / 3, -1 / 3 + 1.96 * error])


def test_what_is_gated_or_missing_is_one_sentence_that_says_what_to_do(hub: Hub, load: Load) -> None:
    for code, kind in ((MODEL, "tokenizer"), (DATA, "data set")):
        assert load(code, "d/none") == (
            f"refused: There is no {kind} d/none on the Hugging Face hub, or none that you may read; check its name."
        )
    hub.refuses = True
    for code, kind, name in ((MODEL, "tokenizer", "d/tiny"), (DATA, "data set", "d/pairs")):
        said = load(code, name)
        assert said.startswith(f"refused: The {kind} {name} is gated on the Hugging Face hub: accept its terms at ")
        assert "HF_TOKEN" in said


def test_a_connection_that_is_cut_is_one_sentence(hub: Hub, load: Load) -> None:
    hub.cut = True
    said = load(MODEL, "e/tiny")
    assert said.startswith("refused: ")
    assert "e/tiny" in said
