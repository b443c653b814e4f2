"""One call on its way: the engine's events in, vLLM's chunks out, the faults at their tokens.

The engine runs ahead of a slow client; events are written while the client keeps up, so a stream costs two counters
here, not a queue.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from gateway.sim.connection import Connection, Received
from gateway.sim.dialect import DONE, ENGINE_DEAD, Call
from gateway.sim.engine import Event, Request
from gateway.sim.response import Response

if TYPE_CHECKING:
    from gateway.sim.server import SimServer

#: events written in one turn of the loop before others get theirs
_TURN = 512


class Generation:
    __slots__ = (
        "_begun",
        "_choices",
        "_first_at",
        "_last_at",
        "_made",
        "_pinged_at",
        "_rest",
        "_sent",
        "_stop",
        "call",
        "connection",
        "received",
        "response",
        "serial",
        "server",
        "shape",
    )

    def __init__(
        self, server: SimServer, connection: Connection, received: Received, call: Call, serial: int, created: int
    ) -> None:
        self.server = server
        self.connection = connection
        self.received = received
        self.call = call
        self.serial = serial
        self.shape = server.runtime.shape(call, serial, created)
        self.response = Response(connection, call.faults, received.keep_alive)
        self._choices = len(call.choices)
        self._made = [0] * self._choices  # tokens the engine has made
        self._sent = [-1] * self._choices if call.chat else [0] * self._choices  # -1: the role chunk is due
        self._rest = self._choices  # sequences still in the engine
        self._begun = False  # the stream's head is written
        self._first_at = 0.0
        self._last_at = received.at
        self._pinged_at = received.at
        self._stop = call.faults.stops_after

    def start(self) -> None:
        """Submit every choice. ValueError: it could never fit into the engine."""
        call, faults = self.call, self.call.faults
        self.connection.work = self
        for index, choice in enumerate(call.choices):
            request = Request(
                (self.serial, index),
                call.prompt_lengths[index],
                choice.tokens,
                call.blocks[index],
                faults.first_token_s,
                faults.token_s,
                self._stop,
            )
            self.server.submit(request, self)
        if call.stream:
            if self.server.runtime.head == "at_once":
                self.begin()
            else:
                self.server.await_admission(self)
        if self._stop == 0:
            self._break()

    def begin(self) -> None:
        """Write the stream's head, once."""
        if self._begun or not self.call.stream or self.connection.work is not self:
            return
        self._begun = True
        faults = self.call.faults
        length = sum(map(len, self._every_event())) if faults.content_length else None
        self.response.begin(200, self.server.runtime.stream_type, length)
        if faults.ping_s:
            self.server.loop.call_later(faults.ping_s, self._ping)

    def on_event(self, event: Event, index: int, now: float) -> None:
        made = event.generated - self._made[index]
        self._made[index] = event.generated
        server = self.server
        if self._first_at == 0.0:
            self._first_at = now
            self.shape.cached = event.cached_tokens
            self.shape.prefill_s = now - self.received.at
            server.first_token_s.add(now - self.received.at)
            made -= 1
        if made > 0:
            server.inter_token_s.add((now - self._last_at) / made, made)
        self._last_at = now
        self.shape.decode_s = now - self._first_at
        if event.finished:
            self._rest -= 1
            server.finished[self.call.choices[index].finish] += 1
            if not self._rest:
                server.request_s.add(now - self.received.at)
        if self.call.stream:
            self.begin()
            self._pump()
        elif self._stop is not None and index == 0 and event.generated >= self._stop:
            self._break()
        elif not self._rest:
            body = self.shape.whole(self.server.created())
            self.response.begin(200, self.server.runtime.json_type, len(body))
            if self.response.send(body):
                self.response.end()

    def on_writable(self) -> None:
        if self.call.stream:
            self._pump()

    def on_closed(self) -> None:
        """The client has gone: free the engine at once."""
        self.drop()
        if self.response.live:  # else it was us
            self.server.aborted += 1

    def drop(self) -> None:
        """Take every choice out of the engine."""
        for index in range(self._choices):
            self.server.abort((self.serial, index))

    def _pump(self) -> None:
        """Write what the engine has made and the client can take, the choices in turns."""
        sent, made, response, connection = self._sent, self._made, self.response, self.connection
        if connection.work is not self:
            return
        turn = 0
        progress = True
        while progress:
            progress = False
            if connection.transport.is_closing():
                return
            for index in range(self._choices):
                if connection.paused:
                    return
                at = sent[index]
                if at >= made[index]:
                    continue
                if index == 0 and self._stop is not None and at >= self._stop:
                    break
                progress = True
                sent[index] = at + 1
                for payload in self._events(index, at):
                    if not response.event(payload):
                        return
                turn += 1
            if turn >= _TURN and progress:
                self.server.loop.call_soon(self._pump)
                return
        if self._stop is not None and sent[0] >= self._stop:
            self._break()
        elif not self._rest and sent == made:
            total = sum(made)
            usage = self.shape.usage(total)
            if (not usage or response.event(usage)) and response.event(DONE):
                response.end()

    def _events(self, index: int, at: int) -> list[bytes]:
        """The chunks for token `at` (-1: the role) of a choice."""
        if at < 0:
            return [self.shape.role(index)]
        choice = self.call.choices[index]
        made = sum(sent for sent in self._sent if sent > 0)
        if at == choice.tokens - 1:
            return self.shape.ending(index, made)
        if not choice.pieces[at] and choice.tool is None:
            return []  # swallowed by a stop string
        payload = self.shape.piece(index, at, made)
        missing = self.call.faults.big_event_bytes - len(payload) + 2
        if at == 0 and index == 0 and missing > 0:
            choice.pieces[0] += "x" * missing
            payload = self.shape.piece(index, at, made)
        return [payload]

    def _every_event(self) -> list[bytes]:
        """The whole stream in advance, for a content-length: the text is known, only its timing is not."""
        kept, events = self._sent[:], []
        for index, choice in enumerate(self.call.choices):
            for at in range(self._sent[index], choice.tokens):
                self._sent[index] = at + 1
                events += self._events(index, at)
        total = sum(choice.tokens for choice in self.call.choices)
        self._sent = kept
        return [*events, self.shape.usage(total), DONE]

    def _break(self) -> None:
        """The token has come at which this answer goes wrong."""
        faults, response = self.call.faults, self.response
        at = self._stop
        if at == faults.stall_at_token:
            response.flush()
            return
        if at == faults.kill_at_token:
            response.flush()
            # what was written has left by then, also with uvloop, which writes at the end of its turn
            self.server.loop.call_later(0.001, self.server.kill, faults.down_s)
            return
        self.drop()
        if at == faults.cut_at_token:
            if self.call.stream:
                response.flush()
            response.live = False
            self.connection.cut(faults.cut_with)
        elif not self.call.stream:
            runtime = self.server.runtime
            body = runtime.error(500, "InternalServerError", ENGINE_DEAD)
            response.begin(500, runtime.json_type, len(body))
            if response.send(body):
                response.end()
        elif at == faults.error_event_at_token:
            if response.event(self.server.runtime.error_event) and response.event(DONE):
                response.end()
        else:
            response.end()

    def _ping(self) -> None:
        if self.connection.work is not self or not self.response.live:
            return
        now = self.server.loop.time()
        quiet = now - max(self._last_at, self._pinged_at)
        if quiet >= self.call.faults.ping_s * 0.99:
            self._pinged_at = now
            self.response.send(b":\n\n")
            quiet = 0.0
        self.server.loop.call_later(self.call.faults.ping_s - quiet, self._ping)
