"""What an existing cluster service manager says, as it was seen on the wire, and names that the tests share."""

import json
from typing import Any

NODE = "65f0000000000000000000a1"
ADDRESS, PORT = "192.0.2.1", 50103
PEER = "192.0.2.2"
JOB = "app.ns.srv.test"
OTHER = "app.ns.db.test"
RR, RR_V6 = "10.30.30.30", "fdff:2000::30"


def topic(kind: str) -> str:
    """A topic of the node under test."""
    return f"nodes/{NODE}/net/{kind}"


def instance(number: int = 0, node: str = PEER, rr: str = RR, **more: Any) -> dict[str, Any]:
    """A deployed instance with all that an existing manager sends, which is more than a node needs."""
    return {
        "instance_number": number,
        "instance_ip": f"10.30.0.{number + 1}",
        "instance_ip_v6": f"fdff::{number + 1}",
        "cluster_id": "c1",
        "worker_id": "65f0000000000000000000a2",
        "namespace_ip": f"10.18.0.{number + 66}",
        "namespace_ip_v6": f"fc00::1{number:02x}",
        "host_ip": node,
        "host_port": 50103,
        "service_ip": [
            {"IpType": "RR", "Address": rr, "Address_v6": RR_V6},
            {"IpType": "instance_ip", "Address": f"10.30.0.{number + 1}", "Address_v6": f"fdff::{number + 1}"},
        ],
        **more,
    }


def answer(*instances: dict[str, Any], job: str = JOB, key: str = "") -> bytes:
    """The result of a table query; by default one by name."""
    return json.dumps({"app_name": job, "instance_list": instances, "query_key": key or job}).encode()


def unknown(key: str) -> bytes:
    """The result of a query by an address that no job has."""
    return answer(job="", key=key)
