"""GET /admin/api/queue: who waits, in the order of service."""

from __future__ import annotations

import asyncio
from dataclasses import replace

from gateway.config.model import Tenant
from gateway.sim import SimServer
from tests.journeys.stage import CHAT, Client, chat, gateway, provider, until


async def test_the_queue_is_shown_in_its_order() -> None:
    keyed = {
        "boss": {"roles": ("admin",)},
        "a": {"group": "big"},
        "b": {"priority": "high"},
    }
    async with SimServer() as sim, gateway(provider("one", sim.url, max_in_flight=1), keyed=keyed) as here:
        empty = await here.ask("GET", "/admin/api/queue", key=here.keys["boss"])
        assert empty.json() == {"waiting": 0, "most": 1000, "rows": []}
        holder = await Client.open(here.port, here.key)
        holder.send("POST", CHAT, chat(stream=True, max_tokens=5000, sim={"token_s": 0.02}))
        await holder.head()
        tasks = []
        for count, name in enumerate("aab", 1):
            tasks.append(asyncio.create_task(here.ask("POST", CHAT, chat(max_tokens=2), key=here.keys[name])))
            await until(lambda count=count: len(here.app.gate.queue) == count)  # type: ignore[misc]
        shown = (await here.ask("GET", "/admin/api/queue", key=here.keys["boss"])).json()
        assert (shown["waiting"], shown["most"]) == (3, 1000)
        rows = shown["rows"]
        assert [row["position"] for row in rows] == [1, 2, 3]
        assert [row["class"] for row in rows] == ["high", "normal", "normal"]
        assert [row["key"] for row in rows] == ["b", "a", "a"]
        assert rows[1]["tenant"] == "big"
        assert rows[0]["tenant"] != "b", "a key without a group is shown by its public id"
        assert {(row["model"], *row["upstreams"]) for row in rows} == {("sim", "one")}
        assert all(0 <= row["waited_s"] < 30 and row["request_id"].startswith("req-") for row in rows)
        first = await here.ask("GET", "/admin/api/queue?limit=1", key=here.keys["boss"])
        assert (first.json()["waiting"], len(first.json()["rows"])) == (3, 1)
        assert (await here.ask("GET", "/admin/api/queue?limit=x", key=here.keys["boss"])).status == 400
        assert (await here.ask("GET", "/admin/api/queue", key=here.keys["a"])).status == 403
        holder.abort()
        await asyncio.gather(*tasks)


async def test_a_reload_changes_the_queue_for_those_who_come() -> None:
    async with SimServer() as sim, gateway(provider("one", sim.url, max_in_flight=1)) as here:
        tenants = (Tenant("x", 2.0),)
        config = replace(
            here.app.config, queue_s=0.0, queue_max=7, queue_output_weight=4.0, comment_s=3.0, tenants=tenants
        )
        assert here.app.apply(config) == []
        assert (here.app.gate.queue.most, here.app.gate.queue.cost(1, 1)) == (7, 5.0)
        assert here.app.comments.every_s == 3.0
        holder = await Client.open(here.port, here.key)
        holder.send("POST", CHAT, chat(stream=True, max_tokens=5000, sim={"token_s": 0.02}))
        await holder.head()
        assert (await here.ask("POST", CHAT, chat())).status == 503
        holder.abort()
