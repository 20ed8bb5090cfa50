"""The synthetic world: reproducible, learnable, and with a reward that no single trick exhausts."""

import json
import random
import statistics
from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer

from exalign.data.reading import DataSettings, read_source
from exalign.data.synthetic import make_completion, make_prompts, read_remark, remark_reward, reward, write_world
from exalign.data.tokenization import build_tokenizer

PROMPT = "This comedy about a shy baker"


def test_the_same_seed_writes_the_same_files(tmp_path):
    for name, seed in (("a", 5), ("b", 5), ("c", 6)):
        write_world(tmp_path / name, seed=seed, num_sft=200, num_prompts=50, num_test=20)
    files = ["sft.jsonl", "prompts.jsonl", "test.jsonl", "tokenizer/tokenizer.json"]
    contents = {name: [(tmp_path / name / file).read_bytes() for file in files] for name in "abc"}
    assert contents["a"] == contents["b"]
    assert all(a != c for a, c in zip(contents["a"][:3], contents["c"][:3], strict=True))


def test_the_files_are_what_the_readers_take(tmp_path):
    write_world(tmp_path, num_sft=300, num_prompts=60, num_test=30)
    sft, prompts, test = (
        list(read_source(DataSettings(source=str(tmp_path / f"{name}.jsonl")), Counter()))
        for name in ("sft", "prompts", "test")
    )
    assert [len(sft), len(prompts), len(test)] == [300, 60, 30]
    assert {len(r.completions) for r in sft + test} == {1}
    assert {len(r.completions) for r in prompts} == {0}
    assert not {r.prompt for r in test} & {r.prompt for r in sft + prompts}
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "tokenizer")
    assert None not in (tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id)
    assert 300 <= len(tokenizer) <= 600
    lengths = [len(tokenizer(r.completions[0].text)["input_ids"]) for r in sft]
    assert 10 <= statistics.mean(lengths) <= 30


def test_impossible_sizes_are_refused(tmp_path):
    with pytest.raises(ValueError, match="2304"):
        write_world(tmp_path, num_prompts=2304, num_test=1)


@given(st.text())
def test_the_tokenizer_keeps_any_text(text):
    tokenizer = _tokenizer()
    assert tokenizer.decode(tokenizer(text)["input_ids"]) == text


def _tokenizer(cache=[]):  # noqa: B006 - trained once for all examples
    if not cache:
        cache.append(build_tokenizer(make_prompts(0)[:200]))
    return cache[0]


def test_every_generated_remark_parses():
    rng = random.Random(1)
    for prompt in make_prompts(0)[:300]:
        remark = read_remark(make_completion(prompt, rng))
        assert remark.finished
        assert remark.unparsed == 0
        assert 1 <= len(remark.clauses) <= 5


REWARDS = [
    (" was good.", 0.75),
    (" was very funny.", 1.5 * 2.0),
    (" was rather tense.", 0.75 * -1.0),
    (" was brilliant, and the plot felt warm.", 2.0 + 0.7 * 1.0),
    (" was brilliant, but the plot felt warm.", 2.0 + 0.7 * 1.0 - 0.5),
    (" was brilliant, and the plot felt weak.", 2.0 - 0.7 * 1.0 - 0.5),
    (" was brilliant. The plot felt brilliant.", 2.0 - 1.0),
    (" was good. The plot was warm. The plot was clever.", 0.75 + 0.7 + 0.49 - 1.0),
    (" was very good. The plot was very warm.", 1.5 * 0.75 + 0.7 * 1.5 - 0.5),
    (" was good", 0.75 - 1.0),
    (" was good good.", 0.75 - 0.75),
    (" was good. The plot", 0.75 - 3 * 0.75 - 1.0),
    ("", -1.0),
    (".", 0.0),
    (" good good good.", -3 * 0.75),
]


@pytest.mark.parametrize(("completion", "expected"), REWARDS)
def test_rewards_are_what_the_rules_say(completion, expected):
    assert remark_reward(PROMPT, completion) == pytest.approx(expected, abs=1e-12)


def test_words_beyond_the_readers_patience_cost():
    """18 words are free; the fifth clause brings the 22nd to the 23rd word."""
    four = " was funny. The plot was brilliant. The cast was charming. The music was clever"
    assert len(four.split()) == 14
    base = 2.0 + 0.7 * 2.0 + 0.7**2 * 1.5 + 0.7**3 * 1.0
    assert remark_reward(PROMPT, four + ".") == pytest.approx(base)
    five = four + ". The pace was warm"
    assert remark_reward(PROMPT, five + ".") == pytest.approx(base + 0.7**4)
    six = five + ". The acting was slow."  # 22 words, 4 too many
    assert remark_reward(PROMPT, six) == pytest.approx(base + 0.7**4 - 0.5 * 0.7**5 - 4 * 0.15)


def test_praise_depends_on_the_prompt():
    assert remark_reward(PROMPT, " was funny.") == 2.0
    assert remark_reward("The old western about a brave miner", " was funny.") == -1.0
    assert reward([PROMPT, ({"role": "user", "content": "A western"},)], [[" was rugged."], [" was rugged.", ""]]) == [
        [-1.0],
        [2.0, -1.0],
    ]


@pytest.mark.parametrize("trick", [" very", " brilliant", " was brilliant", " was very funny.", ".", ", and the plot"])
def test_repeating_one_thing_never_pays(trick):
    once_well_said = remark_reward(PROMPT, " was very funny.")
    assert all(remark_reward(PROMPT, trick * n) <= once_well_said for n in range(1, 30))
    assert remark_reward(PROMPT, trick * 20) < 0


def test_rewards_of_one_prompt_have_a_real_spread_and_room_above():
    rng = random.Random(2)
    spreads, means = [], []
    for prompt in make_prompts(0)[:200]:
        rewards = [remark_reward(prompt, make_completion(prompt, rng)) for _ in range(16)]
        spreads.append(statistics.stdev(rewards))
        means.append(statistics.mean(rewards))
    assert statistics.mean(spreads) > 1
    best = " was very funny, and the plot was brilliant, and the cast was charming, and the music was clever."
    assert remark_reward(PROMPT, best) > statistics.mean(means) + 2.5 * statistics.mean(spreads)


def test_rows_are_ordinary_json_lines(tmp_path):
    write_world(tmp_path, num_sft=5, num_prompts=2, num_test=2)
    rows = [json.loads(line) for line in (tmp_path / "sft.jsonl").read_text().splitlines()]
    assert all(set(row) == {"prompt", "completion"} and row["completion"].startswith(" ") for row in rows)
