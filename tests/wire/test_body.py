"""The request body: what is refused, what is read, and that a splice changes nothing else."""

from __future__ import annotations

import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.errors import BadRequest
from gateway.wire.body import GUARDED, Body, usage_options


def refused(raw: bytes) -> BadRequest:
    with pytest.raises(BadRequest) as caught:
        Body.parse(raw)
    assert caught.value.status == 400
    return caught.value


@pytest.mark.parametrize(
    ("raw", "words"),
    [
        (b"", "empty"),
        (b" \n", "empty"),
        (b'{"a":1', "ends too early"),
        (b'{"secret":tru}', "(at byte "),
        (b'{"a":NaN}', "at byte 5"),
        (b'{"a":Infinity}', "at byte 5"),
        (b'{"a":01}', "at byte 6"),
        (b'{"a":1}{', "(at byte "),
        (b'{"a":1,}', "at byte 7"),
        (b"{'a':1}", "at byte 1"),
        (b'{"a":"\n"}', "at byte 6"),
        (b'{"a":1} x', "(at byte "),
        (b'{"a":"\\ud83d and more"}', "at byte 12, half of a surrogate pair"),
        (b"[1]", "must be a JSON object"),
        (b"null", "must be a JSON object"),
        (b'"x"', "must be a JSON object"),
        (b'\xef\xbb\xbf{"a":1}', "byte order mark"),
        (b'{"a":"\xff"}', "not valid UTF-8 (at byte 6)"),
        (b'{"a":{"b":"\xed\xa0\x80"}}', "not valid UTF-8"),
        (b'{"\xff":1}', "not valid UTF-8"),
        (b'{"a":' + b"[" * 200_000 + b"]" * 200_000 + b"}", "nested too deeply"),
        ('{"a":1}'.encode("utf-16"), "not valid UTF-8"),
    ],
)
def test_not_json(raw: bytes, words: str) -> None:
    error = refused(raw)
    assert words in error.message
    assert "secret" not in error.message


@pytest.mark.parametrize(
    ("raw", "param"),
    [
        (b'{"model":"a","model":"b"}', "model"),
        (b'{"model":"a","model":"a"}', "model"),
        (b'{"model":"a","n":1,"model":"a"}', "model"),
        (b'{"n":1,"n":12}', "n"),
        (b'{"n":12,"n":1}', "n"),
        (b'{"n":12,"x":0,"n":1}', "n"),
        (b'{"model":"a","mod\\u0065l":"b"}', "model"),
        (b'{"x":1,"y":2,"x":1,"y":2}', None),
        (b'{"x":1,"y":1,"x":1,"z":1}', None),
        (b'{ "model" : "a" , "stream" : true , "model" : "a" }', "model"),
        (b'{"x":"s","x":"supersecret"}', None),
    ],
)
def test_repeated_keys(raw: bytes, param: str | None) -> None:
    error = refused(raw)
    assert error.code == "duplicate_key"
    assert "more than once" in error.message
    assert "supersecret" not in error.message
    if param:
        assert error.param in (param, None)


@pytest.mark.parametrize("key", sorted(GUARDED))
def test_keys_that_differ_by_case_only(key: str) -> None:
    spellings = {key.upper(), key.title(), key[:-1] + key[-1].upper(), key.replace("s", "ſ"), key.replace("k", "K")}
    for spelling in spellings - {key}:
        error = refused(json.dumps({"x": 1, spelling: 1}, ensure_ascii=False).encode())
        assert error.param == key
        assert repr(key) in error.message
        refused(json.dumps({"x": 1, spelling: 1}).encode())
    Body.parse(json.dumps({key: "true" if key == "model" else True, "Temperature": 1}).encode())


def test_wrong_types() -> None:
    assert refused(b'{"model":1}').param == "model"
    assert refused(b'{"model":null}').param == "model"
    assert refused(b'{"stream":"true"}').param == "stream"
    assert refused(b'{"stream":1}').param == "stream"
    body = Body.parse(b'{"stream":null,"n":"2","max_tokens":"x","stream_options":7}')
    assert (body.stream, body.n, body.max_tokens, body.include_usage) == (None, 1, None, False)


def test_what_is_read() -> None:
    raw = (
        b' { "model" : "sm\\u00f6l", "stream":true ,"stream_options":{"include_usage":true,"x":1},"max_tokens":5,'
        b'"n":2,"messages":[{"role":"user","content":"model\\":{}[],"}],"Temperature":0} '
    )
    body = Body.parse(raw)
    assert (body.model, body.stream, body.include_usage, body.max_tokens, body.n) == ("smöl", True, True, 5, 2)
    assert body.has("messages")
    assert not body.has("tools")
    assert body.get("messages") == [{"role": "user", "content": 'model":{}[],'}]
    assert body.get("tools") is None
    assert list(body.keys()) == list(json.loads(raw))
    for key, value in json.loads(raw).items():
        span = body.span(key)
        assert span is not None
        assert json.loads(raw[span[0] : span[1]]) == value
    assert body.span("tools") is None
    assert repr(body) == f"<Body {len(raw)} bytes, 7 members>"
    assert Body.parse(b'{"max_tokens":5,"max_completion_tokens":6}').max_tokens == 6
    empty = Body.parse(b"{}")
    assert (empty.model, empty.stream, empty.include_usage, empty.max_tokens, empty.n) == ("", None, False, None, 1)


def test_patch_keeps_every_other_byte() -> None:
    raw = b' { "a" : 1.0e+2 ,\n "model":"x", "b":[ ] , "tools":[1], "c" : "\\u00e4" } '
    body = Body.parse(raw)
    assert body.patch() is raw
    assert body.patch({"model": b'"yy"'}) == raw.replace(b'"x"', b'"yy"')
    assert body.patch(remove=["tools"]) == b' { "a" : 1.0e+2 ,\n "model":"x", "b":[ ], "c" : "\\u00e4" } '
    assert body.patch(remove=["a"]) == b' { "model":"x", "b":[ ] , "tools":[1], "c" : "\\u00e4" } '
    assert body.patch(remove=["c", "absent"]) == b' { "a" : 1.0e+2 ,\n "model":"x", "b":[ ] , "tools":[1] } '
    assert body.patch({"new": b"{}"}) == raw.replace(b" } ", b',"new":{} } ')
    assert json.loads(body.patch({"n": b"1"}, ["a", "model", "b", "tools", "c"])) == {"n": 1}
    assert Body.parse(b"{}").patch({"n": b"1", "m": b"2"}) == b'{"n":1,"m":2}'
    assert Body.parse(b"{ }").patch({"n": b"1"}) == b'{"n":1 }'


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3),
    max_leaves=8,
)
NAMES = st.text(max_size=6).filter(lambda name: name.casefold() not in GUARDED)


@given(
    st.dictionaries(NAMES, VALUES, max_size=6),
    st.dictionaries(NAMES, VALUES, max_size=3),
    st.data(),
    st.sampled_from([(",", ":"), (", ", ": "), (" ,\t", "\r\n:\n")]),
    st.booleans(),
)
@settings(max_examples=250, deadline=None)
def test_patch_is_dict_arithmetic(
    members: dict[str, Any], replace: dict[str, Any], data: st.DataObject, separators: tuple[str, str], ascii_only: bool
) -> None:
    raw = json.dumps(members, separators=separators, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")
    body = Body.parse(raw)
    remove = data.draw(st.lists(st.sampled_from([*members, "absent"]), max_size=4))
    replace |= dict.fromkeys(data.draw(st.lists(st.sampled_from([*members, "new"]), max_size=2)), 0)
    patched = body.patch({key: json.dumps(value).encode() for key, value in replace.items()}, remove)
    expected = {key: value for key, value in (members | replace).items() if key not in remove}
    assert json.loads(patched) == expected
    assert list(json.loads(patched)) == list(expected)
    assert Body.parse(patched).keys() == expected.keys()


@given(
    st.lists(
        st.tuples(st.sampled_from(["a", "b", "é", "\\", '"']), st.sampled_from([1, 12, "1", [1], {}])), max_size=6
    ),
    st.booleans(),
)
@settings(max_examples=300, deadline=None)
def test_repeated_keys_are_found_exactly(pairs: list[tuple[str, Any]], spaced: bool) -> None:
    colon, comma = (" : ", " , ") if spaced else (":", ",")
    members = (
        json.dumps(key, ensure_ascii=bool(i % 2)) + colon + json.dumps(value) for i, (key, value) in enumerate(pairs)
    )
    raw = ("{" + comma.join(members) + "}").encode()
    if len({key for key, _ in pairs}) == len(pairs):
        assert {key: Body.parse(raw).get(key) for key, _ in pairs} == dict(pairs)
    else:
        assert refused(raw).code == "duplicate_key"


def test_usage_options() -> None:
    def done(raw: bytes) -> bytes:
        body = Body.parse(raw)
        return body.patch({"stream_options": usage_options(body)})

    assert done(b'{"stream":true}') == b'{"stream":true,"stream_options":{"include_usage":true}}'
    assert done(b'{"stream_options":null}') == b'{"stream_options":{"include_usage":true}}'
    assert done(b'{"stream_options":{}}') == b'{"stream_options":{"include_usage":true}}'
    assert done(b'{"stream_options":{"include_usage":false, "continuous_usage_stats":true}}') == (
        b'{"stream_options":{"include_usage":true, "continuous_usage_stats":true}}'
    )
    assert done(b'{"stream_options":{"x":1}}') == b'{"stream_options":{"x":1,"include_usage":true}}'
    assert usage_options(Body.parse(b'{"stream_options":{"x":1}}')) == b'{"x":1,"include_usage":true}'
    for raw in (b'{"stream_options":[]}', b'{"stream_options":{"include_usage":true,"include_usage":false}}'):
        with pytest.raises(BadRequest):
            done(raw)
