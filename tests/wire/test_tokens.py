"""Usage objects in every shape, and odd ones."""

from __future__ import annotations

import pytest

from gateway.wire.tokens import read
from gateway.wire.usage import Usage, usage_from_json


@pytest.mark.parametrize(
    ("document", "expected"),
    [
        (b'{"prompt_tokens":37,"total_tokens":45,"completion_tokens":8}', Usage(37, 8)),
        (b'{"prompt_tokens":37,"completion_tokens":8,"prompt_tokens_details":{"cached_tokens":36}}', Usage(37, 8, 36)),
        (b'{"prompt_tokens":3,"completion_tokens":8,"completion_tokens_details":{"reasoning_tokens":5,"x":3}}',
         Usage(3, 8, 0, 5)),
        (b'{"prompt_tokens":37,"completion_tokens":8,"completion_tokens_details":null}', Usage(37, 8)),
        (b'{"prompt_tokens":2,"total_tokens":2}', Usage(2, 0)),
        (b'{"total_tokens":56}', Usage(56, 0)),
        (b'{"prompt_tokens":9,"completion_tokens":1,"cache_read_input_tokens":4}', Usage(9, 1, 4)),
        # Responses: the cached ones are a part
        (b'{"input_tokens":37,"output_tokens":6,"total_tokens":43,"input_tokens_details":{"cached_tokens":36}}',
         Usage(37, 6, 36)),
        (b'{"input_tokens":16,"output_tokens":6,"output_tokens_details":{"reasoning_tokens":4}}', Usage(16, 6, 0, 4)),
        # Anthropic: the cached ones are beside
        (b'{"input_tokens":1,"output_tokens":16,"cache_read_input_tokens":36}', Usage(37, 16, 36)),
        (b'{"input_tokens":1,"output_tokens":2,"cache_read_input_tokens":3,"cache_creation_input_tokens":4}',
         Usage(8, 2, 3)),
        (b'{"output_tokens":8}', Usage(0, 8)),
        (b'{"prompt_eval_count":16,"eval_count":8}', Usage(16, 8)),
        (b'{"prompt_tokens":0,"completion_tokens":0,"total_tokens":0}', Usage(0, 0)),
        # odd members spoil nothing else
        (b'{"prompt_tokens":"7","completion_tokens":3.0}', Usage(7, 3)),
        (b'{"prompt_tokens":7,"completion_tokens":{"a":1}}', Usage(7, 0)),
        (b'{"prompt_tokens":7,"completion_tokens":true,"prompt_tokens_details":[1]}', Usage(7, 0)),
        (b'{"prompt_tokens":7,"completion_tokens":3,"prompt_tokens_details":{"cached_tokens":"x"}}', Usage(7, 3)),
        (b'{"prompt_tokens":-7,"completion_tokens":3}', Usage(0, 3)),
        (b'{"prompt_tokens":1e400,"completion_tokens":3}', None),
        # what cannot be: more than anybody can use, and more in the cache than there is
        (b'{"prompt_tokens":9,"completion_tokens":100000000000000000000}', None),
        (b'{"prompt_tokens":1000000001,"completion_tokens":3}', None),
        (b'{"prompt_tokens":9,"completion_tokens":3,"prompt_tokens_details":{"cached_tokens":4000}}', Usage(9, 3, 9)),
        (b'{"prompt_tokens":9,"completion_tokens":3,"completion_tokens_details":{"reasoning_tokens":4000}}',
         Usage(9, 3, 0, 3)),
        (b"null", None),
        (b"[]", None),
        (b"{}", None),
        (b'{"cost":1}', None),
        (b'{"prompt_tokens":1', None),
        (b"\xff", None),
        (b'{"prompt_tokens":' + b"[" * 100_000, None),
    ],
)  # fmt: skip
def test_usage_from_json(document: bytes, expected: Usage | None) -> None:
    assert usage_from_json(document) == expected
    assert usage_from_json(memoryview(document)) == expected


def test_timings_that_cannot_be() -> None:
    for timings in (b'{"prompt_n":1,"predicted_n":10000000000}', b'{"prompt_n":5,"predicted_n":1,"cache_n":-9}'):
        report = read(b'{"choices":[{"finish_reason":"stop","delta":{}}],"timings":' + timings + b"}")
        assert report is not None
        assert report.usage is None or min(report.usage.prompt, report.usage.cached) == 0


def test_usage_is_compared_and_shown() -> None:
    usage = Usage(3, 4, 1, 2, estimated=True)
    assert usage.total == 7
    assert usage != Usage(3, 4, 1, 2)
    assert usage != (3, 4)
    assert repr(usage) == "<Usage 3+4 cached=1 reasoning=2 estimated>"


def test_a_hostile_document_is_unread() -> None:
    assert read(b'{"usage":' * 100_000) is None
    assert read(b"[1]") is None
    assert read(b'{"usage":{"prompt_tokens":1}') is None
    report = read(b'{"usage":{"prompt_tokens":1},"choices":"x","error":[[[' + b"]]]}")
    assert report is not None
    assert report.usage == Usage(1, 0)
    assert not report.trailing
    assert report.error == "[[[]]]"
