"""Programs in namespaces that tell who called them, and their callers."""

import socket
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress

from tests.environment.netns import Netns

WAIT_S = 2.0


@contextmanager
def answering(namespace: Netns, name: str, port: int) -> Iterator[None]:
    """TCP and UDP of both families: each caller is told this name and the address that it has here."""
    with ExitStack() as stack:
        tcp = namespace.call(lambda: _bound(socket.SOCK_STREAM, port))
        udp = namespace.call(lambda: _bound(socket.SOCK_DGRAM, port))
        tcp.listen(64)
        for sock, serve in ((tcp, _serve_streams), (udp, _serve_datagrams)):
            stack.callback(_end, sock)
            threading.Thread(target=serve, args=(sock, name), daemon=True).start()
        yield


def _bound(kind: int, port: int) -> socket.socket:
    sock = socket.socket(socket.AF_INET6, kind)
    sock.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
    sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    sock.bind(("::", port))
    return sock


def _end(sock: socket.socket) -> None:
    with suppress(OSError):
        sock.shutdown(socket.SHUT_RDWR)
    sock.close()


def _serve_streams(sock: socket.socket, name: str) -> None:
    with suppress(OSError):
        while True:
            connection, peer = sock.accept()
            with connection, suppress(OSError):
                connection.sendall(_told(name, peer[0]))


def _serve_datagrams(sock: socket.socket, name: str) -> None:
    with suppress(OSError):
        while True:
            _, peer = sock.recvfrom(2048)
            if peer is None:  # the end of it
                return
            sock.sendto(_told(name, peer[0]), peer)


def _told(name: str, address: str) -> bytes:
    return f"{name} {address.removeprefix('::ffff:')}".encode()


def call(namespace: Netns, protocol: str, address: str, port: int, wait: float = WAIT_S) -> tuple[str, str] | None:
    """Who answers, and which address it saw; None if nobody does."""
    with suppress(OSError), namespace.call(lambda: _opened(protocol, address)) as sock:
        sock.settimeout(wait)
        sock.connect((address, port))
        if protocol == "udp":
            sock.send(b"?")
        name, _, seen = sock.recv(2048).decode().partition(" ")
        return (name, seen) if name else None
    return None


def _opened(protocol: str, address: str) -> socket.socket:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    return socket.socket(family, socket.SOCK_STREAM if protocol == "tcp" else socket.SOCK_DGRAM)
