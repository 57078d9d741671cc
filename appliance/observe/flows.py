"""The flow records of a worker, as values for tools: read while the worker writes them.

A record may change between two of its fields; each field is whole. What is shown is a picture, not a decision.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from appliance.dataplane import flow
from appliance.tables import layout

_STATES = {flow.OPENING: "opening", flow.ANSWERED: "answered", flow.CLOSING: "closing"}
_PROTOCOLS = {flow.TCP: "tcp", flow.UDP: "udp", flow.ICMP: "icmp", flow.ICMP6: "icmp6"}


def _address(record: Any, name: str) -> str:
    return str(layout.address(int(record[f"{name}_hi"]), int(record[f"{name}_lo"])))


def listing(worker: int, records: Any) -> Iterator[dict[str, Any]]:
    """The live flows of one worker."""
    for number in np.flatnonzero(records["state"]):
        record = records[number].copy()
        if record["state"] != flow.FREE:
            yield describe(worker, record)


def describe(worker: int, record: Any) -> dict[str, Any]:
    """One flow as values."""
    return {
        "worker": worker,
        "protocol": _PROTOCOLS.get(int(record["protocol"]), str(record["protocol"])),
        "local": _address(record, "local"),
        "local_port": int(record["local_port"]) & 0xFFFF,
        "dialled": _address(record, "dialled"),
        "remote_port": int(record["remote_port"]) & 0xFFFF,
        "target": _address(record, "target"),
        "node": _address(record, "node"),
        "state": _STATES.get(int(record["state"]), "free"),
        "packets_out": int(record["packets_out"]),
        "packets_in": int(record["packets_in"]),
        "bytes_out": int(record["bytes_out"]),
        "bytes_in": int(record["bytes_in"]),
    }
