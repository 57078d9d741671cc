"""What a ServiceIP's policy may choose now, as the tables have it. Pure; for people who ask why.

A worker's turn among equals is the worker's own, and so is the draw of ``least-flows``: what is certain is who may be
next and how often, and, where only one may, who.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from appliance.cluster.messages import TableQueryResult
from appliance.tables.catalogue import Host, Service
from appliance.tables.layout import IPAddress

ORDERS: Mapping[str, str] = {
    "rr": "each worker takes its turns on its own",
    "closest": "each worker takes turns among the nearest; the others stand in, in this order",
    "least-flows": "the one with fewer live flows of two drawn at random",
    "maglev": "by a hash of the client",
    "instance": "always the same",
}


def explain(service: Service, hosts: Mapping[IPAddress, Host], job: TableQueryResult | None) -> dict[str, Any]:
    """The instances behind a ServiceIP, and which of them a new flow may get.

    ``share`` is the part of new flows that an instance gets, from 0 to 1; of sticky clients, of those without one.
    ``next`` names the instance that the next flow gets, and is None if several may get it, or none.
    """
    weights = service.weights or (1,) * len(service.backends)
    chosen = _chosen(service, hosts, weights)
    total = sum(chosen.values())
    states = {} if job is None else {f"{job.job}.{it.number}": it.state for it in job.instances}
    instances = [
        {
            **_instance(address, hosts.get(address), states),
            "weight": weight,
            "share": round(chosen.get(address, 0) / total, 4) if total else 0.0,
        }
        for address, weight in zip(service.backends, weights, strict=True)
    ]
    certain = [it["instance"] for it in instances if it["share"]]
    return {
        "next": certain[0] if len(certain) == 1 else None,
        "order": ORDERS.get(service.policy, ""),
        "sticky": service.sticky,
        "instances": instances,
    }


def _chosen(service: Service, hosts: Mapping[IPAddress, Host], weights: tuple[int, ...]) -> dict[IPAddress, int]:
    """Those that a new flow may get, with their weights; of ``closest`` the near ones, as long as one is there."""
    able = {
        address: weight
        for address, weight in zip(service.backends, weights, strict=True)
        if weight and address in hosts
    }
    if service.policy != "closest":
        return able
    near = [it for it in service.backends[: service.near] if it in able] or list(able)[:1]
    return {address: able[address] for address in near}


def _instance(address: IPAddress, host: Host | None, states: Mapping[str, str]) -> dict[str, Any]:
    """Who is at an address. ``state`` is ``unknown`` if no node is known for it."""
    if host is None:
        return {"instance": "", "address": str(address), "node": None, "local": False, "state": "unknown"}
    state = states.get(host.owner, "down" if host.down else "up")
    return {
        "instance": host.owner,
        "address": str(address),
        "node": str(host.node),
        "local": host.local,
        "state": state,
    }
