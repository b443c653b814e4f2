"""Where answers come from: upstream addresses, pools of them, and the two ways of talking to them.

- `upstream`   one address: place, runtime, health, load; the lease that counts a request on it
- `reply`, `connection`, `transport`   the data plane: our pooled HTTP/1.1 client; prompts and answers move only here
- `health`     the prober: asks every upstream again and again whether it is well
- `reasons`    why a probe failed, in words
- `control`    the control plane: the one aiohttp ClientSession; probes, discovery, Ollama's model management

May import runtimes, wire, errors and metrics. Upstream objects outlive the route table that names them.
"""
