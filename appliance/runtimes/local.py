"""One request to the local API, with as few imports as possible: HTTP/1.0, of which the answer ends with the stream.

`_socket` is the half of `socket` that is written in C: the other half costs as much to import as `json`.
"""

from __future__ import annotations

import json
from _socket import AF_UNIX, SOCK_STREAM, socket

TYPE_CHECKING = False  # without typing, which is a tenth of the start
if TYPE_CHECKING:
    from typing import Any


class RequestError(Exception):
    """No answer: nobody listens, or not in time."""


def request(path: str, method: str, target: str, body: object = None, timeout: float = 30.0) -> tuple[int, Any]:
    """Status and JSON of an answer (None without a body). `path` is the API's socket. Raises RequestError."""
    payload = b"" if body is None else json.dumps(body).encode()
    head = f"{method} {target} HTTP/1.0\r\nHost: localhost\r\nContent-Length: {len(payload)}\r\n\r\n"
    try:
        answer = _exchange(path, head.encode() + payload, timeout)
        headers, _, content = answer.partition(b"\r\n\r\n")
        return int(headers.split(b" ", 2)[1]), json.loads(content) if content else None
    except (OSError, ValueError, IndexError) as error:
        raise RequestError(f"{path}: {error}") from error


def quote(text: str) -> str:
    """A text as one part of a target (RFC 3986, 2.1)."""
    return "".join(chr(it) if chr(it) in _UNRESERVED else f"%{it:02X}" for it in text.encode())


_UNRESERVED = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-._~")


def _exchange(path: str, sent: bytes, timeout: float) -> bytes:
    """All that is answered. Raises OSError."""
    sock = socket(AF_UNIX, SOCK_STREAM)
    try:
        sock.settimeout(timeout)
        sock.connect(path)
        sock.sendall(sent)
        return b"".join(iter(lambda: sock.recv(1 << 16), b""))
    finally:
        sock.close()
