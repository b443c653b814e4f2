"""The first five minutes: with nothing configured, look for runtimes on this machine, or bring an engine along.

`furnish` fills an empty configuration; `greeting` is what the operator reads once the gateway listens.
"""

from __future__ import annotations

import dataclasses
import shutil
import sys
from contextlib import AsyncExitStack
from pathlib import Path

from gateway.catalog import Catalog
from gateway.config import Config, Listen, Model, Provider
from gateway.detect import Found, detect, table
from gateway.upstreams.control import Control

PROGRAM = "llm-gateway"
DEMO_NOTE = (
    "No runtime was found on this machine, so the provider `demo` answers: a SIMULATED engine that is part of the\n"
    "gateway. Its text is made up, no model runs. Start Ollama, vLLM, llama.cpp, LocalAI, LiteLLM or LM Studio and\n"
    "restart the gateway, or name a server in OPENAI_COMPATIBLE_DATA or OLLAMA_BASE_URL (see .env.example)."
)


@dataclasses.dataclass(frozen=True, slots=True)
class Furnished:
    """A configuration that has providers, and how it came to them."""

    config: Config
    found: tuple[Found, ...] = ()
    demo: bool = False
    #: the providers that were not configured
    added: tuple[Provider, ...] = ()

    def again(self, config: Config) -> Config:
        """`config`, read later, with what this start found: nothing is looked for while requests are served."""
        if config.providers and config.demo != "on":
            return config
        names = {provider.name for provider in config.providers}
        added = tuple(provider for provider in self.added if provider.name not in names)
        return dataclasses.replace(config, providers=(*config.providers, *added))


async def furnish(config: Config, stack: AsyncExitStack) -> Furnished:
    """Give `config` providers if it has none: detected ones, else the simulated engine (unless `demo` is off).

    What is started for it is closed with `stack`.
    """
    if config.providers and config.demo != "on":
        return Furnished(config)
    found: tuple[Found, ...] = ()
    if not config.providers:
        async with Control() as control:
            found = tuple(await detect(control))
    usable = tuple(_provider(one) for one in found if not one.note)
    providers = (*config.providers, *usable)
    demo = config.demo == "on" or (config.demo == "auto" and not providers)
    if demo:
        from gateway.sim import demo_engine

        engine = await stack.enter_async_context(demo_engine())
        providers = (
            *providers,
            Provider(
                "demo",
                (engine.url,),
                runtime="vllm",
                models=(Model("demo", "Simulated engine"),),
                origin="the built-in simulated engine",
            ),
        )
    added = providers[len(config.providers) :]
    return Furnished(dataclasses.replace(config, providers=providers), found, demo, added)


def greeting(furnished: Furnished, catalog: Catalog, listen: Listen, metrics: Listen | None, key: str | None) -> str:
    """Aligned, ready to paste. `key` is shown here and never again."""
    shown_host = "127.0.0.1" if listen.host in ("0.0.0.0", "::") else listen.host
    base = f"http://{Listen(shown_host, listen.port)}"
    parts = []
    if furnished.found:
        parts.append(f"Found on this machine:\n\n{_indented(table(furnished.found))}")
    if furnished.demo:
        parts.append(DEMO_NOTE)
    parts.append(f"Listening on {base}" + (f"   (metrics: http://{metrics}/metrics)" if metrics is not None else ""))
    if key is not None:
        parts.append(
            "Your API key, shown only now (its hash is kept). It has the role `admin`, which makes and revokes keys:\n"
            f"keep it to yourself, and give others one of `{_program()} keys create NAME`.\n\n    {key}"
        )
    model = next(iter(catalog.table.pools), None)
    if model is None:
        parts.append(f"No model can be asked yet: `{_program()} check` shows the configuration.")
    else:
        request = f'{{"model": "{model}", "stream": true, "messages": [{{"role": "user", "content": "Hello!"}}]}}'
        parts.append(
            f"Try it:\n\n    curl -N {base}/v1/chat/completions \\\n"
            f'      -H "Authorization: Bearer {key or "$OPENAI_API_KEY"}" \\\n'
            f"      -d '{request}'"
        )
        parts.append(
            f"For any OpenAI client:\n\n    export OPENAI_BASE_URL={base}/v1\n"
            f"    export OPENAI_API_KEY={key or 'your-key'}"
        )
    return "\n\n".join(parts) + "\n"


def _program() -> str:
    """How a shell finds this program: `make run` has it in `.venv/bin`, which is in nobody's PATH."""
    called = Path(sys.argv[0])
    return str(called) if called.name == PROGRAM and shutil.which(PROGRAM) is None else PROGRAM


def _provider(found: Found) -> Provider:
    return Provider(
        found.runtime, (found.base_url,), runtime=found.runtime, discover=True, origin=f"found at {found.base_url}"
    )


def _indented(text: str) -> str:
    return "\n".join(f"    {line}" for line in text.splitlines())
