"""Whether an answer of the cluster may touch a table: names and addresses are what this cluster can have.

An answer is taken as a whole or not at all. A container's address lies in the overlay and is no ServiceIP, a ServiceIP
lies in the ranges of ServiceIPs, and a node's address is one that packets can be sent to without entering the overlay
again. Everything else would let one wrong message divert traffic that is none of the overlay's.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cached_property, lru_cache
from ipaddress import IPv4Network, IPv6Network, ip_address, ip_network

from appliance.cluster.messages import JOB_NAME, ClusterNode, Instance, MessageError, SubnetworkResult, TableQueryResult
from appliance.config import inside, overlap
from appliance.tables.layout import IPAddress

Networks = tuple[IPv4Network | IPv6Network, ...]
_JOB = re.compile(JOB_NAME)


@dataclass(frozen=True)
class Subnetwork:
    """The subnets that this node's containers live in."""

    v4: IPv4Network | None
    v6: IPv6Network | None


def is_address(key: str) -> bool:
    """Whether a query's key is an address; 10.18.0.2 would make a job name too."""
    try:
        ip_address(key)
    except ValueError:
        return False
    return True


def check_job(name: str) -> str:
    """A job's name. Raises MessageError."""
    if not _JOB.fullmatch(name) or is_address(name):
        raise MessageError(f"job: expected a name of four parts such as app.ns.service.ns, got {name[:80]!r}")
    return name


class Spans:
    """Networks by their first and last number: a large cluster's answers hold 500,000 addresses to be looked at."""

    def __init__(self, networks: Networks) -> None:
        self._of: dict[int, list[tuple[int, int]]] = {4: [], 6: []}
        for network in networks:
            self._of[network.version].append((int(network.network_address), int(network.broadcast_address)))

    def __contains__(self, address: IPAddress) -> bool:
        number = int(address)
        return any(first <= number <= last for first, last in self._of[address.version])


@dataclass(frozen=True)
class Ranges:
    """The cluster's address plan, as the configuration has it."""

    overlay: Networks
    services: Networks

    @cached_property
    def _overlay(self) -> Spans:
        return Spans(self.overlay)

    @cached_property
    def _services(self) -> Spans:
        return Spans(self.services)

    def check_result(self, result: TableQueryResult) -> None:
        """Raises MessageError with the first field that no table may have."""
        if result.job:
            check_job(result.job)
        elif result.instances:
            raise MessageError("app_name: expected a name, as there are instances")
        for index, instance in enumerate(result.instances):
            self._check_instance(f"instance_list.{index}", instance)

    def check_node(self, node: ClusterNode) -> None:
        """Raises MessageError with the first field that no table may have."""
        if not self._is_underlay(node.address):
            raise MessageError(f"host_ip: expected an address outside of the overlay, got {node.address}")
        for index, subnet in enumerate(node.subnets):
            if not inside(subnet, self.overlay):
                raise MessageError(f"subnets.{index}: expected a subnet in the overlay, got {subnet}")

    def _check_instance(self, where: str, instance: Instance) -> None:
        for name, address in (("namespace_ip", instance.address_v4), ("namespace_ip_v6", instance.address_v6)):
            if address is not None and not self._is_container(address):
                raise MessageError(f"{where}.{name}: expected a container's address in the overlay, got {address}")
        if instance.node is not None and not self._is_underlay(instance.node):
            raise MessageError(f"{where}.host_ip: expected an address outside of the overlay, got {instance.node}")
        for index, service_ip in enumerate(instance.service_ips):
            for address in (service_ip.v4, service_ip.v6):
                if address is not None and address not in self._services:
                    wanted = "expected an address in network.services"
                    raise MessageError(f"{where}.service_ip.{index}: {wanted}, got {address}")

    def subnetwork(self, result: SubnetworkResult) -> Subnetwork:
        """The subnets of an answer. Raises MessageError."""
        if result.v4 is None and result.v6 is None:
            raise MessageError("address: expected a network address, or one in addressv6")
        for name, address, prefix in (
            ("address", result.v4, result.prefix_v4),
            ("addressv6", result.v6, result.prefix_v6),
        ):
            if address is not None:
                self._check_subnet(name, address, prefix)
        return Subnetwork(
            None if result.v4 is None else IPv4Network((result.v4, result.prefix_v4)),
            None if result.v6 is None else IPv6Network((result.v6, result.prefix_v6)),
        )

    def _check_subnet(self, name: str, address: IPAddress, prefix: int) -> None:
        try:
            network = ip_network((str(address), prefix))
        except ValueError:
            raise MessageError(f"{name}: expected the first address of a /{prefix}, got {address}") from None
        if not inside(network, self.overlay) or any(overlap(network, services) for services in self.services):
            raise MessageError(f"{name}: expected a subnet in the overlay, got {network}")

    def _is_container(self, address: IPAddress) -> bool:
        return address in self._overlay and address not in self._services

    def _is_underlay(self, address: IPAddress) -> bool:
        return _is_somewhere(address) and address not in self._overlay


@lru_cache(1024)
def _is_somewhere(address: IPAddress) -> bool:
    """Whether packets can be sent to an address at all; many instances share a node's."""
    return not (address.is_unspecified or address.is_loopback or address.is_multicast or address.is_reserved)
