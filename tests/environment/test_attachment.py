"""References to namespaces, and the record in a link's alias."""

from dataclasses import replace
from ipaddress import IPv4Address, IPv6Address

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.environment import Attachment, EnvironmentError_, NetnsRef
from appliance.environment.attachment import INSTANCE_MAX, RECORD_MAX, SERVICE_MAX, Record, check_key

GRAPHIC = st.characters(min_codepoint=0x21, max_codepoint=0x7E)
PATHS = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=8)

RECORD = Record(
    service="web.demo.api.test",
    instance=7,
    interface="eth0",
    address_v4=IPv4Address("10.18.0.2"),
    address_v6=IPv6Address("fc00::2"),
    netns=NetnsRef.by_name("web"),
)


def test_the_record_can_be_read() -> None:
    assert RECORD.encode() == "edge1 web.demo.api.test 7 eth0 10.18.0.2 fc00::2 name:web"
    lone = replace(RECORD, address_v6=None, netns=NetnsRef.by_pid(42))
    assert lone.encode() == "edge1 web.demo.api.test 7 eth0 10.18.0.2 - pid:42"


@given(
    service=st.text(GRAPHIC, min_size=1, max_size=40),
    instance=st.integers(0, INSTANCE_MAX),
    v4=st.none() | st.ip_addresses(v=4),
    v6=st.none() | st.ip_addresses(v=6),
    path=PATHS,
)
def test_a_record_survives_the_kernel(
    service: str, instance: int, v4: IPv4Address | None, v6: IPv6Address | None, path: str
) -> None:
    record = Record(service, instance, "eth0", v4, v6, NetnsRef.by_path(f"/run/{path}"))
    line = record.encode()
    assert len(line.encode()) <= RECORD_MAX
    assert Record.decode(line) == record


def test_the_longest_record_fits() -> None:
    address = IPv6Address("fc00:1111:2222:3333:4444:5555:6666:7777")
    longest = Record(
        "s" * SERVICE_MAX,
        INSTANCE_MAX,
        "i" * 15,
        IPv4Address("10.118.110.112"),
        address,
        NetnsRef.by_pid(4194304),
    )
    assert Record.decode(longest.encode()) == longest
    room = RECORD_MAX - len(longest.encode()) + len("pid:4194304")
    with pytest.raises(EnvironmentError_, match=f"netns: expected at most {room} characters"):
        replace(longest, netns=NetnsRef.by_path("/" + "p" * 60)).encode()


@given(st.text(max_size=80) | st.text("edge1 .:-/0123456789abcdef", max_size=80))
def test_any_other_alias_is_no_record(alias: str) -> None:
    record = Record.decode(alias)
    assert record is None or Record.decode(record.encode()) == record


@pytest.mark.parametrize(
    "alias",
    [
        "",
        "uplink to the office",
        "edge2 web 7 eth0 10.18.0.2 fc00::2 name:web",
        "edge1 web 7 eth0 fc00::2 10.18.0.2 name:web",
        "edge1 web -1 eth0 10.18.0.2 fc00::2 name:web",
        "edge1 web 7 eth0 10.18.0.2 fc00::2 name:../web",
        "edge1 web 7 eth0 10.18.0.2 fc00::2 pid:x",
        "edge1 web 7 eth0 10.18.0 fc00::2 name:web",
        "edge1 web 7 eth0 10.18.0.2 fc00::2",
    ],
)
def test_what_is_not_quite_a_record(alias: str) -> None:
    assert Record.decode(alias) is None


@pytest.mark.parametrize("service", ["", "a b", "a\tb", "ü", "s" * (SERVICE_MAX + 1), "a\0"])
def test_a_service_that_cannot_be_recorded(service: str) -> None:
    with pytest.raises(EnvironmentError_, match="service: expected 1 to 123 printable ASCII"):
        check_key(service, 0)


@pytest.mark.parametrize("instance", [-1, INSTANCE_MAX + 1])
def test_an_instance_that_cannot_be(instance: int) -> None:
    with pytest.raises(EnvironmentError_, match="instance: expected an integer from 0"):
        check_key("web", instance)


def test_where_a_namespace_is() -> None:
    assert str(NetnsRef.by_name("web").path) == "/run/netns/web"
    assert str(NetnsRef.by_pid(42).path) == "/proc/42/ns/net"
    assert str(NetnsRef.by_path("/run/docker/netns/x").path) == "/run/docker/netns/x"


@pytest.mark.parametrize("name", ["", ".", "..", "a/b", "/etc", "a\0b"])
def test_what_is_no_name(name: str) -> None:
    with pytest.raises(EnvironmentError_, match="netns: expected a name below /run/netns"):
        NetnsRef.by_name(name)


def test_what_is_no_pid_and_no_path() -> None:
    with pytest.raises(EnvironmentError_, match="pid: expected a positive integer, got 0"):
        NetnsRef.by_pid(0)
    with pytest.raises(EnvironmentError_, match="path: expected an absolute path, got 'run/netns/x'"):
        NetnsRef.by_path("run/netns/x")


@pytest.mark.parametrize(
    "reference", ["name:web", "pid:42", "path:/run/netns/web", "docker:e5e5", "docker:e5e5@/run/docker/netns/0a1b"]
)
def test_a_reference_as_text(reference: str) -> None:
    assert str(NetnsRef.parse(reference)) == reference


def test_an_endpoint_of_dockers() -> None:
    identity = "0123456789abcdef" * 4
    before, after = NetnsRef.by_endpoint(identity), NetnsRef.by_endpoint(identity, "/var/run/docker/netns/0a1b")
    assert before.endpoint == after.endpoint == identity[:24]
    assert str(after.path) == "/var/run/docker/netns/0a1b"
    assert NetnsRef.by_pid(7).endpoint == ""
    with pytest.raises(EnvironmentError_, match=r"docker: expected an endpoint's id, got '\.\./etc'"):
        NetnsRef.by_endpoint("../etc")


def test_the_reply_is_what_the_api_says() -> None:
    attachment = Attachment(
        service="web.demo.api.test",
        instance=0,
        interface="eth0",
        address_v4=IPv4Address("10.18.0.2"),
        address_v6=None,
        gateway_v4=IPv4Address("10.18.0.1"),
        gateway_v6=None,
        netns=NetnsRef.by_name("web"),
    )
    assert attachment.reply() == {
        "service": "web.demo.api.test",
        "instance": 0,
        "interface": "eth0",
        "address_v4": "10.18.0.2",
        "address_v6": None,
        "gateway_v4": "10.18.0.1",
        "gateway_v6": None,
        "netns": "name:web",
    }
