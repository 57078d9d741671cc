"""The node at a glance: everything that ``status``, the metrics and the health checks say, gathered in one place.

Read in the supervisor's event loop; only the resolver is asked, and one that does not answer costs its own numbers
alone.
"""

from __future__ import annotations

import os
import time
from typing import TYPE_CHECKING, Any, Final

from appliance import __version__
from appliance.observe.counters import ANNOUNCED, HEARTBEAT, drops, snapshot, stages
from appliance.tables.publish import ASLEEP

if TYPE_CHECKING:
    from appliance.supervisor.main import Supervisor
    from appliance.supervisor.workers import Worker

SILENT_S: Final = 5.0
"""A worker that is awake, and has begun no batch for so long, hangs."""
_SUMMARY = ("member", "node", "broker", "connected", "since", "last_error", "subnets", "ready", "jobs", "instances")


async def status(supervisor: Supervisor) -> dict[str, Any]:
    """What ``appliance status`` shows."""
    cluster = supervisor.membership.status()
    forwarding = workers(supervisor)
    naming = None if supervisor.naming is None else await supervisor.naming.status()
    return {
        "node": _node(supervisor),
        "workers": forwarding,
        "offloads": {name: offload.reply() for name, offload in supervisor.offloads.items()},
        "tables": _tables(supervisor, cluster),
        "cluster": {name: cluster[name] for name in _SUMMARY if name in cluster},
        "peers": cluster["peers"],
        "naming": naming,
        "upkeep": supervisor.upkeep.status(),
        "attachments": len(supervisor.environment.attachments()),
        "reload": {
            "successful": supervisor.reload_error == "",
            "at": supervisor.reloaded_at,
            "last_error": supervisor.reload_error,
        },
        "flow_log": supervisor.flow_log.status(),
        "firewall": supervisor.ports.status(),
        "exposed": supervisor.ingress.status(),
        "checks": supervisor.checks.status(),
        "ill": why_ill(forwarding),
        "not_ready": why_not_ready(supervisor, forwarding, naming),
    }


def workers(supervisor: Supervisor) -> list[dict[str, Any]]:
    """Each worker: its process, and what it counted."""
    return [_worker(worker, supervisor.config.workers.flows) for worker in supervisor.pool.workers]


async def picture(supervisor: Supervisor) -> dict[str, Any]:
    """What the metrics are made of: the status, and what is too much for a screen."""
    return {
        **await status(supervisor),
        "membership": supervisor.membership.status(),
        "operations": dict(supervisor.operations),
        "round_trips": supervisor.prober.times(),
    }


def why_ill(forwarding: list[dict[str, Any]]) -> list[str]:
    """Why the node does not forward as it should, a sentence each; none if it does."""
    gone = [f"worker {it['index']} does not run" for it in forwarding if not it["pid"]]
    hung = (it for it in forwarding if it["pid"] and it["silent"] > SILENT_S)
    return gone + [f"worker {it['index']} has done nothing for {it['silent']:.1f} s" for it in hung]


def why_not_ready(
    supervisor: Supervisor, forwarding: list[dict[str, Any]], naming: dict[str, Any] | None
) -> list[str]:
    """Why containers cannot be served, a sentence each; none if they can. Losing the broker is no reason."""
    reasons = why_ill(forwarding)
    if not supervisor.membership.provisioned.is_set():
        reasons.append(supervisor.membership.why_not_ready())
    if naming is not None and not naming["ready"]:
        reasons.append("the resolver does not answer")
    return reasons


def _node(supervisor: Supervisor) -> dict[str, Any]:
    return {
        "id": supervisor.config.node.id,
        "address": str(supervisor.address),
        "port": supervisor.port,
        "version": __version__,
        "pid": os.getpid(),
        "started": supervisor.started,
        "last_error": supervisor.last_error,
    }


def _tables(supervisor: Supervisor, cluster: dict[str, Any]) -> dict[str, Any]:
    """``staleness``: seconds for which the oldest of what the cluster said may have been outdated."""
    catalogue, capacity = supervisor.catalogue, supervisor.publisher.capacity
    age = {"staleness": cluster["staleness"]} if "staleness" in cluster else {}
    sizes = {"hosts": capacity.hosts, "services": capacity.services, "nodes": capacity.nodes}
    entries = {name: len(getattr(catalogue, name)) for name in sizes}
    return {"epoch": supervisor.publisher.epoch, **entries, "capacity": sizes, **age}


def _worker(worker: Worker, flows: int) -> dict[str, Any]:
    heartbeat = int(worker.counters[HEARTBEAT])
    is_asleep = int(worker.counters[ANNOUNCED]) == ASLEEP
    silent = 0.0 if is_asleep else max(0.0, time.monotonic() - heartbeat / 1e9)
    return {
        "index": worker.index,
        "pid": worker.pid,
        "cpu": worker.cpu,
        "restarts": max(0, worker.restarts),
        "silent": round(silent, 3),
        "flows": flows,
        "heartbeat_ns": heartbeat,
        "counters": snapshot(worker.counters),
        "drops": drops(worker.counters),
        "stages": stages(worker.counters),
    }
