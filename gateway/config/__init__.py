"""Configuration: where it comes from, and the frozen `Config` that everything else receives.

Precedence, highest first; a value is taken whole from the highest source that sets it:

1. the command line (`--listen`)
2. the process environment (`GATEWAY_LISTEN`)
3. `.env` in the working directory (the same names; nothing is expanded in it)
4. the TOML file that `--config` or `GATEWAY_CONFIG` names (`listen`)
5. the default

A variable is `GATEWAY_` and the field's name in upper case, a TOML key the field's name, a flag the field's
name with dashes; only `OPENAI_COMPATIBLE_DATA` (`providers`), `OLLAMA_BASE_URL` and `LOCAL_LLM_ENABLE_PULL`
(`enable_pull`) have names of their own. An empty variable counts as not set.

`model` is the data, `settings` the table of settings, `parsing`, `entries` and `providers` read values, `sources` finds
them, `check` shows them. May import runtimes (their names), the `Timeouts` of upstreams and the key format of
identity.
"""

from __future__ import annotations

from gateway.config.model import Config, ConfigError, Listen, Lookup, Model, Price, Problem, Provider, Secret
from gateway.config.sources import load

__all__ = ["Config", "ConfigError", "Listen", "Lookup", "Model", "Price", "Problem", "Provider", "Secret", "load"]
