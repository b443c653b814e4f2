"""An answer read the plain way, with a full JSON parse of every event: what the meters must agree with."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Reading:
    prompt: int = 0
    completion: int = 0
    cached: int = 0
    reasoning: int = 0
    usages: int = 0
    content: int = 0
    finished: bool = False
    error: bool = False
    trailing: list[bytes] = field(default_factory=list)  # usage chunks that carry nothing else

    def take(self, usage: dict[str, Any]) -> None:
        prompt = usage.get("prompt_tokens", usage.get("input_tokens", usage.get("prompt_eval_count")))
        completion = usage.get("completion_tokens", usage.get("output_tokens", usage.get("eval_count"))) or 0
        if not prompt and not completion:
            return
        self.usages += 1
        self.completion = completion
        more = usage.get("completion_tokens_details") or usage.get("output_tokens_details") or {}
        self.reasoning = more.get("reasoning_tokens") or 0
        if prompt:
            details = usage.get("prompt_tokens_details") or usage.get("input_tokens_details") or {}
            read = usage.get("cache_read_input_tokens") or 0
            if "input_tokens" in usage and "total_tokens" not in usage:
                prompt += read + (usage.get("cache_creation_input_tokens") or 0)
            self.prompt = prompt
            self.cached = details.get("cached_tokens") or read


def _has_text(value: Any) -> bool:
    return isinstance(value, str) and value != ""


def _chat_content(choice: dict[str, Any]) -> bool:
    delta = choice.get("delta") or {}
    texts = ("content", "reasoning_content", "reasoning", "refusal")
    return (
        _has_text(choice.get("text"))
        or any(_has_text(delta.get(name)) for name in texts)
        or bool(delta.get("tool_calls"))
    )


def read_sse(body: bytes) -> Reading:
    found = Reading()
    for event in body.decode().split("\n\n"):
        data = "\n".join(re.findall(r"(?m)^data: ?(.*)$", event))
        if not data:
            continue
        if data == "[DONE]":
            found.finished = not found.error
            continue
        document = json.loads(data)
        kind = document.get("type", "")
        if document.get("error") or kind == "error":
            found.error = True
        inner = document.get("message") if kind == "message_start" else document.get("response")
        for holder in (document, inner if isinstance(inner, dict) else {}):
            if holder.get("usage"):
                found.take(holder["usage"])
        ends = any(choice.get("finish_reason") for choice in document.get("choices") or [])
        if "timings" in document and ends and not document.get("usage"):  # llama.cpp, where usage was not asked for
            timings = document["timings"]
            prompt = timings["prompt_n"] + timings["cache_n"]
            details = {"cached_tokens": timings["cache_n"]}
            counts = {"prompt_tokens": prompt, "completion_tokens": timings["predicted_n"] + found.completion}
            found.take({**counts, "prompt_tokens_details": details})
        choices = document.get("choices") or []
        if kind.startswith("response."):
            found.content += kind.endswith(".delta") and _has_text(document.get("delta"))
        elif kind == "content_block_delta":
            delta = document["delta"]
            found.content += any(_has_text(delta.get(n)) for n in ("text", "thinking", "partial_json"))
        else:
            found.content += any(_chat_content(choice) for choice in choices)
        if kind in ("message_stop", "response.completed", "response.incomplete"):
            found.finished = True
        if any(choice.get("finish_reason") for choice in choices):
            found.finished = True
        bare = all(set(choice) <= {"index", "delta"} and choice.get("delta") == {} for choice in choices)
        if document.get("usage") and "choices" in document and bare:
            found.trailing.append(event.encode() + b"\n\n")
    return found


def read_ndjson(body: bytes) -> Reading:
    found = Reading()
    for line in body.decode().split("\n"):
        if not line.strip():
            continue
        document = json.loads(line)
        message = document.get("message") or {}
        texts = (message.get("content"), message.get("thinking"), document.get("response"))
        found.content += any(_has_text(text) for text in texts)
        found.error |= bool(document.get("error"))
        if document.get("done") or document.get("status") == "success":
            found.finished = True
        if "eval_count" in document or "prompt_eval_count" in document:
            found.take(document)
    return found


def read_json(body: bytes) -> Reading:
    document = json.loads(body)
    found = Reading(finished=True, error=bool(document.get("error")))
    found.take(document.get("usage") or document)
    return found
