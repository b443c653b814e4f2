"""The Anthropic surface: `/v1/messages`, and `/v1/messages/count_tokens`, which uses none."""

from __future__ import annotations

from typing import Final

from gateway.passage.proxy import Surface

SURFACES: Final = {
    "/v1/messages": Surface("messages", "chat", needs="messages", family="anthropic"),
    "/v1/messages/count_tokens": Surface(
        "count_tokens", "count_tokens", needs="messages", family="anthropic", streams=None, billable=False
    ),
}
