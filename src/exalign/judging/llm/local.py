"""A judge in this process: a transformers model, one question at a time.

The plainest way to ask without a server. For speed, serve the model (`transformers serve`, vLLM) and use `Endpoint`.
"""

from __future__ import annotations

import asyncio
import json
import time
from pathlib import Path
from typing import Any

from exalign.judging.llm.exchanges import Body, Reply, request_key
from exalign.judging.llm.settings import JudgeSettings
from exalign.storage import fingerprint_path


class LocalModel:
    """The model of a folder or hub name. Temperature 0 is greedy; else each question has its own seed.

    A folder's weights are part of the request by their content, so that answers of other weights are never reused.
    The chat template of the tokenizer is used where there is one, else the question as it is.
    """

    concurrency = 1

    def __init__(self, source: str, settings: JudgeSettings) -> None:
        self.judge = Path(source).resolve().name if Path(source).is_dir() else source
        self._source = source
        self._settings = settings
        self._weights = fingerprint_path(Path(source)) if Path(source).is_dir() else None
        self._loaded: tuple[Any, Any] | None = None

    def body(self, question: str) -> Body:
        weights = {} if self._weights is None else {"weights": self._weights}
        return {
            "model": self.judge,
            **weights,
            "messages": [{"role": "user", "content": question}],
            "temperature": self._settings.temperature,
            "max_tokens": self._settings.max_answer_tokens,
        }

    async def attempt(self, body: Body) -> Reply:
        """Generate one answer, in a thread."""
        return await asyncio.to_thread(self._generate, body)

    async def close(self) -> None:
        self._loaded = None

    def _generate(self, body: Body) -> Reply:
        import torch

        start = time.monotonic()
        model, tokenizer = self._load()
        text = body["messages"][0]["content"]
        if tokenizer.chat_template:
            text = tokenizer.apply_chat_template(body["messages"], tokenize=False, add_generation_prompt=True)
        # A rendered chat template carries its own special tokens.
        ids = tokenizer(text, return_tensors="pt", add_special_tokens=not tokenizer.chat_template).to(model.device)
        prompt_tokens = ids["input_ids"].shape[1]
        room = getattr(model.config, "max_position_embeddings", None)
        if room is not None and prompt_tokens >= room:
            return Reply("refused", error=f"the question has {prompt_tokens} tokens, the model reads {room}")
        temperature = body["temperature"]
        sampling = {"do_sample": True, "temperature": temperature} if temperature > 0 else {"do_sample": False}
        limit = body["max_tokens"] if room is None else min(body["max_tokens"], room - prompt_tokens)
        torch.manual_seed(int(request_key(body)[:15], 16))
        with torch.inference_mode():
            output = model.generate(**ids, max_new_tokens=limit, pad_token_id=tokenizer.pad_token_id, **sampling)
        answer = output[0, prompt_tokens:]
        completion = {
            "model": body["model"],
            "choices": [
                {
                    "message": {"role": "assistant", "content": tokenizer.decode(answer, skip_special_tokens=True)},
                    "finish_reason": "length" if len(answer) >= limit else "stop",
                }
            ],
            "usage": {"prompt_tokens": prompt_tokens, "completion_tokens": len(answer)},
        }
        return Reply("answered", raw=json.dumps(completion), seconds=time.monotonic() - start)

    def _load(self) -> tuple[Any, Any]:
        if self._loaded is None:
            import torch

            from exalign.models.loading import load_policy, load_tokenizer
            from exalign.models.model_settings import ModelSettings

            tokenizer = load_tokenizer(self._source)
            model = load_policy(ModelSettings.model_validate({"source": self._source}), tokenizer)
            device = "cuda" if torch.cuda.is_available() else "cpu"
            self._loaded = model.to(device).eval(), tokenizer  # type: ignore[arg-type]
        return self._loaded
