"""Answers to table queries, as existing clusters give them."""

from __future__ import annotations

from typing import Any

from appliance.cluster.manager.documents import Instance, Job, Placement, ServiceIp
from appliance.cluster.manager.state import State

TYPES = {"rr": "RR", "closest": "Closest", "least-flows": "least-flows", "maglev": "maglev"}
"""How the wire calls a policy."""
INSTANCE = "instance_ip"


def found(state: State, cluster: str, job: str, key: str) -> dict[str, Any]:
    """A job with all instances that packets can be sent to, by number. The job must exist."""
    document = state.job(job) or Job()
    instances = ((number, state.live(job, number)) for number in state.numbers(job))
    listed = [
        _instance(number, instance, instance.placement, document.service_ips, cluster)
        for number, instance in instances
        if instance is not None and instance.placement is not None
    ]
    names = document.names.model_dump(mode="json", exclude_defaults=True)
    if not listed:  # the name has an address nevertheless
        names["service_ips"] = [_service_ip(it) for it in document.service_ips]
    return {"app_name": job, "instance_list": listed, "query_key": key, **names}


def nothing(name: str, key: str) -> dict[str, Any]:
    """The answer about a job that does not exist; `name` is empty if an address was asked for."""
    return {"app_name": name, "instance_list": [], "query_key": key}


def _instance(
    number: int, instance: Instance, placement: Placement, service_ips: tuple[ServiceIp, ...], cluster: str
) -> dict[str, Any]:
    own = {"IpType": INSTANCE, "Address": str(instance.v4), "Address_v6": str(instance.v6)}
    entry = {
        "instance_number": number,
        "instance_ip": str(instance.v4),
        "instance_ip_v6": str(instance.v6),
        "cluster_id": cluster,
        "worker_id": placement.node,
        "namespace_ip": _text(placement.address_v4),
        "namespace_ip_v6": _text(placement.address_v6),
        "host_ip": str(placement.host),
        "host_port": placement.port,
        "service_ip": [*map(_service_ip, service_ips), own],
        "weight": None if instance.weight == 1 else instance.weight,
        "state": None if instance.state == "up" else instance.state,
    }
    return {name: value for name, value in entry.items() if value is not None}


def _service_ip(service_ip: ServiceIp) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "IpType": TYPES[service_ip.policy],
        "Address": _text(service_ip.v4),
        "Address_v6": _text(service_ip.v6),
    }
    entry |= {"sticky": service_ip.sticky or None, "hash_port": service_ip.hash_port or None}
    return {name: value for name, value in entry.items() if value is not None}


def _text(address: object) -> str | None:
    return None if address is None else str(address)
