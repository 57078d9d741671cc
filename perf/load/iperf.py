"""TCP streams by iperf3: a server, and one client after the other, with JSON.

iperf3's parallel streams share one thread before version 3.16; the environment of a result names the version.
"""

from dataclasses import dataclass
from typing import Any

from perf.load import ports
from perf.load.tool import Tool, ToolError


@dataclass(frozen=True)
class Streamed:
    """What the server received, over the seconds that it took, and what the client sent again."""

    octets: int
    seconds: float
    retransmits: int


def server(namespace: str) -> Tool:
    """A server that is ready for tests, one at a time. Raises ToolError."""
    return Tool(namespace, "iperf3", "-s", "-p", str(ports.IPERF), "--forceflush").expect(b"listening")


def streams_in_turn(namespace: str, address: str, seconds: int, streams: int) -> Streamed:
    """Connections of a second each, one set of parallel streams after the other. Raises ToolError.

    Which of the pinned workers a connection meets follows from its ports, and on a machine whose few CPUs both nodes
    share much follows from that: so no sample is one connection.
    """
    tests = [stream(namespace, address, 1, streams) for _ in range(seconds)]
    return Streamed(
        sum(it.octets for it in tests), sum(it.seconds for it in tests), sum(it.retransmits for it in tests)
    )


def stream(namespace: str, address: str, seconds: int, streams: int) -> Streamed:
    """Sends over parallel streams for whole seconds (iperf3 knows no others). Raises ToolError."""
    argv = ("iperf3", "-c", address, "-p", str(ports.IPERF), "-t", f"{seconds}", "-P", str(streams), "-J")
    with Tool(namespace, *argv) as client:
        return parsed(client.result(seconds))


def parsed(report: dict[str, Any]) -> Streamed:
    """The result in iperf3's report. Raises ToolError for a test that failed."""
    if "error" in report:
        raise ToolError(f"iperf3: {report['error']}")
    sent, received = report["end"]["sum_sent"], report["end"]["sum_received"]
    return Streamed(received["bytes"], received["seconds"], sent["retransmits"])
