"""Sockets inside namespaces, and servers behind them. A socket stays where it was made, whoever uses it."""

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress

from tests.environment.netns import Netns

PORT = 7000
WAIT_S = 10.0


def made(container: Netns, kind: socket.SocketKind) -> socket.socket:
    """A socket in a container, not bound yet."""
    sock = container.call(lambda: socket.socket(socket.AF_INET, kind))
    sock.settimeout(WAIT_S)
    return sock


@contextmanager
def tcp_echo(container: Netns) -> Iterator[None]:
    """A server that sends back what it gets, each connection in a thread of its own."""
    with made(container, socket.SOCK_STREAM) as listener:
        listener.settimeout(None)
        listener.bind(("", PORT))
        listener.listen()
        threading.Thread(target=_accept, args=(listener,), daemon=True).start()
        try:
            yield
        finally:
            listener.shutdown(socket.SHUT_RDWR)


def _accept(listener: socket.socket) -> None:
    with suppress(OSError):
        while True:
            connection, _ = listener.accept()
            threading.Thread(target=_echo, args=(connection,), daemon=True).start()


def _echo(connection: socket.socket) -> None:
    with suppress(OSError), connection:
        while data := connection.recv(65536):
            connection.sendall(data)


@contextmanager
def udp_server(container: Netns) -> Iterator[list[bytes]]:
    """A server that sends back what it gets; gives what it got so far."""
    got: list[bytes] = []
    with made(container, socket.SOCK_DGRAM) as server:
        server.bind(("", PORT))
        server.settimeout(0.05)
        stop = threading.Event()
        thread = threading.Thread(target=_answer, args=(server, got, stop), daemon=True)
        thread.start()
        try:
            yield got
        finally:
            stop.set()
            thread.join()


def _answer(server: socket.socket, got: list[bytes], stop: threading.Event) -> None:
    while not stop.is_set():
        with suppress(TimeoutError):
            data, sender = server.recvfrom(65536)
            got.append(data)
            server.sendto(data, sender)


def connect(client: Netns, address: str) -> tuple[socket.socket, float]:
    """A TCP connection, and the seconds that it took to open."""
    sock = made(client, socket.SOCK_STREAM)
    began = time.monotonic()
    sock.connect((address, PORT))
    return sock, time.monotonic() - began


def say(connection: socket.socket, what: bytes) -> bytes:
    """What comes back."""
    connection.sendall(what)
    return connection.recv(65536)


def round_trips(client: Netns, address: str, seconds: float) -> list[float]:
    """Seconds that each echo of a UDP flow took, one after the other. Raises TimeoutError if one is lost."""
    took = []
    with made(client, socket.SOCK_DGRAM) as sock:
        sock.connect((address, PORT))
        end = time.monotonic() + seconds
        while (began := time.monotonic()) < end:
            sock.send(b"echo")
            sock.recv(65536)
            took.append(time.monotonic() - began)
    return took
