"""The command line of the load generators; `perf.load` tells how they talk."""

import json
import os
import sys
import threading
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import click

from perf.load import calls, connects, crowd, openloop, tcp, udp


def work(task: Callable[[], Any]) -> None:
    """Says that all is ready, waits for the word to go, works, and prints the result."""
    print("ready", flush=True)
    if sys.stdin.readline():
        print(json.dumps(asdict(task())), flush=True)


CLIENT, SERVER = 0, -1
"""Which of the usable CPUs an end of request and response runs on: the first and the last. Two ends that
happen to share a CPU answer each other in a quarter of the time, which no two nodes do, and the scheduler
changes its mind."""


def pin(which: int) -> None:
    """Keeps this process on one of the CPUs that it may use."""
    os.sched_setaffinity(0, {sorted(os.sched_getaffinity(0))[which]})


@click.group()
def main() -> None:
    """One end of a load."""


@main.command()
@click.argument("address")
@click.argument("port", type=int)
@click.argument("size", type=int)
@click.argument("seconds", type=float)
@click.argument("flows", type=int)
@click.argument("rate", type=float, default=0.0)
def udp_generator(address: str, port: int, size: int, seconds: float, flows: int, rate: float) -> None:
    """Send UDP payloads of SIZE bytes, RATE a second or as fast as possible."""
    with udp.Generator(address, port, flows) as source:
        work(lambda: source.generate(size, seconds, rate))


@main.command()
@click.argument("port", type=int)
def udp_sink(port: int) -> None:
    """Count UDP packets until no more come."""
    with udp.sink(port) as endpoint:
        work(lambda: udp.count(endpoint))


@main.command()
@click.argument("address")
@click.argument("flows", type=int)
@click.argument("seconds", type=float)
def crowd_container(address: str, flows: int, seconds: float) -> None:
    """Send UDP packets of FLOWS flows from a container."""
    with crowd.of_container(address, flows) as source:
        source.send(crowd.WARM_S)
        work(lambda: source.send(seconds))


@main.command()
@click.argument("node")
@click.argument("port", type=int)
@click.argument("source")
@click.argument("destination")
@click.argument("flows", type=int)
@click.argument("seconds", type=float)
def crowd_node(node: str, port: int, source: str, destination: str, flows: int, seconds: float) -> None:
    """Send UDP packets of FLOWS flows from one container to another, as a node does."""
    with crowd.of_node(node, port, source, destination, flows) as packets:
        packets.send(crowd.WARM_S)
        work(lambda: packets.send(seconds))


@main.command()
@click.argument("address")
@click.argument("port", type=int)
@click.argument("seconds", type=float)
def tcp_client(address: str, port: int, seconds: float) -> None:
    """Exchange one byte at a time."""
    endpoint = tcp.client(address, port)
    pin(CLIENT)
    work(lambda: endpoint.exchange(seconds))


@main.command()
@click.argument("port", type=int)
def tcp_server(port: int) -> None:
    """Echo bytes to one client."""
    with tcp.server(port) as endpoint:
        pin(SERVER)
        work(lambda: tcp.echo(endpoint))


@main.command()
@click.argument("address")
@click.argument("port", type=int)
@click.argument("seconds", type=float)
@click.argument("rate", type=float)
@click.option("--steady", is_flag=True, help="Gaps of one length, and no sleep between requests.")
def open_client(address: str, port: int, seconds: float, rate: float, steady: bool) -> None:
    """Send RATE requests a second, whatever becomes of them, and time the responses."""
    with openloop.client(address, port) as endpoint:
        work(lambda: openloop.ask(endpoint, rate, seconds, steady=steady))


@main.command()
@click.argument("port", type=int)
def open_server(port: int) -> None:
    """Answer requests of one client."""
    with openloop.server(port) as endpoint:
        pin(SERVER)
        work(lambda: openloop.serve(endpoint))


@main.command()
@click.argument("address")
@click.argument("port", type=int)
@click.argument("seconds", type=float)
def connect_client(address: str, port: int, seconds: float) -> None:
    """Make one TCP connection after the other."""
    connects.prepare()
    pin(CLIENT)
    work(lambda: connects.connect_for(address, port, seconds))


@main.command()
@click.argument("port", type=int)
def connect_server(port: int) -> None:
    """Accept the connections of one client."""
    with connects.server(port) as endpoint:
        pin(SERVER)
        work(lambda: connects.accept_all(endpoint))


@main.command()
@click.argument("service")
@click.argument("instance")
def callers(service: str, instance: str) -> None:
    """Call the demo SERVICE, and one INSTANCE of it, in every way until the input ends."""
    ended = threading.Event()

    def wait() -> None:
        sys.stdin.read()
        ended.set()

    threading.Thread(target=wait, daemon=True).start()
    print("ready", flush=True)
    print(json.dumps(asdict(calls.call_until(ended, service, instance))), flush=True)


if __name__ == "__main__":
    try:
        main()
    except OSError as error:
        sys.exit(str(error))
