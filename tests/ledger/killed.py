"""A shipper as a process that dies by SIGKILL at a chosen place: `python -m tests.ledger.killed ROOT URL PLACE COUNT`.

It writes COUNT records into a journal of its own, ships them and those of the dead, and deletes what was shipped. PLACE
names the call before or behind which it dies; "none": it lives until all is shipped and every other journal is gone.
Nothing of the shipper is replaced but the calls through which it changes the world.
"""

from __future__ import annotations

import asyncio
import os
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import uvloop

from gateway.ledger import shipper as shipping
from gateway.ledger.journal import Journal
from gateway.ledger.recovery import journals
from gateway.ledger.shipper import Shipper
from gateway.store.address import parse
from gateway.store.client import Store
from tests.ledger.books import exchange, finished

PLACES = ("before a batch", "behind a batch", "before a deletion", "behind a deletion", "before a removal",
          "behind a removal", "before the mark goes", "none")  # fmt: skip


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def deadly(place: str, after: int, call: Callable[..., Any]) -> Callable[..., Any]:
    """`call`, with death before or behind its `after`-th use."""
    left = [after]

    def made(*args: Any, **more: Any) -> Any:
        left[0] -= 1
        if left[0] < 0 and place.startswith("before"):
            die()
        result = call(*args, **more)
        if left[0] < 0:
            die()
        return result

    return made


async def main(root: Path, url: str, place: str, count: int) -> None:
    shipping.BATCH, shipping.SHIP_EVERY_S, shipping.ADOPT_EVERY_S = 20, 0.02, 0.05  # type: ignore[misc]
    store = Store(parse(url))
    await store.start()
    if place.endswith("batch"):
        left, run = [1], store.run

        async def run_and_die(script: Any, *args: Any, **more: Any) -> Any:
            if script is not shipping.SHIP:
                return await run(script, *args, **more)
            left[0] -= 1
            if left[0] < 0 and place.startswith("before"):
                die()
            result = await run(script, *args, **more)
            if left[0] < 0:
                die()
            return result

        store.run = run_and_die  # type: ignore[method-assign]
    elif place.endswith("deletion"):
        Path.unlink = deadly(place, 1, Path.unlink)  # type: ignore[method-assign]
    elif place.endswith("removal"):
        shutil.rmtree = deadly(place, 0, shutil.rmtree)  # type: ignore[assignment]
    elif place == "before the mark goes":
        call = store.call

        async def call_or_die(*command: Any, **more: Any) -> Any:
            if command[0] == "HDEL":
                die()
            return await call(*command, **more)

        store.call = call_or_die  # type: ignore[method-assign]
    journal = Journal(root, segment_bytes=6000)
    journal.start()
    one = Shipper(journal, store, grace_s=0.05)
    one.start()
    for number in range(count):
        each = exchange(number)
        each.id = f"req-{os.getpid()}-{number}"
        journal.open(each)
        journal.post(finished(each))
        if number % 10 == 0:
            await asyncio.sleep(0.005)
    until = asyncio.get_running_loop().time() + 20.0
    while len(journals(root)) > 1 or one._own.read != journal.position:
        assert asyncio.get_running_loop().time() < until, "neither dead nor done"
        await asyncio.sleep(0.02)
    if place != "none":  # what is deleted a little later
        await asyncio.sleep(0.5)
    await journal.close()
    await one.stop()
    await store.close()


if __name__ == "__main__":
    uvloop.run(main(Path(sys.argv[1]), sys.argv[2], sys.argv[3], int(sys.argv[4])))
