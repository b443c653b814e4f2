"""How a configuration, or what is wrong with it, is shown: text for people, plain data for `--json`.

Everything shown passes `str`, which masks a `Secret`; nothing here reads `Secret.value`.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import asdict, fields
from typing import Any

from gateway.config.model import Config, Listen, Problem, Provider, Secret
from gateway.limits.spec import Limit
from gateway.oidc.grants import Grant

Row = tuple[str, str, str]


def rows(config: Config) -> list[Row]:
    """(path, value, origin) of every effective value."""
    found: list[Row] = []
    for field in fields(Config):
        value = getattr(config, field.name)
        if field.name in ("warnings", "origins", "files"):
            continue
        origin = config.origins.get(field.name, "default")
        if field.name == "providers" and value:
            for index, provider in enumerate(value):
                found += _provider_rows(config, f"providers[{index}]", provider)
        elif field.name == "limits" and value:
            found += [(f"limits.{limit.name}", _limit_text(limit), origin) for limit in value]
        elif field.name == "tenants" and value:
            found += [(f"tenants.{tenant.group}", str(tenant), origin) for tenant in value]
        elif field.name in ("oidc_audience", "oidc_algorithms"):
            found.append((field.name, ", ".join(value) or "(none)", origin))
        elif field.name == "oidc_grants" and value:
            found += [(f"oidc_grants[{index}]", _grant_text(grant), origin) for index, grant in enumerate(value)]
        elif field.name == "api_keys" and value:
            found += [(f"api_keys.{name}", str(secret), origin) for name, secret in value]
        else:
            found.append((field.name, _text(value), origin))
    return found


def _limit_text(limit: Limit) -> str:
    rate = "" if limit.resource == "concurrent" else f", {limit.per_s:g} per second"
    mode = ", only observed" if limit.observe else ""
    return f"{limit.burst} {limit.resource.replace('_', ' ')} by {limit.scope.replace('_', ' and ')}{rate}{mode}"


def _grant_text(grant: Grant) -> str:
    when = " and ".join(f"{path} is {value}" for path, value in grant.when) or "every token"
    given = [
        f"group {grant.group}" if grant.group else "",
        f"roles {', '.join(grant.roles)}" if grant.roles else "",
        "all models" if grant.models is None else f"models {', '.join(grant.models) or '(none)'}",
        *(f"limit {_limit_text(limit)}" for limit in grant.limits),
        f"budget {grant.budget.amount:g} {grant.budget.unit} a {grant.budget.period}" if grant.budget else "",
    ]
    return f"{when}: {'; '.join(filter(None, given))}"


def _provider_rows(config: Config, path: str, provider: Provider) -> Iterator[Row]:
    def row(below: str, value: object) -> Row:
        return (f"{path}.{below}", _text(value), _origin(config, f"{path}.{below}", provider.origin))

    yield row("provider", provider.name)
    for index, url in enumerate(provider.base_urls):
        yield row(f"base_urls[{index}]", url)
    for index, lookup in enumerate(provider.lookups):
        yield row(f"lookups[{index}]", lookup)
    yield row("runtime", provider.runtime or "openai")
    yield row("api_key", provider.api_key)
    yield row("weight", provider.weight)
    if provider.max_in_flight is not None:
        yield row("max_in_flight", provider.max_in_flight)
    if provider.cache_tokens is not None:
        yield row("cache_tokens", provider.cache_tokens)
    for name in ("connect", "first_byte", "idle", "total"):
        yield row(f"timeouts.{name}", getattr(provider.timeouts, f"{name}_s") or "off")
    if provider.discover:
        yield row("models", "(asked of the provider)")
    elif not provider.models:
        yield row("models", "(none)")
    for index, model in enumerate(provider.models):
        at = f"models[{index}]"
        yield row(f"{at}.api_name", model.name)
        yield row(f"{at}.ui_name", model.ui_name)
        yield row(f"{at}.supports_tools", model.supports_tools)
        if model.aliases:
            yield row(f"{at}.aliases", ", ".join(model.aliases))
        if model.fallbacks:
            yield row(f"{at}.fallbacks", ", ".join(model.fallbacks))
        if model.policy:
            yield row(f"{at}.policy", model.policy)
        if model.continues is not None:
            yield row(f"{at}.continue", model.continues)
        if model.context_window is not None:
            yield row(f"{at}.context_window", model.context_window)
        if model.price is not None:
            prices = {name: amount for name, amount in asdict(model.price).items() if amount is not None}
            yield row(f"{at}.price", ", ".join(f"{name} {amount:g}" for name, amount in prices.items()))


def _origin(config: Config, path: str, fallback: str) -> str:
    """The origin noted for the longest beginning of `path`."""
    while path:
        if path in config.origins:
            return config.origins[path]
        path = path[: max(path.rfind("."), path.rfind("["), 0)]
    return fallback


def _text(value: object) -> str:
    match value:
        case bool():
            return "true" if value else "false"
        case None:
            return "off"
        case Secret() | tuple() if not value:
            return "(none)"
        case float():
            return f"{value:g}"
        case Listen() | Secret():
            return str(value)
    return str(value)


def effective_text(config: Config) -> str:
    """An aligned table of path, value and origin, then the warnings."""
    table = [("setting", "value", "from"), *rows(config)]
    widths = [min(max(len(row[column]) for row in table), 60) for column in (0, 1)]
    lines = [f"{path:<{widths[0]}}  {value:<{widths[1]}}  {origin}" for path, value, origin in table]
    if config.warnings:
        lines += ["", warnings_text(config.warnings)]
    return "\n".join(lines)


def problems_text(problems: Iterable[Problem]) -> str:
    """Every problem: where, the value, what is wrong, the nearest valid name, and the source that holds it."""
    found = tuple(problems)
    return "\n".join([_heading(len(found), "problem"), *_described(found)])


def warnings_text(warnings: Iterable[Problem]) -> str:
    found = tuple(warnings)
    return "\n".join([_heading(len(found), "warning"), *_described(found)])


def effective_data(config: Config) -> dict[str, Any]:
    settings = [{"path": path, "value": value, "origin": origin} for path, value, origin in rows(config)]
    return {"ok": True, "rows": settings, "warnings": [asdict(warning) for warning in config.warnings]}


def problems_data(problems: Iterable[Problem]) -> dict[str, Any]:
    return {"ok": False, "problems": [asdict(problem) for problem in problems]}


def _heading(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'} in the configuration:"


def _described(problems: Iterable[Problem]) -> Iterator[str]:
    for problem in problems:
        yield f"  {problem} [{problem.origin}]" if problem.origin else f"  {problem}"
