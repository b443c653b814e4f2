"""What the policies are asked: a prompt's bytes as a model reads them, its session; and its tenant's cache salt."""

from __future__ import annotations

from functools import lru_cache
from hashlib import blake2b
from typing import TYPE_CHECKING, Final, Literal

from gateway.routing.policies import Ask
from gateway.routing.prefix import BYTES_PER_TOKEN, Prompt, fingerprint, seed_of

if TYPE_CHECKING:
    from gateway.catalog import Offer
    from gateway.dispatch.plan import Plan
    from gateway.identity.principals import Principal
    from gateway.wire.body import Body

#: Whose prompts share an engine's cache: those of a group of keys (of one key, where it has no group), or of one key;
#: "off" is everybody's.
CacheSalt = Literal["group", "key", "off"]

#: operations whose prompts runtimes keep in a prefix cache
CACHED: Final = frozenset({"chat", "completions", "responses", "messages", "ollama_chat", "ollama_generate"})
#: Chat templates put tools and system prompt before the messages, wherever they stand in the body.
_PROMPT: Final = ("tools", "functions", "system", "instructions", "messages", "prompt", "input")
#: What clients call what belongs together, the most explicit first. https://platform.openai.com/docs/api-reference
_SESSION: Final = ("prompt_cache_key", "session_id", "user")
#: a header that says it for any client
SESSION_HEADER: Final = "X-Session-Id"
_BLANK: Final = b" \t\r\n"


def ask_for(plan: Plan, offer: Offer, now: float) -> Ask:
    """What to ask about `plan`, whose model is `offer`'s."""
    body = plan.body
    model = offer.model.name
    tokens = max(1, len(body.raw) // BYTES_PER_TOKEN)

    def prompt() -> Prompt:
        if plan.operation not in CACHED:
            return Prompt((), (), tokens)
        return fingerprint(prompt_text(body), seed_of(model, plan.cache_salt))

    def session() -> str:
        return plan.session or _session(body)

    return Ask(model, tokens, prompt, session, now)


def prompt_text(body: Body) -> bytes | memoryview:
    """The bytes of the prompt, without the end that a longer one would not have: of the next turn of a conversation
    this is the beginning.
    """
    pieces = [piece for name in _PROMPT if (piece := body.view(name)) is not None]
    if not pieces:
        return b""
    last = pieces[-1]
    if len(last) and last[-1] in b']"':
        end = len(last) - 1
        while end and last[end - 1] in _BLANK:
            end -= 1
        pieces[-1] = last[:end]
    return pieces[0] if len(pieces) == 1 else b"\n".join(pieces)  # no JSON value holds a bare line break inside a word


def _session(body: Body) -> str:
    for name in _SESSION:
        if body.has(name):
            value = body.get(name)
            if isinstance(value, str) and value:
                return value
    return ""


def cache_salt(principal: Principal | None, by: CacheSalt) -> str:
    """The salt that keeps a tenant's part of an engine's prefix cache from others', who could tell by the time to the
    first token what was asked before. "" for none.
    """
    if by == "off" or principal is None:
        return ""
    if by == "group" and principal.group:
        return _digest("group", principal.group)
    return _digest("key", principal.key_id)


@lru_cache(maxsize=4096)
def _digest(kind: str, name: str) -> str:
    return blake2b(f"{kind}\0{name}".encode("utf-8", "surrogatepass"), digest_size=16).hexdigest()
