"""redis-py, set up so that it keeps our promises: short timeouts, no retry, a bound on connections.

Its defaults hold a call for seconds when the server is dead (ten retries with growing pauses), which no request can
afford. One client for each kind of deployment; all answer `execute_command`.
"""

from __future__ import annotations

import asyncio
from typing import Any, Final

from redis.asyncio import Redis, RedisCluster
from redis.asyncio.cluster import ClusterNode
from redis.asyncio.connection import Connection, ConnectionPool, SSLConnection, UnixDomainSocketConnection
from redis.asyncio.retry import Retry
from redis.asyncio.sentinel import Sentinel
from redis.backoff import NoBackoff

from gateway.store.address import Address

CONNECT_TIMEOUT_S: Final = 0.25
#: connections, and so calls in flight at once, for requests; further calls wait their turn
REQUEST_CALLS: Final = 16
REQUEST_SOCKET_TIMEOUT_S: Final = 0.25
#: the same for what no request waits for: batches of records, reports
BACKGROUND_CALLS: Final = 4
BACKGROUND_SOCKET_TIMEOUT_S: Final = 10.0


class Connections:
    """A client of the store and the slots that bound its use: take one of `slots` around each `execute_command`.

    An answer that did not come in `socket_timeout_s` drops its connection.
    """

    def __init__(self, address: Address, calls: int, socket_timeout_s: float) -> None:
        self.slots = asyncio.Semaphore(calls)
        self._sentinel: Any = None
        common: dict[str, Any] = {
            "username": address.username,
            "password": address.password,
            "socket_timeout": socket_timeout_s,
            "retry": Retry(NoBackoff(), 0),
            "protocol": 2,  # its answers have one shape with every server since Redis 5, and no pushes come between
            "driver_info": None,  # two round trips less for each connection
            "max_connections": calls + 1,
        }
        network = {**common, "socket_connect_timeout": CONNECT_TIMEOUT_S}
        tls = {} if address.tls is None else address.tls
        # typed Any: redis-py's stubs give `execute_command` another type on each class
        self.client: Any
        match address.shape:
            case "unix":
                pool = ConnectionPool(UnixDomainSocketConnection, path=address.path, db=address.db, **common)
                self.client = Redis.from_pool(pool)
            case "single":
                ((host, port),) = address.nodes
                kind = Connection if address.tls is None else SSLConnection
                self.client = Redis.from_pool(
                    ConnectionPool(kind, host=host, port=port, db=address.db, **network, **tls)
                )
            case "sentinel":
                secure = {} if address.tls is None else {"ssl": True, **tls}
                asking = {
                    "password": address.sentinel_password,
                    **{k: network[k] for k in ("socket_timeout", "socket_connect_timeout", "retry", "protocol")},
                    **secure,
                }
                sentinel: Any = Sentinel  # its constructor has no types
                self._sentinel = sentinel(list(address.nodes), sentinel_kwargs=asking, **network, **secure)
                self.client = self._sentinel.master_for(address.master, db=address.db)
            case "cluster":
                nodes = [ClusterNode(host, port) for host, port in address.nodes]
                self.client = RedisCluster(startup_nodes=nodes, ssl=address.tls is not None, **network, **tls)

    async def close(self) -> None:
        """Close every connection; calls in flight end with an error."""
        await self.client.aclose()
        if self._sentinel is not None:
            await self._sentinel.aclose()
