"""How the nodes of a lab learn of its services: a static file at each node, and a reload.

This is all that the lab knows of the way to the tables; a lab with a cluster replaces this module.
"""

import json
from collections.abc import Sequence

from appliance.client import Client
from appliance.lab.files import Files, replace
from appliance.lab.plan import Attached, Topology, node_config, table


def prepare(files: Files, plan: Topology) -> None:
    """Gives each node a table without services, so that it can start."""
    for node in plan.nodes:
        files.table(node.name).write_text("[]\n")


def publish(files: Files, plan: Topology, attached: Sequence[Attached]) -> None:
    """Tells every node of all services. Raises ApiError."""
    tunnel = node_config(plan, plan.nodes[0], files.of(plan.nodes[0].name)).tunnel
    text = json.dumps(table(plan, attached, tunnel.advertised_port or tunnel.port), indent=1)
    for node in plan.nodes:
        replace(files.table(node.name), text)
        Client(files.socket(node.name)).reload()
