"""Calls the demo service and tells what came back; runs in a client's namespace.

Prints a JSON list of calls, each over a connection or socket of its own, so that each is a flow of its own.
UDP sockets are not connected: they would not show a reply that comes from elsewhere.
"""

import json
import socket
from collections.abc import Iterator
from ipaddress import ip_address
from typing import Any

import click

from appliance.lab.plan import WEB_PORT
from appliance.lab.service import DATAGRAM_MAX, plain

TIMEOUT_S = 5.0


def call(address: str, port: int, own_port: int = 0) -> dict[str, Any]:
    """One HTTP request; the service's answer, our port, and where the reply came from. Raises OSError."""
    with socket.create_connection((address, port), TIMEOUT_S, ("", own_port)) as connection:
        connection.sendall(b"GET / HTTP/1.1\r\nHost: demo\r\nConnection: close\r\n\r\n")
        with connection.makefile("rb") as reply:
            answer = json.loads(reply.read().partition(b"\r\n\r\n")[2])
        return _result("tcp", answer, connection.getsockname(), connection.getpeername())


def call_datagram(address: str, port: int, own_port: int = 0) -> dict[str, Any]:
    """The same with a UDP datagram. Raises OSError."""
    family = socket.AF_INET6 if ip_address(address).version == 6 else socket.AF_INET
    with socket.socket(family, socket.SOCK_DGRAM) as talker:
        talker.settimeout(TIMEOUT_S)
        talker.bind(("", own_port))
        talker.sendto(b"who are you?", (address, port))
        reply, peer = talker.recvfrom(DATAGRAM_MAX)
        return _result("udp", json.loads(reply), talker.getsockname(), peer)


def _result(protocol: str, answer: dict[str, Any], own: tuple[Any, ...], peer: tuple[Any, ...]) -> dict[str, Any]:
    return {"protocol": protocol, "port": own[1], "reply_from": plain(peer[0]), **answer}


def calls(address: str, port: int, times: int, own_port: int = 0) -> Iterator[dict[str, Any]]:
    """`times` requests over TCP, then as many over UDP, from `own_port` upwards (0: as the kernel chooses)."""
    for ask in (call, call_datagram):
        for number in range(times):
            yield ask(address, port, own_port and own_port + number)


@click.command()
@click.argument("address")
@click.option("--port", default=WEB_PORT)
@click.option("--times", default=20)
@click.option("--own-port", default=0)
def main(address: str, port: int, times: int, own_port: int) -> None:
    """Calls ADDRESS over TCP and UDP."""
    click.echo(json.dumps(list(calls(address, port, times, own_port))))


if __name__ == "__main__":
    main()
