"""Answers to table queries, as existing clusters give them."""

from __future__ import annotations

from typing import Any

from appliance.cluster.manager.documents import Instance, Job, Placement, ServiceIp
from appliance.cluster.manager.state import State

TYPES = {"rr": "RR", "closest": "Closest", "least-flows": "least-flows", "maglev": "maglev"}
"""How the wire calls a policy."""
INSTANCE = "instance_ip"


def found(state: State, cluster: str, job: str, key: str) -> dict[str, Any]:
    """A job with all its instances, by number; those that packets can be sent to with where they are. The others have
    their own addresses: the node where one begins needs them before anybody calls it. The job must exist."""
    document = state.job(job) or Job()
    states = effective(state, job)
    instances = {number: it for number in states if (it := state.instance(job, number)) is not None}
    placements = {number: it.placement if state.live(job, number) else None for number, it in instances.items()}
    listed = [
        {
            **_instance(number, instance, document.service_ips, cluster, states[number]),
            **_place(placements[number]),
        }
        for number, instance in instances.items()
    ]
    names = document.names.model_dump(mode="json", exclude_defaults=True)
    if not any(placements.values()):  # the name has an address nevertheless
        names["service_ips"] = [_service_ip(it) for it in document.service_ips]
    return {"app_name": job, "instance_list": listed, "query_key": key, **names}


def effective(state: State, job: str) -> dict[int, str]:
    """The state that nodes are told of each instance, by number: one that its node's checks found bad is down, unless
    fewer than ``panic`` percent of those that are wanted up are good: then the checks do not count."""
    document = state.job(job) or Job()
    instances = {number: it for number in state.numbers(job) if (it := state.instance(job, number)) is not None}
    health = document.names.health
    if health is None:
        return {number: it.state for number, it in instances.items()}
    live = [number for number, it in instances.items() if it.state == "up" and state.live(job, number) is not None]
    good = [number for number in live if instances[number].healthy]
    in_panic = not good or 100 * len(good) < health.panic * len(live)
    bad = set() if in_panic else set(live) - set(good)
    return {number: "down" if number in bad else it.state for number, it in instances.items()}


def nothing(name: str, key: str) -> dict[str, Any]:
    """The answer about a job that does not exist; `name` is empty if an address was asked for."""
    return {"app_name": name, "instance_list": [], "query_key": key}


def _instance(
    number: int, instance: Instance, service_ips: tuple[ServiceIp, ...], cluster: str, effective_state: str
) -> dict[str, Any]:
    own = {"IpType": INSTANCE, "Address": str(instance.v4), "Address_v6": str(instance.v6)}
    return _present(
        {
            "instance_number": number,
            "instance_ip": str(instance.v4),
            "instance_ip_v6": str(instance.v6),
            "cluster_id": cluster,
            "service_ip": [*map(_service_ip, service_ips), own],
            "weight": None if instance.weight == 1 else instance.weight,
            "state": None if effective_state == "up" else effective_state,
        }
    )


def _place(placement: Placement | None) -> dict[str, Any]:
    """Where an instance is; nothing, as existing managers do, if packets cannot be sent to it."""
    if placement is None:
        return {}
    return _present(
        {
            "worker_id": placement.node,
            "namespace_ip": _text(placement.address_v4),
            "namespace_ip_v6": _text(placement.address_v6),
            "host_ip": str(placement.host),
            "host_port": placement.port,
        }
    )


def _service_ip(service_ip: ServiceIp) -> dict[str, Any]:
    return _present(
        {
            "IpType": TYPES[service_ip.policy],
            "Address": _text(service_ip.v4),
            "Address_v6": _text(service_ip.v6),
            "sticky": service_ip.sticky or None,
            "hash_port": service_ip.hash_port or None,
        }
    )


def _present(entry: dict[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in entry.items() if value is not None}


def _text(address: object) -> str | None:
    return None if address is None else str(address)
