"""Every block of the table in docs/data.md reads rows of the layout that it names. The rows are ours."""

import json
import re
from collections import Counter
from pathlib import Path

import pytest
import yaml

from exalign.data.reading import DataSettings, read_source

DOCS = Path(__file__).parents[2] / "docs/data.md"
U, A, B = ({"role": role, "content": text} for role, text in (("user", "Hi"), ("assistant", "a"), ("assistant", "b")))
SYSTEM = {"role": "system", "content": "Be brief."}
HUMAN, GPT = {"from": "human", "value": "Hi"}, {"from": "gpt", "value": "a"}
TOOL = {"type": "function", "function": {"name": "look", "description": "Look.", "parameters": {}}}


def answer(text, score):
    rating = {"Rating": "4", "Rationale": "Fine."}
    return {
        "annotations": {"helpfulness": rating},
        "custom_system_prompt": "Help.",
        "model": "m",
        "response": text,
        "overall_score": score,
    }


def turn(text, role, rank=None, replies=()):
    return {"message_id": text, "text": text, "role": role, "lang": "en", "rank": rank, "replies": [*replies]}


def battle(winner, last="b"):
    return {
        "question_id": "q",
        "model_a": "x",
        "model_b": "y",
        "winner": winner,
        "conversation_a": [{"content": "Hi", "role": "user"}, {"content": "a", "role": "assistant"}],
        "conversation_b": [{"content": "Hi", "role": "user"}, {"content": last, "role": "assistant"}],
        "turn": 1,
        "language": "English",
    }


def safe(better):
    return {
        "prompt": "Hi",
        "response_0": "a",
        "response_1": "b",
        "is_response_0_safe": True,
        "better_response_id": better,
    }


def summary(choice, **info):
    texts = [{"text": text, "policy": "sup", "note": None} for text in "ab"]
    return {
        "info": {"id": "t", "post": None, "article": None, **info},
        "summaries": texts,
        "choice": choice,
        "worker": "w",
    }


RANKED = [turn("a", "assistant", 0), turn("b", "assistant", 1), turn("e", "assistant")]
UNRANKED = turn("Or", "prompter", replies=[turn("c", "assistant", 0), turn("d", "assistant")])
FIRST = turn("a", "assistant", 1, [turn("More", "prompter", replies=RANKED)])
TREE = turn("Hi", "prompter", replies=[FIRST, turn("b", "assistant", 0, [UNRANKED])])
THERE = {"role": "user", "content": "Hi\nthere"}
TEXT, CHAT = "Hi", (U,)
PAIRED = ["a", "b"]

# name: rows, then (prompt, texts, rewards, preferred) of each record
PUBLISHED = {
    "HH-RLHF, argilla pairs, allenai's binarised mixtures (Tulu 3)": (
        [{"id": "1", "source": "x", "prompt": "Hi", "chosen": [U, A], "rejected": [U, B], "chosen_rating": None}],
        [(CHAT, PAIRED, None, 0)],
    ),
    "UltraFeedback": (
        [{"source": "x", "instruction": "Hi", "models": ["m"], "completions": [answer("a", 7.5), answer("b", 3)]}],
        [(TEXT, PAIRED, [7.5, 3.0], None)],
    ),
    "UltraFeedback, binarised": (
        [
            {
                "prompt": "Hi",
                "prompt_id": "0",
                "chosen": [U, A],
                "rejected": [U, B],
                "messages": [U, A],
                "score_chosen": 8,
            }
        ],
        [(CHAT, PAIRED, None, 0)],
    ),
    "UltraFeedback, binarised, with its scores": (
        [
            {
                "prompt": "Hi",
                "chosen": [U, A],
                "rejected": [U, B],
                "messages": [U, A],
                "score_chosen": 8,
                "score_rejected": 3,
            }
        ],
        [(CHAT, PAIRED, [8.0, 3.0], None)],
    ),
    "Nectar": (
        [
            {
                "prompt": "\n\nHuman: Hi\n\nAssistant: ",
                "answers": [{"answer": t, "rank": r, "model": "m"} for t, r in zip("ab", (2.0, 1.0), strict=True)],
                "turns": 1,
            }
        ],
        [("\n\nHuman: Hi\n\nAssistant: ", PAIRED, [-2.0, -1.0], None)],
    ),
    "HelpSteer2, ratings": (
        [{"prompt": "Hi", "response": t, "helpfulness": h, "verbosity": 2} for t, h in (("a", 3), ("b", 4))],
        [(TEXT, PAIRED, [3.0, 4.0], None)],
    ),
    "HelpSteer2, preferences": (
        [
            {
                "split": "train",
                "prompt": "Hi",
                "response_1": "a",
                "response_2": "b",
                "preference_strength": s,
                "preference_statement": "s",
            }
            for s in (-2, 0)
        ],
        [(TEXT, PAIRED, [0.0, -2.0], None), (TEXT, PAIRED, [0.0, 0.0], None)],
    ),
    "HelpSteer3": (
        [
            {
                "domain": "general",
                "language": "english",
                "context": [U],
                "response1": "a",
                "response2": "b",
                "overall_preference": 3,
                "individual_preference": [{"score": 3, "reasoning": "r"}],
            }
        ],
        [(CHAT, PAIRED, [0.0, 3.0], None)],
    ),
    "Chatbot Arena conversations": (
        [battle("model_b"), battle("tie"), battle("tie (bothbad)"), battle("model_a")],
        [
            (CHAT, PAIRED, None, 1),
            (CHAT, PAIRED, [0.0, 0.0], None),
            (CHAT, PAIRED, [0.0, 0.0], None),
            (CHAT, PAIRED, None, 0),
        ],
    ),
    "SHP": (
        [
            {"post_id": "p", "history": "Hi", "human_ref_A": "a", "human_ref_B": "b", "labels": n, "score_A": 5}
            for n in (1, 0)
        ],
        [(TEXT, PAIRED, None, 0), (TEXT, PAIRED, None, 1)],
    ),
    "PKU-SafeRLHF": ([safe(1), safe(0)], [(TEXT, PAIRED, None, 1), (TEXT, PAIRED, None, 0)]),
    "summarize_from_feedback": (
        [summary(1, post="Hi"), summary(0, article="News")],
        [(TEXT, PAIRED, None, 1), ("News", PAIRED, None, 0)],
    ),
    "WebGPT comparisons": (
        [
            {
                "question": {"dataset": "eli5", "id": "1", "full_text": "Hi"},
                "quotes_0": {"title": []},
                "answer_0": "a",
                "answer_1": "b",
                "score_0": -0.5,
                "score_1": 0.5,
            }
        ],
        [(TEXT, PAIRED, [-0.5, 0.5], None)],
    ),
    "OASST, ranked trees": (
        [{"message_tree_id": "t", "tree_state": "ready_for_export", "prompt": TREE}],
        [(CHAT, PAIRED, [-1.0, 0.0], None), ((U, A, {"role": "user", "content": "More"}), PAIRED, [0.0, -1.0], None)],
    ),
    "LLaMA-Factory, pairs": (
        [{"instruction": "Hi", "input": i, "chosen": "a", "rejected": "b"} for i in ("", "there")],
        [(TEXT, PAIRED, None, 0), ("Hi\nthere", PAIRED, None, 0)],
    ),
    "LLaMA-Factory, instructions": (
        [{"instruction": "Hi", "input": "there", "output": "a", "system": s} for s in ("Be brief.", "")],
        [((SYSTEM, THERE), ["a"], None, None), ((THERE,), ["a"], None, None)],
    ),
    "LLaMA-Factory, labelled answers (`method: kto`)": (
        [{"instruction": "Hi", "input": "", "output": "a", "kto_tag": tag} for tag in (True, False)],
        [(TEXT, ["a"], [1.0], None), (TEXT, ["a"], [0.0], None)],
    ),
    "LLaMA-Factory, ShareGPT pairs": (
        [{"conversations": [HUMAN], "chosen": GPT, "rejected": {**GPT, "value": "b"}}],
        [(CHAT, PAIRED, None, 0)],
    ),
    "ShareGPT conversations, with tools": (
        [{"conversations": [HUMAN, GPT], "system": "Be brief.", "tools": json.dumps([TOOL])}],
        [((SYSTEM, U), ["a"], None, None)],
    ),
    "ms-swift, pairs": (
        [{"messages": [SYSTEM, U, A], "rejected_response": "b"}],
        [((SYSTEM, U), PAIRED, None, 0)],
    ),
    "ms-swift, query and response": (
        [{"system": "Be brief.", "query": "Hi", "response": "a", "history": h} for h in ([["Hi", "a"]], None)],
        [((SYSTEM, U, A, U), ["a"], None, None), ((SYSTEM, U), ["a"], None, None)],
    ),
    "axolotl, chat_template.default": (
        [{"messages": [SYSTEM, U], "chosen": A, "rejected": B}],
        [((SYSTEM, U), PAIRED, None, 0)],
    ),
    "axolotl, chatml.argilla": (
        [{"system": "Be brief.", "instruction": "Hi", "chosen_response": "a", "rejected_response": "b"}],
        [((SYSTEM, U), PAIRED, None, 0)],
    ),
    "axolotl, chatml.intel": (
        [{"system": None, "question": "Hi", "chosen": "a", "rejected": "b"}],
        [(TEXT, PAIRED, None, 0)],
    ),
}


def blocks():
    rows = re.findall(r"^\| ([^|]+) \| (`+)(\w+: \{.*\})\2 \|$", DOCS.read_text(encoding="utf-8"), re.M)
    return {name: next(iter(yaml.safe_load(block).values())) for name, _, block in rows}


def test_the_table_names_each_layout():
    assert blocks().keys() == PUBLISHED.keys()


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_block_of_the_table_reads_its_layout(name, write_jsonl):
    rows, expected = PUBLISHED[name]
    local = {"source": str(write_jsonl(rows)), "name": None, "data_dir": None, "split": None}
    counts = Counter()
    records = list(read_source(DataSettings.model_validate({**blocks()[name], **local}), counts))
    found = [(r.prompt, [c.text for c in r.completions], r.rewards, r.preferred) for r in records]
    assert found == expected
    assert counts["records"] == len(expected)
    assert not any(re.match(r"(column )?(rows_without|pairs_|answers_)", key) for key in counts)
