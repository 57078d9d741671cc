"""TCP streams by iperf3: one server for one test, one client, JSON.

iperf3's parallel streams share one thread before version 3.16; the environment of a result names the version.
"""

from dataclasses import dataclass
from typing import Any

from perf.load.tool import Tool, ToolError

PORT = 5301
"""The lab's own iperf3 servers have 5201 and on."""


@dataclass(frozen=True)
class Streamed:
    """What the server received, over the seconds that it took, and what the client sent again."""

    octets: int
    seconds: float
    retransmits: int


def server(namespace: str) -> Tool:
    """A server that is ready for one test. Raises ToolError."""
    return Tool(namespace, "iperf3", "-s", "-1", "-p", str(PORT), "--forceflush").expect(b"listening")


def stream(namespace: str, address: str, seconds: int, streams: int) -> Streamed:
    """Sends over parallel streams for whole seconds (iperf3 knows no others). Raises ToolError."""
    argv = ("iperf3", "-c", address, "-p", str(PORT), "-t", f"{seconds}", "-P", str(streams), "-J")
    with Tool(namespace, *argv) as client:
        return parsed(client.result(seconds))


def parsed(report: dict[str, Any]) -> Streamed:
    """The result in iperf3's report. Raises ToolError for a test that failed."""
    if "error" in report:
        raise ToolError(f"iperf3: {report['error']}")
    sent, received = report["end"]["sum_sent"], report["end"]["sum_received"]
    return Streamed(received["bytes"], received["seconds"], sent["retransmits"])
