"""Frames between supervisor and resolver: a length of four bytes, and one JSON object of that length.

To the resolver    ``{"settings": …}`` how to answer · ``{"snapshot": [service, …]}`` all that is known ·
                   ``{"put": [service, …], "gone": [job, …]}`` what changed · ``{"answer": key, "verdict": …}`` ·
                   ``{"explain": name, "id": n}`` · ``{"status": n}`` · ``{"leave": true}``
From the resolver  ``{"ready": true}`` · ``{"need": key}`` · ``{"used": [job, …]}`` ·
                   ``{"explained": {…}, "id": n}`` · ``{"counters": {…}, "id": n}``

What is said first arrives first: an answer comes after the entries that it is about.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Final

import orjson

LENGTH: Final = 4
FRAME_MAX: Final = 256 << 20
"""Bytes of one frame: a snapshot of a million services."""


def encode(message: dict[str, Any]) -> bytes:
    """One frame."""
    body = orjson.dumps(message)
    return len(body).to_bytes(LENGTH, "big") + body


class Frames:
    """Frames out of a stream, in whatever pieces it comes."""

    def __init__(self) -> None:
        self._buffer = bytearray()

    def feed(self, data: bytes) -> Iterator[dict[str, Any]]:
        """The frames that are complete now. Raises ValueError if this is not the other side's language."""
        self._buffer += data
        while len(self._buffer) >= LENGTH:
            size = int.from_bytes(self._buffer[:LENGTH], "big")
            if size > FRAME_MAX:
                raise ValueError(f"frame: expected at most {FRAME_MAX} bytes, got {size}")
            if len(self._buffer) < LENGTH + size:
                return
            body = bytes(self._buffer[LENGTH : LENGTH + size])
            del self._buffer[: LENGTH + size]
            yield orjson.loads(body)
