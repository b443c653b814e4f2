"""The loop that serves in production, as for the journeys."""

from __future__ import annotations

from tests.journeys.conftest import pytest_asyncio_loop_factories

__all__ = ["pytest_asyncio_loop_factories"]
