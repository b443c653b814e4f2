"""Configuration: where it comes from, and the frozen `Config` that everything else receives."""

from __future__ import annotations

from gateway.config.model import Config, ConfigError, Listen, Model, Price, Problem, Provider, Secret

__all__ = ["Config", "ConfigError", "Listen", "Model", "Price", "Problem", "Provider", "Secret"]
