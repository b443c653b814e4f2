"""What may be said about a key: every field's good and bad values, and that a refusal names field and valid values."""

from __future__ import annotations

from typing import Any

import pytest

from gateway.errors import BadRequest
from gateway.identity import fields
from gateway.limits.spec import Budget, Limit

NOW = 1_800_000_000.0


@pytest.mark.parametrize(
    ("field", "raw", "value"),
    [
        ("name", "a-B_9.x", "a-B_9.x"),
        ("group", "", ""),
        ("group", "team", "team"),
        ("roles", [], ()),
        ("roles", ["admin", "admin"], ("admin",)),
        ("models", None, None),
        ("models", [], ()),
        ("models", ["b", "a", "b"], ("b", "a")),
        ("limits", [{"resource": "requests", "burst": 2, "per_s": 1}],
         (Limit("requests-per-key", "key", "requests", 2, 1.0),)),
        ("budget", None, None),
        ("budget", {"amount": 5, "unit": "tokens", "period": "day"}, Budget(5.0, "tokens", "day")),
        ("expires_at", None, None),
        ("expires_at", "30d", NOW + 30 * 86400),
        ("expires_at", "90s", NOW + 90),
        ("expires_at", "2027-01-16T00:00:00Z", 1_800_057_600.0),
        ("expires_at", "2027-01-16T01:00:00+01:00", 1_800_057_600.0),
        ("priority", "low", "low"),
        ("weight", 3, 3.0),
        ("metadata", {}, {}),
        ("metadata", {"owner": "me"}, {"owner": "me"}),
    ],
)  # fmt: skip
def test_good_values(field: str, raw: object, value: object) -> None:
    assert fields.read({field: raw}, NOW, new=False) == {field: value}


BAD: list[tuple[str, Any, str, str]] = [
    ("name", "", "name", "1 to 64"),
    ("name", "a b", "name", "1 to 64"),
    ("name", "é", "name", "1 to 64"),
    ("name", "a" * 65, "name", "1 to 64"),
    ("name", None, "name", "1 to 64"),
    ("group", "a/b", "group", "1 to 64"),
    ("group", None, "group", "1 to 64"),
    ("roles", "admin", "roles", "valid: admin"),
    ("roles", ["root"], "roles", "valid: admin"),
    ("roles", [["admin"]], "roles", "valid: admin"),
    ("models", "m", "models", "array of model names"),
    ("models", [1], "models", "array of model names"),
    ("models", [""], "models", "array of model names"),
    ("models", [str(n) for n in range(1001)], "models", "at most 1000"),
    ("limits", {}, "limits", "array"),
    ("limits", [{"resource": "x"}], "limits[0].resource", "requests, input_tokens"),
    ("limits", [{"resource": "requests", "burst": 0}], "limits[0].burst", "1 to"),
    ("limits", [{"resource": "requests", "burst": 1, "per_s": 1, "brst": 1}], "limits[0].brst", "valid: name, scope"),
    ("limits", [{}] * 51, "limits", "at most 50"),
    ("budget", [], "budget", "object"),
    ("budget", {"amount": 1}, "budget.period", "day, week, month, total"),
    ("budget", {"amount": -1, "period": "day"}, "budget.amount", "0 to"),
    ("expires_at", 5, "expires_at", "30d"),
    ("expires_at", "soon", "expires_at", "30d"),
    ("expires_at", "0s", "expires_at", "future"),
    ("expires_at", "2020-01-01T00:00:00Z", "expires_at", "future"),
    ("expires_at", "2030-01-01T00:00:00", "expires_at", "offset"),
    ("expires_at", "9999999w", "expires_at", "100 years"),
    ("expires_at", "0001-01-01T00:00:00+14:00", "expires_at", "future"),
    ("expires_at", "9999-12-31T23:59:59-14:00", "expires_at", "100 years"),
    ("priority", "urgent", "priority", "high, normal, low"),
    ("priority", None, "priority", "high, normal, low"),
    ("weight", 0, "weight", "0.01 to 1000"),
    ("weight", True, "weight", "0.01 to 1000"),
    ("weight", float("nan"), "weight", "0.01 to 1000"),
    ("metadata", [], "metadata", "object"),
    ("metadata", {"a b": "x"}, "metadata", "1 to 64"),
    ("metadata", {"a": 1}, "metadata.a", "text"),
    ("metadata", {"a": "x" * 257}, "metadata.a", "256"),
    ("metadata", {str(n): "x" for n in range(17)}, "metadata", "16"),
    ("nam", "x", "nam", "did you mean 'name'? Valid: name, group, roles"),
    ("model", ["x"], "model", "did you mean 'models'?"),
    ("id", "x", "id", "valid: name"),
    ("digest", "x", "digest", "is no field"),
    ("revoked_at", 1, "revoked_at", "is no field"),
]


@pytest.mark.parametrize(("field", "raw", "param", "told"), BAD)
def test_bad_values(field: str, raw: object, param: str, told: str) -> None:
    with pytest.raises(BadRequest) as caught:
        fields.read({field: raw}, NOW, new=False)
    error = caught.value
    assert (error.status, error.code, error.param) == (400, "invalid_field", param)
    assert f"`{param}`" in error.message
    assert told in error.message


@pytest.mark.parametrize("raw", [None, [], "x", 1, True])
def test_what_is_no_object(raw: object) -> None:
    with pytest.raises(BadRequest, match="JSON object"):
        fields.read(raw, NOW, new=True)


def test_a_new_key_needs_a_name_and_a_change_needs_something() -> None:
    with pytest.raises(BadRequest, match="`name` is missing"):
        fields.read({"group": "a"}, NOW, new=True)
    with pytest.raises(BadRequest, match="nothing to change"):
        fields.read({}, NOW, new=False)


@pytest.mark.parametrize("raw", [None, "", "5", "d", "1.5d", "-1d", "1 d", "1y", 5, "١d"])
def test_what_is_no_duration(raw: object) -> None:
    with pytest.raises(BadRequest, match="`overlap` must be a whole number with a unit"):
        fields.duration_s(raw, "overlap")
