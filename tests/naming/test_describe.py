"""From what the cluster says to what names lead to."""

from appliance.cluster.manager.descriptor import load
from appliance.cluster.messages import TableQueryResult
from appliance.naming.describe import describe, port_name
from appliance.naming.service import Port, Service


def result(**more):
    return TableQueryResult.model_validate({"app_name": "a.b.c.d", "instance_list": [], **more})


def test_an_answer_without_instances_has_the_addresses_nevertheless() -> None:
    service = describe(result(service_ips=[{"IpType": "RR", "Address": "10.30.0.1"}]))
    assert str(service.policies["rr"].v4) == "10.30.0.1"
    assert not service.up


def test_the_default_policy_is_one_that_there_is() -> None:
    both = [{"IpType": "RR", "Address": "10.30.0.1"}, {"IpType": "closest", "Address": "10.30.0.2"}]
    assert describe(result(service_ips=both, default_policy="closest")).default == "closest"
    assert describe(result(service_ips=both, default_policy="maglev")).default == "closest"
    assert describe(result(service_ips=both)).default == "rr"


def test_the_channel_keeps_every_field() -> None:
    instance = {
        "instance_number": 3,
        "namespace_ip": "10.18.0.2",
        "host_ip": "192.0.2.1",
        "host_port": 1,
        "service_ip": [
            {"IpType": "RR", "Address": "10.30.0.1", "Address_v6": "fdff:2000::1"},
            {"IpType": "instance_ip", "Address": "10.30.0.9"},
        ],
    }
    service = describe(result(instance_list=[instance], ports=[{"port": 80}], metadata={"a": "b", "long": "x" * 300}))
    assert service.ports == (Port(80, "tcp", "http"),)
    assert service.metadata == ("a=b",)
    assert service.members[3].up
    assert Service.from_wire(service.to_wire()) == service


def test_a_port_has_a_name_that_dns_sd_allows() -> None:
    assert port_name(80, "tcp") == "http"
    assert port_name(61999, "tcp") == "p61999"
    assert port_name(80, "tcp", "No Name") == "http"
    assert port_name(80, "tcp", "Shop") == "shop"


def test_descriptor_keys_for_names() -> None:
    text = "{app: a, namespace: b, service: c, service_namespace: d, "
    text += "ports: [{port: 80}], metadata: {v: '3'}, needs: [a.b.e.d]}"
    (descriptor,) = load(text, "f.yaml")
    assert descriptor.ports[0].port == 80
    assert descriptor.needs == ("a.b.e.d",)
