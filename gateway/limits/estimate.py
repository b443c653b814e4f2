"""Estimates: what a request will use, before anybody knows. Learned upward from what was used. Pure.

Many requests may run at once on the strength of their estimates, so these must rather be too large than too small: the
first that used more than was thought makes the next ones reserve that much, and the memory of it fades by
`FADE` with each answer. What was reserved and not used is given back when the request ends.
"""

from __future__ import annotations

from typing import Final

#: reserved for an answer whose length the request leaves open, at least
OUTPUT_TOKENS: Final = 1024
#: prompt tokens for each byte of the body, at least: English text and JSON run at about four bytes a token
TOKENS_PER_BYTE: Final = 0.25
#: of each answer, what remains of what was learned before: a tenth after a hundred
FADE: Final = 0.98
_PLACES_MAX: Final = 20_000


class Estimates:
    """By model (how its tokenizer divides text) and by key and model (how long answers are that nobody bounded)."""

    __slots__ = ("_outputs", "_ratios")

    def __init__(self) -> None:
        self._ratios: dict[str, float] = {}
        self._outputs: dict[tuple[str, str], float] = {}

    def prompt(self, model: str, request_bytes: int) -> int:
        """Tokens of a prompt whose body has so many bytes."""
        return int(request_bytes * self._ratios.get(model, TOKENS_PER_BYTE)) + 1

    def output(self, key_id: str, model: str) -> int:
        """Tokens of an answer whose length the request leaves open."""
        return int(self._outputs.get((key_id, model), OUTPUT_TOKENS))

    def learn(self, key_id: str, model: str, request_bytes: int, prompt: int, output: int) -> None:
        """What a request used in truth; `output` of one choice."""
        if request_bytes and prompt:
            # No byte is more than a token; a runtime that adds a long prompt of its own is not the tokenizer's doing.
            seen = min(prompt / request_bytes, 1.0)
            if seen > TOKENS_PER_BYTE or model in self._ratios:
                self._ratios[model] = max(TOKENS_PER_BYTE, seen, self._ratios.get(model, 0.0) * FADE)
        if output <= OUTPUT_TOKENS and not self._outputs:
            return  # nobody is known for long answers
        place = (key_id, model)
        known = self._outputs.get(place, 0.0) * FADE
        if output > known:
            known = output
        if known > OUTPUT_TOKENS:
            if len(self._outputs) >= _PLACES_MAX and place not in self._outputs:
                self._outputs.clear()
            self._outputs[place] = known
        else:
            self._outputs.pop(place, None)
