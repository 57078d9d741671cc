"""``closest`` services, arranged by the nodes of their instances: pure functions of tables and an order of nodes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace

from appliance.supervisor.rtt import Group, Node
from appliance.tables.catalogue import Host, Service
from appliance.tables.layout import IPAddress

Find = Callable[[IPAddress], Host | None]
"""The host of a namespace address."""
OWN = -1
"""Rank of this node: before all others."""


def groups(find: Find, services: Iterable[Service]) -> set[Group]:
    """For each ``closest`` service, the other nodes on which it has instances that may be chosen."""
    found = (group_of(find, service) for service in services if service.policy == "closest")
    return {group for group in found if group}


def group_of(find: Find, service: Service) -> Group:
    """The other nodes of one service."""
    backends = (find(address) for address, _ in service.weighted())
    return frozenset((host.node, host.port) for host in backends if host is not None and not host.local)


def arrange(find: Find, services: Iterable[Service], order: Callable[[Group], tuple[Node, ...]]) -> list[Service]:
    """The services, those of ``closest`` with the instances of the nearest node first: this one, then by ``order``."""
    return [_arranged(find, it, order) if it.policy == "closest" else it for it in services]


def _arranged(find: Find, service: Service, order: Callable[[Group], tuple[Node, ...]]) -> Service:
    group = group_of(find, service)
    ranks = {node: rank for rank, node in enumerate(order(group))} if group else {}
    weights = service.weights or (1,) * len(service.backends)
    ranked = [
        (_rank(find(address), weight, ranks), place, address, weight)
        for place, (address, weight) in enumerate(zip(service.backends, weights, strict=True))
    ]
    ranked.sort(key=lambda it: it[:2])
    near = sum(1 for rank, *_ in ranked if rank == ranked[0][0])
    arranged = tuple(weight for *_, weight in ranked) if service.weights else ()
    return replace(service, backends=tuple(it[2] for it in ranked), weights=arranged, near=near)


def _rank(host: Host | None, weight: int, ranks: Mapping[Node, int]) -> int:
    """Nearest first; what cannot be chosen comes last."""
    if host is None or weight == 0:
        return len(ranks)
    return OWN if host.local else ranks[(host.node, host.port)]
