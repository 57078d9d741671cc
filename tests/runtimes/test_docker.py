"""The network driver for Docker, over its socket: every method of the published API, on the real kernel."""

import subprocess
from collections.abc import Iterator
from contextlib import suppress

import pytest

from appliance.client import ApiError
from tests.environment import netns
from tests.runtimes.docker import ENDPOINT, NETWORK, Libnetwork
from tests.supervisor.world import Node, World, ping, until, world

pytestmark = pytest.mark.root

JOB = "app.ns.web.test"
SERVICE, INSTANCE = "edge-appliance/service", "edge-appliance/instance"
THIS = {SERVICE: JOB, INSTANCE: "0"}
PORTMAP = "com.docker.network.portmap"


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """One node without a cluster, with the driver."""
    netns.remove_abandoned()
    with world(tmp_path_factory.mktemp("docker")) as made:
        network = {"subnet_v4": "10.18.0.0/24", "subnet_v6": "fc00::/120"}
        made.node(network=network).start()
        yield made


@pytest.fixture
def docker(alone: World) -> Iterator[Libnetwork]:
    """Docker on it; nothing is attached before and after."""
    (node,) = alone.nodes
    assert node.api.attachments() == []
    yield Libnetwork(node)
    assert node.api.attachments() == []
    assert "eo" not in node.namespace.ip("-br", "link")


def test_what_docker_asks_when_it_finds_the_plugin(docker: Libnetwork) -> None:
    assert docker.call("Plugin.Activate") == {"Implements": ["NetworkDriver", "IpamDriver"]}
    assert docker.call("NetworkDriver.GetCapabilities") == {"Scope": "local", "ConnectivityScope": "global"}
    capabilities = {"RequiresMACAddress": False, "RequiresRequestReplay": False}
    assert docker.call("IpamDriver.GetCapabilities") == capabilities
    spaces = docker.call("IpamDriver.GetDefaultAddressSpaces")
    assert set(spaces.values()) == {"edge-appliance"}
    assert docker.post("Plugin.Activate", raw=b"null\n")[0] == 200
    status, said = docker.post("NetworkDriver.Unheard")
    assert status == 404, "which Docker takes for a method that need not be"
    assert "Unheard" in said["Err"]


def test_what_changes_nothing(docker: Libnetwork) -> None:
    node = {"DiscoveryType": 1, "DiscoveryData": {"Address": "192.0.2.1", "self": True}}
    assert docker.call("NetworkDriver.DiscoverNew", node) == {}
    assert docker.call("NetworkDriver.DiscoverDelete", node) == {}
    allocate = {"NetworkID": NETWORK, "Options": {}, "IPv4Data": [], "IPv6Data": []}
    assert docker.call("NetworkDriver.AllocateNetwork", allocate) == {"Options": {}}
    assert docker.call("NetworkDriver.FreeNetwork", {"NetworkID": NETWORK}) == {}
    assert docker.call("IpamDriver.ReleaseAddress", {"PoolID": "", "Address": "fc00::2"}) == {}
    assert docker.call("IpamDriver.ReleasePool", {"PoolID": "edge-appliance/4"}) == {}
    assert docker.call("NetworkDriver.DeleteEndpoint", docker.which()) == {}
    assert docker.call("NetworkDriver.RevokeExternalConnectivity", docker.which()) == {}


def test_a_container_from_run_to_rm(alone: World, docker: Libnetwork) -> None:
    (node,), sandbox, other = alone.nodes, alone.container(), alone.container()
    assert docker.create_network()["Gateway"] == "10.18.0.1/24"
    interface = docker.create_endpoint(**THIS)
    (attached,) = node.api.attachments()
    assert (attached["service"], attached["instance"], attached["interface"]) == (JOB, 0, "edge0")
    assert interface["Address"] == f"{attached['address_v4']}/24"
    assert interface["AddressIPv6"] == f"{attached['address_v6']}/120"
    said = docker.join(sandbox, interface)
    assert (said["Gateway"], said["DisableGatewayService"]) == ("10.18.0.1", True)
    until(lambda: docker.condition(JOB) == "whole", "its link is up")
    node.api.attach("app.ns.call.test", 0, {"netns": other.name})
    assert ping(other, attached["address_v4"])
    assert ping(other, attached["address_v6"])
    assert ping(sandbox, "10.18.0.1"), "the node, which has the names"
    value = docker.call("NetworkDriver.EndpointOperInfo", docker.which())["Value"]
    assert value == {**THIS, "com.docker.network.endpoint.macaddress": interface["MacAddress"]}
    node.api.detach("app.ns.call.test", 0)
    docker.leave(sandbox, said["InterfaceName"]["SrcName"])
    assert docker.call("NetworkDriver.DeleteNetwork", {"NetworkID": NETWORK}) == {}
    assert "impaired service" not in node.log.read_text()


def test_a_network_says_which_service_its_containers_are(alone: World, docker: Libnetwork) -> None:
    docker.create_network(**{SERVICE: JOB})
    docker.create_endpoint(**{INSTANCE: "3"})
    assert [it["instance"] for it in docker.node.api.attachments()] == [3]
    docker.call("NetworkDriver.DeleteEndpoint", docker.which())
    docker.call("NetworkDriver.DeleteNetwork", {"NetworkID": NETWORK})
    assert SERVICE in docker.refused("NetworkDriver.CreateEndpoint", docker.which(Options={INSTANCE: "3"}))


def test_published_ports_lead_there_while_docker_wants_it(alone: World, docker: Libnetwork) -> None:
    (node,) = alone.nodes
    docker.create_endpoint(**THIS)
    http = {"Proto": 6, "IP": "", "Port": 80, "HostIP": "", "HostPort": 8080, "HostPortEnd": 8080}
    names = {**http, "Proto": 17, "Port": 53, "HostPort": 5300, "HostIP": "0.0.0.0"}
    wanted = docker.which(Options={PORTMAP: [http, names]})
    docker.call("NetworkDriver.ProgramExternalConnectivity", wanted)
    assert node.api.attachments()[0]["ports"] == "8080:80/tcp;5300:53/udp"
    docker.call("NetworkDriver.RevokeExternalConnectivity", docker.which())
    assert node.api.attachments()[0]["ports"] == ""
    for field, value in (("HostPort", 0), ("HostIP", "127.0.0.1"), ("Proto", 132)):
        options = {PORTMAP: [{**http, field: value}]}
        said = docker.refused("NetworkDriver.ProgramExternalConnectivity", docker.which(Options=options))
        assert field in said
    docker.call("NetworkDriver.DeleteEndpoint", docker.which())


def test_what_is_refused_says_which_field(docker: Libnetwork) -> None:
    which = docker.which()
    for method, body, field in (
        ("NetworkDriver.CreateNetwork", {"NetworkID": ""}, "NetworkID"),
        ("NetworkDriver.CreateNetwork", {}, "NetworkID"),
        ("NetworkDriver.CreateNetwork",
         {"NetworkID": NETWORK, "IPv4Data": [{"AddressSpace": "LocalDefault"}]}, "AddressSpace"),
        ("NetworkDriver.CreateEndpoint", {**which, "Options": {SERVICE: JOB}}, INSTANCE),
        ("NetworkDriver.CreateEndpoint", {**which, "Options": {SERVICE: JOB, INSTANCE: "first"}}, INSTANCE),
        ("NetworkDriver.CreateEndpoint", {**which, "Options": {SERVICE: "web", INSTANCE: "0"}}, "job"),
        ("NetworkDriver.CreateEndpoint",
         {**which, "Options": THIS, "Interface": {"Address": "172.18.0.2/16"}}, "address"),
        ("NetworkDriver.CreateEndpoint",
         {**which, "Options": THIS, "Interface": {"Address": "first"}}, "Interface.Address"),
        ("IpamDriver.ReleaseAddress", {"PoolID": "edge-appliance/4", "Address": "first"}, "Address"),
        ("NetworkDriver.Join", which, "EndpointID"),
        ("NetworkDriver.EndpointOperInfo", which, "EndpointID"),
        ("NetworkDriver.ProgramExternalConnectivity", which, "EndpointID"),
        ("IpamDriver.RequestPool", {"Pool": "192.168.7.0/24"}, "Pool"),
        ("IpamDriver.RequestPool", {"Pool": "10.18.0.0/24", "SubPool": "10.18.0.128/25"}, "SubPool"),
        ("IpamDriver.RequestAddress", {"PoolID": "elsewhere"}, "PoolID"),
        ("IpamDriver.RequestAddress", {"PoolID": "edge-appliance/4", "Address": "10.18.0.9"}, "Address"),
        ("IpamDriver.RequestAddress", {"PoolID": "edge-appliance/6", "Address": "fc00::9",
                                       "Options": {"RequestAddressType": "com.docker.network.gateway"}}, "Address"),
    ):  # fmt: skip
        assert docker.refused(method, body).startswith(("Options." + field, field)), (method, body)
    status, said = docker.post("NetworkDriver.Join", raw=b"{")
    assert (status, said["Err"].partition(":")[0]) == (400, "body")


def test_the_pools_are_the_nodes_subnets(docker: Libnetwork) -> None:
    asked = {"AddressSpace": "edge-appliance", "Pool": "", "SubPool": "", "Options": {}, "V6": True}
    expected = {"PoolID": "edge-appliance/6", "Pool": "fc00::/120", "Data": {}}
    assert docker.call("IpamDriver.RequestPool", asked) == docker.call("IpamDriver.RequestPool", asked) == expected
    any_v4 = docker.call("IpamDriver.RequestPool", {**asked, "V6": False})
    assert any_v4["Pool"] == "0.0.0.0/0", "the only one that libnetwork takes although the node has a route to it"
    given = docker.call("IpamDriver.RequestPool", {**asked, "Pool": "10.18.0.0/24", "V6": False})
    assert given == {"PoolID": "edge-appliance/4", "Pool": "10.18.0.0/24", "Data": {}}
    gateway = {"PoolID": "edge-appliance/6", "Address": "fc00::1"}
    options = {"RequestAddressType": "com.docker.network.gateway"}
    said = docker.call("IpamDriver.RequestAddress", {**gateway, "Options": options})
    assert said["Address"] == "fc00::1/120"


def test_addresses_that_docker_does_not_use_are_free_again(docker: Libnetwork) -> None:
    pool = {"PoolID": "edge-appliance/4", "Address": "", "Options": {}}
    for _ in range(300):
        address = docker.call("IpamDriver.RequestAddress", pool)["Address"].partition("/")[0]
        assert docker.call("IpamDriver.ReleaseAddress", {**pool, "Address": address}) == {}


def test_with_the_null_driver_addresses_come_with_the_endpoint(docker: Libnetwork) -> None:
    docker.call("NetworkDriver.CreateNetwork", {
        "NetworkID": NETWORK, "IPv4Data": [{"AddressSpace": "null", "Pool": "0.0.0.0/0"}], "Options": {},
    })  # fmt: skip
    told = docker.call("NetworkDriver.CreateEndpoint", docker.which(Options=THIS, Interface=None))["Interface"]
    assert set(told) == {"Address", "AddressIPv6", "MacAddress"}
    docker.call("NetworkDriver.DeleteEndpoint", docker.which())
    docker.call("NetworkDriver.DeleteNetwork", {"NetworkID": NETWORK})


def test_a_container_that_vanishes_is_noticed(alone: World, docker: Libnetwork) -> None:
    (node,), sandbox = alone.nodes, alone.make()
    docker.join(sandbox, docker.create_endpoint(**THIS))
    until(lambda: docker.condition(JOB) == "whole", "its link is up")
    subprocess.run(["ip", "netns", "del", sandbox.name], check=True)
    until(lambda: node.api.attachments() == [], "the supervisor says so")
    assert f"lost service={JOB}" in node.log.read_text()
    assert docker.call("NetworkDriver.Leave", docker.which()) == {}
    assert docker.call("NetworkDriver.DeleteEndpoint", docker.which()) == {}


def test_a_late_delete_does_not_take_what_another_container_has_now(alone: World, docker: Libnetwork) -> None:
    (node,), sandbox, later = alone.nodes, alone.container(), "f6" * 32
    before = docker.create_endpoint(**THIS)
    after = docker.create_endpoint(later, **THIS)
    assert after["Address"] != before["Address"], "Docker asks for an address before it says for whom"
    docker.call("NetworkDriver.DeleteEndpoint", docker.which())
    assert len(node.api.attachments()) == 1
    docker.join(sandbox, after, later)
    docker.call("NetworkDriver.DeleteEndpoint", docker.which(later))


def _since(node: Node) -> float | None:
    """When the supervisor was started last; None if it does not answer."""
    with suppress(ApiError):
        return float(node.api.status()["node"]["started"])
    return None


def test_another_supervisor_knows_endpoints_and_networks(alone: World, docker: Libnetwork) -> None:
    (node,), sandbox = alone.nodes, alone.container()
    docker.create_network(**{SERVICE: JOB})
    interface = docker.create_endpoint(**{INSTANCE: "0"})
    docker.join(sandbox, interface)
    (before,) = node.api.attachments()
    assert before["netns"] == f"docker:{ENDPOINT[:24]}@/run/netns/{sandbox.name}"
    started = node.api.status()["node"]["started"]
    node.api.restart()
    until(lambda: _since(node) not in (None, started), "the next one answers", 60)
    assert node.api.attachments() == [before]
    assert docker.call("NetworkDriver.EndpointOperInfo", docker.which())["Value"][SERVICE] == JOB
    docker.call("NetworkDriver.DeleteEndpoint", docker.which())
    docker.create_endpoint(**{INSTANCE: "1"})
    docker.call("NetworkDriver.DeleteEndpoint", docker.which())
    docker.call("NetworkDriver.DeleteNetwork", {"NetworkID": NETWORK})
