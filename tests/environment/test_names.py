"""Names that follow from what they belong to."""

from ipaddress import IPv4Address, IPv6Address

import pytest

from appliance.environment import names


def test_a_veth_name_is_stable_and_recognised() -> None:
    name = names.veth_name("web.demo.api.test", 3)
    assert name == names.veth_name("web.demo.api.test", 3)
    assert len(name) == 12
    assert names.is_veth_name(name)


def test_services_and_instances_differ() -> None:
    keys = [(service, instance) for service in ("a", "a1", "b") for instance in range(100)]
    assert len({names.veth_name(*key) for key in keys}) == len(keys)


@pytest.mark.parametrize("name", ["eth0", "ea", "ea123456789", "ea0123456789a", "eaABCDEF0123", "xea012345678"])
def test_other_names_are_not_taken_for_ours(name: str) -> None:
    assert not names.is_veth_name(name)


@pytest.mark.parametrize(
    "mac",
    [
        names.container_mac(IPv4Address("10.18.0.2")),
        names.container_mac(IPv6Address("fc00::2")),
        names.bridge_mac("edge-br0"),
    ],
)
def test_hardware_addresses_are_local_and_unicast(mac: str) -> None:
    octets = bytes.fromhex(mac.replace(":", ""))
    assert len(octets) == 6
    assert octets[0] & 0b11 == 0b10


def test_a_containers_hardware_address_shows_its_ipv4_address() -> None:
    assert names.container_mac(IPv4Address("10.18.0.2")) == "02:ea:0a:12:00:02"


def test_the_first_free_interface_name() -> None:
    assert names.free_interface_name({"lo"}) == "eth0"
    assert names.free_interface_name({"lo", "eth0", "eth2"}) == "eth1"
