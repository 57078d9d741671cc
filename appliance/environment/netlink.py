"""The kernel as seen from one network namespace, and the executor of commands.

Theory of operation
-------------------
A `Kernel` owns one netlink socket, opened in its namespace, and nothing else; it lives no longer than the
operation it is opened for. `Executor` carries out one command at a time in the namespace that the command
names; where the kernel refuses, EnvironmentError_ says which command, and why.

Kept in mind about pyroute2 and rtnetlink:
- one socket carries one dump at a time (EBUSY otherwise): an operation asks in sequence, and operations
  do not share sockets;
- pyroute2 filters a dump in Python, unless `dump_filter` is given, which lets the attributes through to
  the kernel's own filter (NETLINK_GET_STRICT_CHK); the results are checked here all the same;
- a dump that changed under way is flagged (NLM_F_DUMP_INTR), which pyroute2 does not look at: it is
  repeated here, at most `DUMP_ATTEMPTS` times;
- `netns=` of AsyncIPRoute forks a process, and makes the namespace if there is none: not used.
"""

import asyncio
import errno
import os
import time
from collections.abc import AsyncIterator, Awaitable, Callable, Iterable, Iterator, Mapping
from contextlib import asynccontextmanager, contextmanager, nullcontext
from ipaddress import ip_interface, ip_network
from pathlib import Path
from socket import AF_INET, AF_INET6, AF_UNSPEC
from typing import Any, Final, assert_never

from pyroute2 import AsyncIPRoute, NetlinkError
from pyroute2.ethtool.ioctl import IoctlEthtool
from pyroute2.netlink import NLM_F_DUMP_INTR, rtnl

from appliance.dataplane import bpf
from appliance.environment import guard, plan
from appliance.environment.addresses import IPAddress, IPInterface, IPNetwork, default_route
from appliance.environment.errors import EnvironmentError_
from appliance.environment.hints import AddressEvent, Event, LinkEvent, RouteEvent
from appliance.environment.namespace import Namespace
from appliance.environment.plan import Command, Link, Place

SYSCTL_ROOT: Final = Path("/proc/sys")
DUMP_ATTEMPTS: Final = 20
"""Other programs change links too; a dump takes milliseconds, so that 20 misses mean something is wrong."""
CARRIER_S: Final = 5.0
"""The kernel puts a carrier into force within milliseconds, or within a second if it has done so for many links."""
CARRIER_POLL_S: Final = 0.001

_MAIN_TABLE: Final = 254
_SKIP_STATS: Final = 1 << 3  # RTEXT_FILTER_SKIP_STATS: half of a link's description, unused here
_NODAD: Final = 0x02  # IFA_F_NODAD
_UP: Final = 0x1  # IFF_UP
_RUNNING: Final = 0x40  # IFF_RUNNING: the carrier that IFF_LOWER_UP tells of is in force (netif_oper_up)
_CLONED: Final = 0x200  # RTM_F_CLONED: an entry of the kernel's cache, no route
_UNIVERSE_SCOPE: Final = 0  # RT_SCOPE_UNIVERSE
_LINK_SCOPE: Final = 253  # RT_SCOPE_LINK
_UNICAST: Final = 1  # RTN_UNICAST
_INGRESS: Final = 0xFFFFFFF2  # TC_H_CLSACT, TC_H_MIN_INGRESS
_ANY_PROTOCOL: Final = 0x0003  # ETH_P_ALL
_GRO: Final = "generic-receive-offload"
_REASONS: Final = {
    errno.EXFULL: "the bridge has 1023 ports already, the kernel's limit",
    errno.ENODEV: "no such link",
}

Message = Mapping[str, Any]
"""A netlink message as pyroute2 has it: fields and attributes by name."""


class Kernel:
    """Links, addresses, routes and sysctls of one namespace. Only inside `namespace.apart`."""

    def __init__(self, ipr: AsyncIPRoute, namespace: Namespace | None) -> None:
        self.ipr = ipr
        self._namespace = namespace

    @classmethod
    @asynccontextmanager
    async def open(cls, namespace: Namespace | None = None) -> AsyncIterator["Kernel"]:
        """The kernel in a namespace, by default the calling thread's. What it refuses in the body comes
        out as EnvironmentError_."""
        try:
            with nullcontext() if namespace is None else namespace.entered():
                ipr = AsyncIPRoute(ext_ack=True, strict_check=True)
                ipr.fileno()  # the socket opens at its first use: that is to be here
            async with ipr:
                await ipr.setup_endpoint()
                yield cls(ipr, namespace)
        except (NetlinkError, OSError) as error:
            raise EnvironmentError_(f"kernel: {reason(error)}") from error

    @contextmanager
    def entered(self) -> Iterator[None]:
        """The calling thread is in this namespace."""
        with nullcontext() if self._namespace is None else self._namespace.entered():
            yield

    async def links(self, **filters: Any) -> list[Link]:
        """All links, or those that the kernel selects."""
        messages = await self._dump(self.ipr.link, ext_mask=_SKIP_STATS, **filters)
        return [_link(message) for message in messages]

    async def veths(self) -> list[Link]:
        """The links that are one end of a pair."""
        links = await self.links(linkinfo={"attrs": [["IFLA_INFO_KIND", "veth"]]})
        return [link for link in links if link.kind == "veth"]

    async def link(self, name: str) -> Link | None:
        """One link, None if there is none of that name."""
        try:
            (message,) = await self.ipr.link("get", ifname=name, ext_mask=_SKIP_STATS)
        except NetlinkError as error:
            if error.code == errno.ENODEV:
                return None
            raise
        return _link(message)

    async def index(self, name: str) -> int:
        """A link's index. Raises NetlinkError (ENODEV)."""
        (message,) = await self.ipr.link("get", ifname=name, ext_mask=_SKIP_STATS)
        return int(message["index"])

    async def addresses(self, index: int) -> frozenset[IPInterface]:
        """A link's addresses, without link-local ones."""
        messages = await self._dump(self.ipr.addr, index=index)
        mine = (it for it in messages if it["index"] == index and it["scope"] != _LINK_SCOPE)
        return frozenset(ip_interface(f"{_address(it)}/{it['prefixlen']}") for it in mine)

    async def routes(self, version: int, **filters: Any) -> list[Message]:
        """The main table's routes of an IP version, or those that the kernel selects."""
        family = AF_INET if version == 4 else AF_INET6
        messages = await self._dump(self.ipr.route, family=family, table=_MAIN_TABLE, **filters)
        return [it for it in messages if it["family"] == family and it.get("table") == _MAIN_TABLE]

    async def guard(self, index: int) -> str:
        """The name of the filter that guards a link; empty if none does."""
        try:
            found = [it async for it in await self.ipr.get_filters(index=index, parent=_INGRESS)]
        except NetlinkError as error:
            if error.code not in (errno.EINVAL, errno.ENOENT, errno.ENODEV):  # no clsact; the link is gone
                raise
            return ""
        ours = (it for it in found if it["handle"] == guard.HANDLE and it["info"] >> 16 == guard.PRIORITY)
        return next((str(it.get_nested("TCA_OPTIONS", "TCA_BPF_NAME")) for it in ours), "")

    async def forged(self) -> dict[int, int]:
        """How many frames of links with a guard were dropped where they came in, by index."""
        found = [it async for it in await self.ipr.get_qdiscs() if it.get("kind") == "clsact"]
        return {it["index"]: it.get_nested("TCA_STATS2", "TCA_STATS_QUEUE")["drops"] for it in found}

    async def namespace_id(self, namespace: Namespace) -> int | None:
        """The number by which this namespace knows another one, None if it does not."""
        answer = await self.ipr.get_netnsid(fd=namespace.fd)
        number = None if answer is None else answer["nsid"]
        return None if number is None or number == 0xFFFFFFFF or number < 0 else int(number)

    def sysctl(self, path: str) -> str | None:
        """A value below /proc/sys, None if there is none."""
        try:
            with self.entered():
                return (SYSCTL_ROOT / path).read_text().strip()
        except FileNotFoundError:
            return None

    def sysctls(self, paths: Iterable[str]) -> dict[str, str]:
        """Those of the values that exist."""
        values = ((path, self.sysctl(path)) for path in paths)
        return {path: value for path, value in values if value is not None}

    def set_sysctl(self, path: str, value: str) -> None:
        """Writes a value below /proc/sys. Raises OSError."""
        with self.entered(), (SYSCTL_ROOT / path).open("w") as file:
            file.write(value)

    def has_ipv6(self) -> bool:
        """Whether the kernel was started with IPv6."""
        return (SYSCTL_ROOT / "net/ipv6/conf/all").is_dir()

    def ipv6_links(self) -> list[str]:
        """Names of the links that IPv6 knows."""
        with self.entered():
            directories = [path.name for path in (SYSCTL_ROOT / "net/ipv6/conf").iterdir()]
        return sorted(set(directories) - {"all", "default"})

    def gro(self, link: str) -> bool:
        """Whether a link joins the segments that it receives. Raises OSError."""
        with self.entered(), _ethtool(link) as device:
            return bool(device.get_offload_flags()[_GRO])

    def enable_gro(self, link: str) -> None:
        """Makes a link join the segments that it receives. Raises OSError."""
        with self.entered(), _ethtool(link) as device:
            device.set_offload_flag(_GRO, 1)

    async def _dump(self, request: Callable[..., Awaitable[Any]], **query: Any) -> list[Message]:
        for _ in range(DUMP_ATTEMPTS):
            try:
                messages = [it async for it in await request("dump", dump_filter=_everything, **query)]
            except NetlinkError as error:
                if error.code != errno.ENOENT:  # the main table, before the first route
                    raise
                return []
            if not any(it["header"]["flags"] & NLM_F_DUMP_INTR for it in messages):
                return messages
        raise EnvironmentError_(f"netlink: expected a dump without changes within {DUMP_ATTEMPTS} attempts")


class Executor:
    """Carries out commands, each in the namespace that it names."""

    def __init__(self, node: Kernel, container: Kernel | None = None, namespace: Namespace | None = None) -> None:
        self._node = node
        self._container = container
        self._namespace = namespace
        self._indices: dict[tuple[Place, str], int] = {}
        """Of links that commands named; none after a link was made or removed."""

    async def carry_out(self, command: Command) -> None:
        """Raises EnvironmentError_ if the kernel refuses."""
        if isinstance(command, plan.CreateBridge | plan.CreateVeth | plan.DeleteLink):
            self._indices.clear()
        try:
            await self._dispatch(command)
        except (NetlinkError, OSError) as error:
            raise EnvironmentError_(f"{plan.describe(command)}: {reason(error)}") from error

    async def _dispatch(self, command: Command) -> None:
        node = self._node
        match command:
            case plan.CreateBridge(link, mac):
                await node.ipr.link("add", ifname=link, kind="bridge", address=mac, group=plan.LINK_GROUP)
            case plan.CreateVeth():
                await self._create_veth(command)
            case plan.DeleteLink(link):
                await self._delete(link)
            case plan.SetMtu(place, link, mtu):
                await self._set(place, link, mtu=mtu)
            case plan.SetTxQueueLength(link, packets):
                await self._set(Place.NODE, link, txqlen=packets)
            case plan.SetMaster(link, bridge):
                await self._set(Place.NODE, link, master=await node.index(bridge))
            case plan.SetUp(place, link):
                await self._set(place, link, state="up")
            case plan.AwaitCarrier(place, link):
                await self._carrier(place, link)
            case plan.EnableGro(link):
                node.enable_gro(link)
            case plan.Guard(link, addresses):
                await self._guard(await node.index(link), addresses)
            case plan.SetRecord(link, record):
                await self._set(Place.NODE, link, ifalias=record)
            case plan.AddAddress(place, link, interface):
                await self._address("add", place, link, interface)
            case plan.RemoveAddress(link, interface):
                with _or_gone(errno.EADDRNOTAVAIL):
                    await self._address("del", Place.NODE, link, interface)
            case plan.AddRoute(place, link, destination, gateway):
                via = {} if gateway is None else {"gateway": str(gateway)}
                await self._route("add", place, link, destination, **via)
            case plan.RemoveRoute(link, destination):
                with _or_gone(errno.ESRCH):
                    await self._route("del", Place.NODE, link, destination)
            case plan.SetSysctl(place, path, value):
                self._kernel(place).set_sysctl(path, value)
            case _:
                assert_never(command)

    def _kernel(self, place: Place) -> Kernel:
        kernel = self._node if place is Place.NODE else self._container
        assert kernel is not None, f"a command for the {place} in a plan without one"
        return kernel

    async def _index(self, place: Place, link: str) -> int:
        """A link's index, asked for once: half of the round trips of an attachment would be for that. Raises
        NetlinkError (ENODEV)."""
        if (place, link) not in self._indices:
            self._indices[place, link] = await self._kernel(place).index(link)
        return self._indices[place, link]

    async def _create_veth(self, command: plan.CreateVeth) -> None:
        """One request makes both ends, each where it belongs: neither is ever seen anywhere else."""
        assert self._namespace is not None
        peer = {
            "ifname": command.peer,
            "net_ns_fd": self._namespace.fd,
            "address": command.mac,
            "mtu": command.mtu,
            "gso_max_size": plan.super_packet_max(command.mtu),
            "group": plan.LINK_GROUP,
        }
        await self._node.ipr.link(
            "add",
            ifname=command.link,
            kind="veth",
            master=await self._node.index(command.bridge),
            mtu=command.mtu,
            group=plan.LINK_GROUP,
            peer=peer,
        )

    async def _guard(self, index: int, addresses: tuple[IPAddress, ...]) -> None:
        """The kernel keeps the program as long as the filter."""
        ipr = self._node.ipr
        try:
            await ipr.tc("add", "clsact", index)
        except NetlinkError as error:
            if error.code != errno.EEXIST:
                raise
        program = bpf.load(bpf.CLASSIFIER, guard.program(addresses), "edge_guard")
        try:
            await ipr.tc(
                "replace-filter",
                "bpf",
                index,
                fd=program,
                name=guard.name(addresses),
                direct_action=True,
                parent=_INGRESS,
                prio=guard.PRIORITY,
                protocol=_ANY_PROTOCOL,
                handle=guard.HANDLE,
            )
        finally:
            os.close(program)

    async def _delete(self, link: str) -> None:
        with _or_gone():
            await self._node.ipr.link("del", ifname=link)

    async def _set(self, place: Place, link: str, **values: Any) -> None:
        kernel = self._kernel(place)
        await kernel.ipr.link("set", index=await self._index(place, link), **values)

    async def _carrier(self, place: Place, link: str) -> None:
        """Linux 6.8 and later see to it when asked for the link."""
        kernel, deadline = self._kernel(place), time.monotonic() + CARRIER_S
        while (found := await kernel.link(link)) is None or not found.carrier:
            if time.monotonic() > deadline:
                raise OSError(errno.ENETDOWN, f"expected to pass packets within {CARRIER_S:g} s")
            await asyncio.sleep(CARRIER_POLL_S)

    async def _address(self, verb: str, place: Place, link: str, interface: IPInterface) -> None:
        kernel = self._kernel(place)
        flags = {"flags": _NODAD} if interface.version == 6 and verb == "add" else {}
        await kernel.ipr.addr(
            verb,
            index=await self._index(place, link),
            address=str(interface.ip),
            prefixlen=interface.network.prefixlen,
            **flags,
        )

    async def _route(self, verb: str, place: Place, link: str, destination: IPNetwork, **more: str) -> None:
        kernel = self._kernel(place)
        await kernel.ipr.route(
            verb,
            family=AF_INET if destination.version == 4 else AF_INET6,
            dst=str(destination),
            oif=await self._index(place, link),
            proto=plan.ROUTE_PROTOCOL,
            scope=_UNIVERSE_SCOPE if more or destination.version == 6 else _LINK_SCOPE,
            **more,
        )


@contextmanager
def _or_gone(*codes: int) -> Iterator[None]:
    """What is to be removed may be gone by itself since it was looked at: a TUN link, and all that is on it, ends with
    the last process that has it open. ``codes``: how the kernel says so, besides ENODEV."""
    try:
        yield
    except NetlinkError as error:
        if error.code not in (errno.ENODEV, *codes):
            raise


def reason(error: NetlinkError | OSError) -> str:
    """Why the kernel refused, in words."""
    code = error.code if isinstance(error, NetlinkError) else error.errno
    return _REASONS.get(code or 0) or str(error.args[-1] if len(error.args) > 1 else error)


def destination(route: Message) -> IPNetwork:
    """A route's destination; a default route has no attribute for it."""
    version = 4 if route["family"] == AF_INET else 6
    dst = route.get("dst")
    return default_route(version) if dst is None else ip_network(f"{dst}/{route['dst_len']}")


def event(message: Message) -> Event | None:
    """What a notification says, None if it is none that matters here: a bridge's view of its ports, the routes
    that the kernel keeps for addresses, anything of link scope."""
    match message["header"]["type"]:
        case rtnl.RTM_NEWLINK | rtnl.RTM_DELLINK as kind if message["family"] == AF_UNSPEC:
            return LinkEvent(_link(message), deleted=kind == rtnl.RTM_DELLINK)
        case rtnl.RTM_NEWADDR | rtnl.RTM_DELADDR if message["scope"] != _LINK_SCOPE:
            return AddressEvent(message["index"])
        case rtnl.RTM_NEWROUTE | rtnl.RTM_DELROUTE if _is_route(message):
            return RouteEvent(message.get("oif") or 0, message["proto"])
    return None


def _is_route(message: Message) -> bool:
    """Whether packets can leave by it: not if it is local, cached, or for link-local addresses."""
    link_local = destination(message).is_link_local
    return message["type"] == _UNICAST and not message["flags"] & _CLONED and not link_local


def _everything(_: Message) -> bool:
    """Given as pyroute2's filter, so that it leaves the query's attributes to the kernel."""
    return True


@contextmanager
def _ethtool(link: str) -> Iterator[IoctlEthtool]:
    device = IoctlEthtool(link)
    try:
        yield device
    finally:
        device.close()


def _link(message: Message) -> Link:
    info = message.get("linkinfo") or {}
    return Link(
        name=message.get("ifname", ""),
        index=message["index"],
        kind=info.get("kind") or "",
        up=bool(message["flags"] & _UP),
        mtu=message.get("mtu", 0),
        txqueuelen=message.get("txqlen", 0),
        mac=message.get("address", ""),
        master=message.get("master", 0),
        group=message.get("group", 0),
        alias=message.get("ifalias", ""),
        peer=message.get("link", 0),
        peer_namespace=message.get("link_netnsid", -1),
        carrier=bool(message["flags"] & _RUNNING),
    )


def _address(message: Message) -> str:
    """The link's own address: on a point-to-point link the plain attribute is the other end's."""
    return str(message.get("local") or message.get("address"))
