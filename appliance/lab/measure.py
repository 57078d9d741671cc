"""ping and iperf3 as functions: command lines, and what their output says."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


class OutputError(Exception):
    """A tool's output is not what was expected; `str()` repeats it."""


@dataclass(frozen=True)
class Echo:
    """What ping found: requests, replies, and the average round trip (None without a reply)."""

    sent: int
    received: int
    average_ms: float | None


def ping_command(address: str, count: int, interval_s: float = 0.05) -> list[str]:
    """`count` echo requests; ends at the latest two seconds after the last one."""
    return ["ping", "-n", "-c", str(count), "-i", f"{interval_s:g}", "-W", "2", address]


def ping_result(output: str) -> Echo:
    """Reads the summary of ping (iputils). Raises OutputError."""
    counts = re.search(r"(\d+) packets transmitted, (\d+) received", output)
    if counts is None:
        raise OutputError(f"ping: expected a summary, got {output.strip()!r}")
    times = re.search(r"= [\d.]+/([\d.]+)/", output)
    return Echo(int(counts[1]), int(counts[2]), float(times[1]) if times else None)


@dataclass(frozen=True)
class Rate:
    """What iperf3 found, as the receiver counted it."""

    bits_per_second: float
    retransmits: int

    def __str__(self) -> str:
        return f"{self.bits_per_second / 1e9:.2f} Gbit/s"


def iperf_command(address: str, port: int, seconds: int, streams: int = 1, reverse: bool = False) -> list[str]:
    """TCP to (or with `reverse` from) an iperf3 server."""
    command = ["iperf3", "--client", address, "--port", str(port), "--time", str(seconds), "--json"]
    return [*command, "--parallel", str(streams), *(["--reverse"] if reverse else [])]


def iperf_result(output: str) -> Rate:
    """Reads iperf3's JSON. Raises OutputError."""
    data: Mapping[str, Any]
    try:
        data = json.loads(output)
        if "error" in data:
            raise OutputError(f"iperf3: {data['error']}")
        end = data["end"]
        return Rate(end["sum_received"]["bits_per_second"], end["sum_sent"].get("retransmits", 0))
    except (ValueError, KeyError) as error:
        raise OutputError(f"iperf3: expected its JSON, got {output[:200]!r} ({error!r})") from None
