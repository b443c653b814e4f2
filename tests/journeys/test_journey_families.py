"""Responses, Messages, reranking and Ollama's own API: recorded answers through the whole gateway."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

from gateway.config import Model, Provider
from gateway.limits.spec import parse_limits
from tests.journeys.stage import (
    LAST_CHUNK,
    SSE_HEAD,
    Scripted,
    framed,
    gateway,
    provider,
    whole,
)
from tests.replay import TRANSCRIPTS, Faults, Replay, load
from tests.wire.oracle import Reading, read_json, read_ndjson, read_sse

#: folder of transcripts -> runtime
RUNTIMES = {
    "vllm": "vllm",
    "llama-server": "llamacpp",
    "ollama": "ollama",
    "ollama-proxy-plus": "ollama",
    "litellm": "litellm",
}
RESPONSES, MESSAGES, COUNT = "/v1/responses", "/v1/messages", "/v1/messages/count_tokens"
_ASKED = re.compile(rb"### POST (/v1/(?:responses|messages|messages/count_tokens|rerank)|/api/[a-z]+)\n### BODY (.*)\n")
_MANAGEMENT = {"/api/pull", "/api/create", "/api/copy", "/api/delete", "/api/show"}


def recorded() -> list[tuple[str, str]]:
    """(transcript, path) of every recorded answer to a request that the gateway forwards."""
    found = []
    for folder in RUNTIMES:
        for file in sorted((TRANSCRIPTS / folder).glob("*.txt")):
            asked = _ASKED.match(file.read_bytes())
            if asked and asked[1].decode() not in _MANAGEMENT and not file.name.startswith(("63-", "o15-")):
                found.append((f"{folder}/{file.stem}", asked[1].decode()))
    return found


RECORDED = recorded()
#: those that end by themselves
STREAMS = [
    (name, path)
    for name, path in RECORDED
    if load(name)[0].header("content-type").startswith(("text/event-stream", "application/x-ndjson"))
]


def asked_for(name: str) -> dict[str, Any]:
    found = _ASKED.match((TRANSCRIPTS / f"{name}.txt").read_bytes())
    assert found, name
    document: dict[str, Any] = json.loads(found[2])
    return document


def reading(name: str) -> Reading:
    """The counts in the recording, read the plain way."""
    (recording,) = load(name)[:1]
    kind = recording.header("content-type")
    read = read_sse if "event-stream" in kind else read_ndjson if "ndjson" in kind else read_json
    return read(recording.body)


def served(name: str, url: str, asked: dict[str, Any], **more: Any) -> Provider:
    return provider("recorded", f"{url}/v1", runtime=RUNTIMES[name.partition("/")[0]], models=[asked["model"]], **more)


def test_every_runtime_has_recordings_of_what_it_is_asked_for() -> None:
    having = {(RUNTIMES[name.partition("/")[0]], path) for name, path in RECORDED}
    everybody = {"vllm", "llamacpp", "ollama", "litellm"}
    assert having >= {(runtime, path) for runtime in everybody for path in (RESPONSES, MESSAGES)}
    assert having >= {(runtime, COUNT) for runtime in everybody - {"ollama"}}
    assert having >= {("ollama", path) for path in ("/api/chat", "/api/generate", "/api/embed", "/api/embeddings")}
    assert {(RUNTIMES[name.partition("/")[0]], path) for name, path in STREAMS} >= {
        *((runtime, path) for runtime in everybody for path in (RESPONSES, MESSAGES)),
        *(("ollama", path) for path in ("/api/chat", "/api/generate")),
    }


@pytest.mark.parametrize(("name", "path"), RECORDED, ids=[name for name, _ in RECORDED])
async def test_the_recorded_bytes_and_their_counts(name: str, path: str) -> None:
    (recording,) = load(name)[:1]
    asked = asked_for(name)
    async with Replay({("POST", path): [recording]}) as replay, gateway(served(name, replay.url, asked)) as here:
        answer = await here.ask("POST", path, asked)
        here.assert_idle()
    assert answer.status == recording.status
    assert answer.body == recording.body
    (sent,) = [one.body for one in replay.seen if one.method == "POST"]
    assert sent == json.dumps(asked).encode(), "nothing had to be changed in the request"
    record = here.record
    assert record.route == path
    if recording.status != 200 or path == COUNT:
        assert (record.prompt_tokens or 0, record.completion_tokens or 0) == (0, 0)
        return
    counted = reading(name)
    assert counted.usages
    assert (record.prompt_tokens, record.completion_tokens) == (counted.prompt, counted.completion)
    assert record.cached_tokens == counted.cached
    assert not record.estimated
    assert (record.outcome, record.stream) == ("ok", (name, path) in STREAMS)


async def test_the_cached_part_of_a_prompt_is_in_what_llamacpp_says_of_messages() -> None:
    """It says input_tokens 1 and cache_read_input_tokens 36; of the same prompt without a cache it says 37."""
    name = "llama-server/60-anthropic-messages"
    asked = asked_for(name)
    async with Replay({("POST", MESSAGES): load(name)}) as replay, gateway(served(name, replay.url, asked)) as here:
        assert (await here.ask("POST", MESSAGES, asked)).json()["usage"]["input_tokens"] == 1
    assert (here.record.prompt_tokens, here.record.cached_tokens) == (37, 36)


@pytest.mark.parametrize(("name", "path"), STREAMS, ids=[name for name, _ in STREAMS])
async def test_a_stream_that_breaks_off_never_looks_like_its_end(name: str, path: str) -> None:
    """Cut in front of its last event, and in the middle: the family's error ends it, and the record says partial."""
    (recording,) = load(name)[:1]
    asked = asked_for(name)
    end = b"\n" if path.startswith("/api/") else b"\n\n"
    pieces = [piece for piece in re.split(rb"(?<=%b)" % end, recording.body.rstrip(b"\n")) if piece]
    last = next(at for at in range(len(pieces) - 1, 0, -1) if b"[DONE]" not in pieces[at])
    for kept in (b"".join(pieces[:last]), b"".join(pieces[: last // 2 + 2])):
        if kept == recording.body or b'"done":true' in kept:
            continue
        faults = Faults(cut_bytes=len(kept))
        async with (
            Replay({("POST", path): [recording]}, faults) as replay,
            gateway(served(name, replay.url, asked), attempts=1) as here,
        ):
            answer = await here.ask("POST", path, asked)
            here.assert_idle()
        assert (answer.status, answer.ended) == (200, True)
        assert answer.body.startswith(kept)
        told = answer.body.removeprefix(kept)
        assert told.endswith(end)
        if path == MESSAGES:
            assert told.startswith(b"event: error\ndata: ")
            assert json.loads(told[19:])["error"]["type"] == "api_error"
            assert b"message_stop" not in answer.body
        elif path == RESPONSES:
            assert told.startswith(b"event: response.failed\ndata: ")
            response = json.loads(told[29:])["response"]
            assert response["status"] == "failed"
            assert response["error"]["code"].startswith("upstream_")
            created = json.loads(kept.partition(b"data: ")[2].partition(b"\n")[0])
            assert response["id"] == created["response"]["id"]
        else:
            assert isinstance(json.loads(told)["error"], str)
            assert b'"done":true' not in answer.body
        assert here.record.outcome == "partial"
        assert here.record.completion_tokens


# -- what is asked of whom ------------------------------------------------------------------------------------------

ASKED: dict[str, dict[str, Any]] = {
    RESPONSES: {"input": "Hi"},
    MESSAGES: {"messages": [], "max_tokens": 4},
    COUNT: {"messages": []},
    "/v1/rerank": {"query": "a", "documents": ["b"]},
    "/v2/rerank": {"query": "a", "documents": ["b"]},
    "/rerank": {"query": "a", "documents": ["b"]},
    "/api/chat": {"messages": []},
    "/api/generate": {"prompt": "Hi"},
    "/api/embed": {"input": "Hi"},
    "/api/embeddings": {"prompt": "Hi"},
}


@pytest.mark.parametrize("path", ASKED)
async def test_only_the_name_of_the_model_is_changed(path: str) -> None:
    runtime = "ollama" if path.startswith("/api/") else "vllm"
    async with Scripted(answer=whole(b'{"usage":{"total_tokens":5}}')) as upstream:
        models = [Model("smol:1b", "Smol", aliases=("small",))]
        async with gateway(provider("one", upstream.url, runtime=runtime, models=models, api_key="up")) as here:
            versions = [("anthropic-version", "2023-06-01"), ("anthropic-beta", "x"), ("x-other", "y")]
            body = {"model": "small", **ASKED[path]}
            answer = await here.ask("POST", path, body, [("x-api-key", here.key), *versions], key=None)
            assert answer.status == 200
            (seen,) = upstream.seen
            assert seen.path == ("/v1/rerank" if path.endswith("rerank") else path)
            assert seen.body == json.dumps(body).encode().replace(b'"small"', b'"smol:1b"')
            assert seen.headers["authorization"] == "Bearer up"
            assert (seen.headers["anthropic-version"], seen.headers["anthropic-beta"]) == ("2023-06-01", "x")
            assert not {"x-other", "x-api-key"} & set(seen.headers)
            if path.endswith("rerank"):
                assert (here.record.prompt_tokens, here.record.completion_tokens) == (5, 0)


@pytest.mark.parametrize(
    ("path", "runtime", "has"),
    [
        ("/api/chat", "vllm", "vLLM has /v1/chat/completions"),
        ("/v1/messages/count_tokens", "ollama", "Ollama has"),
        ("/v1/rerank", "ollama", "/v1/messages"),
        (MESSAGES, "lmstudio", "LM Studio has"),
    ],
)
async def test_a_route_that_the_runtime_has_not(path: str, runtime: str, has: str) -> None:
    async with (
        Scripted(answer=whole(b"{}")) as upstream,
        gateway(provider("one", upstream.url, runtime=runtime)) as here,
    ):
        answer = await here.ask("POST", path, {"model": "sim", **ASKED[path]})
        assert answer.status == 404
        assert upstream.seen == []
        told = answer.json()["error"]
        text = told if path.startswith("/api/") else told["message"]
        assert path in text
        assert has in text
        assert here.record.error == "operation_not_supported"


async def test_who_has_the_route_is_asked() -> None:
    async with (
        Scripted(answer=whole(b"{}")) as without,
        Scripted(answer=whole(b"{}")) as having,
        gateway(provider("one", without.url, runtime="vllm"), provider("two", having.url, runtime="ollama")) as here,
    ):
        for _ in range(6):
            assert (await here.ask("POST", "/api/generate", {"model": "sim", "prompt": "Hi"})).status == 200
        assert (len(without.seen), len(having.seen)) == (0, 6)


async def test_a_response_in_the_background_is_refused() -> None:
    async with Scripted(answer=whole(b"{}")) as upstream, gateway(provider("one", upstream.url)) as here:
        body = {"model": "sim", "input": "Hi", "background": True}
        answer = await here.ask("POST", RESPONSES, body)
        assert (answer.status, answer.error["param"]) == (400, "background")
        assert upstream.seen == []
        assert (await here.ask("POST", RESPONSES, {**body, "background": False})).status == 200


DENIED = [
    *(("POST", f"/api/{name}") for name in ("pull", "push", "create", "copy", "show", "delete", "blobs/sha256:00")),
    *(("DELETE", "/api/delete"), ("HEAD", "/api/blobs/sha256:00"), ("PUT", "/api/blobs/sha256:00")),
    *(("GET", path) for path in ("/api/chat", "/v1/messages", "/v1/responses/resp_1", "/api/status")),
    *(("POST", f"/v1/{name}") for name in ("responses/resp_1/cancel", "messages/batches", "messages/render", "files")),
    *(("POST", path) for path in ("/api/tags", "/api/ps", "/slots/0", "/tokenize", "/v1/load_lora_adapter")),
]


@pytest.mark.parametrize(("method", "path"), DENIED, ids=lambda one: one)
async def test_nothing_else_is_forwarded(method: str, path: str) -> None:
    async with Scripted(answer=whole(b"{}")) as upstream:
        served = [provider(name, upstream.url, runtime=name) for name in ("ollama", "vllm", "llamacpp")]
        async with gateway(*served) as here:
            asked = None if method in ("GET", "HEAD") else {"model": "sim", "name": "sim"}
            assert (await here.ask(method, path, asked)).status in (404, 405)
            assert upstream.seen == []


# -- before the first content ---------------------------------------------------------------------------------------

LINES_HEAD = SSE_HEAD.replace(b"text/event-stream", b"application/x-ndjson")


def sse(kind: str, **more: Any) -> bytes:
    return f"event: {kind}\ndata: {json.dumps({'type': kind, **more})}\n\n".encode()


def line(**members: Any) -> bytes:
    return json.dumps(members, separators=(",", ":")).encode() + b"\n"


OPENINGS = {
    RESPONSES: (
        sse("response.created", response={"id": "r", "error": None, "output": [], "instructions": "Be brief"})
        + sse("response.output_item.added", item={"content": []}),
        sse("response.output_text.delta", delta="Hi")
        + sse("response.completed", response={"usage": {"input_tokens": 3, "output_tokens": 1, "total_tokens": 4}}),
        sse("response.failed", response={"error": {"code": "server_error", "message": "no memory"}}),
    ),
    MESSAGES: (
        sse("message_start", message={"content": [], "usage": {"input_tokens": 3, "output_tokens": 0}})
        + sse("ping")
        + sse("content_block_start", content_block={"type": "text", "text": ""}),
        sse("content_block_delta", delta={"type": "text_delta", "text": "Hi"})
        + sse("message_delta", delta={}, usage={"output_tokens": 1})
        + sse("message_stop"),
        sse("error", error={"type": "overloaded_error", "message": "no memory"}),
    ),
    "/api/chat": (
        line(message={"role": "assistant", "content": ""}, done=False),
        line(message={"role": "assistant", "content": "Hi"}, done=False)
        + line(message={"role": "assistant", "content": ""}, done=True, prompt_eval_count=3, eval_count=1),
        line(error="no memory"),
    ),
    "/api/generate": (
        line(response="", done=False),
        line(response="Hi", done=False) + line(response="", done=True, prompt_eval_count=3, eval_count=1),
        line(error="no memory"),
    ),
}


@pytest.mark.parametrize("error", [False, True], ids=["cut", "error"])
@pytest.mark.parametrize("path", OPENINGS)
async def test_another_is_asked_before_there_is_content(path: str, error: bool) -> None:
    head = LINES_HEAD if path.startswith("/api/") else SSE_HEAD
    before, rest, failed = OPENINGS[path]
    bad = head + framed(before) + (framed(failed) + LAST_CHUNK if error else b"")
    good = head + framed(before + rest) + LAST_CHUNK
    async with Scripted(answer=bad) as first, Scripted(answer=good) as second:
        urls = (first.url, second.url)
        async with gateway(provider("one", *urls, runtime="ollama"), policy="round_robin") as here:
            for _ in range(4):
                body = {"model": "sim", **ASKED[path], **({} if path.startswith("/api/") else {"stream": True})}
                answer = await here.ask("POST", path, body)
                assert answer.body == before + rest
                record = here.record
                assert (record.prompt_tokens, record.completion_tokens, record.outcome) == (3, 1, "ok")
            assert first.seen
            assert any(record.attempts == 2 for record in here.records)


# -- limits, the ledger, errors -------------------------------------------------------------------------------------


async def test_counting_tokens_uses_none(tmp_path: Path) -> None:
    async with Scripted(answer=whole(b'{"input_tokens":37}')) as upstream:
        fields = {"limits": parse_limits([{"resource": "total_tokens", "burst": 10, "per_s": 1}])}
        async with gateway(provider("one", upstream.url), keyed={"few": fields}, data_dir=tmp_path) as here:
            for _ in range(3):
                answer = await here.ask("POST", COUNT, {"model": "sim", **ASKED[COUNT]}, key=here.keys["few"])
                assert answer.json() == {"input_tokens": 37}
            assert here.record.prompt_tokens is None
            assert (await here.ask("GET", "/v1/usage?by=key", key=here.keys["few"])).json()["rows"] == []
            assert 'gen_ai_operation_name="count_tokens"' in await here.scrape()
        assert here.app.journal is not None
        journal = b"".join(path.read_bytes() for path in here.app.journal.root.rglob("*") if path.is_file())
        assert b"count_tokens" not in journal, "nor as a request that was begun, which a restart would bill"


async def test_counting_tokens_is_limited_by_requests() -> None:
    async with Scripted(answer=whole(b'{"input_tokens":37}')) as upstream:
        fields = {"limits": parse_limits([{"resource": "requests", "burst": 2, "per_h": 1}])}
        async with gateway(provider("one", upstream.url), keyed={"few": fields}) as here:
            body = {"model": "sim", **ASKED[COUNT]}
            answers = [await here.ask("POST", COUNT, body, key=here.keys["few"]) for _ in range(3)]
            assert [answer.status for answer in answers] == [200, 200, 429]
            assert answers[2].json()["error"]["type"] == "rate_limit_error"
            assert int(answers[2].header("retry-after") or 0) >= 1


@pytest.mark.parametrize(
    ("path", "asked"),
    [
        (RESPONSES, {"max_output_tokens": 8}),
        (MESSAGES, {"max_tokens": 8}),
        ("/api/chat", {"options": {"num_predict": 8}}),
        ("/api/generate", {"options": {"num_predict": 8}}),
        ("/v1/rerank", {}),
        ("/api/embed", {}),
    ],
)
async def test_estimates_know_how_each_family_says_how_much_it_wants(path: str, asked: dict[str, Any]) -> None:
    async with Scripted(answer=whole(b"{}")) as upstream:
        fields = {"limits": parse_limits([{"resource": "total_tokens", "burst": 10_000, "per_s": 1}])}
        runtime = "ollama" if path.startswith("/api/") else "vllm"
        async with gateway(provider("one", upstream.url, runtime=runtime), keyed={"few": fields}) as here:
            body = {"model": "sim", **ASKED[path], **asked}
            assert (await here.ask("POST", path, body, key=here.keys["few"])).status == 200
            (limit,) = here.record.limits
            assert 0 < limit.reserved <= 8 + len(json.dumps(body))
            if path.startswith("/api/") and asked:  # what is not Ollama's word for it says nothing
                assert await here.ask("POST", path, {**body, "options": {}, "max_tokens": 8}, key=here.keys["few"])
                assert here.record.limits[0].reserved > limit.reserved + 50


@pytest.mark.parametrize("path", ASKED)
async def test_errors_have_the_familys_form(path: str) -> None:
    async with Scripted() as upstream, gateway(provider("one", upstream.url, runtime="vllm")) as here:
        for key, body in ((None, ASKED[path]), ("", {}), ("", {"model": "nonesuch", **ASKED[path]})):
            answer = await here.ask("POST", path, body, key=key)
            assert answer.status in (400, 401, 404)
            document = answer.json()
            if path.startswith("/api/"):
                assert set(document) == {"error"}
                assert isinstance(document["error"], str)
            elif path.startswith(MESSAGES):
                assert (document["type"], document["request_id"]) == ("error", answer.header("x-request-id"))
                assert set(document["error"]) == {"type", "message"}
            else:
                assert answer.error["code"]


# -- what Ollama's clients look at first ----------------------------------------------------------------------------


async def test_lists_are_the_catalogs_and_the_keys() -> None:
    async with Scripted() as upstream:
        models = [Model("a:1b", "A", aliases=("a",)), Model("b:latest", "B", aliases=("b",))]
        providers = (
            provider("one", upstream.url, runtime="ollama", models=models),
            provider("two", upstream.url, models=["c"]),
        )
        async with gateway(*providers, limited={"few": frozenset({"a:1b"})}) as here:
            tags = (await here.ask("GET", "/api/tags")).json()["models"]
            assert {one["name"] for one in tags} == {one["model"] for one in tags} == {"a:1b", "a", "b:latest", "b"}
            few = (await here.ask("GET", "/api/tags", key=here.keys["few"])).json()["models"]
            assert {one["name"] for one in few} == {"a:1b", "a"}
            assert (await here.ask("GET", "/api/ps")).json() == {"models": []}
            assert "version" in (await here.ask("GET", "/api/version")).json()
            assert isinstance((await here.ask("GET", "/api/tags", key=None)).json()["error"], str)
