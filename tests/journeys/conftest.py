"""The loops of the journeys: uvloop, which serves in production; both loops where a module asks for it."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping

import pytest
import uvloop

Loops = Mapping[str, Callable[[], asyncio.AbstractEventLoop]]


def pytest_asyncio_loop_factories(config: pytest.Config, item: pytest.Item) -> Loops:
    """A module with `BOTH_LOOPS = True` runs on asyncio's own loop too."""
    loops: dict[str, Callable[[], asyncio.AbstractEventLoop]] = {"uvloop": uvloop.new_event_loop}
    if getattr(getattr(item, "module", None), "BOTH_LOOPS", False):
        loops["asyncio"] = asyncio.new_event_loop
    return loops
