"""What a request is recorded as, where it is not plain."""

from __future__ import annotations

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
