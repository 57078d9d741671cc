"""Policies, weights and states in the cluster's messages."""

from __future__ import annotations

from ipaddress import ip_address

import pytest

from appliance.cluster.messages import MessageError, TableQueryResult, entries, parse_answer, parse_results

TEXT = """[{{"app_name":"a.b.c.d","instance_list":[
 {{"instance_number":0,"namespace_ip":"10.18.0.2","host_ip":"192.0.2.1","host_port":50103,{0}
  "service_ip":[{{"IpType":"{1}","Address":"10.30.0.9","sticky":60}},{{"IpType":"instance_ip","Address":"10.30.0.1"}}]}},
 {{"instance_number":1,"namespace_ip":"10.18.0.3","host_ip":"192.0.2.1","host_port":50103,
  "service_ip":[{{"IpType":"{1}","Address":"10.30.0.9","sticky":60}}]}}]}}]"""
WIRE = {"RR": "rr", "Closest": "closest", "closest": "closest", "least-flows": "least-flows", "maglev": "maglev"}


@pytest.mark.parametrize(("kind", "policy"), [*WIRE.items(), ("underutilized", "rr")])
def test_a_type_is_its_policy_and_an_unknown_one_is_round_robin(kind: str, policy: str) -> None:
    _, services = entries(parse_results(TEXT.format("", kind), "test"), ip_address("192.0.2.9"), 50103)
    assert [(it.policy, it.weights, it.sticky) for it in services] == [(policy, (), 60), ("instance", (), 0)]


@pytest.mark.parametrize(
    ("said", "weights", "down"),
    [('"weight":3,', (3, 1), False), ('"state":"draining",', (0, 1), False), ('"state":"down",', (0, 1), True)],
)
def test_weight_and_state_of_an_instance(said: str, weights: tuple[int, ...], down: bool) -> None:
    hosts, services = entries(parse_results(TEXT.format(said, "RR"), "test"), ip_address("192.0.2.9"), 50103)
    assert [it.weights for it in services] == [weights, ()]
    assert [it.down for it in hosts] == [down, False]


def test_an_unknown_state_is_refused_by_its_name() -> None:
    with pytest.raises(MessageError, match=r"instance_list\.0\.state"):
        parse_answer(TableQueryResult, TEXT.format('"state":"asleep",', "RR").strip("[]\n").encode())
