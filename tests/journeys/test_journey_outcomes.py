"""What a request is recorded as, where it is not plain."""

from __future__ import annotations

import asyncio
import json

import pytest

from tests.journeys.stage import (
    CHAT,
    DONE,
    FINISH,
    SSE_HEAD,
    Scripted,
    chat,
    event,
    framed,
    gateway,
    provider,
    until,
    whole,
)


@pytest.mark.parametrize("status", ["400 Bad Request", "404 Not Found", "422 Unprocessable Entity"])
async def test_an_upstreams_refusal_is_an_answer_and_no_failure(status: str) -> None:
    body = b'{"error":{"message":"too long","type":"BadRequestError","code":400}}'
    async with Scripted(answer=whole(body, status=status)) as upstream, gateway(provider("one", upstream.url)) as here:
        answer = await here.ask("POST", CHAT, chat())
        assert answer.body == body
        (record,) = await here.settled(1)
        assert record.status == int(status[:3])
        assert record.outcome == "ok"
        assert record.error is None
        assert here.app.catalog.upstreams[0].failed == 0


async def test_a_client_that_hangs_up_on_reading_done_has_had_its_answer() -> None:
    """As the SDKs do: they close on [DONE], and the upstream's last chunk may not have come yet."""
    stream = SSE_HEAD + framed(event("a")) + framed(FINISH) + framed(DONE)
    async with Scripted(answer=stream, keep=True) as upstream, gateway(provider("one", upstream.url)) as here:
        async with here.connect() as client:
            client.send("POST", CHAT, chat(stream=True))
            await client.head()
            seen = b""
            while b"[DONE]" not in seen:
                seen += await client.chunk()
        await until(lambda: here.app.in_flight() == 0, what="nothing in flight")
        (record,) = await here.settled(1)
        assert (record.status, record.outcome) == (200, "ok")


async def test_own_answers_name_their_request() -> None:
    async with Scripted() as upstream, gateway(provider("one", upstream.url)) as here:
        for method, path in (("GET", "/v1/models"), ("GET", "/livez"), ("GET", "/nothing")):
            answer = await here.ask(method, path)
            assert answer.header("x-request-id") == (await here.settled(1))[-1].request_id


async def test_a_redirecting_upstream_is_a_configuration_fault() -> None:
    """Followed, it would take prompts to another host; passed on without its Location it helps nobody."""
    moved = whole(b"", status="307 Temporary Redirect", extra="Location: http://127.0.0.1:1/v1/chat/completions\r\n")
    async with Scripted(answer=moved) as upstream, gateway(provider("one", upstream.url)) as here:
        answer = await here.ask("POST", CHAT, chat())
        assert answer.status == 502
        assert answer.error["code"] == "upstream_redirect"
        assert "baseUrl" in answer.error["message"]
        assert len(upstream.seen) == 1


async def test_an_answer_without_content_has_no_length() -> None:
    none = b"HTTP/1.1 204 No Content\r\n\r\n"
    async with Scripted(answer=none) as upstream, gateway(provider("one", upstream.url)) as here:
        async with here.connect() as client:
            client.send("POST", CHAT, chat())
            head = await client.head()
        assert head.status == 204
        assert head.header("content-length") is None


async def test_null_is_no_messages() -> None:
    async with Scripted() as upstream, gateway(provider("one", upstream.url)) as here:
        answer = await here.ask("POST", CHAT, {"model": "sim", "messages": None})
        assert (answer.status, answer.error["param"]) == (400, "messages")
        assert not upstream.seen


async def test_the_record_says_who_asked_for_what() -> None:
    async with Scripted() as upstream, gateway(provider("one", upstream.url)) as here:
        await here.ask("POST", CHAT, chat(model="no-such-model"))
        (record,) = await here.settled(1)
        assert record.client == "127.0.0.1"
        assert record.model_asked == "no-such-model"


async def test_waiting_for_a_slow_body_is_no_overhead() -> None:
    async with Scripted(answer=whole(b"{}")) as upstream, gateway(provider("one", upstream.url)) as here:
        body = json.dumps(chat()).encode()
        reader, writer = await asyncio.open_connection("127.0.0.1", here.port)
        head = f"POST {CHAT} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {here.key}\r\nContent-Length: {len(body)}\r\n"
        writer.write(head.encode() + b"\r\n" + body[:10])
        await asyncio.sleep(0.4)
        writer.write(body[10:])
        assert (await reader.readline()).startswith(b"HTTP/1.1 200")
        writer.close()
        (record,) = await here.settled(1)
        assert record.duration_s >= 0.4
        assert here.app.metrics.overhead.sum < 0.3
