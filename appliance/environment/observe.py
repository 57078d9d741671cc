"""Reads what there is, for `plan` to compare with what is wanted."""

from appliance.environment import names, plan
from appliance.environment.addresses import IPNetwork
from appliance.environment.namespace import Namespace
from appliance.environment.netlink import Kernel, destination
from appliance.environment.plan import AttachmentActual, Link, NodeActual, NodeWanted, Place

VERSIONS = (4, 6)


async def node(kernel: Kernel, wanted: NodeWanted) -> NodeActual:
    """The node's part of the environment."""
    ipv6 = kernel.has_ipv6()
    sysctls = kernel.sysctls(plan.node_sysctls(wanted, ipv6))
    is_router = sysctls.get(plan.FORWARDING_V6) == "1"
    bridge, tun = await kernel.link(wanted.bridge), await kernel.link(wanted.tun)
    veths = await _veths(kernel, bridge)
    return NodeActual(
        ipv6=ipv6,
        bridge=bridge,
        tun=tun,
        gateways=frozenset() if bridge is None else await kernel.addresses(bridge.index),
        tun_addresses=frozenset() if tun is None else await kernel.addresses(tun.index),
        overlay=frozenset() if tun is None else await _overlay(kernel, tun),
        veths=veths,
        guards={it.name: await kernel.guard(it.index) for it in veths if it.record is not None},
        advertised=_advertised(kernel) if ipv6 and not is_router else (),
        sysctls=sysctls,
    )


async def veth(kernel: Kernel, name: str) -> Link | None:
    """The node's end of one container's link, None if there is none that we made."""
    link = await kernel.link(name)
    return link if link is not None and _is_ours(link) else None


async def attachment(node: Kernel, container: Kernel, namespace: Namespace, bridge: str, name: str) -> AttachmentActual:
    """A container's link, by the name of the node's end, and the container around it."""
    link, inside = await veth(node, name), await container.links()
    peer = None if link is None else await _peer(node, namespace, link, inside)
    by_link = await _destinations(container)
    elsewhere = (to for index, to in by_link if peer is None or index != peer.index)
    return AttachmentActual(
        ipv6=node.has_ipv6(),
        bridge=await node.link(bridge),
        veth=link,
        gro=link is not None and node.gro(name),
        guard="" if link is None else await node.guard(link.index),
        peer=peer,
        names=frozenset(it.name for it in inside),
        loopback_up=any(it.name == "lo" and it.up for it in inside),
        addresses=frozenset() if peer is None else await container.addresses(peer.index),
        routes=frozenset(to for index, to in by_link if peer is not None and index == peer.index),
        defaults=frozenset(to.version for to in elsewhere if to.prefixlen == 0),
        sysctls={} if peer is None else _sysctls(node, container, name, peer.name),
    )


async def offer(node: Kernel, bridge: str, name: str) -> AttachmentActual:
    """The node's end of a link whose other end is no matter of ours."""
    return AttachmentActual(ipv6=node.has_ipv6(), bridge=await node.link(bridge), veth=await veth(node, name))


async def _veths(kernel: Kernel, bridge: Link | None) -> tuple[Link, ...]:
    """The node's ends of containers' links that we made, half-made ones too.

    Another appliance may share the namespace: what is on its bridge is not ours.
    """
    masters = (0,) if bridge is None else (0, bridge.index)
    return tuple(link for link in await kernel.veths() if _is_ours(link) and link.master in masters)


def _is_ours(link: Link) -> bool:
    return link.kind == "veth" and link.group == plan.LINK_GROUP and names.is_veth_name(link.name)


async def _overlay(kernel: Kernel, tun: Link) -> frozenset[IPNetwork]:
    """Where our routes into the TUN lead."""
    routes = [it for version in VERSIONS for it in await kernel.routes(version, oif=tun.index)]
    ours = (it for it in routes if it.get("oif") == tun.index and it["proto"] == plan.ROUTE_PROTOCOL)
    return frozenset(destination(it) for it in ours)


def _advertised(kernel: Kernel) -> tuple[str, ...]:
    """Links that take router advertisements only while they do not forward."""
    directory = "net/ipv6/conf"
    return tuple(
        link
        for link in kernel.ipv6_links()
        if kernel.sysctl(f"{directory}/{link}/accept_ra") == "1"
        and kernel.sysctl(f"{directory}/{link}/forwarding") == "0"
        and link != "lo"
    )


async def _peer(node: Kernel, namespace: Namespace, link: Link, inside: list[Link]) -> Link | None:
    """The other end of a link, if it is in this very container: indices alone are alike everywhere."""
    if link.peer_namespace < 0 or link.peer_namespace != await node.namespace_id(namespace):
        return None
    return next((it for it in inside if it.index == link.peer and it.peer == link.index), None)


async def _destinations(kernel: Kernel) -> list[tuple[int, IPNetwork]]:
    """The index of a link, and where a route out of it leads."""
    routes = [it for version in VERSIONS for it in await kernel.routes(version)]
    return [(it.get("oif") or 0, destination(it)) for it in routes]


def _sysctls(node: Kernel, container: Kernel, name: str, interface: str) -> dict[tuple[Place, str], str]:
    kernels = {Place.NODE: node, Place.CONTAINER: container}
    paths = plan.attachment_sysctls(name, interface)
    values = ((place, path, kernels[place].sysctl(path)) for place, path in paths)
    return {(place, path): value for place, path, value in values if value is not None}
