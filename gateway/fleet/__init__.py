"""The fleet while it runs: what changes which upstreams there are, and which of them get requests.

- `reload`   the configuration's files are followed; a new configuration is applied, a bad one refused and said
- `names`    DNS names that stand for several hosts, looked up again and again
- `findings` one prober for all gateways that share a store
- `drains`   upstreams that an operator took out of service, agreed on with the gateways that share the store
- `cli`      `llm-gateway upstreams`, which asks a running gateway

May import catalog, config, store, upstreams and errors. Everything here changes the Catalog, and nothing else of a
request's way: requests that run keep the offers they were given.
"""
