"""One request to the local API, with as few imports as possible: HTTP/1.0, of which the answer ends with the stream."""

import json
import socket
from typing import Any


class RequestError(Exception):
    """No answer: nobody listens, or not in time."""


def request(path: str, method: str, target: str, body: object = None, timeout: float = 30.0) -> tuple[int, Any]:
    """Status and JSON of an answer (None without a body). `path` is the API's socket. Raises RequestError."""
    payload = b"" if body is None else json.dumps(body).encode()
    head = f"{method} {target} HTTP/1.0\r\nHost: localhost\r\nContent-Length: {len(payload)}\r\n\r\n"
    try:
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.settimeout(timeout)
            sock.connect(path)
            sock.sendall(head.encode() + payload)
            answer = b"".join(iter(lambda: sock.recv(1 << 16), b""))
        headers, _, content = answer.partition(b"\r\n\r\n")
        return int(headers.split(b" ", 2)[1]), json.loads(content) if content else None
    except (OSError, ValueError, IndexError) as error:
        raise RequestError(f"{path}: {error}") from error
