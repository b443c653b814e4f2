"""Other gateways' configurations, read into ours: a TOML file, and a list of all that has no counterpart.

- `litellm`   LiteLLM's proxy configuration (YAML)
- `document`  taking a foreign document apart so that nothing in it is passed over silently
- `cli`       `llm-gateway import`

May import config, whose reader checks every result. Nothing else knows this room.
"""
