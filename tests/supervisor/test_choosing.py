"""Who behind a ServiceIP may get the next flow."""

from ipaddress import ip_address

import pytest

from appliance.cluster.messages import Instance, TableQueryResult
from appliance.supervisor.choosing import explain
from appliance.tables.catalogue import Host, Service

JOB = "app.ns.web.test"
A, B, C = (ip_address(f"10.18.0.{number}") for number in (2, 3, 4))
NODE = ip_address("192.0.2.1")
HOSTS = {it: Host(it, NODE, 50103, local=it == A, owner=f"{JOB}.{number}") for number, it in enumerate((A, B, C))}
RR = ip_address("10.30.30.30")


def shares(service: Service, hosts=HOSTS) -> list[float]:
    return [it["share"] for it in explain(service, hosts, None)["instances"]]


@pytest.mark.parametrize("policy", ["rr", "least-flows", "maglev"])
def test_flows_are_shared_by_weight(policy):
    said = explain(Service(RR, policy, (A, B, C), (1, 3, 0)), HOSTS, None)
    assert [it["share"] for it in said["instances"]] == [0.25, 0.75, 0.0]
    assert said["next"] is None


def test_one_that_is_left_is_next():
    assert explain(Service(RR, "rr", (A, B), (1, 0)), HOSTS, None)["next"] == f"{JOB}.0"
    assert explain(Service(RR, "instance", (B,)), HOSTS, None)["next"] == f"{JOB}.1"


def test_closest_chooses_among_the_near_and_falls_back_on_the_first_of_the_others():
    assert shares(Service(RR, "closest", (A, B, C), near=2)) == [0.5, 0.5, 0.0]
    assert shares(Service(RR, "closest", (A, B, C), (0, 1, 1), near=1)) == [0.0, 1.0, 0.0]


def test_an_address_that_no_node_has_gets_nothing():
    said = explain(Service(RR, "rr", (A, B)), {A: HOSTS[A]}, None)
    assert [it["state"] for it in said["instances"]] == ["up", "unknown"]
    assert said["next"] == f"{JOB}.0"


def test_nobody_is_next_of_nothing():
    assert explain(Service(RR, "rr", ()), HOSTS, None)["next"] is None
    assert explain(Service(RR, "rr", (A,), (0,)), HOSTS, None)["next"] is None


def test_states_are_the_descriptors():
    job = TableQueryResult(app_name=JOB, instance_list=(Instance(instance_number=1, state="draining"),))
    said = explain(Service(RR, "rr", (A, B), (1, 0)), HOSTS, job)
    assert [it["state"] for it in said["instances"]] == ["up", "draining"]
