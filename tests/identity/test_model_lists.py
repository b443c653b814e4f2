"""A key for some models: asked about the final model, after aliases, on retries, and in every list of models."""

from __future__ import annotations

import asyncio
import json

import pytest

from gateway.config import Model
from gateway.sim import SimServer
from tests.journeys.stage import CHAT, Scripted, chat, gateway, provider

ONLY_B = {"few": frozenset({"b"})}


async def test_an_alias_is_followed_before_the_key_is_asked() -> None:
    models = [Model("a", "a", aliases=("b2",)), Model("b", "b", aliases=("gpt",))]
    async with (
        SimServer(models=("a", "b")) as sim,
        gateway(provider("one", sim.url, models=models), limited=ONLY_B) as here,
    ):
        for name, status in (("b", 200), ("gpt", 200), ("a", 403), ("b2", 403), ("nonesuch", 404)):
            answer = await here.ask("POST", CHAT, chat(name, max_tokens=1), key=here.keys["few"])
            assert answer.status == status, name
            if status == 404:
                assert "'a'" not in answer.error["message"]
        listed = (await here.ask("GET", "/v1/models", key=here.keys["few"])).json()["data"]
        assert [one["id"] for one in listed] == ["b", "gpt"]


async def test_a_name_of_two_models_goes_to_the_allowed_one_and_never_falls_back_on_the_other() -> None:
    """The same name at two providers, for another model at each."""
    async with SimServer(models=("a",)) as allowed_not, Scripted() as broken:  # closes without an answer
        here = gateway(
            provider("one", allowed_not.url, models=[Model("a", "a", aliases=("chat",))]),
            provider("two", broken.url, models=[Model("b", "b", aliases=("chat",))]),
            limited=ONLY_B,
        )
        async with here as one:
            for _ in range(4):
                answer = await one.ask("POST", CHAT, chat("chat", max_tokens=1), key=one.keys["few"])
                assert answer.status == 502
            assert {record.model for record in one.records} == {"b"}
            assert not [request for request in allowed_not.requests if request.method == "POST"]


@pytest.mark.parametrize("path", ["/v1/models", "/api/local-llm/providers"])
async def test_lists_name_no_model_that_the_key_may_not_use(path: str) -> None:
    """What the runtimes themselves report included: of each host, and in hints."""
    async with SimServer(models=("b", "hidden")) as sim, SimServer(models=("b", "hidden")) as twin:
        configured = provider("one", sim.url, twin.url, models=("b", "hidden"))
        empty = provider("two", sim.url, models=())
        async with gateway(configured, empty, limited={**ONLY_B, "none": frozenset()}) as here:
            for key, shown, hidden in (("client", ("b", "hidden"), ()), ("few", ("b",), ("hidden",))):
                text = (await here.ask("GET", path, key=here.keys[key])).body.decode()
                assert all(f'"{name}"' in text for name in shown)
                assert not any(name in text for name in hidden), key
            text = (await here.ask("GET", path, key=here.keys["none"])).body.decode()
            assert "hidden" not in text
            assert '"b"' not in text


class Ollama:
    """Just enough of Ollama: a list of models, and what it was asked to delete."""

    def __init__(self) -> None:
        self.deleted: list[str] = []

    async def __aenter__(self) -> Ollama:
        self._server = await asyncio.start_server(self._serve, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self._server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = (await reader.readuntil(b"\r\n\r\n")).decode()
        length = next((int(line[15:]) for line in head.split("\r\n") if line.lower().startswith("content-length:")), 0)
        body = await reader.readexactly(length)
        if head.startswith("DELETE"):
            self.deleted.append(json.loads(body)["model"])
        names = ("b:latest", "b:7b", "hidden:latest")
        answer = json.dumps({"models": [{"name": name, "model": name} for name in names]}).encode()
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\nConnection: close\r\nContent-Length: ")
        writer.write(b"%d\r\n\r\n%b" % (len(answer), answer))
        writer.close()


async def test_ollamas_list_and_its_management_are_for_the_keys_models_only() -> None:
    async with Ollama() as ollama:
        listed = provider("ollama", f"{ollama.url}/v1", models=("b:latest", "hidden:latest"), runtime="ollama")
        async with gateway(listed, limited=ONLY_B, ollama_base_url=ollama.url, enable_pull=True) as here:
            path = "/api/local-llm/ollama"
            whole = (await here.ask("GET", f"{path}/list")).json()["models"]
            assert [one["name"] for one in whole] == ["b:latest", "b:7b", "hidden:latest"]
            few = here.keys["few"]
            assert (await here.ask("GET", f"{path}/list", key=few)).json() == {"models": [whole[0]]}
            for action in ("pull", "delete"):
                for name in ("hidden", "hidden:latest", "b:7b"):
                    answer = await here.ask("POST", f"{path}/{action}", {"model": name}, key=few)
                    assert (answer.status, answer.error["code"]) == (403, "model_not_allowed")
            for name in ("b", "b:latest"):
                assert (await here.ask("POST", f"{path}/delete", {"model": name}, key=few)).status == 200
            assert ollama.deleted == ["b", "b:latest"]
