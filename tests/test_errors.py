"""The error tree: statuses, codes, and bodies in each family's shape."""

from __future__ import annotations

import json

import pytest

from gateway import errors
from gateway.errors import BadRequest, GatewayError, NoCapacity, UpstreamTimeout, render, render_event


def tree(kind: type[GatewayError] = GatewayError) -> list[type[GatewayError]]:
    return [kind, *(one for child in kind.__subclasses__() for one in tree(child))]


@pytest.mark.parametrize("kind", tree())
def test_every_error_is_complete(kind: type[GatewayError]) -> None:
    error = kind("what is wrong")
    assert 400 <= error.status <= 599
    assert error.blame in ("client", "gateway", "upstream")
    assert (error.blame == "client") == (error.status < 500 or error.status == 505)
    document = json.loads(render(error))["error"]
    assert document == {"message": "what is wrong", "type": error.type, "param": None, "code": error.code}
    assert getattr(errors, kind.__name__) is kind
    assert str(error.status) in repr(error)


def test_an_instance_may_differ_from_its_class() -> None:
    error = UpstreamTimeout("late", code="upstream_idle_timeout", status=599, param="x")
    assert (error.status, error.code, error.param) == (599, "upstream_idle_timeout", "x")
    assert (UpstreamTimeout.status, UpstreamTimeout.code) == (504, "upstream_timeout")
    assert str(error) == "late"


def test_families() -> None:
    error = BadRequest('no "quotes"\n\u20ac', param="model")
    assert json.loads(render(error, "ollama")) == {"error": 'no "quotes"\n\u20ac'}
    assert json.loads(render(error, "anthropic", "req-1")) == {
        "type": "error",
        "error": {"type": "invalid_request_error", "message": 'no "quotes"\n\u20ac'},
        "request_id": "req-1",
    }
    assert json.loads(render(NoCapacity("full"), "anthropic"))["error"]["type"] == "overloaded_error"
    assert json.loads(render(GatewayError("x"), "anthropic"))["error"]["type"] == "api_error"


def test_events_are_one_event_each_whatever_the_message() -> None:
    error = BadRequest("two\n\nlines\r\n\r\n")
    for family in ("openai", "anthropic"):
        event = render_event(error, family)  # type: ignore[arg-type]  # one of the families
        assert event.endswith(b"\n\n")
        assert event.count(b"\n\n") == 1
        assert b"\r" not in event
    assert render_event(error, "anthropic").startswith(b"event: error\ndata: {")
    line = render_event(error, "ollama")
    assert line.endswith(b"}\n")
    assert line.count(b"\n") == 1
