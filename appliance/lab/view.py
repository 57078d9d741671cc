"""A lab as data (`appliance lab status --json`) and as tables for a terminal."""

from collections.abc import Iterator, Mapping
from typing import Any

from rich.console import Group, RenderableType

from appliance.client import ApiError
from appliance.lab.cluster import NOTHING, Picture
from appliance.lab.lifecycle import Lab
from appliance.lab.plan import ROLES, Container, Node, Topology, dns_name
from appliance.screens import table


def data(lab: Lab) -> dict[str, Any]:
    """Nodes; containers with node, namespace and addresses; services with DNS name, ServiceIPs by policy and family.

    What the cluster assigns is null, and a service has no instances, while it does not answer.
    """
    try:
        picture, error = lab.manager.picture(), None
    except ApiError as failure:
        picture, error = NOTHING, str(failure)
    return {
        "lab": lab.plan.spec.name,
        "directory": str(lab.files.directory),
        "underlay": lab.plan.underlay,
        "cluster": _cluster(lab, error),
        "nodes": [_node(lab, it, picture) for it in lab.plan.nodes],
        "containers": [_container(it, picture) for it in lab.plan.containers],
        "services": [_service(lab.plan, name, picture.service(name)) for name in ROLES.values()],
    }


def _cluster(lab: Lab, error: str | None) -> dict[str, Any]:
    cluster = lab.plan.cluster
    manager = lab.supervisor(cluster)
    return {
        "name": cluster.name,
        "namespace": cluster.namespace,
        "running": manager is not None,
        "pid": None if manager is None else manager.pid,
        "underlay_v4": str(cluster.underlay_v4),
        "underlay_v6": str(cluster.underlay_v6),
        "error": error,
        "log": str(lab.files.log(cluster.name)),
    }


def _node(lab: Lab, node: Node, picture: Picture) -> dict[str, Any]:
    supervisor, known = lab.supervisor(node), picture.node(node)
    return {
        "name": node.name,
        "namespace": node.namespace,
        "running": supervisor is not None,
        "pid": None if supervisor is None else supervisor.pid,
        "id": node.id,
        "status": known.get("status"),
        "underlay_v4": str(node.underlay_v4),
        "underlay_v6": str(node.underlay_v6),
        "tunnel": str(lab.plan.tunnel_address(node)),
        "subnet_v4": known.get("subnet_v4"),
        "subnet_v6": known.get("subnet_v6"),
        "socket": str(lab.files.socket(node.name)),
        "config": str(lab.files.config(node.name)),
        "log": str(lab.files.log(node.name)),
    }


def _container(container: Container, picture: Picture) -> dict[str, Any]:
    placed = picture.placed(container)
    return {
        "name": container.name,
        "node": container.node.name,
        "namespace": container.namespace,
        "service": container.service,
        "instance": container.instance,
        "address_v4": placed.address_v4,
        "address_v6": placed.address_v6,
        "instance_v4": placed.instance_v4,
        "instance_v6": placed.instance_v6,
        "status": placed.status,
    }


def _service(plan: Topology, name: str, service: Mapping[str, Any]) -> dict[str, Any]:
    """A service as the cluster has it; `service` is empty if it has none."""
    addresses = {it["policy"]: {"v4": it["v4"], "v6": it["v6"]} for it in service.get("service_ips", [])}
    called = dns_name(name) if addresses else None
    return {"name": name, "dns": called, "service_ips": addresses, "instances": list(_instances(plan, name, service))}


def _instances(plan: Topology, name: str, service: Mapping[str, Any]) -> Iterator[dict[str, Any]]:
    containers = {it.instance: it for it in plan.containers if it.service == name}
    nodes = {it.id: it.name for it in plan.nodes}
    for it in service.get("instances", []):
        container = containers.get(it["number"])
        yield {
            "instance": it["number"],
            "container": None if container is None else container.name,
            "node": nodes.get(it.get("node", "")),
            "status": it.get("status"),
            "service_ips": {"instance": {"v4": it.get("v4"), "v6": it.get("v6")}},
        }


def screen(lab: Mapping[str, Any]) -> RenderableType:
    """What `data` gives, as one screen."""
    nodes = [_without(it, "id", "socket", "config", "log") for it in lab["nodes"]]
    services = [
        {"name": it["name"], "called": it["dns"], **_flat(it["service_ips"]), "instances": len(it["instances"])}
        for it in lab["services"]
    ]
    cluster = lab["cluster"]
    return Group(
        f"lab {lab['lab']} in {lab['directory']}",
        cluster["error"] or f"cluster in {cluster['namespace']}, MQTT on {cluster['underlay_v4']}",
        table("nodes", nodes),
        table("containers", lab["containers"]),
        table("services", services),
    )


def _without(row: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in names}


def _flat(addresses: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
    """`{"rr": {"v4": …}}` as `{"rr v4": …}`."""
    return {f"{policy} {family}": ip for policy, by in addresses.items() for family, ip in by.items()}
