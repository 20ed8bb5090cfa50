"""Inputs of people who do this job that went wrong elsewhere, each run through the command line: what its README says
is right is asserted here. The inputs stand beside the checkout and are skipped where they are not.
"""

from __future__ import annotations

import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from _thread import interrupt_main
from collections.abc import Callable, Iterator
from datetime import datetime
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from rich.console import Console
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GenerationConfig,
)

from evaluation.synthetic_run import World, write_run
from exalign import cli
from exalign.data.store import read_records
from exalign.data.tokenization import pin_date
from exalign.rollout.scorers import open_scorer
from exalign.rollout.settings import ScorerSettings

FIELD = Path(__file__).parents[2] / "../shared/field"


class Printed(NamedTuple):
    status: int
    out: str
    err: str

    @property
    def sentence(self) -> str:
        """The one line that a refused command ends with."""
        assert self.status == 2 and "Traceback" not in self.err, self
        (line,) = (line for line in self.err.splitlines() if line.startswith("error: "))
        return line

    @property
    def stages(self) -> list[str]:
        return re.findall(r"^✓ (\S+)", self.out, re.M)

    def shown(self, name: str) -> list[str]:
        """The texts of the prompts or completions that `inspect` prints under a name like this, as they are joined."""
        lines = re.findall(rf"^│ (?:{name})[^:]*: (.*?) *│$", self.out, re.M)
        return [re.sub("·(?!·)", "", line).replace("\\n", "\n") for line in lines]

    def count(self, name: str) -> int:
        found = re.search(rf"{re.escape(name)} +([\d,]+)", self.out) or re.search(
            rf"([\d,]+) {re.escape(name)}\b", self.out
        )
        return int(found[1]) if found else 0


Run = Callable[..., Printed]


@pytest.fixture
def case(tmp_path: Path, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of the case that the test is named after, as the working directory, with `../mat` beside it."""
    number = re.match(r"test_(\d\d)", request.node.name)
    assert number
    if not FIELD.is_dir():
        pytest.skip("the inputs from the field are not on this machine")
    (source,) = FIELD.glob(f"{number[1]}-*")
    copy = tmp_path / source.name
    shutil.copytree(source, copy, ignore=shutil.ignore_patterns("run*", "home", "*.txt"))
    (tmp_path / "mat").symlink_to((FIELD / "mat").resolve())
    monkeypatch.chdir(copy)
    yield copy
    pin_date(None)


@pytest.fixture
def exalign(case: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setattr(cli, "console", Console(width=2000))

    def run(*arguments: str) -> Printed:
        status: Any = 0
        try:
            cli.main(list(arguments))
        except SystemExit as exit_:
            status = exit_.code
        return Printed(status, *capfd.readouterr())

    return run


def lines(file: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(file).read_text().splitlines()]


def test_01_a_prompt_before_several_turns_stays(exalign: Run) -> None:
    printed = exalign("inspect", "rows.jsonl", "--model", "../mat/tok-bos")
    (prompt,) = printed.shown("prompt")
    assert re.findall(r"(user|assistant)<\|/h\|>\s*([^<]*)", prompt) == [
        ("user", "Hello"), ("assistant", "Hi"), ("user", "How are you?"), ("assistant", ""),
    ]  # fmt: skip
    assert printed.shown("completion") == ["Fine</s>", "Bad</s>"]


def test_02_the_system_message_of_the_prompt_stays(exalign: Run) -> None:
    printed = exalign("inspect", "rows.jsonl", "--model", "../mat/tok-bos")
    (prompt,) = printed.shown("prompt")
    assert prompt.count("Answer as a pirate.") == prompt.count("Hello") == 1
    assert printed.shown("completion") == ["Arr</s>", "Hi</s>"]


def test_03_columns_with_content_are_named_and_can_be_joined(exalign: Run) -> None:
    printed = exalign("reward", "recipe.yaml", "--run", "run")
    assert printed.status == 0 and "4 column input kept beside" in printed.out
    joined = r"""data.preferences.columns={prompt: 'join(`"\n"`, [instruction, input])'}"""
    assert exalign("reward", "recipe.yaml", "--run", "joined", joined).status == 0
    prompts = [record.prompt for record in read_records(Path("joined/preferences/records"))]
    assert prompts == [f"Translate to English.\nHallo {i}" for i in range(4)]
    (prompt,) = exalign("inspect", "system.jsonl", "--model", "../mat/tok-bos").shown("prompt")
    assert prompt.index("Answer as a pirate.") < prompt.index("Hello")


def test_04_messages_as_json_text_are_messages(exalign: Run) -> None:
    for file in ("rows.csv", "rows.jsonl"):
        printed = exalign("inspect", file, "--model", "../mat/tok-bos")
        (prompt,) = printed.shown("prompt")
        assert re.findall(r"user<\|/h\|>\s*([^<]*)", prompt) == ["Hello"]
        assert printed.shown("completion") == ["Hi</s>", "Go away</s>"]
    refused = exalign("inspect", "repr.csv", "--model", "../mat/tok-bos")
    assert "repr.csv, row 1: `chosen` holds messages as Python prints them" in refused.sentence


@pytest.mark.parametrize("file", ["rows.jsonl", "rows.csv"])
def test_06_a_null_answer_is_a_row_less(exalign: Run, file: str) -> None:
    printed = exalign("inspect", file, "--model", "../mat/tok-bos")
    assert printed.status == 0
    assert [printed.count(name) for name in ("rows", "records", "pairs with empty side")] == [3, 2, 1]


def test_07_a_file_held_out_by_name_is_not_trained_on(exalign: Run) -> None:
    for folder, other in (("folder", "validation"), ("folder2", "test")):
        assert re.search(
            rf"several splits \(.*{other}.*\): name one",
            exalign("inspect", folder, "--model", "../mat/tok-bos").sentence,
        )
        held = exalign("inspect", folder, "chat=false", "--split", other, "--model", "../mat/tok-bos")
        trained = exalign("inspect", folder, "chat=false", "--split", "train", "--model", "../mat/tok-bos")
        assert held.shown("prompt") == ["<s>HELD OUT 0", "<s>HELD OUT 1"]
        assert trained.shown("prompt") == ["<s>T0", "<s>T1", "<s>T2"]


def test_09_reasoning_that_the_template_would_cut_stays(exalign: Run) -> None:
    printed = exalign("inspect", "sft.jsonl", "--model", "../mat/tok-think")
    (answer,) = printed.shown("completion")
    assert answer == "<think>\nSix sevens are forty-two.\n</think>\n\n42</s>"
    assert printed.count("answers changed by template") == 1
    pair = exalign("inspect", "pair.jsonl", "--model", "../mat/tok-think")
    assert pair.shown("completion") == ["<think>six sevens are forty-two</think>42</s>", "<think>I guess</think>42</s>"]
    assert pair.count("pairs equal as tokens") == 0


@pytest.mark.parametrize("tokenizer", ["tok-sp", "tok-sp-zephyr", "mistral-v1-fast"])
def test_10_an_answer_gets_no_space_of_its_own(exalign: Run, tokenizer: str) -> None:
    printed = exalign("inspect", "rows.jsonl", "chat=false", "--model", f"../mat/{tokenizer}")
    assert printed.status == 0
    wholes = [a + b for a, b in zip(printed.shown("prompt"), printed.shown("completion"), strict=True)]
    texts = [row["prompt"] + row["completion"] for row in lines("rows.jsonl")]
    assert [whole.removeprefix("<s>").removesuffix("</s>").lstrip(" ") for whole in wholes] == texts


def test_11_a_sampled_text_keeps_its_space(exalign: Run) -> None:
    assert exalign("sample", "recipe.yaml", "--run", "run").status == 0
    tokenizer = AutoTokenizer.from_pretrained("../mat/llama-sp")
    words = 0
    for record in read_records(Path("run/rollouts/records")):
        for completion in record.completions:
            ids = [i for i in completion.token_ids or () if i != tokenizer.eos_token_id]
            whole = tokenizer.decode([*(record.prompt_ids or ()), *ids], skip_special_tokens=True)
            assert f"{record.prompt}{completion.text}" == whole
            words += bool(ids) and tokenizer.convert_ids_to_tokens(ids[0]).startswith("▁") and completion.text[0] == " "
    assert words > 4
    cut = exalign("inspect", "texts.jsonl", "prompt_tokens=5", "--model", "../mat/mistral-v1-fast")
    wholes = [a + b for a, b in zip(cut.shown("prompt"), cut.shown("completion"), strict=True)]
    assert [whole.removeprefix("<s>").removesuffix("</s>").lstrip() for whole in wholes] == [
        row["text"] for row in lines("texts.jsonl")
    ]


def test_12_what_the_template_puts_behind_an_answer_ends_it(exalign: Run) -> None:
    printed = exalign("inspect", "chat-sft.jsonl", "--rows", "24", "--model", "../mat/chatml")
    answers = [row["messages"][-1]["content"] for row in lines("chat-sft.jsonl")]
    assert printed.shown("completion") == [f"{answer}<|im_end|>" for answer in answers]
    assert exalign("sample", "recipe.yaml", "--run", "run").status == 0
    drawn = [c for record in read_records(Path("run/rollouts/records")) for c in record.completions]
    ended = [completion for completion in drawn if completion.finish_reason == "stop"]
    assert len(ended) > len(drawn) / 2 and {c.text for c in ended} & set(answers)
    assert not any("\n" in completion.text or "<|" in completion.text for completion in ended)

    # transformers alone stops there too, with what is saved.
    tokenizer = AutoTokenizer.from_pretrained("run/sft/model")
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    assert end in GenerationConfig.from_pretrained("run/sft/model").eos_token_id
    model = AutoModelForCausalLM.from_pretrained("run/sft/model")
    asked = [{"role": "user", "content": "Describe item 0 in one word:"}]
    ids = tokenizer.apply_chat_template(asked, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    said = model.generate(**ids, max_new_tokens=24, do_sample=False)[0, ids["input_ids"].shape[1] :].tolist()
    assert said[-1] == end and said.count(end) == 1


def test_13_a_run_keeps_the_date_it_began(exalign: Run) -> None:
    def stop() -> None:
        while not Path("run/sft/metrics.jsonl").exists() or len(lines("run/sft/metrics.jsonl")) < 8:
            time.sleep(0.02)
        interrupt_main()

    command = ("sft", "recipe.yaml", "sft.epochs=4", "--run", "run")
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # in the background nobody hears it
    threading.Thread(target=stop, daemon=True).start()
    stopped = exalign(*command)
    signal.signal(signal.SIGINT, before)
    assert stopped.status == 130 and "Interrupted: sft after step" in stopped.err
    pin_date(datetime(2031, 7, 26, 9, 5))  # what the clock says now
    printed = exalign(*command)
    assert printed.status == 0 and "(continues)" in printed.out and printed.stages == ["sft"]
    assert [row["step"] for row in lines("run/sft/metrics.jsonl")] == list(range(1, 49))


def test_15_an_answer_goes_on_where_the_prompt_began_it(exalign: Run) -> None:
    printed = exalign("inspect", "rows.jsonl", "--model", "../mat/tok-bos")
    (prompt,) = printed.shown("prompt")
    assert prompt.count("assistant") == 1 and prompt.endswith("The colour is")
    assert printed.shown("completion") == [" blue.</s>", " no.</s>"]


def test_16_a_contradictory_generation_config_is_saved_mended(exalign: Run) -> None:
    printed = exalign("sft", "recipe.yaml", "--run", "run")
    assert printed.status == 0 and printed.stages == ["sft"]
    saved = GenerationConfig.from_pretrained("run/sft/model")
    saved.validate(strict=True)
    assert (saved.do_sample, saved.temperature, saved.top_p) == (True, 0.9, 0.6)


def test_17_positions_are_checked_before_any_work(exalign: Run) -> None:
    for recipe in ("recipe.yaml", "late.yaml"):
        printed = exalign("sft", recipe, "--run", "run")
        assert "128 positions" in printed.sentence and not Path("run/sft").exists()
    # With samples that fit, it is the data that do not.
    fitting = ("data.max_prompt_tokens=64", "sample.max_new_tokens=32")
    assert "128 positions" in exalign("sft", "recipe.yaml", "--run", "run", *fitting).sentence
    assert exalign("sft", "recipe.yaml", "--run", "run", *fitting, "data.max_completion_tokens=64").status == 0


def test_18_adapters_on_a_tied_head_are_saved_as_trained(exalign: Run) -> None:
    assert exalign("sft", "recipe.yaml", "--run", "run").stages == ["sft"]
    model = AutoModelForCausalLM.from_pretrained("run/sft/model")
    tokenizer = AutoTokenizer.from_pretrained("run/sft/model")
    nats = tokens = 0.0
    for row in lines("pairs.jsonl"):
        prompt = tokenizer(row["prompt"])["input_ids"]
        ids = torch.tensor(
            [prompt + tokenizer(row["chosen"], add_special_tokens=False)["input_ids"] + [tokenizer.eos_token_id]]
        )
        labels = ids.clone()
        labels[:, : len(prompt)] = -100
        with torch.no_grad():
            nats += float(model(input_ids=ids, labels=labels).loss) * (ids.shape[1] - len(prompt))
        tokens += ids.shape[1] - len(prompt)
    trained = [row["loss"] for row in lines("run/sft/metrics.jsonl")][-3:]  # the last epoch
    assert abs(nats / tokens - sum(trained) / 3) < 0.5


def test_20_a_reward_model_is_the_same_in_transformers(exalign: Run) -> None:
    assert exalign("reward", "recipe.yaml", "--run", "run").stages[-1] == "reward"
    tokenizer = AutoTokenizer.from_pretrained("run/reward/model")
    model = AutoModelForSequenceClassification.from_pretrained("run/reward/model").eval()
    records = read_records(Path("run/preferences/records"))
    scorer = open_scorer(ScorerSettings(reward_model="run/reward/model"))
    for record, rewards in zip(records, scorer.score(records), strict=True):
        texts = [record.prompt + completion.text + tokenizer.eos_token for completion in record.completions]
        batch = tokenizer(texts, return_tensors="pt", padding=True, padding_side="right")
        with torch.no_grad():
            assert model(**batch).logits[:, 0].tolist() == pytest.approx(rewards, abs=1e-4)


def test_21_a_scorer_is_tried_before_samples_are_drawn(exalign: Run) -> None:
    for recipe in ("three-labels", "encoder"):  # log-odds against the rest; an encoder with one label
        assert exalign("score", f"{recipe}.yaml", "--run", recipe).stages == ["rollouts", "scored"]
    refused = exalign("score", "no-template.yaml", "--run", "run")
    assert "has no chat template" in refused.sentence and "rm-notemplate" in refused.sentence
    assert not Path("run").exists()


def test_22_the_positive_label_is_the_one_that_is_called_so(exalign: Run, caplog: pytest.LogCaptureFixture) -> None:
    printed = exalign("score", "recipe.yaml", "--run", "run")
    assert printed.status == 0 and "label 0, POSITIVE" in caplog.text
    assert exalign("score", "recipe.yaml", "score.scorer.positive=NEGATIVE", "--run", "other").status == 0
    model = AutoModelForSequenceClassification.from_pretrained("../mat/clf2-flipped").eval()
    tokenizer = AutoTokenizer.from_pretrained("../mat/clf2-flipped")
    both = (read_records(Path(run, "scored/records")) for run in ("run", "other"))
    for record, turned in zip(*both, strict=True):
        for completion, reward, other in zip(
            record.completions, record.rewards or (), turned.rewards or (), strict=True
        ):
            ids = (
                tokenizer(record.prompt)["input_ids"]
                + tokenizer(completion.text, add_special_tokens=False)["input_ids"]
            )
            ids += [tokenizer.eos_token_id] * (completion.finish_reason == "stop")
            with torch.no_grad():
                positive, negative = model(torch.tensor([ids])).logits[0].tolist()
            assert (reward, other) == pytest.approx((positive - negative, negative - positive), abs=1e-4)


def test_23_a_log_probability_depends_on_its_own_group_alone(exalign: Run) -> None:
    fitting = ("data.max_prompt_tokens=24", "sample.max_new_tokens=8")
    first = []
    for budget in (4096, 32):
        assert (
            exalign("align", "recipe.yaml", f"align.dpo.token_budget={budget}", *fitting, "--run", str(budget)).status
            == 0
        )
        first.append(lines(f"{budget}/align/dpo/metrics.jsonl")[0])
    assert [row["loss"] for row in first] == pytest.approx([0.6931471805599453] * 2, abs=1e-5)
    assert first[0]["grad_norm"] == pytest.approx(first[1]["grad_norm"], rel=1e-3)


def test_24_a_training_without_a_step_is_an_error(exalign: Run) -> None:
    printed = exalign("sft", "recipe.yaml", "--run", "run")
    assert "No step was taken" in printed.sentence and not printed.stages
    assert not Path("run/sft/model").exists()


def test_26_a_judge_that_says_nothing_gives_no_win_rate(exalign: Run, case: Path) -> None:
    write_run(case / "run", World(num_prompts=8, pool=4, density=1))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    server = subprocess.Popen([sys.executable, "../mat/fake_judge.py", str(port)], stderr=subprocess.DEVNULL)
    try:
        cut = "cut off at 256 tokens (finish_reason length): raise --max-answer-tokens"
        said = {"reasoner": cut, "cut": cut, "brackets": "[[A]]", "refuses": "refused", "filtered": "filtered"}
        for model, why in said.items():
            command = ("judge", "run/evaluation/exo-rw", "--against", "sft", "--model", model)
            printed = exalign(
                *command, "--endpoint", f"http://127.0.0.1:{port}/v1", "--attempts", "40", "--retry-wait", "0.1"
            )
            assert why in printed.sentence and "win rate" not in printed.out.replace("there is no win rate", "")
    finally:
        server.kill()
        server.wait()


def test_28_a_tilde_is_the_home_everywhere(exalign: Run, case: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    home = case / "home"
    home.mkdir()
    monkeypatch.setenv("HOME", str(home))
    shutil.copy("pairs.jsonl", home)
    shutil.copytree("../mat/llama", home / "m")
    assert exalign("sft", "recipe.yaml", "--run", "run").stages == ["sft"]
    assert "done before, skipped" in exalign("sft", "recipe.yaml", "--run", "run").out
    (home / "pairs.jsonl").write_text("".join((case / "pairs.jsonl").read_text().splitlines(True)[:12]))
    assert "pairs.jsonl changed" in exalign("sft", "recipe.yaml", "--run", "run").sentence
    assert exalign("sft", "recipe.yaml", "model.source=~/m", "--run", "~/run2").status == 0
    assert (home / "run2/sft/model").exists()


def test_30_any_causal_model_works_and_another_is_a_sentence(exalign: Run) -> None:
    for recipe in ("llama4", "recurrent-gemma"):
        assert exalign("sample", f"{recipe}.yaml", "--run", recipe).stages == ["sft", "rollouts"]
    assert "A t5 is no causal language model" in exalign("sample", "t5.yaml", "--run", "t5").sentence
    assert not Path("t5").exists()


def test_31_a_prompt_that_the_answers_repeat_stands_there_once(exalign: Run) -> None:
    printed = exalign("inspect", "rows.jsonl", "chat=false", "--rows", "3", "--model", "../mat/tok-bos")
    assert printed.count("prompts taken off answers") == 3
    assert printed.shown("prompt")[0] == "<s>Question: what is 0+0?\nAnswer:"
    assert printed.shown("completion")[:2] == [" 0</s>", " no idea</s>"]


@pytest.mark.parametrize("epsilon", ["0.5", "0.9"])
def test_33_epsilon_is_below_uniform(exalign: Run, epsilon: str) -> None:
    printed = exalign("align", "recipe.yaml", f"align.dpo.epsilon={epsilon}", "--run", "run")
    assert "epsilon" in printed.sentence and not Path("run/align").exists()


def test_34_json_over_several_lines(exalign: Run) -> None:
    printed = exalign("inspect", "pretty.json", "chat=false", "--model", "../mat/tok-bos")
    assert (printed.shown("prompt"), printed.shown("completion")) == (["<s>Hello"], ["Hi</s>", "No</s>"])
    assert "a list of 1 objects in 'data'" in exalign("inspect", "nested.json", "--model", "../mat/tok-bos").sentence
    assert (
        "one row with a list for each column"
        in exalign("inspect", "columnar.json", "--model", "../mat/tok-bos").sentence
    )
