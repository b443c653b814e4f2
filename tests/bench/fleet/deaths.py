"""Engines killed at random moments under load, and one that has gone silent."""

from __future__ import annotations

import asyncio
import random
from collections import Counter
from typing import Any

from tests.fleet.rig import Outcome, load, unique

from .stand import Clients, Stand, expected_text, milliseconds, stand

_ENGINES = 8
#: each is away for a second, until a probe finds it back: with four deaths a second a third of the fleet at any time
_MORE_ENGINES = 16


async def kills(count: int = 1000, seed: int = 1, attempts: int | None = None) -> dict[str, Any]:
    """`count` deaths as by kill -9, each engine back after a while, beside 24 clients that stream and 8 that do not.

    Failed: the client got no answer. Broken: an answer without its end. Wrong: not the text of an engine left alone.
    Tokens billed twice: those in the gateway's records over what the request and its answer are.
    """
    dice = random.Random(seed)
    settings = {} if attempts is None else {"GATEWAY_ATTEMPTS": str(attempts)}
    async with stand(_MORE_ENGINES, "--speed", "4", **settings) as here:
        asked: list[dict[str, Any]] = []

        def body(number: int) -> dict[str, Any]:
            made = unique(dice, 20, stream=number % 4 != 0, max_tokens=dice.randint(20, 60), user=str(number))
            asked.append(made)
            return made

        loop = asyncio.get_running_loop()
        async with load(here, 32, body) as running:
            await running.count(100)
            began = loop.time()
            done = 0
            while done < count:
                await asyncio.sleep(dice.uniform(0.15, 0.35))
                alive = [one["engine"] for one in await here.control() if one["listening"]]
                if len(alive) > _MORE_ENGINES // 2:
                    await here.control(f"/kill?engine={dice.choice(alive)}", {"down_s": dice.uniform(0.1, 0.4)})
                    done += 1
            took = loop.time() - began
        await asyncio.sleep(0.5)  # the log line follows the answer
        made = sum(one["generation_tokens"] for one in await here.control())
        return {"kills": done, "seconds": round(took, 1), **_verdict(here, asked, running.outcomes, made)}


def _verdict(here: Stand, asked: list[dict[str, Any]], outcomes: list[Outcome], made: int) -> dict[str, Any]:
    records = here.records()
    by_prompt = {body["messages"][0]["content"]: body for body in asked}
    found: Counter[str] = Counter()
    prompts: Counter[int] = Counter()  # all of them are as long
    lost = missing = twice = delivered = 0
    for outcome in outcomes:
        found[outcome.kind] += 1
        record = records.get(outcome.request_id)
        if record is None:
            missing += outcome.status != 0
            continue
        body = by_prompt.get(outcome.prompt)
        if body is None:
            continue
        prompts[record["prompt_tokens"]] += 1
        if outcome.kind == "done":
            found["wrong"] += outcome.text != expected_text(body)
            delivered += body["max_tokens"]
            twice += max(0, record["completion_tokens"] - body["max_tokens"])
            lost += max(0, body["max_tokens"] - record["completion_tokens"])
    attempts = Counter(record["attempts"] for record in records.values())
    return {
        "requests": len(outcomes),
        "requests_failed": len(outcomes) - found["done"] - found["broken"],
        "streams_broken": found["broken"],
        "texts_wrong": found["wrong"],
        "tokens_billed_twice": twice,
        "tokens_not_billed": lost,
        "prompts_billed_otherwise": len(outcomes) - missing - max(prompts.values(), default=0),
        "records_missing": missing,
        "answers_of_one_attempt": attempts[1],
        "most_attempts": max(attempts, default=0),
        "continued": sum(record.get("continued", 0) for record in records.values()),
        "tokens_made_per_token_delivered": round(made / max(delivered, 1), 3),
        "kinds": dict(found),
        "failures": [_way(records.get(one.request_id)) for one in outcomes if one.kind not in ("done", "lost")],
    }


def _way(record: dict[str, Any] | None) -> str:
    """The attempts of a request, in words."""
    return " ".join(one["outcome"] for one in record["attempts_made"]) if record else "unknown"


async def black_hole(rate: float = 150.0, seconds: float = 8.0, seed: int = 1) -> dict[str, Any]:
    """R5: one engine of eight takes connections and says nothing. What the requests on the others feel of it."""
    found: dict[str, Any] = {}
    for name in ("all well", "one silent"):
        dice = random.Random(seed)
        async with stand(_ENGINES, "--speed", "0", "--fault", "first_token_s=0.005") as here:
            clients = Clients(here)
            warm = [(at / rate, unique(dice, max_tokens=1)) for at in range(int(rate * 2))]
            await clients.at(warm)
            if name == "one silent":
                await here.control("/faults?engine=3", {"black_hole": True})
            arrivals, at = [], 0.0
            while at < seconds:
                at += dice.expovariate(rate)
                arrivals.append((at, unique(dice, max_tokens=1)))
            waiting = asyncio.create_task(clients.at(arrivals))
            await asyncio.wait({waiting}, timeout=seconds + 0.5)
            if not waiting.done():  # those in the hole wait for their timeout: a revival's reset ends them
                await here.control("/kill?engine=3")
            outcomes = await waiting
            await asyncio.sleep(0.5)  # the log line follows the answer
            records = here.records()
            silent = here.urls[2].split("/")[2]

            def elsewhere(outcome: Outcome, records: Any = records, silent: str = silent) -> bool:
                record = records.get(outcome.request_id, {})
                return record.get("attempts") == 1 and not record["upstream"].endswith(silent)

            other = [one for one in outcomes if one.kind == "done" and elsewhere(one)]
            found[name] = {
                **milliseconds([one.took_s for one in other]),
                "on_the_third_or_tried_twice": len(outcomes) - len(other),
                "failed": sum(one.kind != "done" for one in outcomes),
            }
            clients.close()
    found["added_p99_ms"] = round(found["one silent"]["p99_ms"] - found["all well"]["p99_ms"], 2)
    return found
