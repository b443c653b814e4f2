"""The API surfaces: what can be asked of the gateway over HTTP, a file for each; the operator's are in `admin`.

- `openai`, `anthropic`, `native`  ways to a model: tables of what `gateway.passage` needs to know of each; model lists
- `local`      our own streaming door, which may name a provider
- `ollama`     management of an Ollama's models: list, pull, delete
- `providers`  what is configured, and how it is
- `system`     probes and metrics

May import passage, catalog, upstreams, runtimes, wire, answer, exchange and errors.
"""
