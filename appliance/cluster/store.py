"""What this node knew last, on disk: so that it serves after a reboot without its uplink.

Two files in ``paths.state``, each replaced as a whole: written beside, synchronised, renamed. So a reader finds the
old one or the new one, whatever happens in between. Both name the node that they are of; those of another one are
not read. A file that cannot be read is reported and is as good as none.

``saved_at`` is the wall clock's, as monotonic time does not outlive a boot; it is only used to tell an age.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import orjson
from pydantic import BaseModel, ConfigDict, ValidationError

from appliance.cluster.checks import Subnetwork
from appliance.cluster.messages import ClusterNode, SubnetworkResult, TableQueryResult

TABLES, SUBNETWORK = "tables.json", "subnetwork.json"


class _Tables(BaseModel):
    model_config = ConfigDict(extra="forbid")
    node: str
    saved_at: float
    results: list[TableQueryResult]
    nodes: dict[str, ClusterNode] = {}


class _Subnetwork(BaseModel):
    model_config = ConfigDict(extra="forbid")
    node: str
    subnetwork: SubnetworkResult


_Model = TypeVar("_Model", _Tables, _Subnetwork)


@dataclass(frozen=True)
class Kept:
    """What was found: the answers of the cluster, their age in seconds, the node's subnets, the cluster's nodes."""

    results: tuple[TableQueryResult, ...] = ()
    age: float = 0.0
    subnetwork: SubnetworkResult | None = None
    nodes: Mapping[str, ClusterNode] = field(default_factory=dict)


class Store:
    """The files of one node. ``clock`` gives the time of day. One call at a time."""

    def __init__(self, directory: Path, node: str, clock: Callable[[], float] = time.time) -> None:
        self._directory = directory
        self._node = node
        self._clock = clock
        self._encoded: dict[str, tuple[TableQueryResult, bytes]] = {}

    def load(self, complain: Callable[[str], None]) -> Kept:
        """What the last process saved; ``complain`` hears of what cannot be read."""
        tables = self._read(TABLES, _Tables, complain)
        subnetwork = self._read(SUBNETWORK, _Subnetwork, complain)
        return Kept(
            () if tables is None else tuple(tables.results),
            0.0 if tables is None else max(0.0, self._clock() - tables.saved_at),
            None if subnetwork is None else subnetwork.subnetwork,
            {} if tables is None else tables.nodes,
        )

    def save_tables(self, results: Iterable[TableQueryResult], nodes: Mapping[str, ClusterNode] | None = None) -> None:
        """Keeps the answers of the cluster, and its list of nodes. Raises OSError."""
        content = {
            "node": self._node,
            "saved_at": self._clock(),
            "results": [orjson.Fragment(it) for it in self._encode(results)],
            "nodes": {name: orjson.Fragment(_json(node)) for name, node in (nodes or {}).items()},
        }
        write(self._directory / TABLES, orjson.dumps(content))

    def _encode(self, results: Iterable[TableQueryResult]) -> list[bytes]:
        """The results in JSON; one that is the same as last time is not encoded again."""
        before = self._encoded
        self._encoded = {}
        for result in results:
            known = before.get(result.job)
            data = known[1] if known is not None and known[0] is result else _json(result)
            self._encoded[result.job] = result, data
        return [data for _, data in self._encoded.values()]

    def save_subnetwork(self, subnetwork: Subnetwork) -> None:
        """Keeps the node's subnets. Raises OSError."""
        v4, v6 = subnetwork.v4, subnetwork.v6
        message = {} if v4 is None else {"address": str(v4.network_address), "prefix": v4.prefixlen}
        message |= {} if v6 is None else {"addressv6": str(v6.network_address), "prefixv6": v6.prefixlen}
        write(self._directory / SUBNETWORK, json.dumps({"node": self._node, "subnetwork": message}).encode())

    def _read(self, name: str, model: type[_Model], complain: Callable[[str], None]) -> _Model | None:
        path = self._directory / name
        try:
            content = model.model_validate_json(path.read_bytes())
        except FileNotFoundError:
            return None
        except (OSError, ValidationError) as error:
            complain(f"{path}: expected what was saved there: {_reason(error)}")
            return None
        return content if content.node == self._node else None


def _json(message: BaseModel) -> bytes:
    return message.model_dump_json(by_alias=True, exclude_none=True).encode()


def write(path: Path, data: bytes) -> None:
    """Replaces a file as a whole, and survives a power cut at any time. Raises OSError, and the old one stays."""
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f"{path.name}.new")
    with beside.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
    beside.replace(path)
    directory = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(directory)
    finally:
        os.close(directory)


def _reason(error: OSError | ValidationError) -> str:
    if isinstance(error, OSError):
        return error.strerror or str(error)
    details = error.errors()[0]
    return f"{'.'.join(map(str, details['loc']))}: {details['msg']}"
