import gzip
import json
import random
from pathlib import Path

import pytest

from exalign.data.synthetic import make_completion, make_prompts
from exalign.data.tokenization import build_tokenizer

REAL_DATA = Path(__file__).parents[2] / "../shared/data"

CHAT_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{{ m['content'] }}"
    "{% if m['role'] == 'assistant' %}{{ eos_token }}{% endif %}{{ '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture(scope="session")
def real_data():
    if not REAL_DATA.is_dir():
        pytest.skip("the real data sets are not on this machine")
    return REAL_DATA


@pytest.fixture(scope="session")
def remarks():
    rng = random.Random(0)
    return [(prompt, make_completion(prompt, rng)) for prompt in make_prompts(0)[:400]]


@pytest.fixture
def tokenizer(remarks):
    return build_tokenizer(prompt + completion for prompt, completion in remarks)


@pytest.fixture
def chat_tokenizer(tokenizer):
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


@pytest.fixture
def write_jsonl(tmp_path):
    def write(rows, name="data.jsonl"):
        path = tmp_path / name
        data = "".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows).encode()
        path.write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
        return path

    return write
