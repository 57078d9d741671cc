"""The demo service: who answers, and to whom; bytes with known digests.

Runs in each web container, over TCP (HTTP) and UDP on the same port, IPv4 and IPv6:

    GET /             JSON: instance, container, node, and the client's address as it is seen here
    GET /stream/N     N bytes of a fixed pattern; their digest in Repr-Digest (RFC 9530)
    PUT /digest       JSON: the same, with the number and the SHA-256 of the bytes received
    any UDP datagram  the JSON of GET /
"""

import base64
import hashlib
import json
import socket
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from functools import partial
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import IPv6Address
from random import Random
from typing import Any

import click

BLOCK = 1 << 20
"""Bytes of the pattern's block, and of one read."""
STREAM_MAX = 1 << 34
DATAGRAM_MAX = 65535


@dataclass(frozen=True)
class Identity:
    """Who answers."""

    container: str
    instance: int
    node: str


def answer(identity: Identity, peer: tuple[Any, ...]) -> dict[str, Any]:
    """What a client is told: who answers, and the client's address and port as seen here."""
    return {**asdict(identity), "client": plain(peer[0]), "client_port": peer[1]}


def plain(address: str) -> str:
    """An address without the IPv4-mapped form that a dual-stack socket gives it."""
    if ":" not in address:
        return address
    mapped = IPv6Address(address.partition("%")[0]).ipv4_mapped
    return address if mapped is None else str(mapped)


def pattern(size: int) -> Iterator[bytes]:
    """`size` bytes in blocks, the same on every machine; no block is like another."""
    block = bytearray(Random(BLOCK).randbytes(BLOCK))
    for offset in range(0, size, BLOCK):
        block[:8] = offset.to_bytes(8, "big")
        yield bytes(block[: min(BLOCK, size - offset)])


def digest(size: int) -> bytes:
    """The SHA-256 of `pattern(size)`."""
    state = hashlib.sha256()
    for block in pattern(size):
        state.update(block)
    return state.digest()


class Handler(BaseHTTPRequestHandler):
    """One connection of a client."""

    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True

    def __init__(self, identity: Identity, *arguments: Any) -> None:
        self._identity = identity
        super().__init__(*arguments)  # handles the connection

    def do_GET(self) -> None:
        """`/` and `/stream/N`"""
        head, _, size = self.path.rpartition("/stream/")
        if self.path == "/":
            self._send_json(answer(self._identity, self.client_address))
        elif not head and size.isdecimal() and int(size) <= STREAM_MAX:
            self._send_stream(int(size))
        else:
            self.send_error(HTTPStatus.NOT_FOUND, f"expected /, /digest or /stream/N, N at most {STREAM_MAX}")

    def do_PUT(self) -> None:
        """`/digest`"""
        length = self.headers.get("Content-Length", "")
        if self.path != "/digest" or not length.isdecimal():
            self.send_error(HTTPStatus.BAD_REQUEST, "expected /digest with a Content-Length")
            self.close_connection = True
            return
        received, sha256 = self._digest_body(int(length))
        about = answer(self._identity, self.client_address)
        self._send_json({**about, "bytes": received, "sha256": sha256})

    def _digest_body(self, length: int) -> tuple[int, str]:
        state, left = hashlib.sha256(), length
        while left and (data := self.rfile.read1(min(left, BLOCK))):
            state.update(data)
            left -= len(data)
        return length - left, state.hexdigest()

    def _send_json(self, data: dict[str, Any]) -> None:
        body = json.dumps(data).encode() + b"\n"
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        if self.close_connection:  # RFC 9112 section 9.6: a client that is not told takes the end for an error
            self.send_header("Connection", "close")
        self.end_headers()
        self.wfile.write(body)

    def _send_stream(self, size: int) -> None:
        self.send_response(HTTPStatus.OK)
        self.send_header("Content-Type", "application/octet-stream")
        self.send_header("Content-Length", str(size))
        self.send_header("Repr-Digest", f"sha-256=:{base64.b64encode(digest(size)).decode()}:")
        self.end_headers()
        for block in pattern(size):
            self.wfile.write(block)

    def log_request(self, *_: Any) -> None:
        """Requests are not logged: a load test would fill the lab's directory, which is memory."""


class Server(ThreadingHTTPServer):
    """HTTP on both families."""

    address_family = socket.AF_INET6
    request_queue_size = 1024
    daemon_threads = True

    def server_bind(self) -> None:
        """Takes IPv4 too, whatever the namespace's default is."""
        self.socket.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        super().server_bind()


def serve_datagrams(identity: Identity, port: int) -> None:
    """Answers UDP datagrams, for ever."""
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as listener:
        listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        listener.bind(("::", port))
        while True:
            _, peer = listener.recvfrom(DATAGRAM_MAX)
            with suppress(OSError):  # a container that was detached has no way to the client
                listener.sendto(json.dumps(answer(identity, peer)).encode(), peer)


@click.command()
@click.option("--container", required=True)
@click.option("--instance", type=int, required=True)
@click.option("--node", required=True)
@click.option("--port", type=int, required=True)
def main(container: str, instance: int, node: str, port: int) -> None:
    """Serves until it is ended."""
    identity = Identity(container, instance, node)
    threading.Thread(target=serve_datagrams, args=(identity, port), daemon=True).start()
    Server(("::", port), partial(Handler, identity)).serve_forever()


if __name__ == "__main__":
    main()
