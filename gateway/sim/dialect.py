"""vLLM's dialect, sans I/O: a request's body -> `Call`, a call's progress -> the exact bytes vLLM sends.

Shapes, key order and chunk order are those recorded from vLLM 0.32.0 (OpenAI API server). Not modelled: logprobs,
guided output, reasoning, /v1/messages and /v1/responses. What other runtimes do otherwise is in `runtimes`.

An answer that is asked for again with its beginning given (a prompt that ends with it, or a final message to be
continued) goes on as it would have, to the same end: what a test of a continuation compares.
"""

from __future__ import annotations

from typing import Any

import orjson

from gateway.sim.engine import chain
from gateway.sim.faults import Faults
from gateway.sim.text import beginnings, cut_at_stop, rest, tokenize, write

VERSION = "0.32.0"
FINGERPRINT = b'"vllm-0.32.0-2a756906"'
DEFAULT_OUTPUT_TOKENS = 64
_END = "<|im_end|>"


class ApiError(Exception):
    """An error answer in vLLM's shape: `{"error": {"message", "type", "param", "code"}}`, code = HTTP status."""

    def __init__(self, status: int, type: str, message: str, param: str | None = None) -> None:
        super().__init__(message)
        self.status = status
        self.body = error_body(status, type, message, param)


class PromptTooLong(ApiError):
    """The prompt, of `tokens`, leaves no room for an answer."""

    def __init__(self, tokens: int, answer: int, context: int) -> None:
        super().__init__(
            400,
            "BadRequestError",
            f"This model's maximum context length is {context} tokens. However, you requested {answer} output tokens "
            f"and your prompt contains {tokens} input tokens, for a total of {tokens + answer} tokens. Please reduce "
            "the length of the input prompt or the number of requested output tokens. "
            f"(parameter=input_tokens, value={tokens})",
            "input_tokens",
        )
        self.tokens = tokens


def error_body(status: int, type: str, message: str, param: str | None = None) -> bytes:
    return orjson.dumps({"error": {"message": message, "type": type, "param": param, "code": status}})


ENGINE_DEAD = "EngineCore encountered an issue. See stack trace (above) for the root cause."
ERROR_EVENT = (
    b'data: {"error": {"message": "' + ENGINE_DEAD.encode() + b'", '
    b'"type": "InternalServerError", "param": null, "code": 500}}\n\n'
)
DONE = b"data: [DONE]\n\n"


class Choice:
    """One answer: its pieces (one per token) and how it ends. `tokens` counts the end token when it stops."""

    __slots__ = ("finish", "pieces", "stop_reason", "tokens", "tool")

    def __init__(self, pieces: list[str], finish: str, stop_reason: str | None, tool: str | None) -> None:
        self.pieces = pieces
        self.finish = finish
        self.stop_reason = stop_reason
        self.tool = tool
        self.tokens = len(pieces) + (finish != "length" and stop_reason is None)


class Call:
    """A validated request: what to generate and how to show it."""

    __slots__ = (
        "blocks",
        "chat",
        "choices",
        "continuous_usage",
        "faults",
        "include_usage",
        "model",
        "prefill",
        "prompt_lengths",
        "prompt_tokens",
        "stream",
    )

    def __init__(self, chat: bool, model: str, stream: bool, faults: Faults) -> None:
        self.chat = chat
        self.prefill = ""  # the final message that is continued
        self.model = model
        self.stream = stream
        self.faults = faults
        self.include_usage = False
        self.continuous_usage = False
        self.choices: list[Choice] = []
        self.prompt_lengths: list[int] = []  # for each choice
        self.blocks: list[list[int]] = []  # for each choice
        self.prompt_tokens = 0


def load(raw: bytes) -> dict[str, Any]:
    try:
        body = orjson.loads(raw)
    except orjson.JSONDecodeError as error:
        raise _invalid(
            f"body.{error.pos}",
            {
                "type": "json_invalid",
                "loc": f"body.{error.pos}",
                "msg": "JSON decode error",
                "input": "<dict of 0 items>",
                "ctx": {"error": "Expecting value"},
            },
        ) from None
    if not isinstance(body, dict):
        raise _wrong_type("body", "model_attributes_type", "a valid dictionary or object", body)
    return body


def model_of(body: dict[str, Any], models: tuple[str, ...]) -> str:
    """The served model that is asked for; vLLM takes a missing one for its own first."""
    model = body.get("model")
    if model is None:
        return models[0]
    if model not in models:
        names = ", ".join(models)
        raise ApiError(404, "NotFoundError", f"The model `{model}` does not exist. Valid aliases: {names}.", "model")
    return str(model)


def parse_call(
    body: dict[str, Any],
    chat: bool,
    models: tuple[str, ...],
    context: int,
    faults: Faults,
    opening: str = "",
    completion_tokens: int | None = 16,
) -> Call:
    """ApiError for what vLLM refuses. `context`: tokens of prompt and answer; `opening` begins every answer;
    `completion_tokens`: what the completions API writes at most if nobody says (16 by its reference).
    """
    model = model_of(body, models)
    own = body.get("sim")
    if own is not None:
        try:
            faults = faults.merged(own)
        except (TypeError, ValueError) as error:
            raise ApiError(400, "BadRequestError", f"sim: {error}", "sim") from None
    call = Call(chat, model, bool(body.get("stream")), faults)
    options = body.get("stream_options") or {}
    call.include_usage = call.stream and bool(options.get("include_usage"))
    call.continuous_usage = call.include_usage and bool(options.get("continuous_usage_stats"))
    limit = _integer(body, "max_completion_tokens")
    if limit is None:
        limit = _integer(body, "max_tokens")
    if limit is None and not chat:
        limit = completion_tokens
    temperature = body.get("temperature")
    if isinstance(temperature, (int, float)) and temperature < 0:
        raise _refused(
            f"temperature must be non-negative, got {float(temperature)}.", "temperature", float(temperature)
        )
    if limit is not None and limit > context:
        raise _refused(
            f"max_tokens={limit} cannot be greater than max_model_len={context}. Please request fewer output tokens.",
            "max_tokens",
            limit,
        )
    if limit is not None and limit < 1:
        raise _refused(f"max_tokens must be at least 1, got {limit}.", "max_tokens", limit)
    stop = body.get("stop") or []
    stops = [stop] if isinstance(stop, str) else [s for s in stop if isinstance(s, str)]
    count = _integer(body, "n") or 1
    tool = _forced_tool(body, faults) if chat else None
    salt = body.get("cache_salt")
    if salt is not None and (not isinstance(salt, str) or not salt):
        raise _refused("Parameter 'cache_salt' must be a non-empty string if provided.", "cache_salt", salt)
    for prompt, prefill in [_chat_prompt(body)] if chat else _completion_prompts(body):
        length = len(prompt)
        room = context - length
        if room < (limit or 1):
            raise PromptTooLong(length, limit or 1, context)
        call.prompt_tokens += length
        call.prefill = "".join(prefill)
        text = "".join(prompt)
        most = min(limit or faults.tokens or DEFAULT_OUTPUT_TOKENS, room)
        for index in range(count):
            asked = f"{model}\0{index}\0"
            if chat:
                seed = asked + "".join(prompt[: length - len(prefill)])
                begun = rest(seed, call.prefill, most, opening) if prefill else None
                choice = _answer(seed, limit, room, stops, tool, begun, faults, opening, bool(prefill))
            else:
                seed, begun = asked + text, None
                for at in beginnings(text, opening):
                    found = rest(asked + text[:at], text[at + 1 :], most, opening)
                    if found is not None:
                        seed, begun = asked + text[:at], found
                        break
                choice = _answer(seed, limit, room, stops, tool, begun, faults, opening, begun is None)
            call.choices.append(choice)
            call.prompt_lengths.append(length)
            made = choice.pieces if choice.tokens == len(choice.pieces) else [*choice.pieces, _END]
            call.blocks.append(chain(prompt + made, (model, salt)))
    return call


def _answer(
    seed: str,
    limit: int | None,
    room: int,
    stops: list[str],
    tool: tuple[str, str, str] | None,
    begun: tuple[list[str], int] | None,
    faults: Faults,
    opening: str,
    spaced: bool,
) -> Choice:
    """`begun`: what follows the beginning that the prompt ends with, and that beginning's length in tokens; `spaced`:
    an answer from its own beginning follows text, after a space.
    """
    # Without `max_tokens` the answer has a natural end; with it, unless a length was asked for, it fills it exactly.
    natural = faults.tokens or (DEFAULT_OUTPUT_TOKENS if limit is None else room + 1)
    if tool is not None:
        name, arguments, finish = tool
        pieces = ["", *tokenize(arguments)]  # the first token names the function
        if limit is not None and len(pieces) >= limit:
            return Choice(pieces[:limit], "length", None, name)
        return Choice(pieces, finish, None, name)
    most = min(limit or room, room)
    if begun is not None:
        left, done = begun
        wanted = max(min(natural - 1 - done, most), 0)
        pieces = left[:wanted]
    else:
        wanted = min(natural - 1, most)
        pieces = write(seed, wanted, opening)
        if spaced and pieces:
            pieces[0] = " " + pieces[0]
    pieces, stop_reason = cut_at_stop(pieces, stops)
    if stop_reason is not None or wanted < most:
        return Choice(pieces, "stop", stop_reason, None)
    return Choice(pieces, "length", None, None)


def _chat_prompt(body: dict[str, Any]) -> tuple[list[str], list[str]]:
    """The tokens of a ChatML prompt, and those of the answer's beginning if the last message is to be continued."""
    if "messages" not in body:
        raise _missing("messages", body)
    messages = body["messages"]
    if not isinstance(messages, list):
        raise _wrong_type("body.messages", "list_type", "a valid list", messages)
    if not messages:
        raise ApiError(
            400,
            "BadRequestError",
            "Cannot apply chat template to an empty conversation. Provide at least one message.",
        )
    tokens: list[str] = []
    if body.get("tools"):
        tokens += ["<|im_start|>", "tools", "\n", *tokenize(orjson.dumps(body["tools"]).decode()), _END, "\n"]
    content: list[str] = []
    for message in messages:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise _wrong_type("body.messages", "dict_type", "a valid dictionary with a role", message)
        content = tokenize(_plain(message))
        tokens += ["<|im_start|>", message["role"], "\n", *content, _END, "\n"]
    if body.get("continue_final_message") and not body.get("add_generation_prompt", True):
        return tokens[:-2], content
    return [*tokens, "<|im_start|>", "assistant", "\n"], []


def _plain(message: dict[str, Any]) -> str:
    content = message.get("content")
    text = content if isinstance(content, str) else ""
    if isinstance(content, list):
        text = "".join(str(p.get("text") or p.get("type") or "") for p in content if isinstance(p, dict))
    if message.get("tool_calls"):
        text += orjson.dumps(message["tool_calls"]).decode()
    return text


def _completion_prompts(body: dict[str, Any]) -> list[tuple[list[str], list[str]]]:
    if "prompt" not in body:
        raise _missing("prompt", body)
    prompt = body["prompt"]
    many = isinstance(prompt, list) and prompt and not isinstance(prompt[0], int)
    prompts: list[tuple[list[str], list[str]]] = []
    for one in prompt if many else [prompt]:
        if isinstance(one, str):
            prompts.append((tokenize(one), []))
        elif isinstance(one, list) and all(isinstance(token, int) for token in one):
            prompts.append(([f"<{token}>" for token in one], []))
        else:
            raise _wrong_type("body.prompt", "string_type", "a valid string", one)
    return prompts


def _forced_tool(body: dict[str, Any], faults: Faults) -> tuple[str, str, str] | None:
    """(name, arguments as JSON, finish_reason) when the request forces a call."""
    tools = [t["function"] for t in body.get("tools") or [] if isinstance(t, dict) and "function" in t]
    choice = body.get("tool_choice")
    if not tools or not (choice == "required" or isinstance(choice, dict) or faults.tool_call):
        return None
    function = tools[0]
    if isinstance(choice, dict):
        name = (choice.get("function") or {}).get("name")
        named = [f for f in tools if f.get("name") == name]
        if not named:
            raise ApiError(400, "BadRequestError", f"Tool '{name}' has not been passed in `tools`.", "tool_choice")
        function = named[0]
    arguments = orjson.dumps(_example(function.get("parameters") or {}, "")).decode()
    return str(function.get("name")), arguments, "stop" if isinstance(choice, dict) else "tool_calls"


def _example(schema: dict[str, Any], name: str) -> Any:
    """A value that a JSON schema allows, as far as types and enums go."""
    if schema.get("enum"):
        return schema["enum"][0]
    kind = schema.get("type", "object")
    if kind == "object":
        return {key: _example(part, key) for key, part in (schema.get("properties") or {}).items()}
    if kind == "array":
        return [_example(schema.get("items") or {"type": "string"}, name)]
    return {"integer": 7, "number": 1.5, "boolean": True, "null": None}.get(kind, f"some {name}".strip())


def _integer(body: dict[str, Any], name: str) -> int | None:
    value = body.get(name)
    if value is None or (isinstance(value, int) and not isinstance(value, bool)):
        return value
    if isinstance(value, str):
        message = "Input should be a valid integer, unable to parse string as an integer"
        raise _invalid(
            f"body.{name}",
            {"type": "int_parsing", "loc": f"body.{name}", "msg": message, "input": value},
        )
    raise _wrong_type(f"body.{name}", "int_type", "a valid integer", value)


def _invalid(where: str, problem: dict[str, Any]) -> ApiError:
    return ApiError(400, "Bad Request", f"1 validation error:\n  {problem}", where)


def _wrong_type(where: str, kind: str, wanted: str, value: Any) -> ApiError:
    return _invalid(where, {"type": kind, "loc": where, "msg": f"Input should be {wanted}", "input": str(value)[:50]})


def _missing(name: str, body: dict[str, Any]) -> ApiError:
    shown = f"<dict of {len(body)} items>"
    where = f"body.{name}"
    return _invalid(where, {"type": "missing", "loc": where, "msg": "Field required", "input": shown})


def _refused(message: str, param: str, value: object) -> ApiError:
    return ApiError(400, "BadRequestError", f"{message} (parameter={param}, value={value})", param)
