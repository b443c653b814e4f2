"""Grants: what the claims of a verified token let it do. Pure; the first grant that fits decides.

A claim is named by its path, "realm_access.roles"; a name that holds dots itself ("https://example.org/groups") is
found as it stands.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from gateway.errors import BadRequest
from gateway.identity import fields
from gateway.identity.principals import Principal
from gateway.limits.spec import Budget, Limit

#: of Principal's fields, those a grant may set; they read as for a key
_GIVEN: Final = ("group", "roles", "models", "limits", "budget")
KEYS: Final = ("when", *_GIVEN)
_GRANTS_MAX: Final = 200
_GROUP: Final = re.compile(r"[A-Za-z0-9_.-]{1,64}", re.ASCII)
_UNPLAIN: Final = re.compile(r"[^A-Za-z0-9_.@+-]", re.ASCII)
_NAME_CHARS: Final = 64


@dataclass(frozen=True, slots=True)
class Grant:
    """For tokens whose claims have all values of `when` (path -> value; none: every token). Fields as Principal's."""

    when: tuple[tuple[str, str | bool], ...] = ()
    group: str = ""
    roles: tuple[str, ...] = ()
    models: tuple[str, ...] | None = None
    limits: tuple[Limit, ...] = ()
    budget: Budget | None = None

    def fits(self, claims: Mapping[str, Any]) -> bool:
        return all(_has(claim(claims, path), value) for path, value in self.when)


#: with no grants configured, every token of the issuer for the audience is let in, with no role
EVERYBODY: Final = (Grant(),)


def parse_grants(raw: object) -> tuple[Grant, ...]:
    """An array of {"when", "group", "roles", "models", "limits", "budget"}, all optional. Raises BadRequest."""
    if not isinstance(raw, list) or len(raw) > _GRANTS_MAX:
        raise BadRequest(f"must be an array of at most {_GRANTS_MAX} grants")
    return tuple(_grant(one, index) for index, one in enumerate(raw))


def _grant(raw: object, index: int) -> Grant:
    if not isinstance(raw, dict):
        raise BadRequest(f"[{index}] must be an object")
    unknown = [key for key in raw if key not in KEYS]
    if unknown:
        raise BadRequest(f"[{index}] has a key that is not known: {unknown[0][:40]!r}; valid: {', '.join(KEYS)}")
    when = raw.get("when", {})
    if not isinstance(when, dict) or not all(path and isinstance(value, str | bool) for path, value in when.items()):
        raise BadRequest(f"[{index}].when must be an object of claims, each with a text, true or false")
    try:
        given = {name: fields.FIELDS[name](raw[name], 0.0) for name in _GIVEN if name in raw}
    except BadRequest as error:
        raise BadRequest(f"[{index}]: {error.message}") from None
    return Grant(tuple(when.items()), **given)


def grant_of(grants: Sequence[Grant], claims: Mapping[str, Any]) -> Grant | None:
    """The first that fits."""
    return next((one for one in grants if one.fits(claims)), None)


def claim(claims: Mapping[str, Any], path: str) -> Any:
    """The claim at `path`, None if there is none."""
    if path in claims:
        return claims[path]
    found: Any = claims
    for part in path.split("."):
        if not isinstance(found, dict) or part not in found:
            return None
        found = found[part]
    return found


def _has(found: object, value: str | bool) -> bool:
    if isinstance(value, bool):
        return found is value
    return found == value or (isinstance(found, list) and value in found)


def principal_of(grant: Grant, claims: Mapping[str, Any], issuer: str, name_claim: str, group_claim: str) -> Principal:
    """Who a verified token speaks for. Raises KeyError if it has no usable `name_claim`."""
    name = claim(claims, name_claim)
    if not isinstance(name, str) or not name:
        raise KeyError(name_claim)
    group = grant.group
    if not group and group_claim:
        group = _first_group(claim(claims, group_claim))
    models = None if grant.models is None else frozenset(grant.models)
    return Principal(
        f"oidc:{_plain(name)}",
        f"oidc:{_digest(issuer, name)}",
        frozenset(grant.roles),
        models,
        group,
        grant.limits,
        grant.budget,
    )


def _first_group(found: object) -> str:
    for one in found if isinstance(found, list) else [found]:
        if isinstance(one, str) and (plain := one.strip("/")) and _GROUP.fullmatch(plain):
            return plain  # Keycloak writes a group as a path
    return ""


def _plain(name: str) -> str:
    """`name` as it may stand in reports. One that had to be changed gets a mark of its own: no two become one."""
    if len(name) <= _NAME_CHARS and not _UNPLAIN.search(name):
        return name
    return f"{_UNPLAIN.sub('_', name)[: _NAME_CHARS - 13]}~{_digest(name)[:12]}"


def _digest(*parts: str) -> str:
    return hashlib.sha256("\0".join(parts).encode("utf-8", "surrogatepass")).hexdigest()[:20]
