"""The bytes of llama.cpp's answers: what of `Shape` looks otherwise there. Recorded from `llama-server` b11434."""

from __future__ import annotations

import orjson

from gateway.sim.dialect import Call
from gateway.sim.shapes import Shape


class LlamaCppShape(Shape):
    """The end of a choice is a chunk of its own. `timings` counts an answer whether usage was asked for or not: on the
    usage chunk where there is one, else on the last chunk of each choice; completions have usage on it in any case.
    """

    __slots__ = ("_tail",)

    def __init__(self, call: Call, serial: int, created: int) -> None:
        super().__init__(call, serial, created)
        self.id = b"chatcmpl-%032x" % serial
        kind = b"chat.completion" if call.chat else b"text_completion"
        if call.chat and call.stream:
            kind += b".chunk"
        self._tail = b'"created":%d,"model":%b,"system_fingerprint":"b0-unknown","object":"%b"%%b,"id":"%b"%%b}' % (
            created,
            orjson.dumps(call.model).replace(b"%", b"%%"),
            kind,
            self.id,
        )

    def _event(self, choices: bytes, usage: bytes = b"", timings: bytes = b"") -> bytes:
        return b'data: {"choices":[%b],%b\n\n' % (choices, self._tail % (usage, timings))

    def role(self, index: int) -> bytes:
        return self._event(b'{"finish_reason":null,"index":%d,"delta":{"role":"assistant","content":null}}' % index)

    def piece(self, index: int, at: int, made: int) -> bytes:
        text = orjson.dumps(self.call.choices[index].pieces[at])
        if self.call.chat:
            return self._event(b'{"finish_reason":null,"index":%d,"delta":{"content":%b}}' % (index, text))
        return self._event(b'{"text":%b,"index":%d,"logprobs":null,"finish_reason":null}' % (text, index))

    def ending(self, index: int, made: int) -> list[bytes]:
        choice = self.call.choices[index]
        finish = self.finish(index, choice.tokens)
        if choice.tokens == len(choice.pieces) and choice.pieces[-1]:
            return [self.piece(index, choice.tokens - 1, made), finish]
        return [finish]

    def finish(self, index: int, made: int) -> bytes:
        choice = self.call.choices[index]
        if not self.call.chat:
            last = b'{"text":"","index":%d,"logprobs":null,"finish_reason":"%b"}' % (index, choice.finish.encode())
            return self._event(last, self._counts(made), self._timings(made))
        last = b'{"finish_reason":"%b","index":%d,"delta":{}}' % (choice.finish.encode(), index)
        return self._event(last, timings=b"" if self.call.include_usage else self._timings(made))

    def usage(self, made: int, cached: int) -> bytes:
        if not (self.call.include_usage and self.call.chat):
            return b""
        return self._event(b"", self._counts(made), self._timings(made))

    def whole(self, cached: int, created_at: int) -> bytes:
        """Unstreamed, the message that was continued is repeated at the front of its rest."""
        choices = []
        for index, choice in enumerate(self.call.choices):
            text = orjson.dumps(self.call.prefill + "".join(choice.pieces))
            if self.call.chat:
                one = b'{"finish_reason":"%b","index":%d,"message":{"role":"assistant","content":%b}}'
                choices.append(one % (choice.finish.encode(), index, text))
            else:
                one = b'{"text":%b,"index":%d,"logprobs":null,"finish_reason":"%b"}'
                choices.append(one % (text, index, choice.finish.encode()))
        made = sum(choice.tokens for choice in self.call.choices)
        return b'{"choices":[%b],%b' % (b",".join(choices), self._tail % (self._counts(made), self._timings(made)))

    def _counts(self, made: int) -> bytes:
        prompt = self.call.prompt_tokens
        return (
            b',"usage":{"completion_tokens":%d,"prompt_tokens":%d,"total_tokens":%d,'
            b'"prompt_tokens_details":{"cached_tokens":%d}}' % (made, prompt, prompt + made, self.cached)
        )

    def _timings(self, made: int) -> bytes:
        prompt = self.call.prompt_tokens
        return b',"timings":{"cache_n":%d,"prompt_n":%d,"prompt_ms":1.0,"predicted_n":%d,"predicted_ms":1.0}' % (
            self.cached,
            prompt - self.cached,
            made,
        )
