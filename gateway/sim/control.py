"""The control door of `sim serve`: break a running fleet, and mend it. It listens on loopback only.

    GET  /sim                      what each engine is doing, as a JSON list
    POST /sim/faults?engine=2      the body's faults from now on ({}: none any more); answers like GET /sim
    POST /sim/kill?engine=2        dies as from kill -9; with the body {"down_s": 3} it comes back by itself
    POST /sim/revive?engine=2      listens again

Engines are numbered from 1; without `engine` all are meant.
"""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any
from urllib.parse import parse_qs, urlsplit

import orjson

from gateway.sim.connection import Connection, Received
from gateway.sim.dialect import error_body
from gateway.sim.faults import NONE
from gateway.sim.listener import Listener
from gateway.sim.response import Response
from gateway.sim.server import SimServer


class Control(Listener):
    def __init__(self, fleet: Sequence[SimServer], port: int = 0) -> None:
        super().__init__("127.0.0.1", port)
        self.fleet = fleet
        self._tasks: set[asyncio.Task[None]] = set()

    def answer(self, connection: Connection, received: Received) -> None:
        task = self.loop.create_task(self._answer(connection, received), name=f"control {received.target}")
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _answer(self, connection: Connection, received: Received) -> None:
        try:
            status, body = 200, orjson.dumps(await self._do(received))
        except LookupError as error:
            status, body = 404, error_body(404, "NotFoundError", str(error.args[0]))
        except (TypeError, ValueError) as error:
            status, body = 400, error_body(400, "BadRequestError", str(error))
        if connection.closed:
            return
        response = Response(connection, NONE, received.keep_alive)
        response.begin(status, "application/json", len(body))
        response.send(body)
        response.end()

    async def _do(self, received: Received) -> list[dict[str, Any]]:
        parts = urlsplit(received.target)
        chosen = self._chosen(parse_qs(parts.query).get("engine"))
        given = orjson.loads(received.body) if received.body else {}
        if not isinstance(given, dict):
            raise ValueError("the body must be a JSON object")
        match received.method, parts.path:
            case "GET", "/sim":
                pass
            case "POST", "/sim/faults":
                faults = NONE.merged(given)
                for server in chosen:
                    server.faults = faults
            case "POST", "/sim/kill":
                for server in chosen:
                    server.kill(**given)
            case "POST", "/sim/revive":
                for server in chosen:
                    await server.revive()
            case _:
                raise LookupError(f"no {received.method} {parts.path} here")
        return [self._state(number, server) for number, server in enumerate(self.fleet, 1) if server in chosen]

    def _chosen(self, numbers: list[str] | None) -> Sequence[SimServer]:
        if numbers is None:
            return self.fleet
        number = int(numbers[-1])
        if not 1 <= number <= len(self.fleet):
            raise LookupError(f"there are engines 1 to {len(self.fleet)}")
        return [self.fleet[number - 1]]

    @staticmethod
    def _state(number: int, server: SimServer) -> dict[str, Any]:
        prompt, generated = server.tokens_ever
        return {
            "engine": number,
            "url": server.url,
            "listening": server.listening,
            "running": server.engine.running,
            "waiting": server.engine.waiting,
            "requests": server.requests_total,
            "connections": server.connections_open,
            "prompt_tokens": prompt,
            "generation_tokens": generated,
        }
