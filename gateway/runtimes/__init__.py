"""What differs between the runtimes that answer: their doors, their model lists, what they tolerate.

One file per runtime, each a `Runtime` value, and one line in `RUNTIMES`. To add one: write
`runtimes/foo.py`, add its line, and put a recorded transcript of its model list in
`tests/transcripts/foo/`; the contract test picks both up.

Pure data and parsing: may import wire, dialects and errors; nothing here opens a socket.
"""

from __future__ import annotations

from gateway.runtimes.guess import guess
from gateway.runtimes.litellm import LITELLM
from gateway.runtimes.llamacpp import LLAMACPP
from gateway.runtimes.lmstudio import LMSTUDIO
from gateway.runtimes.localai import LOCALAI
from gateway.runtimes.ollama import OLLAMA
from gateway.runtimes.openai import OPENAI
from gateway.runtimes.runtime import Runtime
from gateway.runtimes.vllm import VLLM

__all__ = ["RUNTIMES", "Runtime", "guess"]

#: every runtime by the name that configuration uses
RUNTIMES: dict[str, Runtime] = {
    "vllm": VLLM,
    "llamacpp": LLAMACPP,
    "ollama": OLLAMA,
    "localai": LOCALAI,
    "litellm": LITELLM,
    "lmstudio": LMSTUDIO,
    "openai": OPENAI,
}
