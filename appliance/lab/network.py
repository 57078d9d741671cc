"""Namespaces and the links between them, on pyroute2.

Nothing here is ever created in the machine's own namespace: a link begins inside the underlay's namespace and
its other end is born inside the node's, so a kill at any moment leaves only namespaces, which `existing`
finds by their names and `remove` deletes with all that is in them. So it does with the resolv.conf that a node writes
for each container it attaches (`appliance.naming.resolv`): it is outside the namespace, and outlives a killed node.

pyroute2 can open a namespace's socket and create a namespace by itself, but forks us for it: the copy has
our signal handlers and our stack, and an interrupt would unwind, and so clean up, twice. So the calling
thread enters a namespace itself (`entered`), and `ip` makes new ones.
"""

import os
import subprocess
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from ipaddress import IPv4Interface, IPv6Interface
from pathlib import Path
from typing import Literal, TypeVar

from pyroute2 import IPRoute, NetlinkError, netns
from pyroute2.ethtool import Ethtool
from pyroute2.netlink.rtnl.ifaddrmsg import IFA_F_NODAD

from appliance.lab.plan import UNDERLAY_V4, UNDERLAY_V6, Host, Topology, namespace_path, owned
from appliance.lab.processes import undisturbed
from appliance.naming import resolv

T = TypeVar("T")

BRIDGE, UPLINK = "underlay", "uplink"
SEGMENTATION = ("tx-tcp-segmentation", "tx-tcp6-segmentation", "tx-udp-segmentation")
"""Features without which a device gets every packet cut to its MTU (ethtool(8))."""
RECEIVE = ("rx-gro",)
"""What a network card's driver does with cut packets; a veth does it only when told to."""


def existing(lab: str) -> list[str]:
    """The namespaces of a lab of which there is anything: themselves, or what an attachment wrote for them."""
    return sorted(name for name in {*netns.listnetns(), *_described()} if owned(lab, name))


def _described() -> Iterator[str]:
    """Namespaces for which a supervisor wrote a resolv.conf, or was killed before it had."""
    for directory in resolv.DIRECTORY.glob("*"):
        with suppress(OSError):  # another lab's, which is going just now
            if _is_written(directory):
                yield directory.name


def _is_written(directory: Path) -> bool:
    file = directory / resolv.FILE
    return resolv.is_ours(file) if file.exists() else not any(directory.iterdir())


class NetworkError(Exception):
    """The kernel refused a part of the network; `str()` says why."""


def build(plan: Topology) -> None:
    """Creates the namespaces, the underlay's bridge and the hosts' uplinks. Raises NetworkError."""
    with _refusals():
        _build(plan)


def add(namespaces: Iterable[str]) -> None:
    """Creates namespaces, each with its loopback up. Raises NetworkError."""
    with _refusals():
        for namespace in namespaces:
            _add(namespace)


def plug(plan: Topology, host: Host, state: Literal["up", "down"]) -> None:
    """Connects a host to the underlay again, or pulls its cable. Raises NetworkError."""
    with _refusals(), entered(plan.underlay), IPRoute() as ip:
        (port,) = ip.link_lookup(ifname=host.name)
        ip.link("set", index=port, state=state)


@contextmanager
def _refusals() -> Iterator[None]:
    try:
        yield
    except (OSError, NetlinkError, subprocess.SubprocessError) as error:
        raise NetworkError(f"network: {error}") from error


def _build(plan: Topology) -> None:
    for namespace in plan.namespaces:
        _add(namespace)
    with entered(plan.underlay), IPRoute() as ip:
        ip.link("add", ifname=BRIDGE, kind="bridge", mtu=plan.spec.mtu)
        _up(ip, BRIDGE)
        for host in plan.hosts:
            _plug(ip, host, plan.spec.mtu)
    for host in plan.hosts:
        _address(host)
    if plan.spec.cut:
        _cut(plan)


def _add(namespace: str) -> None:
    with undisturbed():  # an `ip` that nobody waits for any more would make its namespace after the clean-up
        subprocess.run(["ip", "netns", "add", namespace], check=True)
    with entered(namespace), IPRoute() as ip:
        _up(ip, "lo")


def remove(namespaces: Iterable[str]) -> None:
    """Deletes namespaces, and their resolv.conf where a supervisor wrote it; what is gone already is no error."""
    for namespace in namespaces:
        with suppress(FileNotFoundError):
            netns.remove(namespace)
        directory = resolv.DIRECTORY / namespace
        if directory.is_dir() and _is_written(directory):
            (directory / resolv.FILE).unlink(missing_ok=True)
            with suppress(OSError):  # somebody's files beside it stay
                directory.rmdir()


def _plug(ip: IPRoute, host: Host, mtu: int) -> None:
    """A link from the underlay's bridge to a host; `ip` is in the underlay's namespace."""
    handle = os.open(namespace_path(host.namespace), os.O_RDONLY)
    try:
        peer = {"ifname": UPLINK, "net_ns_fd": handle, "mtu": mtu}
        ip.link("add", ifname=host.name, kind="veth", mtu=mtu, peer=peer)
    finally:
        os.close(handle)
    (bridge,) = ip.link_lookup(ifname=BRIDGE)
    (port,) = ip.link_lookup(ifname=host.name)
    ip.link("set", index=port, master=bridge, state="up")


def _address(host: Host) -> None:
    """Brings a host's uplink up, usable at once: nobody else can have its addresses."""
    v4 = IPv4Interface((host.underlay_v4, UNDERLAY_V4.prefixlen))
    v6 = IPv6Interface((host.underlay_v6, UNDERLAY_V6.prefixlen))
    with entered(host.namespace), IPRoute() as ip:
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


def inside(namespace: str, function: Callable[[], T]) -> T:
    """The result of a function in a thread of its own that is in a namespace: whatever interrupts us finds us at home.

    Raises what it raises.
    """

    def there() -> T:
        netns.setns(str(namespace_path(namespace)), flags=0)
        return function()

    with ThreadPoolExecutor(max_workers=1) as pool:
        return pool.submit(there).result()


def _cut(plan: Topology) -> None:
    """Makes each uplink a card without segmentation offload, and each port of the bridge a switch's."""
    for host in plan.hosts:
        with entered(host.namespace):
            _set_features(UPLINK, off=SEGMENTATION, on=RECEIVE)
    with entered(plan.underlay):
        for host in plan.hosts:
            _set_features(host.name, off=SEGMENTATION)


def _set_features(link: str, off: tuple[str, ...] = (), on: tuple[str, ...] = ()) -> None:
    """Switches features of a link in the calling thread's namespace."""
    with Ethtool() as tool:
        features = tool.get_features(link)
        for name in (*off, *on):
            features.features[name].enable = name in on
        tool.set_features(link, features)
