"""The bytes of vLLM's answers, as bytes formatting: the JSON of a request is written once, tokens are slotted in."""

from __future__ import annotations

import base64
import struct
from typing import Any

import orjson

from gateway.sim.dialect import FINGERPRINT, Call, Choice
from gateway.sim.text import tokenize, vector

_DETAILS = b',"prompt_tokens_details":{"cached_tokens":%d,"created_cache_tokens":%b,"multimodal_tokens":null}'


class Shape:
    """Writes one call's answer. Every method returns one whole SSE event, or, `whole`, the unstreamed body."""

    __slots__ = (
        "_after",
        "_between",
        "_head",
        "_last",
        "_trailing",
        "cached",
        "call",
        "decode_s",
        "id",
        "prefill_s",
        "usage_mode",
    )

    def __init__(self, call: Call, serial: int, created: int) -> None:
        self.call = call
        self.cached = 0  # tokens of the prompt that were cached, once that is known
        self.prefill_s = self.decode_s = 0.0
        self.usage_mode = call.faults.usage
        kind = b"chat.completion.chunk" if call.chat else b"text_completion"
        self.id = b"%b-%016x" % (b"chatcmpl" if call.chat else b"cmpl", serial)
        model = orjson.dumps(call.model)
        self._head = b'data: {"id":"%b","object":"%b","created":%d,"model":%b,"choices":[' % (
            self.id,
            kind,
            created,
            model,
        )
        if call.chat:
            self._between = b'{"index":%d,"delta":%b,"logprobs":null,"finish_reason":null,"token_ids":null}]%b}\n\n'
        else:
            self._between = (
                b'{"index":%d,"text":%b,"logprobs":null,"finish_reason":null,"stop_reason":null,'
                b'"prompt_token_ids":null,"token_ids":null}]%b}\n\n'
            )
        # the fingerprint is on the last chunk only: the usage chunk where there is one
        self._trailing = self.usage_mode == "after_finish" or (
            call.include_usage and self.usage_mode not in ("missing", "finish")
        )
        self._last = b',"system_fingerprint":' + FINGERPRINT if call.chat and not self._trailing else b""
        self._after = b',"system_fingerprint":' + FINGERPRINT + b"}\n\n"

    def role(self, index: int) -> bytes:
        return (
            self._head
            + b'{"index":%d,"delta":{"role":"assistant","content":""},"logprobs":null,"finish_reason":null}]%b'
            % (
                index,
                self._running_usage(0),
            )
            + b',"prompt_token_ids":null,"prompt_text":null}\n\n'
        )

    def piece(self, index: int, at: int, made: int) -> bytes:
        """Token `at` of a choice (not its last); `made`: tokens of all choices so far."""
        choice = self.call.choices[index]
        text = orjson.dumps(choice.pieces[at])
        if not self.call.chat:
            return self._head + self._between % (index, text, self._running_usage(made))
        if choice.tool is None:
            delta = b'{"content":%b}' % text
        elif at == 0:
            delta = (
                b'{"content":null,"tool_calls":[{"id":"chatcmpl-tool-%b","type":"function","index":0,'
                b'"function":{"name":%b}}]}' % (self.id[-16:], orjson.dumps(choice.tool))
            )
        else:
            delta = b'{"content":null,"tool_calls":[{"index":0,"function":{"arguments":%b}}]}' % text
        return self._head + self._between % (index, delta, self._running_usage(made))

    def ending(self, index: int, made: int) -> list[bytes]:
        """The last token, and that it was the last."""
        choice = self.call.choices[index]
        finish = self.finish(index, made)
        if choice.tool is not None and choice.finish == "length":
            return [self.piece(index, choice.tokens - 1, made), finish]
        return [finish]

    def finish(self, index: int, made: int) -> bytes:
        """The chunk with finish_reason: with the last token's text, or empty where an end token was the last."""
        choice = self.call.choices[index]
        text = choice.pieces[-1] if choice.tool is None and choice.tokens == len(choice.pieces) else ""
        reason = orjson.dumps(choice.finish)
        stop = orjson.dumps(choice.stop_reason)
        usage = self._running_usage(made)
        if self.usage_mode == "finish":
            usage = b',"usage":' + self._usage(made, 0)
        if self.call.chat:
            delta = b'{"content":%b}' % orjson.dumps(text) if text else b"{}"
            tail = b'{"index":%d,"delta":%b,"logprobs":null,"finish_reason":%b,"stop_reason":%b,"token_ids":null}]' % (
                index,
                delta,
                reason,
                stop,
            )
        else:
            tail = (
                b'{"index":%d,"text":%b,"logprobs":null,"finish_reason":%b,"stop_reason":%b,'
                b'"prompt_token_ids":null,"token_ids":null}]' % (index, orjson.dumps(text), reason, stop)
            )
        return self._head + tail + usage + self._last + b"}\n\n"

    def usage(self, made: int) -> bytes:
        """The usage chunk, or b"" where there is none."""
        if not self._trailing:
            return b""
        choices = b'{"index":0,"delta":{}}' if self.usage_mode == "litellm" else b""
        return self._head + choices + b'],"usage":' + self._usage(made, self.cached) + self._after

    def _running_usage(self, made: int) -> bytes:
        prompt = self.call.prompt_tokens
        if self.usage_mode == "zeros":
            return b',"usage":{"prompt_tokens":0,"completion_tokens":0,"total_tokens":0}'
        if self.usage_mode == "every" or (self.call.continuous_usage and self.usage_mode != "missing"):
            return (
                b',"usage":{"prompt_tokens":%d,"total_tokens":%d,"completion_tokens":%d,'
                b'"completion_tokens_details":null}' % (prompt, prompt + made, made)
            )
        return b""

    def _usage(self, made: int, cached: int) -> bytes:
        prompt = self.call.prompt_tokens
        created = b',"created_cache_tokens":%d' % self._created(cached) if self.call.chat else b""
        return (
            b'{"prompt_tokens":%d,"total_tokens":%d,"completion_tokens":%d,'
            b'"prompt_tokens_details":{"cached_tokens":%d%b}}' % (prompt, prompt + made, made, cached, created)
        )

    def _created(self, cached: int) -> int:
        return max(self.call.prompt_lengths[0] // 16 * 16 - cached, 0)

    def whole(self, created_at: int) -> bytes:
        """The body of an unstreamed answer."""
        call, cached = self.call, self.cached
        choices = b",".join(
            (self._chat_choice if call.chat else self._text_choice)(index, choice)
            for index, choice in enumerate(call.choices)
        )
        made = sum(choice.tokens for choice in call.choices)
        if call.chat:
            kind = b"chat.completion"
            created_cache = b"%d" % self._created(cached)
            tail = b',"prompt_logprobs":null,"prompt_token_ids":null,"prompt_text":null'
        else:
            kind, created_cache, tail = b"text_completion", b"null", b""
        if self.usage_mode == "missing":
            usage = b"null"
        else:
            usage = (
                b'{"prompt_tokens":%d,"total_tokens":%d,"completion_tokens":%d%b,"completion_tokens_details":null}'
                % (
                    call.prompt_tokens,
                    call.prompt_tokens + made,
                    made,
                    _DETAILS % (cached, created_cache),
                )
            )
        return (
            b'{"id":"%b","object":"%b","created":%d,"model":%b,"choices":[%b],"service_tier":null,'
            b'"system_fingerprint":%b,"usage":%b%b,"kv_transfer_params":null,"ec_transfer_params":null,"metrics":null}'
            % (self.id, kind, created_at, orjson.dumps(call.model), choices, FINGERPRINT, usage, tail)
        )

    def _chat_choice(self, index: int, choice: Choice) -> bytes:
        content = orjson.dumps("".join(choice.pieces))
        calls = b""
        if choice.tool is not None:
            calls = (
                b',"tool_calls":[{"id":"chatcmpl-tool-%b","type":"function","function":{"name":%b,"arguments":%b}}]'
                % (self.id[-16:], orjson.dumps(choice.tool), content)
            )
            content = b"null"
        return (
            b'{"index":%d,"message":{"role":"assistant","content":%b,"refusal":null,"annotations":null,"audio":null,'
            b'"function_call":null%b,"reasoning":null},"logprobs":null,"finish_reason":"%b","stop_reason":%b,'
            b'"token_ids":null,"routed_experts":null}'
            % (index, content, calls, choice.finish.encode(), orjson.dumps(choice.stop_reason))
        )

    def _text_choice(self, index: int, choice: Choice) -> bytes:
        return (
            b'{"index":%d,"text":%b,"logprobs":null,"finish_reason":"%b","stop_reason":%b,"token_ids":null,'
            b'"prompt_logprobs":null,"prompt_token_ids":null,"routed_experts":null}'
            % (
                index,
                orjson.dumps("".join(choice.pieces)),
                choice.finish.encode(),
                orjson.dumps(choice.stop_reason),
            )
        )


def models_body(models: tuple[str, ...], context: int, created: int) -> bytes:
    permission: dict[str, Any] = {
        "id": "modelperm-0000000000000000",
        "object": "model_permission",
        "created": created,
        "allow_create_engine": False,
        "allow_sampling": True,
        "allow_logprobs": True,
        "allow_search_indices": False,
        "allow_view": True,
        "allow_fine_tuning": False,
        "organization": "*",
        "group": None,
        "is_blocking": False,
    }
    data = [
        {
            "id": model,
            "object": "model",
            "created": created,
            "owned_by": "vllm",
            "root": f"models/{model}",
            "parent": None,
            "max_model_len": context,
            "permission": [permission],
        }
        for model in models
    ]
    return orjson.dumps({"object": "list", "data": data})


def embeddings_body(body: dict[str, Any], model: str, serial: int, created: int) -> bytes:
    """Deterministic unit vectors, 64 long or `dimensions`; `encoding_format` "float" or "base64" (float32 LE)."""
    given = body.get("input", "")
    many = isinstance(given, list) and given and not isinstance(given[0], int)
    inputs = given if many else [given]
    dimensions = body.get("dimensions") or 64
    packed = body.get("encoding_format") == "base64"
    data: list[dict[str, Any]] = []
    tokens = 0
    for index, one in enumerate(inputs):
        text = one if isinstance(one, str) else repr(one)
        tokens += len(tokenize(one)) if isinstance(one, str) else len(one)
        numbers: Any = vector(text, dimensions)
        if packed:
            numbers = base64.b64encode(struct.pack(f"<{dimensions}f", *numbers)).decode()
        data.append({"index": index, "object": "embedding", "embedding": numbers})
    usage = {"prompt_tokens": tokens, "total_tokens": tokens, "completion_tokens": 0, "prompt_tokens_details": None}
    return orjson.dumps(
        {
            "id": f"embd-{serial:016x}",
            "object": "list",
            "created": created,
            "model": model,
            "data": data,
            "usage": usage,
        }
    )
