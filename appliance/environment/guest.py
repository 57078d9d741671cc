"""What a unikernel or a virtual machine finds in its namespace: a container's link, and a TAP device for its monitor.

Theory of operation
-------------------
The namespace is named SERVICE.instance.NUMBER, as an existing NodeEngine looks for it, and has the same link, addresses
and routes as any container's (`EnvironmentManager.attach`); so instances behind a TAP device are announced, balanced
and watched like all others. On top of that comes one of two layouts, `network.guest`:

`nat`       tap0 and the bridge virbr0. The guest is always 192.168.1.2/30 and fd42:ea::2/126, its gateway .1 and ::1;
            what it sends leaves with the instance's addresses, what comes for those is led to it. A guest is the same
            whatever instance it is. Monitors of type "tap" (crosvm, qemu).
`macvtap`   tap0 is a macvtap device on the container's link: the guest has the instance's own addresses, lengths and
            gateway, and tap0's hardware address. The link keeps its IPv4 address for whoever starts the guest to read
            and to remove; IPv6 is the guest's at once. Monitors that open /dev/tapN.

Everything is inside the namespace and goes with it. `build` may be repeated; it makes only what is missing. A namespace
without an attachment, which a process that was killed here may leave, is used by the next deployment and removed by the
next undeployment.
"""

import errno
from ipaddress import IPv4Interface, IPv6Interface, ip_interface
from typing import Any, Final, Literal

from pyroute2 import NetlinkError, netns

from appliance.environment import nft
from appliance.environment.attachment import NETNS_DIRECTORY, Attachment, NetnsRef, Record
from appliance.environment.errors import EnvironmentError_
from appliance.environment.namespace import Namespace, apart
from appliance.environment.netlink import Kernel, reason

Layout = Literal["nat", "macvtap"]
TAP: Final = "tap0"
BRIDGE: Final = "virbr0"
GUEST_V4: Final = IPv4Interface("192.168.1.2/30")
GATEWAY_V4: Final = IPv4Interface("192.168.1.1/30")
GUEST_V6: Final = IPv6Interface("fd42:ea::2/126")
GATEWAY_V6: Final = IPv6Interface("fd42:ea::1/126")
_UP: Final = 0x1
_ALLMULTI: Final = 0x200  # IFF_ALLMULTI: a monitor does not tell which groups its guest joins, as IPv6 does


def namespace_name(service: str, instance: int) -> str:
    """By which the monitor's starter finds the namespace."""
    return f"{service}.instance.{instance}"


def is_guest(attachment: Attachment | Record) -> bool:
    """Whether an attachment is in a namespace that was made here."""
    return attachment.netns == NetnsRef.by_name(namespace_name(attachment.service, attachment.instance))


async def make_namespace(name: str) -> NetnsRef:
    """The namespace of a name, made if there is none. Raises EnvironmentError_."""

    async def make() -> None:
        try:
            netns.create(name)
        except FileExistsError:
            pass
        except OSError as error:
            raise EnvironmentError_(f"netns: cannot make {name}: {error.strerror or error}") from error

    await apart(make)
    return NetnsRef.by_name(name)


async def remove_namespace(name: str) -> None:
    """Removes a namespace and all that is in it; nothing if there is none. Raises EnvironmentError_."""

    async def remove() -> None:
        try:
            netns.remove(name)
        except OSError as error:
            if error.errno != errno.ENOENT:
                raise EnvironmentError_(f"netns: cannot remove {name}: {error.strerror or error}") from error

    if (NETNS_DIRECTORY / name).exists():
        await apart(remove)


async def build(attachment: Attachment, layout: Layout) -> dict[str, str]:
    """Makes a layout around an attachment; what the guest is to be told. Raises EnvironmentError_."""
    with Namespace.open(attachment.netns) as namespace:
        return await apart(lambda: _build(namespace, attachment, layout))


async def _build(namespace: Namespace, attachment: Attachment, layout: Layout) -> dict[str, str]:
    async with Kernel.open(namespace) as kernel:
        make = _nat if layout == "nat" else _macvtap
        try:
            await make(kernel, attachment)
            (tap,) = await kernel.ipr.link("get", ifname=TAP)
        except NetlinkError as error:
            raise EnvironmentError_(f"guest: {TAP} of {attachment.netns}: {reason(error)}") from error
        index = tap["index"]
        return {"tap": TAP, "mac": str(tap.get("address")), "device": f"/dev/tap{index}" if layout != "nat" else ""}


async def _nat(kernel: Kernel, attachment: Attachment) -> None:
    """The bridge with the gateway's addresses, the TAP device on it, and the rules."""
    await _add(kernel, BRIDGE, kind="bridge")
    with kernel.entered():
        await _add(kernel, TAP, kind="tuntap", mode="tap")
    bridge = await kernel.index(BRIDGE)
    kernel.set_sysctl(f"net/ipv6/conf/{BRIDGE}/accept_dad", "0")
    await kernel.ipr.link("set", index=await kernel.index(TAP), master=bridge, state="up")
    await kernel.ipr.link("set", index=bridge, state="up")
    have = await kernel.addresses(bridge)
    for interface in (GATEWAY_V4, GATEWAY_V6):
        if ip_interface(str(interface)) not in have:
            await kernel.ipr.addr("add", index=bridge, address=str(interface.ip), prefixlen=interface.network.prefixlen)
    kernel.set_sysctl("net/ipv4/ip_forward", "1")
    kernel.set_sysctl("net/ipv6/conf/all/forwarding", "1")
    with kernel.entered():
        await nft.apply(rules(attachment))


async def _macvtap(kernel: Kernel, attachment: Attachment) -> None:
    """The TAP device beside the link, which gives up its IPv6 address: the guest's neighbours must ask the guest."""
    link = await kernel.index(attachment.interface)
    await _add(kernel, TAP, kind="macvtap", link=link, macvtap_mode="bridge")
    flags = _UP | _ALLMULTI
    await kernel.ipr.link("set", index=await kernel.index(TAP), flags=flags, change=flags)
    for interface in await kernel.addresses(link):
        if interface.version == 6:
            await kernel.ipr.addr("del", index=link, address=str(interface.ip), prefixlen=interface.network.prefixlen)


async def _add(kernel: Kernel, name: str, **link: Any) -> None:
    if await kernel.link(name) is None:
        await kernel.ipr.link("add", ifname=name, **link)


def rules(attachment: Attachment) -> str:
    """The rules of `nat`, as one transaction that replaces those of before."""
    link = attachment.interface
    own = [("ip", it, GUEST_V4.ip) if it.version == 4 else ("ip6", it, GUEST_V6.ip) for it in attachment.addresses]
    out = "\n".join(f'    oifname "{link}" snat {family} to {address}' for family, address, _ in own)
    back = "\n".join(
        f'    iifname "{link}" {family} daddr {address} dnat {family} to {guest}' for family, address, guest in own
    )
    return (
        "table inet edge_guest\ndelete table inet edge_guest\ntable inet edge_guest {\n"
        f"  chain back {{\n    type nat hook prerouting priority dstnat;\n{back}\n  }}\n"
        f"  chain out {{\n    type nat hook postrouting priority srcnat;\n{out}\n  }}\n}}\n"
    )
