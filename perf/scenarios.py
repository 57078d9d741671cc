"""The loads: what each one is, how it is made, and what it yields."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

from perf import offload, topology
from perf.load import iperf, ports
from perf.load.tool import ToolError, end
from perf.meter import Used, metered
from perf.topology import FRAME_MAX, Path

UDP_PAYLOAD = 64
"""Bytes of payload in a small packet."""
UDP_FLOWS = 64
"""Flows in turns, a packet each: no two neighbouring packets belong together, so that none can be batched by flow."""

OPEN_RATE = 5_000
"""Requests a second with open-loop arrival: a load that every system here bears, so that the tail shows, not a
queue."""
CONNECTION_PACKETS = 6
"""SYN, SYN-ACK, ACK, the byte and the server's FIN, the reset."""

Values = dict[str, float]
Load = Callable[[Path, list[int], int], Values]
"""Makes a load on a path for whole seconds, with the pids of the workers whose time counts; what was
measured."""


@dataclass(frozen=True)
class Metric:
    """One number of a scenario: its key among the values, and how to print it."""

    key: str
    title: str
    unit: str
    digits: int = 1


@dataclass(frozen=True)
class Scenario:
    """A load under conditions that hold only while it runs."""

    name: str
    sentence: str
    metrics: tuple[Metric, ...]
    load: Load
    conditions: Callable[[Path], AbstractContextManager[None]] = lambda _path: nullcontext()
    v6: bool = False
    """Whether it needs a system that carries IPv6."""

    def measure(self, path: Path, workers: list[int], seconds: int) -> Values:
        """One sample. Raises ToolError, NetError."""
        with self.conditions(path):
            return self.load(path, workers, seconds)


def costs(used: Used, unit: str, amount: float) -> Values:
    """Processor seconds for each unit of traffic; `stolen_cpu_s` tells a sample that others disturbed."""
    values = {f"machine_cpu_s_{unit}": used.machine / amount, "stolen_cpu_s": used.stolen}
    if used.processes is not None:
        values[f"worker_cpu_s_{unit}"] = used.processes / amount
    return values


def tcp(path: Path, workers: list[int], seconds: int, *, streams: int = 1, v6: bool = False) -> Values:
    """Throughput of TCP streams, and what a gigabyte cost."""
    address = path.address_v6 if v6 else path.address_v4
    before = topology.underlay_traffic()
    with iperf.server(path.server), metered(workers) as used:
        streamed = iperf.streams_in_turn(path.client, address, seconds, streams)
    gigabytes = streamed.octets / 1e9
    return {
        "gbit_s": 8 * gigabytes / streamed.seconds,
        "retransmits": streamed.retransmits,
        **costs(used, "gb", gigabytes),
        "frame_bytes": (topology.underlay_traffic() - before).mean_frame,
    }


def tcp_cut(path: Path, workers: list[int], seconds: int) -> Values:
    """Throughput of one TCP stream on an underlay that cuts. Raises ToolError if it did not cut."""
    values = tcp(path, workers, seconds)
    if values["frame_bytes"] > FRAME_MAX:
        raise ToolError(f"underlay: expected frames of up to {FRAME_MAX} bytes, got {values['frame_bytes']:.0f}")
    return values


def udp(path: Path, workers: list[int], seconds: float, *, flows: int = 1, rate: float = 0) -> Values:
    """Packets that arrive of so many a second, or of as many as one core can send; what a million cost."""
    load = (path.address_v4, ports.UDP, UDP_PAYLOAD, seconds, flows, rate)
    with (
        end(path.server, "udp-sink", str(ports.UDP)).expect(b"ready") as sink,
        end(path.client, "udp-generator", *map(str, load)) as source,
    ):
        source.expect(b"ready")
        with metered(workers) as used:
            sink.go()
            sent = source.go().result(seconds)
            received = sink.result(0)
    if not received["seconds"]:
        arrived = f"{received['packets']} of {sent['packets']}"
        raise ToolError(f"{path.server}: expected UDP packets, got {arrived}")
    return {
        "received_kpps": received["packets"] / received["seconds"] / 1e3,
        "offered_kpps": sent["packets"] / sent["seconds"] / 1e3,
        "reordered": received["reordered"],
        **{f"{rank}_us": value for rank, value in received["latency"].items()},
        "loss_percent": 100 * (1 - received["packets"] / sent["packets"]),
        **costs(used, "mpkt", received["packets"] / 1e6),
    }


def request_response(path: Path, workers: list[int], seconds: int) -> Values:
    """Round trips of one byte over TCP, one after the other."""
    with end(path.server, "tcp-server", str(ports.TCP)).expect(b"ready") as server:
        server.go()
        with end(path.client, "tcp-client", path.address_v4, str(ports.TCP), f"{seconds}") as client:
            client.expect(b"ready")
            with metered(workers) as used:
                exchanged = client.go().result(seconds)
    return {
        **{f"{rank}_us": value for rank, value in exchanged["percentiles"].items()},
        "per_s": exchanged["exchanges"] / exchanged["seconds"],
        **costs(used, "mpkt", 2 * exchanged["exchanges"] / 1e6),
    }


def open_answers(
    path: Path, seconds: float, rate: float, workers: list[int] | None = None, *, steady: bool = False
) -> dict[str, Any]:
    """What a client with open-loop arrival says (`perf.load.openloop.Answered`), with the processor time under
    `used`."""
    with end(path.server, "open-server", str(ports.UDP)).expect(b"ready") as server:
        server.go()
        arguments = (path.address_v4, str(ports.UDP), f"{seconds}", f"{rate}", *(["--steady"] if steady else []))
        with end(path.client, "open-client", *arguments) as client:
            client.expect(b"ready")
            with metered(workers or []) as used:
                answered = client.go().result(seconds)
    return {**answered, "used": used}


def open_loop(path: Path, workers: list[int], seconds: int) -> Values:
    """Response times of small UDP requests that arrive whether or not earlier ones were answered."""
    answered = open_answers(path, seconds, OPEN_RATE, workers)
    return {
        **{f"{rank}_us": value for rank, value in answered["percentiles"].items()},
        "loss_percent": 100 * answered["lost"] / answered["requests"],
        **{f"late_{rank}_us": value for rank, value in answered["late"].items()},
        **costs(answered["used"], "mpkt", 2 * answered["requests"] / 1e6),
    }


def connections(path: Path, workers: list[int], seconds: int) -> Values:
    """New TCP connections, one after the other."""
    with end(path.server, "connect-server", str(ports.TCP)).expect(b"ready") as server:
        server.go()
        with end(path.client, "connect-client", path.address_v4, str(ports.TCP), f"{seconds}") as client:
            client.expect(b"ready")
            with metered(workers) as used:
                made = client.go().result(seconds)
    return {
        "per_s": made["connections"] / made["seconds"],
        "failed": made["failed"],
        **{f"{rank}_us": value for rank, value in made["percentiles"].items()},
        **costs(used, "mpkt", CONNECTION_PACKETS * made["connections"] / 1e6),
    }


def container_without_offloads(path: Path) -> AbstractContextManager[None]:
    """The sending container hands over packets of its MTU, as one with a plain device would."""
    return offload.switched(path.client, "eth0", segmentation=False)


@contextmanager
def plain_container_merged(path: Path) -> Iterator[None]:
    """The same, and every container's port at its node merges what comes (GRO), as the appliance has its own do."""
    with ExitStack() as stack:
        stack.enter_context(container_without_offloads(path))
        for port in topology.ports(topology.CLIENT_NODE):
            stack.enter_context(offload.merging(topology.CLIENT_NODE.namespace, port))
        yield


BULK = (
    Metric("gbit_s", "throughput", "Gbit/s", 2),
    Metric("worker_cpu_s_gb", "workers of both nodes", "CPU-s/GB", 2),
    Metric("machine_cpu_s_gb", "whole machine", "CPU-s/GB", 2),
)
PACKETS = (
    Metric("received_kpps", "received", "kpps"),
    Metric("loss_percent", "lost", "%"),
    Metric("worker_cpu_s_mpkt", "workers of both nodes", "CPU-s/Mpkt", 2),
)

SCENARIOS = (
    Scenario("tcp1", "TCP, one stream", BULK, tcp),
    Scenario("tcp4", "TCP, four streams", BULK, partial(tcp, streams=4)),
    Scenario(
        "tcp1-plain",
        "TCP, one stream, container's offloads off",
        BULK,
        tcp,
        container_without_offloads,
    ),
    Scenario(
        "tcp1-plain-gro",
        "TCP, one stream, container's offloads off, GRO on its port",
        BULK,
        tcp,
        plain_container_merged,
    ),
    Scenario(
        "tcp1-cut",
        "TCP, one stream, underlay cuts",
        BULK,
        tcp_cut,
        lambda _path: topology.cutting_underlay(),
    ),
    Scenario("tcp1-v6", "TCP, one stream, IPv6", BULK, partial(tcp, v6=True), v6=True),
    Scenario("udp64", f"UDP, {UDP_PAYLOAD} bytes, one flow", PACKETS, udp),
    Scenario(
        "udp64-flows",
        f"UDP, {UDP_PAYLOAD} bytes, {UDP_FLOWS} flows, packet by packet",
        PACKETS,
        partial(udp, flows=UDP_FLOWS),
    ),
    Scenario(
        "rr",
        "TCP, one byte there and back, median",
        (Metric("p50_us", "median", "µs"), Metric("p99_us", "99 %", "µs")),
        request_response,
    ),
    Scenario(
        "open",
        f"UDP, {OPEN_RATE:,} requests/s with open-loop arrival, median",
        (
            Metric("p50_us", "median", "µs"),
            Metric("p99_us", "99 %", "µs"),
            Metric("p99.9_us", "99.9 %", "µs"),
        ),
        open_loop,
    ),
    Scenario(
        "connect",
        "TCP, new connections one after the other, a second",
        (Metric("per_s", "connections", "/s", 0), Metric("p99_us", "99 %", "µs")),
        connections,
    ),
)
