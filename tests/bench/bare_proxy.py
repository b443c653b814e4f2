"""The reference: the best simple reverse proxy aiohttp gives, `web.Application` + `ClientSession` on uvloop.

    python -m tests.bench.bare_proxy PORT UPSTREAM_URL

It does no gateway work (no keys, no metering, no metrics, no log) and nothing in it is made slow on purpose:
access log off, no cookie jar, no decompression, one pooled session without a connection limit, bodies of
known length relayed in one piece, all others piece by piece as they arrive.
"""

import asyncio
import signal
import sys
from collections.abc import AsyncIterator

import aiohttp
import uvloop
from aiohttp import web
from multidict import CIMultiDict

_HOP_BY_HOP = {
    "connection",
    "content-length",
    "host",
    "keep-alive",
    "proxy-authenticate",
    "proxy-authorization",
}
_HOP_BY_HOP |= {"te", "trailer", "transfer-encoding", "upgrade"}
_BODY_LIMIT_BYTES = 64 << 20
_WHOLE_BODY_BYTES = 1 << 20  # measured: reading first is faster up to about here, passing on as it comes above
_SESSION = web.AppKey("session", aiohttp.ClientSession)


def _end_to_end(headers: object) -> CIMultiDict[str]:
    kept = CIMultiDict[str]()
    for name, value in headers.items():  # type: ignore[attr-defined]
        if name.lower() not in _HOP_BY_HOP:
            kept.add(name, value)
    return kept


def _application(upstream: str) -> web.Application:
    async def session(app: web.Application) -> AsyncIterator[None]:
        async with aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0, keepalive_timeout=60),
            timeout=aiohttp.ClientTimeout(total=None, sock_connect=10),
            cookie_jar=aiohttp.DummyCookieJar(),
            auto_decompress=False,
        ) as app[_SESSION]:
            yield

    async def relay(request: web.Request) -> web.StreamResponse:
        headers = _end_to_end(request.headers)
        data: bytes | aiohttp.StreamReader
        if (request.content_length or 0) <= _WHOLE_BODY_BYTES:
            data = await request.read()
        else:
            data = request.content
            headers["Content-Length"] = str(request.content_length)
        async with request.app[_SESSION].request(
            request.method, upstream + request.path_qs, data=data, headers=headers, allow_redirects=False
        ) as reply:
            headers = _end_to_end(reply.headers)
            if reply.content_length is not None:
                return web.Response(status=reply.status, headers=headers, body=await reply.read())
            response = web.StreamResponse(status=reply.status, headers=headers)
            await response.prepare(request)
            async for piece in reply.content.iter_any():
                await response.write(piece)
            await response.write_eof()
            return response

    app = web.Application(client_max_size=_BODY_LIMIT_BYTES)
    app.cleanup_ctx.append(session)
    app.router.add_route("*", "/{path:.*}", relay)
    return app


async def _serve(port: int, upstream: str) -> None:
    stopped = asyncio.Event()
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, stopped.set)
    runner = web.AppRunner(_application(upstream), access_log=None, keepalive_timeout=300)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", port, backlog=4096, shutdown_timeout=1).start()
    await stopped.wait()
    await runner.cleanup()


if __name__ == "__main__":
    uvloop.run(_serve(int(sys.argv[1]), sys.argv[2]))
