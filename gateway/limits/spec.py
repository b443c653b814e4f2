"""What a limit and a budget are: frozen data that configuration and keys carry, and how it is read and written.

Pure. `parse_limit` and `parse_budget` read the plain objects of JSON and TOML; `limit_document` and
`budget_document` write them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import Any, Final, Literal, cast, get_args

#: "key": each key apart. "key_endpoint", "key_model": each key and route, or key and catalog model, apart.
#: "group": all keys of a group together. "global": everybody together.
Scope = Literal["key", "key_endpoint", "key_model", "group", "global"]
#: "concurrent": requests that run at the same time. "input_tokens" of the prompt, "output_tokens" of the answer.
Resource = Literal["requests", "input_tokens", "output_tokens", "total_tokens", "concurrent"]
#: Calendar windows in UTC; weeks begin on Monday; "total" never ends.
Period = Literal["day", "week", "month", "total"]
Unit = Literal["tokens", "currency"]

SCOPES: Final[tuple[Scope, ...]] = get_args(Scope)
RESOURCES: Final[tuple[Resource, ...]] = get_args(Resource)
PERIODS: Final[tuple[Period, ...]] = get_args(Period)
UNITS: Final[tuple[Unit, ...]] = get_args(Unit)

#: Lua's numbers are doubles, exact to 2**53, and buckets count in microunits: a burst must leave room for both.
BURST_MAX: Final = 1_000_000_000
PER_S_MAX: Final = 1_000_000_000.0
PER_S_MIN: Final = 1e-6
FOR_EVER: Final = float("inf")
BUDGET_MAX: Final[Mapping[Unit, float]] = {"tokens": 1e15, "currency": 1e7}

_NAME: Final = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]{0,63}")
_LIMIT_KEYS: Final = ("name", "scope", "resource", "burst", "per_s", "observe")
_BUDGET_KEYS: Final = ("amount", "unit", "period")


@dataclass(frozen=True, slots=True)
class Limit:
    """A token bucket of `burst` units, refilled by `per_s` units a second; with "concurrent" `burst` slots, no refill.

    `name` appears in messages, metrics and the store's keys. `observe`: count what would be refused, refuse nothing.
    """

    name: str
    scope: Scope
    resource: Resource
    burst: int
    per_s: float = 0.0
    observe: bool = False


@dataclass(frozen=True, slots=True)
class Budget:
    """What a key may spend in a calendar period (UTC): `amount` tokens, or units of the currency of the prices."""

    amount: float
    unit: Unit
    period: Period


class SpecError(ValueError):
    """A limit or a budget that cannot be used. `field` is the key that is wrong, "" for the whole object."""

    def __init__(self, field: str, message: str) -> None:
        super().__init__(f"{field}: {message}" if field else message)
        self.field = field
        self.message = message


def parse_limit(raw: object) -> Limit:
    """{"name", "scope", "resource", "burst", "per_s" or "per_min" or "per_h", "observe"} as a Limit.

    `scope` is "key" and `observe` false if left out; `name` is made of resource and scope. Raises SpecError.
    """
    document = _object(raw, (*_LIMIT_KEYS, "per_min", "per_h"))
    scope = cast("Scope", _one_of(document, "scope", SCOPES, "key"))
    resource = cast("Resource", _one_of(document, "resource", RESOURCES, None))
    name = document.get("name", f"{resource}-per-{scope}")
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        raise SpecError("name", "must be 1 to 64 of A-Z a-z 0-9 _ . -")
    burst = document.get("burst")
    if isinstance(burst, bool) or not isinstance(burst, int) or not 1 <= burst <= BURST_MAX:
        raise SpecError("burst", f"must be a whole number from 1 to {BURST_MAX}")
    rates = [key for key in ("per_s", "per_min", "per_h") if key in document]
    if resource == "concurrent":
        if rates and document[rates[0]] != 0:
            raise SpecError(rates[0], "a limit of concurrent requests has no rate")
        per_s = 0.0
    else:
        if len(rates) != 1:
            raise SpecError("per_s", "say the refill once: per_s, per_min or per_h")
        amount = _number(document, rates[0])
        per_s = amount / {"per_s": 1, "per_min": 60, "per_h": 3600}[rates[0]]
        if not PER_S_MIN <= per_s <= PER_S_MAX:
            raise SpecError(rates[0], f"must be {PER_S_MIN:g} to {PER_S_MAX:g} units a second")
    observe = document.get("observe", False)
    if not isinstance(observe, bool):
        raise SpecError("observe", "must be true or false")
    return Limit(name, scope, resource, burst, per_s, observe)


def parse_limits(raw: object) -> tuple[Limit, ...]:
    """An array of limits with names of their own. Raises SpecError, whose field is then "[2].burst"."""
    if not isinstance(raw, list | tuple):
        raise SpecError("", "must be an array of limits")
    found: list[Limit] = []
    for index, one in enumerate(raw):
        try:
            limit = parse_limit(one)
        except SpecError as error:
            raise SpecError(f"[{index}].{error.field}" if error.field else f"[{index}]", error.message) from None
        if any(limit.name == other.name for other in found):
            raise SpecError(f"[{index}].name", f"{limit.name!r} is already the name of another limit")
        found.append(limit)
    return tuple(found)


def parse_budget(raw: object) -> Budget:
    """{"amount", "unit", "period"} as a Budget; `unit` is "currency" if left out. Raises SpecError."""
    document = _object(raw, _BUDGET_KEYS)
    unit = cast("Unit", _one_of(document, "unit", UNITS, "currency"))
    period = cast("Period", _one_of(document, "period", PERIODS, None))
    amount = _number(document, "amount")
    if not 0 <= amount <= BUDGET_MAX[unit]:
        raise SpecError("amount", f"must be 0 to {BUDGET_MAX[unit]:g}")
    return Budget(amount, unit, period)


def limit_document(limit: Limit) -> dict[str, Any]:
    """The plain object that `parse_limit` reads."""
    return {key: getattr(limit, key) for key in _LIMIT_KEYS}


def budget_document(budget: Budget) -> dict[str, Any]:
    """The plain object that `parse_budget` reads."""
    return {key: getattr(budget, key) for key in _BUDGET_KEYS}


def _object(raw: object, known: tuple[str, ...]) -> Mapping[str, Any]:
    if not isinstance(raw, dict):
        raise SpecError("", "must be an object")
    for key in raw:
        if key not in known:
            raise SpecError(str(key)[:60], f"unknown key; valid: {', '.join(known)}")
    return raw


def _one_of(document: Mapping[str, Any], key: str, names: tuple[str, ...], default: str | None) -> str:
    value = document.get(key, default)
    if value not in names:
        raise SpecError(key, f"must be one of {', '.join(names)}")
    return str(value)


def _number(document: Mapping[str, Any], key: str) -> float:
    value = document.get(key)
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise SpecError(key, "must be a number")
    return float(value)


def period_of(period: Period, unix_s: float) -> tuple[str, float]:
    """The name of the calendar period (UTC) that holds `unix_s`, and when it ends (wall time, inf for never)."""
    if period == "total":
        return "total", FOR_EVER
    day = datetime.fromtimestamp(unix_s, UTC).replace(hour=0, minute=0, second=0, microsecond=0)
    if period == "day":
        end = day + timedelta(days=1)
    elif period == "week":
        day -= timedelta(days=day.weekday())
        end = day + timedelta(days=7)
    else:
        day = day.replace(day=1)
        end = (day + timedelta(days=32)).replace(day=1)
    return f"{day:%Y-%m-%d}", end.timestamp()
