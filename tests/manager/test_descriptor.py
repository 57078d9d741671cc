"""Descriptors: what is accepted, and what an error says."""

import re
from ipaddress import IPv4Address, IPv6Address

import pytest

from appliance.cluster.manager.descriptor import Descriptor, Wanted, load, schema
from appliance.config import ConfigError
from tests.manager.processes import ROOT

FULL = """\
# A shop's cart.
app: shop
namespace: prod
service: cart
service_namespace: web
instances: 3
service_ips:
  rr:
    v4: 10.30.30.30
    v6: FDFF:2000::30
"""
SHORT = "{app: shop, namespace: prod, service: cart, service_namespace: web}"


def test_a_full_descriptor() -> None:
    (it,) = load(FULL, "f.yaml")
    assert (it.job, it.instances) == ("shop.prod.cart.web", 3)
    assert it.service_ips == {"rr": Wanted(v4=IPv4Address("10.30.30.30"), v6=IPv6Address("fdff:2000::30"))}


def test_defaults_are_one_instance_and_a_service_ip_of_both_families() -> None:
    (it,) = load(SHORT, "f.yaml")
    assert (it.instances, it.service_ips) == (1, {"rr": Wanted(v4="assigned", v6="assigned")})
    assert load(SHORT[:-1] + ", service_ips: {rr: }}", "f.yaml") == [it]


def test_a_file_may_hold_several() -> None:
    assert [it.service for it in load(f"{SHORT}\n---\n{SHORT.replace('cart', 'till')}\n", "f.yaml")] == [
        "cart",
        "till",
    ]


@pytest.mark.parametrize(
    ("old", "new", "error"),
    [
        ("instances: 3", "instances: three", 'f.yaml:6: instances: expected an integer from 0 to 10000, got "three"'),
        ("instances: 3", "instances: -1", "f.yaml:6: instances: expected an integer from 0 to 10000, got -1"),
        ("instances: 3", "instances: yes", "f.yaml:6: instances: expected an integer from 0 to 10000, got true"),
        ("instances:", "instance:", "f.yaml:6: instance: expected a known key (did you mean instances?), got 3"),
        ("app: shop", "app: web-shop", 'f.yaml:2: app: expected a name of 1 to 30 letters and digits, got "web-shop"'),
        ("app: shop", "app: 7", "f.yaml:2: app: expected a name of 1 to 30 letters and digits, got 7"),
        ("app: shop\n", "", "f.yaml:2: app: expected a value, got nothing"),
        (
            "v4: 10.30.30.30",
            "v4: 10.30.30",
            'f.yaml:9: service_ips.rr.v4: expected "assigned", "none" or an IPv4 address, got "10.30.30"',
        ),
        (
            "v6: FDFF:2000::30",
            "v6: 10.30.30.30",
            'f.yaml:10: service_ips.rr.v6: expected "assigned", "none" or an IPv6 address, got "10.30.30.30"',
        ),
        (
            "  rr:",
            "  fastest:",
            "f.yaml:8: service_ips.fastest: expected one of the policies rr, closest, least-flows, maglev, got",
        ),
        (
            "v4: 10.30.30.30",
            "v5: x",
            "f.yaml:9: service_ips.rr.v5: expected a known key (v4, v6, sticky, hash_port), got",
        ),
        ("namespace: prod", "app: prod", "f.yaml:3: app: expected each key once (line 2 has it), got it again"),
        ("app: shop", "app: [shop", "f.yaml:3: syntax: expected YAML, got"),
        (FULL, "- a\n- b\n", 'f.yaml:1: descriptor: expected a mapping, got ["a", "b"]'),
        (FULL, "", "f.yaml: file: expected a descriptor, got nothing"),
        (FULL, "# nothing\n", "f.yaml: file: expected a descriptor, got nothing"),
        (
            FULL,
            SHORT.replace("shop", "'10'").replace("prod", "'30'").replace("cart", "'0'").replace("web", "'1'"),
            "f.yaml:1: descriptor: expected names of which at least one has a letter",
        ),
    ],
)
def test_an_error_names_line_key_and_expectation(old: str, new: str, error: str) -> None:
    assert old in FULL
    with pytest.raises(ConfigError) as caught:
        load(FULL.replace(old, new), "f.yaml")
    assert str(caught.value).startswith(error)


def test_all_that_is_wrong_is_told_in_the_order_of_lines() -> None:
    with pytest.raises(ConfigError) as caught:
        load(FULL.replace("instances: 3", "instances: x").replace("app: shop", "app: s p"), "f.yaml")
    assert [problem.line for problem in caught.value.problems] == [2, 6]


def test_no_address_at_all_is_refused() -> None:
    with pytest.raises(ConfigError, match=r"f\.yaml:1: service_ips\.rr: expected an address of at least one family"):
        load(SHORT[:-1] + ", service_ips: {rr: {v4: none, v6: none}}}", "f.yaml")


def test_the_examples_of_the_files_are_descriptors() -> None:
    found = [load(path.read_text(), path.name) for path in sorted((ROOT / "config" / "services").glob("*.yaml"))]
    assert [[it.job for it in file] for file in found] == [
        ["infra.prod.dns.edge"],
        ["shop.prod.web.front", "shop.prod.cart.back"],
    ]


def test_the_examples_in_the_documentation_are_descriptors() -> None:
    examples = re.findall(r"```yaml\n(.*?)```", (ROOT / "docs" / "cluster.md").read_text(), re.DOTALL)
    assert [load(text, "cluster.md")[0].job for text in examples] == ["shop.prod.cart.web", "shop.prod.till.web"]


POLICIES = """app: shop
namespace: prod
service: cart
service_namespace: web
instances: 3
service_ips: {rr: {sticky: 60}, closest: , least-flows: {v6: none}, maglev: {hash_port: true}}
weights: {0: 3, 1: 0}
states: {2: draining}
"""


def test_every_policy_with_weights_and_states() -> None:
    """One ServiceIP a policy; what is not said is weight 1 and up."""
    (it,) = load(POLICIES, "f.yaml")
    assert list(it.service_ips) == ["rr", "closest", "least-flows", "maglev"]
    assert (it.service_ips["rr"].sticky, it.service_ips["maglev"].hash_port) == (60, True)
    assert [it.of_instance(n) for n in range(3)] == [
        {"weight": 3, "state": "up"},
        {"weight": 0, "state": "up"},
        {"weight": 1, "state": "draining"},
    ]


@pytest.mark.parametrize(
    ("old", "new", "error"),
    [
        ("sticky: 60", "sticky: 86401", "service_ips.rr.sticky: expected an integer from 0 to 86400, got 86401"),
        ("hash_port: true", "hash_port: 1", "service_ips.maglev.hash_port: expected true or false, got 1"),
        ("1: 0", "1: -1", "weights.1: expected an integer from 0 to 1000, got -1"),
        ("draining", "asleep", 'states.2: expected one of up, draining, down, got "asleep"'),
    ],
)
def test_a_wrong_modifier_is_named(old: str, new: str, error: str) -> None:
    """The key and what was expected there."""
    with pytest.raises(ConfigError) as caught:
        load(POLICIES.replace(old, new), "f.yaml")
    assert error in str(caught.value)


NORTH = """version: 1
app: shop
namespace: prod
service: cart
service_namespace: web
service_ips: {rr: , closest: }
exposed:
  - {port: 80, nodes: hosting, prefer: local}
  - port: 53
    to: 5353
    protocol: udp
    address: 198.51.100.7
    nodes: [65f0000000000000000000a1]
    policy: closest
health:
  http: {port: 80, path: /healthz}
  interval: 0.5
  fall: 3
drain: 5
"""


def test_exposed_ports_health_and_drain() -> None:
    (it,) = load(NORTH, "f.yaml")
    assert [(port.target, it.policy_of(port), port.nodes) for port in it.exposed] == [
        (80, "rr", "hosting"),
        (5353, "closest", ("65f0000000000000000000a1",)),
    ]
    assert it.health is not None
    assert (it.health.interval, it.health.fall, it.health.rise, it.health.panic, it.drain) == (0.5, 3, 1, 50, 5.0)


@pytest.mark.parametrize(
    ("old", "new", "error"),
    [
        ("version: 1", "version: 2", "f.yaml:1: version: expected 1, the version of descriptors that this is, got 2"),
        ("to: 5353", "to: 70000", "f.yaml:10: exposed.1.to: expected an integer from 1 to 65535, got 70000"),
        ("protocol: udp", "protocol: sctp", 'f.yaml:11: exposed.1.protocol: expected one of tcp, udp, got "sctp"'),
        (
            "198.51.100.7",
            "127.0.0.1",
            'f.yaml:12: exposed.1.address: expected an address of the nodes such as 198.51.100.7, got "127.0.0.1"',
        ),
        ("nodes: hosting", "nodes: some", "f.yaml:8: exposed.0.nodes: expected all, hosting, or a list of nodes' ids"),
        ("prefer: local", "prefer: near", 'f.yaml:8: exposed.0.prefer: expected one of policy, local, got "near"'),
        ("port: 53", "prot: 53", "f.yaml:9: exposed.1.port: expected a value, got nothing"),
        ("to: 5353", "too: 1", "f.yaml:10: exposed.1.too: expected a known key (did you mean to?), got 1"),
        ("policy: closest", "policy: maglev", "f.yaml:1: descriptor: expected exposed to name policies of service_ips"),
        ("port: 80, nodes", "port: 53, protocol: udp, address: 198.51.100.7, nodes", "each of exposed with a port of"),
        ("  http: {port: 80, path: /healthz}\n", "", "15: health: expected exactly one of tcp, http and command"),
        ("  http:", "  tcp: 80\n  http:", "15: health: expected exactly one of tcp, http and command"),
        ("path: /healthz", "path: healthz", "f.yaml:16: health.http.path: expected a path such as /healthz"),
        ("path: /healthz", "pat: /", "f.yaml:16: health.http.pat: expected a known key (did you mean path?)"),
        ("interval: 0.5", "interval: 0", "f.yaml:17: health.interval: expected seconds from 0.1 to 3600, got 0"),
        ("fall: 3", "fall: 0", "f.yaml:18: health.fall: expected an integer from 1 to 100, got 0"),
        ("fall: 3", "command: ls", "f.yaml:18: health.command: expected a program and its arguments, such as"),
        ("drain: 5", "drain: soon", 'f.yaml:19: drain: expected seconds from 0 to 3600, got "soon"'),
        ("exposed:\n", "exposed: 5\nports:\n", "f.yaml:7: exposed: expected a list, got 5"),
        ("app: shop", "app: appliance", "f.yaml:1: descriptor: expected another app than appliance"),
        ("    to: 5353", "    to: 5353\n    to: 5354", "11: exposed.1.to: expected each key once (line 10 has it)"),
    ],
)
def test_each_class_of_error_names_line_key_and_expectation(old: str, new: str, error: str) -> None:
    assert old in NORTH
    with pytest.raises(ConfigError) as caught:
        load(NORTH.replace(old, new), "f.yaml")
    assert error in str(caught.value)


PLAIN = "app: shop\nnamespace: prod\nservice: cart\nservice_namespace: web\n"


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("ports: [{port: 80, name: HTTP}]", "ports.0.name: expected a name of 1 to 15 lower-case letters, digits and"),
        ("default_policy: 5", "default_policy: expected"),
        ("default_policy: maglev", "descriptor: expected default_policy to be a policy of service_ips (rr)"),
        ("metadata: {path: 5}", "metadata: expected a mapping of names to text, each name=text at most 255 bytes"),
        ("metadata: [a]", "metadata: expected a mapping of names to text"),
        ("needs: shop", "needs: expected a list of jobs such as shop.prod.cart.web"),
        ("needs: [shop]", "needs: expected a list of jobs such as shop.prod.cart.web"),
        ("service_ips: rr", "service_ips: expected a mapping of policies, such as {rr: {v4: assigned}}"),
        ("health: {http: {port: 80, path: /a b}}", "health.http.path: expected a path without spaces"),
    ],
)
def test_so_does_each_class_of_the_other_keys(line: str, error: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load(PLAIN + line, "f.yaml")
    assert error in str(caught.value)
    if not error.startswith("descriptor"):
        assert str(caught.value).startswith("f.yaml:5: ")


def test_the_schema_is_the_models() -> None:
    made = schema()
    assert set(made["properties"]) == set(Descriptor.model_fields)
    assert made["required"] == ["app", "namespace", "service", "service_namespace"]
    assert made["$defs"]["Exposure"]["required"] == ["port"]
    assert made["$defs"]["Health"]["properties"]["panic"]["description"].startswith("Percent")
