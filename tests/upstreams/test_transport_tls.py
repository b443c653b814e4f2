"""TLS to an upstream: trusted or refused in clear words, and an end that an attacker could make is no end."""

from __future__ import annotations

import asyncio
import hashlib
import random
import shutil
import ssl
import subprocess
from pathlib import Path
from time import monotonic

import pytest

from gateway.errors import UpstreamBroken, UpstreamUnreachable
from tests.upstreams.scripted import BODY, OK, Script, Scripted, client, exchange, head, read, until, upstream

STREAM = b"HTTP/1.1 200 OK\r\nContent-Type: text/event-stream\r\nTransfer-Encoding: chunked\r\n\r\n"
UNTIL_CLOSE = b"HTTP/1.1 200 OK\r\n\r\nhello"

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="its certificate is made with `openssl`")


@pytest.fixture(scope="module")
def contexts(tmp_path_factory: pytest.TempPathFactory) -> tuple[ssl.SSLContext, ssl.SSLContext]:
    """(the server's, with a certificate of its own for 127.0.0.1; a client's that trusts it)"""
    folder: Path = tmp_path_factory.mktemp("tls")
    key, certificate = folder / "key.pem", folder / "certificate.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes",
         "-days", "1", "-subj", "/CN=test", "-addext", "subjectAltName=IP:127.0.0.1",
         "-keyout", str(key), "-out", str(certificate)],
        check=True,
        capture_output=True,
    )  # fmt: skip
    server = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    server.load_cert_chain(certificate, key)
    return server, ssl.create_default_context(cafile=certificate)


Contexts = tuple[ssl.SSLContext, ssl.SSLContext]


async def test_trusted(contexts: Contexts) -> None:
    stream: Script = [STREAM, b"9\r\ndata: 1\n\n\r\n", 0.02, b"9\r\ndata: 2\n\n\r\n0\r\n\r\n"]
    scripts = [[OK], stream, [OK]]
    async with (
        Scripted(lambda _, turn: scripts[turn], tls=contexts[0]) as server,
        client(contexts[1]) as transport,
    ):
        one = server.upstream()
        assert one.scheme == "https"
        assert await exchange(transport, one) == (200, b"{}")
        assert await exchange(transport, one) == (200, b"data: 1\n\ndata: 2\n\n")
        assert await exchange(transport, one) == (200, b"{}")
        assert server.connections == 1
        assert transport.counts(one) == (0, 1)


async def test_large_bodies_with_pauses(contexts: Contexts) -> None:
    up = random.Random(1).randbytes(2_000_000)
    down = random.Random(2).randbytes(8_000_000)
    answer = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n" % len(down)
    async with Scripted([answer, down], tls=contexts[0]) as server, client(contexts[1]) as transport:
        reply = await transport.send(server.upstream(idle_s=0.5), head(len(up)), up)
        digest = hashlib.sha256()
        loop = asyncio.get_running_loop()

        def sink(data: bytes) -> None:
            digest.update(data)
            reply.moved_at = monotonic()
            if data[0] & 1:
                reply.pause()
                loop.call_later(0.001, reply.resume)

        reply.attach(sink)
        await asyncio.wait_for(reply.ended(), 20)
        assert digest.digest() == hashlib.sha256(down).digest()
        assert server.requests == [up]


async def test_not_trusted(contexts: Contexts) -> None:
    """The default context asks the system's trust store, which has never heard of this certificate."""
    async with Scripted([OK], tls=contexts[0]) as server, client() as transport:
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: None)  # the server's side of it
        one = server.upstream()
        with pytest.raises(UpstreamUnreachable, match=r"the certificate is not trusted: self.signed") as raised:
            await exchange(transport, one)
        assert raised.value.status == 502
        assert not raised.value.sent
        assert server.requests == []
        assert transport.counts(one) == (0, 0)


async def test_trusted_but_for_another_name(contexts: Contexts) -> None:
    async with Scripted([OK], tls=contexts[0]) as server, client(contexts[1]) as transport:
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: None)  # the server's side of it
        with pytest.raises(UpstreamUnreachable, match="not trusted: Hostname mismatch"):
            await exchange(transport, upstream(f"https://localhost:{server.port}/v1"))
        assert server.requests == []


async def test_no_tls_where_it_was_expected(contexts: Contexts) -> None:
    plain: Script = [b"HTTP/1.1 400 Bad Request\r\nContent-Length: 0\r\n\r\n"]
    async with Scripted(plain, read=False) as server, client(contexts[1]) as transport:
        one = upstream(f"https://127.0.0.1:{server.port}/v1")
        with pytest.raises(UpstreamUnreachable, match=r"TLS with 127\.0\.0\.1:\d+ failed: [a-z ]+$"):
            await exchange(transport, one)


async def test_hung_up_in_the_handshake(contexts: Contexts) -> None:
    async with Scripted(["close"], read=False) as server, client(contexts[1]) as transport:
        one = upstream(f"https://127.0.0.1:{server.port}/v1")
        with pytest.raises(UpstreamUnreachable, match=r": connection (reset|closed|aborted)"):
            await exchange(transport, one)


async def test_tls_where_none_was_expected(contexts: Contexts) -> None:
    async with Scripted([OK], tls=contexts[0]) as server, client() as transport:
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: None)  # the server's side of it
        with pytest.raises(UpstreamBroken):
            await asyncio.wait_for(exchange(transport, upstream(f"http://127.0.0.1:{server.port}/v1")), 2)


async def test_a_handshake_that_never_ends_is_the_connect_timeout(contexts: Contexts) -> None:
    async with Scripted(["hang"], read=False) as server, client(contexts[1]) as transport:
        one = upstream(f"https://127.0.0.1:{server.port}/v1", connect_s=0.2)
        began_at = monotonic()
        with pytest.raises(UpstreamUnreachable, match="connect timeout") as raised:
            await exchange(transport, one)
        assert 0.19 < monotonic() - began_at < 1.2
        assert raised.value.status == 504
        await until(lambda: server.open == 0)


@pytest.mark.parametrize(
    ("script", "whole"),
    [
        ([UNTIL_CLOSE, 0.02, "close"], True),
        ([UNTIL_CLOSE, 0.02, "abort"], False),
        ([UNTIL_CLOSE, 0.02, "reset"], False),
        ([UNTIL_CLOSE, "close"], True),
        ([UNTIL_CLOSE, "abort"], False),
        ([OK, "abort"], True),
        ([STREAM, b"9\r\ndata: 1\n\n\r\n", 0.02, "close"], False),
    ],
    ids=["alert", "no alert", "reset", "alert at once", "no alert at once", "has a length", "chunked"],
)
async def test_an_answer_until_close_needs_the_closure_alert(contexts: Contexts, script: Script, whole: bool) -> None:
    """A FIN can be sent by anyone on the way: RFC 9112 section 9.8."""
    async with Scripted(script, tls=contexts[0]) as server, client(contexts[1]) as transport:
        one = server.upstream()
        if whole:
            status, body = await asyncio.wait_for(exchange(transport, one), 2)
            assert (status, body) in ((200, b"hello"), (200, b"{}"))
        else:
            with pytest.raises(UpstreamBroken, match="closed the connection"):
                await asyncio.wait_for(exchange(transport, one), 2)
        await until(lambda: transport.counts(one) == (0, 0))


async def test_an_idle_connection_that_the_server_closes_is_dropped(contexts: Contexts) -> None:
    async with Scripted([OK, 0.02, "close"], tls=contexts[0]) as server, client(contexts[1]) as transport:
        one = server.upstream()
        for number in range(3):
            assert await exchange(transport, one) == (200, b"{}")
            assert transport.counts(one) == (0, 1)
            await until(lambda: transport.counts(one) == (0, 0))
            assert server.connections == number + 1


@pytest.mark.parametrize("delay_s", [0.0, 0.0005, 0.001, 0.002, 0.004, 0.008, 0.03])
async def test_cancelled_it_is_closed_at_once(contexts: Contexts, delay_s: float) -> None:
    script: Script = [STREAM, b"9\r\ndata: 1\n\n\r\n", "hang"]
    async with Scripted(script, tls=contexts[0]) as server, client(contexts[1]) as transport:
        asyncio.get_running_loop().set_exception_handler(lambda loop, context: None)  # the server's side of it
        one = server.upstream()

        async def use() -> None:
            reply = await transport.send(one, head(), BODY)
            try:
                await read(reply)
            finally:
                reply.close()

        task = asyncio.create_task(use())
        await asyncio.sleep(delay_s)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        assert transport.counts(one) == (0, 0)
        await until(lambda: server.open == 0)
