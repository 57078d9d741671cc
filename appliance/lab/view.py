"""A lab as data (`appliance lab status --json`) and as tables for a terminal."""

from collections.abc import Mapping
from typing import Any

from rich.console import Group, RenderableType

from appliance.lab.lifecycle import Lab
from appliance.lab.plan import Attached, Container, Node, Service
from appliance.screens import table


def data(lab: Lab) -> dict[str, Any]:
    """Nodes; containers with node, namespace and addresses; services with ServiceIPs by policy and family."""
    attached = {it.container: it for it in lab.attached}
    return {
        "lab": lab.plan.spec.name,
        "directory": str(lab.files.directory),
        "underlay": lab.plan.underlay,
        "nodes": [_node(lab, it) for it in lab.plan.nodes],
        "containers": [_container(it, attached.get(it.name)) for it in lab.plan.containers],
        "services": [_service(lab, it) for it in lab.plan.services],
    }


def _node(lab: Lab, node: Node) -> dict[str, Any]:
    supervisor = lab.supervisor(node)
    return {
        "name": node.name,
        "namespace": node.namespace,
        "running": supervisor is not None,
        "pid": None if supervisor is None else supervisor.pid,
        "underlay_v4": str(node.underlay_v4),
        "underlay_v6": str(node.underlay_v6),
        "tunnel": str(lab.plan.tunnel_address(node)),
        "subnet_v4": str(node.subnet_v4),
        "subnet_v6": str(node.subnet_v6),
        "socket": str(lab.files.socket(node.name)),
        "config": str(lab.files.config(node.name)),
        "log": str(lab.files.log(node.name)),
    }


def _container(container: Container, attached: Attached | None) -> dict[str, Any]:
    return {
        "name": container.name,
        "node": container.node.name,
        "namespace": container.namespace,
        "service": container.service,
        "instance": container.instance,
        "address_v4": None if attached is None else attached.address_v4,
        "address_v6": None if attached is None else attached.address_v6,
        "instance_v4": str(container.instance_v4),
        "instance_v6": str(container.instance_v6),
    }


def _service(lab: Lab, service: Service) -> dict[str, Any]:
    instances = [it for it in lab.plan.containers if it.service == service.name]
    balanced = service.balanced
    rr = {} if balanced is None else {"rr": {"v4": str(balanced[0]), "v6": str(balanced[1])}}
    return {
        "name": service.name,
        "service_ips": rr,
        "instances": [
            {
                "instance": it.instance,
                "container": it.name,
                "node": it.node.name,
                "service_ips": {"instance": {"v4": str(it.instance_v4), "v6": str(it.instance_v6)}},
            }
            for it in instances
        ],
    }


def screen(lab: Mapping[str, Any]) -> RenderableType:
    """What `data` gives, as one screen."""
    nodes = [_without(it, "socket", "config", "log") for it in lab["nodes"]]
    services = [
        {"name": it["name"], **_flat(it["service_ips"]), "instances": len(it["instances"])} for it in lab["services"]
    ]
    return Group(
        f"lab {lab['lab']} in {lab['directory']}",
        table("nodes", nodes),
        table("containers", lab["containers"]),
        table("services", services),
    )


def _without(row: Mapping[str, Any], *names: str) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in names}


def _flat(addresses: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
    """`{"rr": {"v4": …}}` as `{"rr v4": …}`."""
    return {f"{policy} {family}": ip for policy, by in addresses.items() for family, ip in by.items()}
