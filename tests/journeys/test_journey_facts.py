"""What is kept of a request: metrics, log line, record; and what must appear in none of them."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Callable
from typing import Any

import msgspec
import pytest
from prometheus_client.parser import text_string_to_metric_families

from gateway.config import Model
from gateway.ledger.record import Record
from gateway.sim import SimServer
from gateway.wire.usage import SseMeter
from tests.journeys.stage import CHAT, Gateway, Scripted, chat, gateway, provider, timeouts, until, whole


@pytest.fixture
async def sim() -> AsyncIterator[SimServer]:
    async with SimServer() as one:
        yield one


async def samples(here: Gateway) -> dict[tuple[str, tuple[tuple[str, str], ...]], float]:
    """Every sample of a scrape, by name and sorted labels. Fails on anything that is no exposition."""
    found = {}
    for family in text_string_to_metric_families(await here.scrape()):
        assert family.documentation, family.name
        for sample in family.samples:
            key = (sample.name, tuple(sorted(sample.labels.items())))
            assert key not in found, f"{key} twice"
            found[key] = sample.value
    return found


def sample(name: str, **labels: str) -> tuple[str, tuple[tuple[str, str], ...]]:
    return name, tuple(sorted(labels.items()))


MODEL = {"gen_ai_operation_name": "chat", "gen_ai_provider_name": "one", "gen_ai_request_model": "sim"}


async def test_metrics_after_a_known_scenario(sim: SimServer) -> None:
    async with gateway(provider("one", sim.url)) as here:
        usages = []
        for stream in (False, True, True):
            sim.faults = {"token_s": 0.02} if stream else {}
            await here.ask("POST", CHAT, chat(stream=stream, max_tokens=5))
            usages.append((here.record.prompt_tokens, here.record.completion_tokens))
        sim.faults = {}
        await here.ask("POST", CHAT, chat("nonesuch"))
        await here.ask("POST", CHAT, chat(), key="wrong")
        await here.ask("GET", "/nowhere")
        sim.faults = {"status": 503}
        await here.ask("POST", CHAT, chat())
        sim.faults = {"token_s": 0.05}
        async with here.connect() as client:
            client.send("POST", CHAT, chat(stream=True, max_tokens=500))
            await client.head()
            running = await samples(here)
            assert running[sample("gateway_requests_in_flight")] == 1
            assert running[sample("gateway_upstream_in_flight", provider="one", upstream="one")] == 1
        await until(lambda: here.app.in_flight() == 0, what="nothing in flight")
        got = await samples(here)

        def requests(status: str, route: str = CHAT) -> float:
            return got[sample("gateway_requests_total", route=route, status=status)]

        assert requests("200") == 3
        assert requests("404") == 1
        assert requests("401") == 1
        assert requests("404", "-") == 1
        assert requests("503") == 1
        assert requests("499") == 1
        assert sum(value for (name, _), value in got.items() if name == "gateway_requests_total") == 8
        # of the requests that reached a model: three answered, a 503, one that its client left
        durations = "gen_ai_server_request_duration_seconds_count"
        assert got[sample(durations, **MODEL, error_type="")] == 3
        failed = {dict(labels)["error_type"]: n for (name, labels), n in got.items() if name == durations}
        assert {kind: n for kind, n in failed.items() if kind} == {"upstream_error": 1, "client_gone": 1}
        assert got[sample("gen_ai_server_time_to_first_token_seconds_count", **MODEL)] == 3
        assert got[sample("gen_ai_server_time_per_output_token_seconds_count", **MODEL)] >= 2
        per_token = got[sample("gen_ai_server_time_per_output_token_seconds_sum", **MODEL)]
        measured = [one.tpot_s for one in here.records if one.tpot_s is not None]
        assert len(measured) == got[sample("gen_ai_server_time_per_output_token_seconds_count", **MODEL)]
        assert per_token == pytest.approx(sum(measured), abs=1e-5)
        prompts = got[sample("gen_ai_client_token_usage_sum", **MODEL, gen_ai_token_type="input")]
        completions = got[sample("gen_ai_client_token_usage_sum", **MODEL, gen_ai_token_type="output")]
        gone = here.record
        assert gone.outcome == "client_gone"
        assert prompts == sum(prompt or 0 for prompt, _ in usages) + (gone.prompt_tokens or 0)
        assert completions == 15 + (gone.completion_tokens or 0)
        assert got[sample("gateway_upstream_in_flight", provider="one", upstream="one")] == 0
        assert got[sample("gateway_upstream_requests_total", provider="one", upstream="one")] == 5
        assert got[sample("gateway_upstream_up", provider="one", upstream="one")] == 1
        assert got[sample("gateway_requests_in_flight")] == 0
        overhead = got[sample("gateway_overhead_seconds_sum")] / got[sample("gateway_overhead_seconds_count")]
        assert got[sample("gateway_overhead_seconds_count")] == 8
        assert 0 < overhead < 0.02, "waiting for the upstream is not the gateway's time"
        await asyncio.sleep(0.3)
        assert (await samples(here))[sample("gateway_event_loop_lag_seconds_count")] >= 1


async def test_the_scrape_shows_an_upstream_that_is_gone(sim: SimServer) -> None:
    async with Scripted() as gone:
        url = gone.url
    async with gateway(provider("one", sim.url), provider("two", url)) as here:
        got = await samples(here)
        assert got[sample("gateway_upstream_up", provider="one", upstream="one")] == 1
        assert got[sample("gateway_upstream_up", provider="two", upstream="two")] == 0
        assert (await here.ask("POST", CHAT, {**chat(), "model": "sim"})).status == 200


LOG_KEYS = {field.name for field in msgspec.structs.fields(Record)}


async def test_one_log_line_for_each_request(sim: SimServer) -> None:
    async with gateway(provider("one", sim.url)) as here:
        await here.ask("POST", CHAT, chat(stream=True, max_tokens=4))
        await here.ask("POST", CHAT, chat("nonesuch"))
        await here.ask("GET", "/livez", key=None)
        lines = [json.loads(line) for line in here.log_text().splitlines()]
        assert len(lines) == 3
        assert all(set(line) <= LOG_KEYS for line in lines), "fields that have their default are left out"
        assert {
            "at", "request_id", "route", "method", "status", "outcome", "key", "model", "provider", "upstream",
            "stream", "attempts", "prompt_tokens", "completion_tokens", "cached_tokens", "reasoning_tokens",
            "estimated", "ttft_s", "tpot_s", "duration_s", "upstream_s", "request_bytes", "response_bytes", "error",
        } <= set(lines[0])  # fmt: skip
        first, second, third = lines
        assert first == json.loads(msgspec.json.encode(here.records[0]))
        assert (first["status"], first["outcome"], first["key"], first["stream"]) == (200, "ok", "client", True)
        assert (first["provider"], first["model"], first["upstream"]) == ("one", "sim", "one")
        assert (first["completion_tokens"], first["estimated"], first["attempts"]) == (4, False, 1)
        assert 0 < first["ttft_s"] <= first["duration_s"]
        assert 0 < first["upstream_s"] <= first["duration_s"]
        assert first["request_bytes"] == len(json.dumps(chat(stream=True, max_tokens=4)))
        assert first["response_bytes"] > 300
        assert (second["status"], second["outcome"], second["error"]) == (404, "refused", "model_not_found")
        assert (second["model"], second["prompt_tokens"]) == ("", None)
        assert (third["route"], third["status"], third["key"]) == ("/livez", 200, "")
        assert len({line["request_id"] for line in lines}) == 3


async def test_no_log_line_where_that_is_configured(sim: SimServer) -> None:
    async with gateway(provider("one", sim.url), access_log=False) as here:
        assert (await here.ask("POST", CHAT, chat())).status == 200
        assert here.app.log is None
        assert len(here.records) == 1


async def test_a_record_for_every_request_of_a_crowd(sim: SimServer) -> None:
    async with gateway(provider("one", sim.url)) as here:
        asked = [here.ask("POST", CHAT, chat(stream=bool(i % 2), max_tokens=i % 7 + 1)) for i in range(200)]
        await asyncio.gather(*asked)
        records = here.records
        assert len(records) == len({record.request_id for record in records}) == 200
        assert sum(record.completion_tokens or 0 for record in records) == sum(i % 7 + 1 for i in range(200))


# -- labels -----------------------------------------------------------------------------------------------------


async def test_junk_adds_no_series(sim: SimServer) -> None:
    async with gateway(provider("one", sim.url)) as here:

        async def junk(first: int, count: int) -> None:
            for i in range(first, first + count):
                name = f"junk-{i}"
                async with here.connect() as client:
                    await client.ask("POST", CHAT, chat(name))
                    await client.ask("POST", "/api/local-llm/proxy", {**chat(), "provider": name})
                    await client.ask("GET", f"/v1/{name}")
                    await client.ask("GET", f"/livez?{name}")
                    await client.ask("GET", "/v1/models", None, [("X-" + name, name)], key=name)
                    client.send(f"JUNK{i}", "/livez")
                    await client.head()

        # once, so that every kind of series is there
        await here.ask("POST", CHAT, chat())
        await junk(0, 30)  # more wrong keys than an address may send: their 429 is a series too
        before = {key for key in await samples(here) if not key[0].startswith(("process_", "python_"))}
        await asyncio.gather(*(junk(1000 * i, 40) for i in range(1, 26)))
        after = {key for key in await samples(here) if not key[0].startswith(("process_", "python_"))}
        assert after == before
        assert "junk" not in await here.scrape()
        assert len(here.app.metrics.requests) < 40
        assert len(here.app.metrics.models) == 1


# -- canaries ---------------------------------------------------------------------------------------------------

PROMPT = "CANARYprompt7f3a"
CREDENTIAL = "sk-CANARYcredential91c2"
ANSWER = "CANARYanswer55e1"


class Watch:
    """Gathers what the gateway says anywhere but in a successful answer."""

    def __init__(self, here: Gateway, caplog: pytest.LogCaptureFixture) -> None:
        self.here = here
        self.caplog = caplog
        self.answers: list[str] = []

    async def ask(self, *args: Any, **more: Any) -> None:
        answer = await self.here.ask(*args, **more)
        self.answers.append(repr(answer.headers))
        if answer.status >= 400:
            self.answers.append(repr(answer.body))

    async def everything(self, *more: str) -> str:
        formatter = logging.Formatter("%(name)s %(message)s")
        said = [formatter.format(entry) for entry in self.caplog.records]  # tracebacks included
        records = [repr(record) for record in self.here.records]
        return "\n".join([self.here.log_text(), await self.here.scrape(), *self.answers, *said, *records, *more])


def leaks(text: str, *secrets: str) -> list[str]:
    """The lines that hold a secret."""
    return [line[:300] for line in text.splitlines() for secret in (PROMPT, CREDENTIAL, *secrets) if secret in line]


@pytest.fixture
def watched(caplog: pytest.LogCaptureFixture) -> Callable[[Gateway], Watch]:
    caplog.set_level(logging.DEBUG)
    return lambda here: Watch(here, caplog)


def prompt(**more: Any) -> dict[str, Any]:
    return {"model": "sim", "messages": [{"role": "user", "content": PROMPT}], **more}


ERRORS: dict[str, dict[str, Any]] = {
    "success": {},
    "status": {"status": 500},
    "unauthorized": {"status": 401},
    "reset": {"reset": True},
    "silent": {"silent": True},
    "cut": {"cut_at_byte": 300},
    "ended too early": {"clean_cut_at_token": 2},
    "its own error": {"error_event_at_token": 2},
    "stall": {"stall_at_token": 3},
    "control": {"bad_headers": "control"},
    "giant": {"bad_headers": "giant"},
    "garbage": {"body": "no JSON at all"},
}


@pytest.mark.parametrize("fault", ERRORS)
async def test_no_secret_appears_whatever_the_upstream_does(
    sim: SimServer, fault: str, watched: Callable[[Gateway], Watch]
) -> None:
    limits = timeouts(first_byte_s=0.2, idle_s=0.2)
    async with gateway(provider("one", sim.url, api_key=CREDENTIAL, timeouts=limits)) as here:
        watch = watched(here)
        sim.faults = ERRORS[fault]
        for stream in (False, True):
            await watch.ask("POST", CHAT, prompt(stream=stream, max_tokens=8))
            await watch.ask("POST", "/api/local-llm/stream", prompt())
        assert PROMPT in str([one.body for one in sim.requests]), "it did go upstream"
        assert not leaks(await watch.everything(), here.key)


async def test_no_secret_appears_in_refusals(sim: SimServer, watched: Callable[[Gateway], Watch]) -> None:
    async with gateway(provider("one", sim.url, api_key=CREDENTIAL), max_body_bytes=5000) as here:
        watch = watched(here)
        for body in (
            prompt(stream=PROMPT),
            prompt(model=7),
            {**prompt(), PROMPT: 1, "MODEL": PROMPT},
            prompt(stream_options=PROMPT, stream=True),
            json.dumps(prompt()).encode()[:-2],
            json.dumps(prompt()).encode() + PROMPT.encode(),
            b'{"%b":1,"%b":2,"model":"sim","messages":[]}' % (PROMPT.encode(), PROMPT.encode()),
            prompt(user=PROMPT * 1000),
            {"model": "sim", "prompt": PROMPT},
        ):
            await watch.ask("POST", CHAT, body)
        await watch.ask("POST", CHAT, prompt(), [(PROMPT, PROMPT), (f"{PROMPT}_x", PROMPT)])
        await watch.ask("POST", CHAT, prompt(), [("Cookie", PROMPT)], key=PROMPT)
        await watch.ask("GET", f"/{PROMPT}")
        await watch.ask("GET", f"/livez?{PROMPT}")
        await watch.ask("GET", f"//{PROMPT}")
        await watch.ask("GET", "/api/local-llm/providers")
        await watch.ask("GET", "/v1/models")
        assert len(watch.answers) > 20
        assert not leaks(await watch.everything(), here.key)


async def test_no_secret_appears_when_a_handler_fails(
    sim: SimServer, watched: Callable[[Gateway], Watch], monkeypatch: pytest.MonkeyPatch
) -> None:
    """An exception whose very text holds the prompt, raised deep inside, before and after the first byte."""
    async with gateway(provider("one", sim.url, api_key=CREDENTIAL)) as here:
        watch = watched(here)

        def explode(*args: Any, **more: Any) -> Any:
            raise RuntimeError(f"{PROMPT} {CREDENTIAL}")

        for place in ("passage.proxy.resolve", "dispatch.dispatcher.patched", "passage.relay._head"):
            with monkeypatch.context() as patched:
                patched.setattr(f"gateway.{place}", explode)
                for stream in (False, True):
                    answer = await here.ask("POST", CHAT, prompt(stream=stream))
                    watch.answers.append(repr(answer))
                    assert answer.status == 500
                    assert answer.error["code"] == "internal_error"
                    assert here.record.request_id in answer.error["message"]
                    assert (here.record.status, here.record.outcome) == (500, "internal_error")
        text = await watch.everything()
        assert "Traceback" in text, "where it failed is told"
        assert not leaks(text, here.key)
        here.assert_idle()
        assert (await here.ask("POST", CHAT, prompt())).status == 200


async def test_no_secret_appears_when_the_meter_fails_in_the_middle_of_a_stream(
    sim: SimServer, watched: Callable[[Gateway], Watch], monkeypatch: pytest.MonkeyPatch
) -> None:
    feed = SseMeter.feed

    def explode(self: SseMeter, data: bytes, now: float) -> bytes:
        if self.events > 3:
            raise RuntimeError(f"{PROMPT} {CREDENTIAL} {data!r}")
        return feed(self, data, now)

    sim.faults = {"token_s": 0.01}
    async with gateway(provider("one", sim.url, api_key=CREDENTIAL)) as here:
        watch = watched(here)
        monkeypatch.setattr(SseMeter, "feed", explode)
        answer = await here.ask("POST", CHAT, prompt(stream=True, max_tokens=100))
        monkeypatch.undo()
        assert answer.status == 200
        assert not answer.ended, "it must not look like an end"
        await here.settled(1)
        assert (here.record.status, here.record.outcome) == (200, "internal_error")
        assert not leaks(await watch.everything(), here.key, "chatcmpl")
        await until(lambda: sim.engine.running == 0, what="the engine let go")
        here.assert_idle()


async def test_no_secret_of_an_answer_is_kept(watched: Callable[[Gateway], Watch]) -> None:
    body = json.dumps({"choices": [{"message": {"content": ANSWER}}], "usage": None}).encode()
    async with Scripted(answer=whole(body)) as upstream, gateway(provider("one", upstream.url)) as here:
        answer = await here.ask("POST", CHAT, prompt())
        assert ANSWER in answer.body.decode()
        assert not leaks(await watched(here).everything(), ANSWER)


async def test_no_secret_in_any_repr(sim: SimServer) -> None:
    async with gateway(provider("one", sim.url, api_key=CREDENTIAL, models=[Model("sim", "sim")])) as here:
        await here.ask("POST", CHAT, prompt())
        things = [here.app.config, *here.app.config.providers, *here.app.catalog.upstreams, here.app.catalog]
        assert CREDENTIAL not in repr(things)


async def test_an_upstream_that_is_not_well_is_a_warning(sim: SimServer, caplog: pytest.LogCaptureFixture) -> None:
    """An operator who logs warnings only must hear of it; that it is well again is no warning."""
    caplog.set_level(logging.INFO, "gateway")
    async with gateway(provider("one", sim.url), provider("two", "http://127.0.0.1:1/v1")):
        told = {entry.getMessage(): entry.levelname for entry in caplog.records if "upstream" in entry.getMessage()}
    assert told == {"upstream one is ok": "INFO", "upstream two is unreachable: connection refused": "WARNING"}
