"""Every setting once: its field in `Config`, its variable, how it is read, what it is for.

The table drives the environment, `.env`, the TOML file, the command line's flags and the check of
`.env.example`. Defaults are `Config`'s own. `api_keys` and `providers` are read elsewhere, for one text holds
many values.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Final

from gateway.config import parsing
from gateway.routing.policies import POLICIES


def _many(raw: object) -> object:
    return raw


@dataclass(frozen=True, slots=True)
class Setting:
    """`field`: name in `Config` and key in the TOML file. `variable`: name in the environment and `.env`."""

    field: str
    parse: Callable[[object], object]
    about: str
    variable: str
    flag: bool = True

    @property
    def option(self) -> str:
        return "--" + self.field.replace("_", "-")


def _setting(
    field: str, parse: Callable[[object], object], about: str, variable: str = "", flag: bool = True
) -> Setting:
    return Setting(field, parse, about, variable or f"GATEWAY_{field.upper()}", flag)


_seconds = parsing.number(above=0.0, unit=" (seconds)")
_token_weight = parsing.number(most=1000.0)
_seconds_or_zero = parsing.number(unit=" (seconds)")

SETTINGS: Final[tuple[Setting, ...]] = (
    _setting("providers", _many, "JSON array of providers and their models", "OPENAI_COMPATIBLE_DATA", False),
    _setting("providers_file", parsing.file, "JSON or TOML file of further providers"),
    _setting("dns_refresh_s", _seconds, "longest time between two look-ups of an upstream's name"),
    _setting("dns_server", parsing.dns_server, "DNS server for those names, address:port; off: the system's resolver"),
    _setting("ollama_base_url", parsing.base_url, "Ollama's address, with or without /api", "OLLAMA_BASE_URL"),
    _setting("enable_pull", parsing.switch, "allow Ollama model pull and delete", "LOCAL_LLM_ENABLE_PULL"),
    _setting("listen", parsing.listen, "address for clients, host:port"),
    _setting("metrics_listen", parsing.listen_or_off, "address for Prometheus, host:port or off"),
    _setting("data_dir", parsing.directory, "directory for keys and records"),
    _setting("redis_url", parsing.redis_url, "Redis or Valkey that several gateways share", "REDIS_URL", False),
    _setting(
        "store",
        parsing.choice("auto", "embedded", "off"),
        "where limits, keys and usage are shared; auto: REDIS_URL, else the embedded Valkey",
    ),
    _setting("api_keys", _many, "client keys: name=key,…", flag=False),
    _setting("auth_failures_per_min", parsing.whole(0, 100_000), "wrong keys an address may send a minute; 0 is any"),
    _setting("oidc_issuer", parsing.trusted_url, "issuer whose tokens (JWT) are accepted beside keys"),
    _setting("oidc_audience", parsing.texts, "audiences a token must be for, comma-separated"),
    _setting("oidc_jwks_url", parsing.trusted_url, "the issuer's keys; else its discovery document names them"),
    _setting("oidc_algorithms", parsing.algorithms, "signature algorithms of tokens, comma-separated"),
    _setting("oidc_leeway_s", parsing.number(most=300.0, unit=" (seconds)"), "how far the issuer's clock may be off"),
    _setting("oidc_name_claim", parsing.name, "claim that names who asks; must be unique at the issuer"),
    _setting("oidc_group_claim", parsing.name, "claim whose first usable value is the group"),
    _setting("oidc_grants", parsing.grants, "JSON array: what claims allow; the first that fits", flag=False),
    _setting("limits", parsing.limits, "JSON array of limits for all keys", flag=False),
    _setting(
        "limits_share",
        parsing.number(above=0.0, most=1.0),
        "part of each limit that this process grants while the store is away",
    ),
    _setting("queue_s", _seconds_or_zero, "longest wait for room on an upstream; 0: nobody waits"),
    _setting("queue_max", parsing.whole(0, 1_000_000), "requests that may wait for room at once"),
    _setting("queue_input_weight", _token_weight, "what a prompt's token counts against a tenant while others wait"),
    _setting("queue_output_weight", _token_weight, "what an answer's token counts against it"),
    _setting("queue_reserve", parsing.whole(0, 1000), "places kept for tenants within their share"),
    _setting("tenants", parsing.tenants, "JSON object of groups and their weights", flag=False),
    _setting("comment_s", _seconds_or_zero, "seconds between comments to a stream with nothing to say yet; 0 is off"),
    _setting("tools_unsupported", parsing.choice("strip", "reject"), "tools for a model without them"),
    _setting("max_body_bytes", parsing.whole(1, 2**40), "largest request body"),
    _setting("body_timeout_s", _seconds, "longest wait for a request body"),
    _setting("min_body_rate", parsing.whole(0, 2**40), "bytes per second a request body must keep up; 0 is off"),
    _setting("keepalive_timeout_s", _seconds, "how long an idle client connection, or one sending headers, is kept"),
    _setting("upstream_idle_s", _seconds_or_zero, "how long an idle upstream connection is kept; 0 is never"),
    _setting("attempts", parsing.whole(1, 100), "times a request may be sent until an answer begins"),
    _setting("policy", parsing.choice(*POLICIES), "how an upstream is chosen, where a model does not say"),
    _setting(
        "cache_salt",
        parsing.choice("group", "key", "off"),
        "whose prompts share a vLLM's prefix cache: those of a key's group, of one key, or everybody's",
    ),
    _setting("prefix_index_bytes", parsing.whole(64 * 1024, 2**40), "memory for what upstreams have in their caches"),
    _setting("retry_budget", parsing.number(most=1.0), "part of the requests that may be sent again"),
    _setting("continue_streams", parsing.switch, "go on elsewhere with a streamed answer whose engine failed"),
    _setting("hedge_after_s", parsing.seconds_or_off, "silence after which a second upstream is asked as well; or off"),
    _setting("shutdown_s", _seconds_or_zero, "how long running requests may finish after SIGTERM"),
    _setting("drain_notice_s", _seconds_or_zero, "how long requests are still taken then, if /readyz is asked"),
    _setting("log_level", parsing.choice("debug", "info", "warning", "error"), "least severe message to log"),
    _setting("access_log", parsing.switch, "one log line for each request"),
    _setting("ledger", parsing.switch, "keep a record of what each request used, in the data directory"),
    _setting(
        "ledger_keep_bytes",
        parsing.whole(1024 * 1024, 2**50),
        "records kept one by one where there is no store; older ones are summed up by hour",
    ),
    _setting(
        "demo",
        parsing.choice("auto", "on", "off"),
        "the built-in demo engine; auto: if nothing else is found",
    ),
)

BY_FIELD: Final = {setting.field: setting for setting in SETTINGS}
BY_VARIABLE: Final = {setting.variable: setting for setting in SETTINGS}

#: names the TOML file; read from the environment and `.env` only
CONFIG_VARIABLE: Final = "GATEWAY_CONFIG"
