"""The text of a key: `llmgw_<id>_<secret><checksum>`.

A public id of 10 base32 characters, 32 random bytes in base62, and the CRC-32 of all before it in hexadecimal, so
that a mistyped key, or a false find of a secret scanner, is told from a real one without any look-up. Keys from
`GATEWAY_API_KEYS` may have any form.
"""

from __future__ import annotations

import secrets
import string
import zlib
from typing import Final

PREFIX: Final = "llmgw_"
#: a longer credential is no key: refused before any work is done for it (the configuration takes none longer)
PRESENTED_MAX_CHARS: Final = 512

_ID_CHARS: Final = 10
_SECRET_BYTES: Final = 32
_SECRET_CHARS: Final = 43  # 62**43 > 256**32
_CHECKSUM_CHARS: Final = 8
_KEY_CHARS: Final = len(PREFIX) + _ID_CHARS + 1 + _SECRET_CHARS + _CHECKSUM_CHARS
_PREFIX_BYTES: Final = PREFIX.encode()
_ID: Final = slice(len(PREFIX), len(PREFIX) + _ID_CHARS)
_BASE32: Final = string.ascii_lowercase + "234567"
_BASE62: Final = string.digits + string.ascii_uppercase + string.ascii_lowercase


def new_id() -> str:
    return "".join(secrets.choice(_BASE32) for _ in range(_ID_CHARS))


def new_key(id: str) -> str:
    """The text of a new key with this id."""
    body = f"{PREFIX}{id}_{_base62(secrets.token_bytes(_SECRET_BYTES))}"
    return f"{body}{zlib.crc32(body.encode()):08x}"


def generated(key: bytes) -> bool:
    """Whether `key` has the form of a generated key; its checksum may still be wrong."""
    return len(key) == _KEY_CHARS and key.startswith(_PREFIX_BYTES)


def intact(key: bytes) -> bool:
    """Whether the checksum at the end of a generated key is right."""
    return b"%08x" % zlib.crc32(key[:-_CHECKSUM_CHARS]) == key[-_CHECKSUM_CHARS:]


def id_of(key: bytes) -> bytes:
    """The public id in a generated key."""
    return key[_ID]


def masked(id: str) -> str:
    """What may be shown of a key: enough to find it again, nothing to use it."""
    return f"{PREFIX}{id}_…"


def _base62(raw: bytes) -> str:
    number = int.from_bytes(raw, "big")
    digits = []
    for _ in range(_SECRET_CHARS):
        number, digit = divmod(number, 62)
        digits.append(_BASE62[digit])
    return "".join(digits)
