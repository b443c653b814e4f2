"""What an operator may say about a key, read from plain JSON: the fields of KeyRecord that are theirs to set.

`read` is given the document of `POST /admin/api/keys`, of a PATCH, or what the command line made of its flags. Every
refusal is a BadRequest whose `param` names the field and whose message names what is valid.
"""

from __future__ import annotations

import datetime
import difflib
import re
from collections.abc import Callable, Mapping
from typing import Any, Final

from gateway.errors import BadRequest
from gateway.identity.principals import ROLES
from gateway.limits.spec import Budget, Limit, SpecError, parse_budget, parse_limits
from gateway.queueing.fair import PRIORITIES

NAME_RULE: Final = "must be 1 to 64 of A-Z a-z 0-9 _ . -"
_NAME: Final = re.compile(r"[A-Za-z0-9_.-]{1,64}", re.ASCII)
_DURATION: Final = re.compile(r"([0-9]{1,9})(s|m|h|d|w)", re.ASCII)
_UNIT_S: Final = {"s": 1, "m": 60, "h": 3600, "d": 86400, "w": 7 * 86400}
_DURATION_RULE: Final = 'must be a whole number with a unit: "90s", "15m", "24h", "30d", "12w"'
_LONGEST_S: Final = 100 * 366 * 86400
_MODELS_MAX: Final = 1000
_LIMITS_MAX: Final = 50
_METADATA_MAX: Final = 16
_TEXT_MAX_CHARS: Final = 256
#: of a key's or a group's share of a full fleet
WEIGHT_MIN: Final = 0.01
WEIGHT_MAX: Final = 1000.0


def read(document: object, now_unix_s: float, *, new: bool) -> dict[str, Any]:
    """The fields that `document` sets, as KeyRecord holds them. A `new` key needs a name. Raises BadRequest."""
    if not isinstance(document, dict):
        raise BadRequest("the body must be a JSON object", code="invalid_field")
    known(document, FIELDS)
    if new and "name" not in document:
        raise refused("name", f"is missing: it {NAME_RULE}")
    if not new and not document:
        raise BadRequest(f"nothing to change: give one of {', '.join(FIELDS)}", code="invalid_field")
    return {name: FIELDS[name](raw, now_unix_s) for name, raw in document.items()}


def known(document: Mapping[str, object], valid: Mapping[str, object]) -> None:
    """Raises BadRequest for the first key that is not `valid`, with the nearest that is."""
    for name in document:
        if name not in valid:
            near = difflib.get_close_matches(name[:64].lower(), valid, n=1)
            tail = f"did you mean {near[0]!r}? Valid" if near else "valid"
            raise refused(name[:64], f"is no field of a key; {tail}: {', '.join(valid)}")


def duration_s(raw: object, field: str) -> float:
    """Seconds of "30d" or the like. Raises BadRequest."""
    found = _DURATION.fullmatch(raw) if isinstance(raw, str) else None
    if found is None:
        raise refused(field, _DURATION_RULE)
    seconds = int(found[1]) * _UNIT_S[found[2]]
    if seconds > _LONGEST_S:
        raise refused(field, "must be 100 years or less")
    return float(seconds)


def refused(field: str, message: str) -> BadRequest:
    return BadRequest(f"`{field}` {message}", param=field, code="invalid_field")


def _name(raw: object, now_unix_s: float) -> str:
    if not isinstance(raw, str) or not _NAME.fullmatch(raw):
        raise refused("name", NAME_RULE)
    return raw


def _group(raw: object, now_unix_s: float) -> str:
    if not isinstance(raw, str) or (raw and not _NAME.fullmatch(raw)):
        raise refused("group", f'{NAME_RULE}, or "" for none')
    return raw


def _roles(raw: object, now_unix_s: float) -> tuple[str, ...]:
    if not isinstance(raw, list):
        raise refused("roles", f"must be an array of roles; valid: {', '.join(ROLES)}")
    for one in raw:
        if one not in ROLES:
            raise refused("roles", f"holds a role that does not exist; valid: {', '.join(ROLES)}")
    return tuple(sorted(set(raw)))


def _models(raw: object, now_unix_s: float) -> tuple[str, ...] | None:
    if raw is None:
        return None
    if not isinstance(raw, list) or not all(isinstance(one, str) and 0 < len(one) <= _TEXT_MAX_CHARS for one in raw):
        raise refused("models", "must be an array of model names (apiName, not an alias), or null for all models")
    if len(raw) > _MODELS_MAX:
        raise refused("models", f"must be at most {_MODELS_MAX} names")
    return tuple(dict.fromkeys(raw))


def _limits(raw: object, now_unix_s: float) -> tuple[Limit, ...]:
    if isinstance(raw, list) and len(raw) > _LIMITS_MAX:
        raise refused("limits", f"must be at most {_LIMITS_MAX} limits")
    try:
        return parse_limits(raw)
    except SpecError as error:
        raise refused(f"limits{error.field}", error.message) from None


def _budget(raw: object, now_unix_s: float) -> Budget | None:
    if raw is None:
        return None
    try:
        return parse_budget(raw)
    except SpecError as error:
        raise refused(f"budget.{error.field}" if error.field else "budget", error.message) from None


def _expires_at(raw: object, now_unix_s: float) -> float | None:
    """null, a duration from now, or a date and time with its offset (RFC 3339)."""
    if raw is None:
        return None
    rule = 'must be null, a duration such as "30d", or a time such as "2027-01-31T00:00:00Z"'
    if not isinstance(raw, str):
        raise refused("expires_at", rule)
    if _DURATION.fullmatch(raw):
        at = now_unix_s + duration_s(raw, "expires_at")
    else:
        try:
            moment = datetime.datetime.fromisoformat(raw)
            at = moment.timestamp()
        except (ValueError, OverflowError):
            raise refused("expires_at", rule) from None
        if moment.tzinfo is None:
            raise refused("expires_at", 'must say its offset from UTC: "Z" or "+01:00"')
    if at <= now_unix_s:
        raise refused("expires_at", "must lie in the future; to end a key now, revoke it")
    if at > now_unix_s + _LONGEST_S:
        raise refused("expires_at", "must be 100 years from now or less; null is never")
    return float(int(at))


def _priority(raw: object, now_unix_s: float) -> str:
    if not isinstance(raw, str) or raw not in PRIORITIES:
        raise refused("priority", f"must be one of {', '.join(PRIORITIES)}")
    return raw


def _weight(raw: object, now_unix_s: float) -> float:
    if isinstance(raw, bool) or not isinstance(raw, int | float) or not WEIGHT_MIN <= raw <= WEIGHT_MAX:
        raise refused("weight", f"must be a number from {WEIGHT_MIN:g} to {WEIGHT_MAX:g}")
    return float(raw)


def _metadata(raw: object, now_unix_s: float) -> dict[str, str]:
    if not isinstance(raw, dict) or len(raw) > _METADATA_MAX:
        raise refused("metadata", f"must be an object of at most {_METADATA_MAX} texts")
    for key, value in raw.items():
        if not _NAME.fullmatch(key):
            raise refused("metadata", f"has a key that is not usable: each {NAME_RULE}")
        if not isinstance(value, str) or len(value) > _TEXT_MAX_CHARS:
            raise refused(f"metadata.{key}", f"must be a text of at most {_TEXT_MAX_CHARS} characters")
    return dict(raw)


#: field -> its reader, which is given the raw value and the time
FIELDS: Final[dict[str, Callable[[object, float], Any]]] = {
    "name": _name,
    "group": _group,
    "roles": _roles,
    "models": _models,
    "limits": _limits,
    "budget": _budget,
    "priority": _priority,
    "weight": _weight,
    "expires_at": _expires_at,
    "metadata": _metadata,
}
