"""A look at a store from outside the breaker: one connection, patient, every refusal in words."""

from __future__ import annotations

from typing import Any, Final

from redis import exceptions

from gateway.store.address import Address
from gateway.store.connections import Connections

TIMEOUT_S: Final = 1.0


class Refused(Exception):
    """The store did not answer, or said no; the text says which and holds no password."""


class Visit:
    """Commands for the operator's tools. Every call raises Refused."""

    def __init__(self, address: Address) -> None:
        self._connections = Connections(address, 1, TIMEOUT_S)
        # on a Cluster, what has no key is asked of one node
        self._anywhere = {"target_nodes": "random"} if address.shape == "cluster" else {}

    async def ask(self, *command: bytes | str | int, **options: Any) -> Any:
        try:
            return await self._connections.client.execute_command(*command, **options)
        except (exceptions.RedisError, OSError, TimeoutError) as error:
            raise Refused(str(error) or type(error).__name__) from error

    async def info(self) -> dict[str, Any]:
        """INFO's default sections, flat."""
        answer: dict[str, Any] = await self.ask("INFO", **self._anywhere)
        return answer

    async def config(self, name: str) -> str:
        answer = await self.ask("CONFIG GET", name, **self._anywhere)
        return str(answer.get(name, ""))

    async def cluster(self) -> dict[str, str]:
        """CLUSTER INFO."""
        answer: dict[str, str] = await self.ask("CLUSTER INFO", **self._anywhere)
        return answer

    async def close(self) -> None:
        await self._connections.close()
