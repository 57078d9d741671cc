"""A node's picture as Prometheus metrics. Pure: ``families`` takes what ``status`` gives, and yields families.

Names and labels are an interface: dashboards and alerts stand on them (``config/``), so they are never renamed. The
number of series is bounded by the configuration and never by traffic: labels are workers, reasons, offloads, tables,
names of counters, and peers, of which the ``PEERS_MAX`` nearest are shown. No address of a container, no service.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Final

from prometheus_client import generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily, Metric
from prometheus_client.registry import Collector

from appliance.observe.counters import Drop
from appliance.observe.meanings import DIRECTIONS

CONTENT_TYPE: Final = "text/plain; version=0.0.4; charset=utf-8"
PEERS_MAX: Final = 100
"""Peers whose round-trip time is shown: those that answer soonest."""
STAGES: Final = {"tun": "from_container", "wire": "from_node", "sent": "to_node", "written": "to_container"}
"""What a worker counts packets, bytes and system calls of."""
EVENTS: Final = {
    "handed_over": "Packets passed to the worker that owns their flow.",
    "flows_opened": "Flows that were opened.",
    "flows_expired": "Flows that ended by their time-out.",
    "flows_evicted": "Flows given up as the table was full.",
    "flows_moved": "Flows decided anew as their instance is gone.",
    "waits": "Sleeps for lack of work.",
    "gso_refused": "Trains of datagrams that had to be sent one by one.",
    "tun_errors": "Reads of the TUN device that failed.",
    "wire_errors": "Receptions from the underlay that failed.",
    "misses": "Addresses that the supervisor was asked about.",
    "misses_lost": "Addresses that it could not be asked about, as the ring was full.",
    "held": "Packets kept until their address was known.",
    "learned": "Senders whose node was learned from their packets.",
    "replies": "ICMP errors and TCP resets sent to containers.",
    "replies_limited": "Those not sent, as their receiver had got so many.",
    "reassembled": "Datagrams put together from fragments.",
    "translated_errors": "ICMP errors whose quoted packet was translated.",
    "probes_answered": "Round-trip probes of other nodes that were answered.",
}
GAUGES: Final = ("flows_live",)
_PREFIX = "appliance_"

Picture = Mapping[str, Any]


class _Once(Collector):
    """What the library's text writer takes: something to collect from."""

    def __init__(self, picture: Picture) -> None:
        self._picture = picture

    def collect(self) -> Iterator[Metric]:
        """The families."""
        return families(self._picture)


def exposition(picture: Picture) -> bytes:
    """The metrics of a picture in Prometheus' text format."""
    return generate_latest(_Once(picture))


def families(picture: Picture) -> Iterator[Metric]:
    """All metrics of a picture (``supervisor.picture``)."""
    yield from _node(picture)
    yield from _workers(picture["workers"])
    yield from _drops(picture["workers"])
    yield from _tables(picture["tables"])
    yield from _offloads(picture["offloads"])
    yield from _cluster(picture["membership"])
    yield from _resolver(picture["naming"])
    yield from _operations(picture)
    yield from _peers(picture["round_trips"])
    yield from _flow_log(picture["flow_log"])


def _gauge(name: str, text: str, value: float) -> GaugeMetricFamily:
    return GaugeMetricFamily(_PREFIX + name, text, value=value)


def _labelled(kind: Any, name: str, text: str, labels: Iterable[str], rows: Iterable[tuple[list[str], float]]) -> Any:
    family = kind(_PREFIX + name, text, labels=list(labels))
    for values, value in rows:
        family.add_metric(values, value)
    return family


def _node(picture: Picture) -> Iterator[Metric]:
    node = picture["node"]
    known = {name: str(node[name]) for name in ("id", "address", "version")}
    yield InfoMetricFamily(_PREFIX + "node", "This node.", value=known)
    yield _gauge("start_time_seconds", "When the supervisor started, Unix time.", node["started"])
    yield _gauge("healthy", "Whether all workers run and answer (/healthz).", not picture["ill"])
    yield _gauge("ready", "Whether containers can be served (/readyz).", not picture["not_ready"])


def _workers(workers: Iterable[Mapping[str, Any]]) -> Iterator[Metric]:
    rows = [(str(it["index"]), it) for it in workers]
    yield _labelled(
        GaugeMetricFamily, "worker_up", "Whether the worker's process runs.", ["worker"],
        (([index], bool(it["pid"])) for index, it in rows),
    )  # fmt: skip
    yield _labelled(
        CounterMetricFamily, "worker_restarts", "Replacements of the worker's process.", ["worker"],
        (([index], it["restarts"]) for index, it in rows),
    )  # fmt: skip
    yield _labelled(
        GaugeMetricFamily, "worker_heartbeat_age_seconds", "Time since an awake worker's last batch.", ["worker"],
        (([index], it["silent"]) for index, it in rows),
    )  # fmt: skip
    yield _labelled(
        GaugeMetricFamily, "flows", "Live flows.", ["worker"],
        (([index], it["counters"]["flows_live"]) for index, it in rows),
    )  # fmt: skip
    yield _labelled(
        GaugeMetricFamily, "flows_capacity", "Flow records.", ["worker"],
        (([index], it["flows"]) for index, it in rows),
    )  # fmt: skip
    for unit, counted, text in (
        ("packets", "packets", "Packets, super-packets counted by their segments."),
        ("bytes", "bytes", "Bytes of IP packets; of those read from containers, with the virtio header."),
        ("system_calls", "", "System calls that moved packets."),
    ):
        yield _labelled(CounterMetricFamily, unit, text, ["worker", "path"], _moved(rows, counted))
    for name, text in EVENTS.items():
        yield _labelled(
            CounterMetricFamily, f"worker_{name}", text, ["worker"],
            (([index], it["counters"][name]) for index, it in rows),
        )  # fmt: skip


def _moved(rows: list[tuple[str, Mapping[str, Any]]], counted: str) -> Iterator[tuple[list[str], float]]:
    for index, worker in rows:
        for stage, path in STAGES.items():
            calls = "reads" if stage in ("tun", "wire") else "calls"
            yield [index, path], worker["counters"][f"{stage}_{counted or calls}"]


def _drops(workers: Iterable[Mapping[str, Any]]) -> Iterator[Metric]:
    """Every pair is there from the start, at zero: a rate needs a first value."""
    summed = {(direction, reason.label): 0 for direction in DIRECTIONS for reason in Drop if reason}
    for worker in workers:
        for direction, reasons in worker["drops"].items():
            for reason, count in reasons.items():
                summed[direction, reason] += count
    rows = (([reason, direction], count) for (direction, reason), count in summed.items())
    yield _labelled(CounterMetricFamily, "drops", "Packets dropped.", ["reason", "direction"], rows)


def _tables(tables: Mapping[str, Any]) -> Iterator[Metric]:
    yield _labelled(
        GaugeMetricFamily, "table_entries", "Entries of the shared tables.", ["table"],
        (([name], tables[name]) for name in tables["capacity"]),
    )  # fmt: skip
    yield _labelled(
        GaugeMetricFamily, "table_capacity", "What the shared tables have room for.", ["table"],
        (([name], size) for name, size in tables["capacity"].items()),
    )  # fmt: skip
    yield CounterMetricFamily(_PREFIX + "table_publications", "Changes of the shared tables.", value=tables["epoch"])
    age = tables.get("staleness", 0.0)
    yield _gauge("tables_age_seconds", "For how long the oldest of the tables may have been outdated.", age)


def _offloads(offloads: Mapping[str, Mapping[str, Any]]) -> Iterator[Metric]:
    for name, field, text in (
        ("offload_enabled", "on", "Whether the offload is used."),
        ("offload_wanted", "wanted", "Whether the configuration wants it."),
    ):
        yield _labelled(
            GaugeMetricFamily, name, text, ["offload"], (([key], it[field]) for key, it in offloads.items())
        )


def _cluster(cluster: Mapping[str, Any]) -> Iterator[Metric]:
    yield _gauge("cluster_member", "Whether the node has a cluster to be a member of.", cluster["member"])
    yield _gauge("cluster_connected", "Whether it is connected to the broker.", cluster.get("connected", False))
    yield _gauge("cluster_staleness_seconds", "Age of what the cluster said last.", cluster.get("staleness", 0.0))
    yield _gauge("cluster_jobs", "Jobs that the node knows.", cluster.get("jobs", 0))
    yield _gauge("cluster_nodes", "Nodes that the cluster has.", cluster.get("nodes", 0))
    yield _gauge("peers", "Nodes that packets may come from.", cluster["peers"]["nodes"])
    yield _gauge("path_mtu_bytes", "Smallest path MTU to a peer, 0 if unknown.", cluster["peers"]["smallest_path_mtu"])
    yield _events("cluster_events", "What the membership counted.", cluster.get("counters", {}))
    yield _events("misses_events", "Questions about unknown addresses.", cluster["misses"])


def _resolver(naming: Mapping[str, Any] | None) -> Iterator[Metric]:
    yield _gauge("resolver_ready", "Whether the resolver answers.", naming is not None and naming["ready"])
    yield CounterMetricFamily(
        _PREFIX + "resolver_restarts", "Replacements of the resolver.", value=naming["restarts"] if naming else 0
    )
    counted = naming["counters"] if naming else {}
    yield _events("resolver_events", "What the resolver counted.", counted)


def _operations(picture: Picture) -> Iterator[Metric]:
    done = picture["operations"]
    for name, operations, text in (
        ("deployments", ("attach", "detach"), "Containers attached and detached."),
        ("reloads", ("reload",), "Reloads of the configuration."),
    ):
        rows = (([it, result], done.get((it, result), 0)) for it in operations for result in ("ok", "refused"))
        yield _labelled(CounterMetricFamily, name, text, ["operation", "result"], rows)
    yield _gauge("config_last_reload_successful", "Whether the file is in force.", picture["reload"]["successful"])
    yield _gauge("config_last_reload_timestamp_seconds", "When it was read last, Unix time.", picture["reload"]["at"])
    yield _gauge("attachments", "Containers that are attached.", picture["attachments"])
    yield _gauge("attachments_impaired", "Those whose link passes no packets.", len(picture["upkeep"]["impaired_now"]))
    yield _events("upkeep_events", "What others did to the node, and repairs.", picture["upkeep"])


def _peers(round_trips: Mapping[Any, float | None]) -> Iterator[Metric]:
    known = sorted(((time, node) for node, time in round_trips.items() if time is not None), key=lambda it: it[0])
    rows = (([_endpoint(*node)], time) for time, node in known[:PEERS_MAX])
    yield _labelled(GaugeMetricFamily, "peer_rtt_seconds", "Smoothed round-trip time to a node.", ["peer"], rows)
    unknown = sum(time is None for time in round_trips.values())
    yield _gauge("peers_unanswered", "Nodes that are probed and do not answer.", unknown)


def _flow_log(counted: Mapping[str, Any]) -> Iterator[Metric]:
    rows = (([result], counted[result]) for result in ("written", "suppressed", "failed"))
    yield _labelled(CounterMetricFamily, "flow_log_records", "Records of the flow log.", ["result"], rows)
    missed = counted["missed"]
    yield CounterMetricFamily(_PREFIX + "flow_log_missed", "Flows that ended before a look saw them.", value=missed)


def _events(name: str, text: str, counted: Mapping[str, Any]) -> Any:
    rows = (([event], count) for event, count in counted.items() if type(count) is int)
    return _labelled(CounterMetricFamily, name, text, ["event"], rows)


def _endpoint(address: Any, port: int) -> str:
    return f"[{address}]:{port}" if address.version == 6 else f"{address}:{port}"
