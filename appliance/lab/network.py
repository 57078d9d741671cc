"""Namespaces and the links between them, on pyroute2.

Nothing here is ever created in the machine's own namespace: a link begins inside the underlay's namespace and
its other end is born inside the node's, so a kill at any moment leaves only namespaces, which `existing`
finds by their names and `remove` deletes with all that is in them.

pyroute2 can open a namespace's socket and create a namespace by itself, but forks us for it: the copy has
our signal handlers and our stack, and an interrupt would unwind, and so clean up, twice. So the calling
thread enters a namespace itself (`entered`), and `ip` makes new ones.
"""

import os
import subprocess
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from ipaddress import IPv4Interface, IPv6Interface

from pyroute2 import IPRoute, NetlinkError, netns
from pyroute2.ethtool import Ethtool
from pyroute2.netlink.rtnl.ifaddrmsg import IFA_F_NODAD

from appliance.lab.plan import UNDERLAY_MTU, UNDERLAY_V4, UNDERLAY_V6, Node, Topology, namespace_path, owned
from appliance.lab.processes import undisturbed

BRIDGE, UPLINK = "underlay", "uplink"
SEGMENTATION = ("tx-tcp-segmentation", "tx-tcp6-segmentation", "tx-udp-segmentation")
"""Features without which a device gets every packet cut to its MTU (ethtool(8))."""
RECEIVE = ("rx-gro",)
"""What a network card's driver does with cut packets; a veth does it only when told to."""


def existing(lab: str) -> list[str]:
    """The namespaces of a lab that exist, whether they were completed or not."""
    return sorted(name for name in netns.listnetns() if owned(lab, name))


class NetworkError(Exception):
    """The kernel refused a part of the network; `str()` says why."""


def build(plan: Topology) -> None:
    """Creates the namespaces, the underlay's bridge and the nodes' uplinks. Raises NetworkError."""
    try:
        _build(plan)
    except (OSError, NetlinkError, subprocess.SubprocessError) as error:
        raise NetworkError(f"network: {error}") from error


def _build(plan: Topology) -> None:
    for namespace in plan.namespaces:
        with undisturbed():  # an `ip` that nobody waits for any more would make its namespace after the clean-up
            subprocess.run(["ip", "netns", "add", namespace], check=True)
        with entered(namespace), IPRoute() as ip:
            _up(ip, "lo")
    with entered(plan.underlay), IPRoute() as ip:
        ip.link("add", ifname=BRIDGE, kind="bridge", mtu=UNDERLAY_MTU)
        _up(ip, BRIDGE)
        for node in plan.nodes:
            _plug(ip, node)
    for node in plan.nodes:
        _address(node)
    if plan.spec.cut:
        _cut(plan)


def remove(namespaces: Iterable[str]) -> None:
    """Deletes namespaces; one that is gone already is no error."""
    for namespace in namespaces:
        try:
            netns.remove(namespace)
        except FileNotFoundError:
            continue


def _plug(ip: IPRoute, node: Node) -> None:
    """A link from the underlay's bridge to a node; `ip` is in the underlay's namespace."""
    handle = os.open(namespace_path(node.namespace), os.O_RDONLY)
    try:
        peer = {"ifname": UPLINK, "net_ns_fd": handle, "mtu": UNDERLAY_MTU}
        ip.link("add", ifname=node.name, kind="veth", mtu=UNDERLAY_MTU, peer=peer)
    finally:
        os.close(handle)
    (bridge,) = ip.link_lookup(ifname=BRIDGE)
    (port,) = ip.link_lookup(ifname=node.name)
    ip.link("set", index=port, master=bridge, state="up")


def _address(node: Node) -> None:
    """Brings a node's uplink up, usable at once: nobody else can have its addresses."""
    v4 = IPv4Interface((node.underlay_v4, UNDERLAY_V4.prefixlen))
    v6 = IPv6Interface((node.underlay_v6, UNDERLAY_V6.prefixlen))
    with entered(node.namespace), IPRoute() as ip:
        (uplink,) = ip.link_lookup(ifname=UPLINK)
        ip.addr("add", index=uplink, address=str(v4.ip), prefixlen=v4.network.prefixlen)
        ip.addr("add", index=uplink, address=str(v6.ip), prefixlen=v6.network.prefixlen, flags=IFA_F_NODAD)
        ip.link("set", index=uplink, state="up")


def _up(ip: IPRoute, name: str) -> None:
    (index,) = ip.link_lookup(ifname=name)
    ip.link("set", index=index, state="up")


@contextmanager
def entered(namespace: str) -> Iterator[None]:
    """Moves the calling thread into a namespace for a while."""
    netns.pushns(namespace)
    try:
        yield
    finally:
        netns.popns()


def _cut(plan: Topology) -> None:
    """Makes each uplink a card without segmentation offload, and each port of the bridge a switch's."""
    for node in plan.nodes:
        with entered(node.namespace):
            _set_features(UPLINK, off=SEGMENTATION, on=RECEIVE)
    with entered(plan.underlay):
        for node in plan.nodes:
            _set_features(node.name, off=SEGMENTATION)


def _set_features(link: str, off: tuple[str, ...] = (), on: tuple[str, ...] = ()) -> None:
    """Switches features of a link in the calling thread's namespace."""
    with Ethtool() as tool:
        features = tool.get_features(link)
        for name in (*off, *on):
            features.features[name].enable = name in on
        tool.set_features(link, features)
