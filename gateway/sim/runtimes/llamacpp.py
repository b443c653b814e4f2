"""llama.cpp's `llama-server` (cpp-httplib), as recorded from b11434.

It answers as its only model whatever the request names; sends no head before a slot is free; continues a final
assistant message unasked (unstreamed it repeats it); ends the connection with every stream although it promised to
keep it; counts in `timings` where no usage was asked for. Tool calls are not modelled: the recorded models wrote text,
too. The error event is not recorded.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import orjson

from gateway.sim.dialect import ENGINE_DEAD, ApiError, Call, PromptTooLong, parse_call
from gateway.sim.faults import Faults
from gateway.sim.runtimes.runtime import Runtime

if TYPE_CHECKING:
    from gateway.sim.server import SimServer

_JSON = "application/json; charset=utf-8"
_FINGERPRINT = b'"system_fingerprint":"b0-unknown"'


def _error(status: int, type: str, message: str) -> bytes:
    kind = {503: "unavailable_error", 400: "invalid_request_error"}.get(status, "server_error")
    return orjson.dumps({"error": {"code": status, "message": message, "type": kind}})


class Refused(ApiError):
    def __init__(self, message: str) -> None:
        super().__init__(400, "", message)
        self.body = _error(400, "", message)


def _load(raw: bytes) -> dict[str, Any]:
    try:
        body = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise Refused(
            f"[json.exception.parse_error.101] parse error at line {error.lineno}, column {error.colno}: "
            f"syntax error while parsing value - {error.msg}"
        ) from None
    if not isinstance(body, dict):
        raise Refused("the request body must be a JSON object")
    return body


def _parse(
    body: dict[str, Any], chat: bool, models: tuple[str, ...], context: int, faults: Faults, opening: str = ""
) -> Call:
    asked = {**body, "model": models[0]}
    asked.pop("temperature", None)
    asked.pop("tools", None)
    for name in ("max_tokens", "max_completion_tokens"):
        limit = asked.get(name)
        if isinstance(limit, str):
            raise Refused(f"Field '{name}': [json.exception.type_error.302] type must be number, but is string")
        if isinstance(limit, int) and not 1 <= limit <= context:  # -1 is no limit, and so is more than there is
            del asked[name]
    if chat:
        messages = asked.get("messages")
        if not isinstance(messages, list):
            raise Refused("'messages' is required")
        asked["messages"] = messages or [{"role": "system", "content": ""}]
        asked["add_generation_prompt"] = True
        if isinstance(last := asked["messages"][-1], dict) and last.get("role") == "assistant":
            asked.update(continue_final_message=True, add_generation_prompt=False)
    try:
        return parse_call(asked, chat, models, context, faults, opening, None)
    except PromptTooLong as error:
        error.body = orjson.dumps(
            {
                "error": {
                    "code": 400,
                    "message": f"request ({error.tokens} tokens) exceeds the available context size "
                    f"({context} tokens), try increasing it",
                    "type": "exceed_context_size_error",
                    "n_prompt_tokens": error.tokens,
                    "n_ctx": context,
                }
            }
        )
        raise


class LlamaShape:
    __slots__ = ("_head", "_tail", "cached", "call", "decode_s", "id", "prefill_s")

    def __init__(self, call: Call, serial: int, created: int) -> None:
        self.call = call
        self.cached = 0
        self.prefill_s = self.decode_s = 0.0
        self.id = b"chatcmpl-%032x" % serial
        kind = b"chat.completion.chunk" if call.chat else b"text_completion"
        # a chat has its id before the model, a completion last
        self._head = b'],"created":%d,' % created + (b'"id":"%b",' % self.id if call.chat else b"")
        self._head += b'"model":%b,%b,"object":"%b"' % (orjson.dumps(call.model), _FINGERPRINT, kind)
        self._tail = b"" if call.chat else b',"id":"%b"' % self.id

    def _event(self, choice: bytes, more: bytes = b"", last: bytes = b"") -> bytes:
        return b'data: {"choices":[' + choice + self._head + more + self._tail + last + b"}\n\n"

    def role(self, index: int) -> bytes:
        return self._event(b'{"finish_reason":null,"index":%d,"delta":{"role":"assistant","content":null}}' % index)

    def piece(self, index: int, at: int, made: int) -> bytes:
        return self._event(self._choice(index, self.call.choices[index].pieces[at], b"null"))

    def _choice(self, index: int, text: str, reason: bytes) -> bytes:
        if not self.call.chat:
            return b'{"text":%b,"index":%d,"logprobs":null,"finish_reason":%b}' % (orjson.dumps(text), index, reason)
        delta = b'{"content":%b}' % orjson.dumps(text) if reason == b"null" else b"{}"
        return b'{"finish_reason":%b,"index":%d,"delta":%b}' % (reason, index, delta)

    def ending(self, index: int, made: int) -> list[bytes]:
        choice = self.call.choices[index]
        finish = self.finish(index)
        if choice.tokens == len(choice.pieces) and choice.pieces[-1]:  # else it was the end token, or a stop string
            return [self.piece(index, choice.tokens - 1, made), finish]
        return [finish]

    def finish(self, index: int) -> bytes:
        """A chat's counts move to the usage chunk where usage was asked for; a completion has them always."""
        choice = self._choice(index, "", orjson.dumps(self.call.choices[index].finish))
        timings = b',"timings":' + self._timings(self.call.choices[index].tokens)
        if not self.call.chat:
            return self._event(choice, b',"usage":' + self._usage(self.call.choices[index].tokens), timings)
        return self._event(choice, b"" if self.call.include_usage else timings)

    def usage(self, made: int) -> bytes:
        if not (self.call.chat and self.call.include_usage):
            return b""
        return self._event(b"", b',"usage":' + self._usage(made) + b',"timings":' + self._timings(made))

    def _usage(self, made: int) -> bytes:
        prompt = self.call.prompt_tokens
        return (
            b'{"completion_tokens":%d,"prompt_tokens":%d,"total_tokens":%d,"prompt_tokens_details":{"cached_tokens":%d}}'
            % (made, prompt, prompt + made, self.cached)
        )

    def _timings(self, made: int) -> bytes:
        fields: dict[str, float] = {"cache_n": self.cached}
        parts = (
            ("prompt", max(self.call.prompt_tokens - self.cached, 1), self.prefill_s),
            ("predicted", made, self.decode_s),
        )
        for name, count, seconds in parts:
            ms = max(seconds * 1000, 0.001)
            fields |= {
                f"{name}_n": count,
                f"{name}_ms": ms,
                f"{name}_per_token_ms": ms / count,
                f"{name}_per_second": count / ms * 1000,
            }
        return orjson.dumps(fields)

    def whole(self, created_at: int) -> bytes:
        call = self.call
        made = sum(choice.tokens for choice in call.choices)
        parts = []
        for index, choice in enumerate(call.choices):
            text = orjson.dumps(call.prefill + "".join(choice.pieces))
            reason = choice.finish.encode()
            if call.chat:
                parts.append(
                    b'{"finish_reason":"%b","index":%d,"message":{"role":"assistant","content":%b}}'
                    % (reason, index, text)
                )
            else:
                parts.append(b'{"text":%b,"index":%d,"logprobs":null,"finish_reason":"%b"}' % (text, index, reason))
        return b'{"choices":[%b],"created":%d,"model":%b,%b,"object":"%b","usage":%b,"id":"%b","timings":%b}' % (
            b",".join(parts),
            created_at,
            orjson.dumps(call.model),
            _FINGERPRINT,
            b"chat.completion" if call.chat else b"text_completion",
            self._usage(made),
            self.id,
            self._timings(made),
        )


def _models(server: SimServer) -> tuple[str, bytes]:
    name = server.models[0]
    details: dict[str, Any] = {"parent_model": "", "format": "gguf", "family": "", "families": [""]}
    details |= {"parameter_size": "", "quantization_level": ""}
    old: dict[str, Any] = {"name": name, "model": name, "modified_at": "", "size": "", "digest": "", "type": "model"}
    old |= {"description": "", "tags": [""], "capabilities": ["completion"], "parameters": "", "details": details}
    meta: dict[str, Any] = {"vocab_type": 2, "n_vocab": 49152, "n_ctx": server.context, "n_ctx_train": server.context}
    meta |= {"n_embd": 576, "n_params": 134515008, "size": 96576768, "ftype": "Q4_1"}
    entry: dict[str, Any] = {"id": name, "aliases": [name], "tags": [], "object": "model"}
    entry["architecture"] = {"input_modalities": ["text"], "output_modalities": ["text"]}
    entry |= {"created": server.created(), "owned_by": "llamacpp", "meta": meta}
    return _JSON, orjson.dumps({"models": [old], "object": "list", "data": [entry]})


def _props(server: SimServer) -> tuple[str, bytes]:
    """The part that tells how many requests are worked on at a time; the rest of the page is the sampler's."""
    settings = {"default_generation_settings": {"n_ctx": server.context}, "total_slots": server.engine.max_sequences}
    return _JSON, orjson.dumps({**settings, "model_path": f"{server.models[0]}.gguf"})


def _slots(server: SimServer) -> tuple[str, bytes]:
    busy = server.engine.running
    slots = [
        {"id": number, "n_ctx": server.context, "speculative": False, "is_processing": number < busy}
        for number in range(server.engine.max_sequences)
    ]
    return _JSON, orjson.dumps(slots)


def _exposition(server: SimServer) -> str:
    engine = server.engine
    values = {
        "prompt_tokens_total": engine.prompt_tokens_total - engine.prefix_cache_hits,
        "prompt_tokens_cached_total": engine.prefix_cache_hits,
        "tokens_predicted_total": engine.generation_tokens_total,
        "requests_processing": engine.running,
        "requests_deferred": engine.waiting,
    }
    return "".join(
        f"# TYPE llamacpp:{name} {'counter' if name.endswith('_total') else 'gauge'}\nllamacpp:{name} {value}\n"
        for name, value in values.items()
    )


def _metrics(server: SimServer) -> tuple[str, bytes]:
    return "text/plain; version=0.0.4", server.metrics_page().encode()


LLAMACPP = Runtime(
    name="llamacpp",
    headers=b"server: llama.cpp\r\naccess-control-allow-origin: \r\n",
    dated=False,
    stream_headers=b"x-accel-buffering: no\r\n",
    kept_headers=b"keep-alive: timeout=5, max=100\r\n",
    json_type=_JSON,
    stream_type="text/event-stream",
    closes_streams=True,
    closes_errors=True,
    head="admitted",
    loading=b'{"error":{"message":"Loading model","type":"unavailable_error","code":503}}',
    pages={
        "/health": lambda server: (_JSON, b'{"status":"ok"}'),
        "/metrics": _metrics,
        "/models": _models,
        "/props": _props,
        "/slots": _slots,
        "/v1/models": _models,
    },
    exposition=_exposition,
    calls={"/v1/chat/completions": True, "/v1/completions": False},
    not_found=b'{"error":{"message":"File Not Found","type":"not_found_error","code":404}}',
    unauthorized=b'{"error":{"message":"Invalid API Key","type":"authentication_error","code":401}}',
    load=_load,
    parse=_parse,
    shape=LlamaShape,
    error=_error,
    error_event=b"data: "
    + orjson.dumps({"error": {"code": 500, "message": ENGINE_DEAD, "type": "server_error"}})
    + b"\n\n",
)
