"""Exposed services on this node: from what the cluster says of jobs to node ports.

Theory of operation
-------------------
*Owns* which exposed ports this node has, and the node's own place in the overlay. *Runs* in the supervisor's event
loop; one update at a time, and once more if something changed meanwhile.

A job's answer says which ports nodes open for it (``messages.Exposure``); ``wanted`` picks those of this node. A port
leads

- to the job's ServiceIP of the policy that it names: into the overlay, to an instance on any node, balanced by the
  workers. The instance sees the node's own address in the overlay as its client;
- or, where it prefers instances of its own node and there are some, straight to these, in turns. They see the client.

*The node's own address* is the last of its subnet (``addresses.ingress_of``). For workers and other nodes it is that of
an instance like any other: the only one of the job ``topics.ingress_job``, which the node announces when it has a port
that needs it, and withdraws with the last one. Until the tables have it such ports wait.

A port that a container or a listening program has is not opened; ``status`` says why, and it is tried again every
``AGAIN_S`` seconds.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

from appliance.cluster import topics
from appliance.cluster.feed import Tables
from appliance.cluster.messages import Exposure, TableQueryResult
from appliance.environment.addresses import IPAddress, v4_of, v6_of
from appliance.environment.firewall import NodePort, Target
from appliance.environment.manager import EnvironmentManager
from appliance.supervisor.membership import Membership
from appliance.supervisor.ports import Ports
from appliance.supervisor.publication import Publication
from appliance.tables.catalogue import Catalogue
from appliance.tasks import end

log = logging.getLogger(__name__)

AGAIN_S: Final = 2.0

Jobs = Mapping[str, TableQueryResult]


@dataclass(frozen=True)
class Here:
    """What of this node decides about its ports: its id, its containers' addresses, its own in the overlay."""

    node: str
    containers: frozenset[IPAddress]
    ingress: tuple[IPAddress, ...]


# --- Pure ---------------------------------------------------------------------------------------------------------


def wanted(jobs: Iterable[TableQueryResult], here: Here) -> list[NodePort]:
    """The node's ports, by job; of two for one port the first counts."""
    found: dict[tuple[object, ...], NodePort] = {}
    for job in sorted(jobs, key=lambda job: job.job):
        for exposure in job.exposed:
            for it in _ports(job, exposure, here):
                found.setdefault((it.protocol, it.port, it.address, it.version), it)
    return list(found.values())


def needs_ingress(jobs: Iterable[TableQueryResult], here: Here) -> bool:
    """Whether a port of this node leads into the overlay."""
    return any(
        is_here(job, it, here) and not (it.prefer == "local" and _own(job, here)) for job in jobs for it in job.exposed
    )


def is_here(job: TableQueryResult, exposure: Exposure, here: Here) -> bool:
    """Whether this node opens a port."""
    if exposure.nodes == "hosting":
        return bool(_own(job, here))
    return exposure.nodes == "all" or here.node in exposure.nodes


def _ports(job: TableQueryResult, exposure: Exposure, here: Here) -> Iterator[NodePort]:
    if not is_here(job, exposure, here):
        return
    own = _own(job, here) if exposure.prefer == "local" else []
    for version in (4, 6) if exposure.address is None else (exposure.address.version,):
        near = [it for it in own if it.version == version]
        far = [it for it in _service_ips(job, exposure) if it.version == version and _has(here.ingress, version)]
        targets = tuple(Target(it, exposure.target) for it in near or far[:1])
        if targets:
            yield NodePort(exposure.protocol, exposure.port, targets, exposure.address)


def _has(addresses: Iterable[IPAddress], version: int) -> bool:
    return any(it.version == version for it in addresses)


def _own(job: TableQueryResult, here: Here) -> list[IPAddress]:
    """Addresses of this node's instances that may be chosen."""
    chosen = (it for it in job.instances if it.state == "up" and it.weight > 0)
    both = (address for it in chosen for address in (it.address_v4, it.address_v6))
    return [it for it in both if it is not None and it in here.containers]


def _service_ips(job: TableQueryResult, exposure: Exposure) -> list[IPAddress]:
    """The addresses of the ServiceIP that a port leads to."""
    listed = [*job.service_ips, *(it for instance in job.instances for it in instance.service_ips)]
    balanced = [it for it in listed if not it.is_instance]
    policy = exposure.policy or job.default_policy or (balanced[0].policy if balanced else "")
    return [address for it in balanced if it.policy == policy for address in (it.v4, it.v6) if address is not None]


# --- Carrying out -------------------------------------------------------------------------------------------------


class Ingress:
    """See the module."""

    def __init__(
        self,
        environment: EnvironmentManager,
        membership: Membership,
        publication: Publication,
        catalogue: Catalogue,
        ports: Ports,
    ) -> None:
        self._environment = environment
        self._membership = membership
        self._publication = publication
        self._catalogue = catalogue
        self._ports = ports
        self._with_ports: set[str] = set()
        self._announced: tuple[object, str, tuple[IPAddress, ...]] | None = None
        self._refused: dict[str, str] = {}
        self._opened: list[NodePort] = []
        self._asked = asyncio.Event()
        self._task: asyncio.Task[None] | None = None
        self._again: asyncio.TimerHandle | None = None

    def start(self) -> None:
        """Opens what is known, and follows what changes."""
        self._task = asyncio.create_task(self._run(), name="ingress")
        self.changed(Tables(self._publication.jobs, frozenset(self._publication.jobs)))

    async def stop(self) -> None:
        """Ends; the ports stay."""
        if self._task is not None:
            await end({self._task})
        if self._again is not None:
            self._again.cancel()

    def changed(self, tables: Tables) -> None:
        """These jobs are other ones now."""
        concerned = False
        for job in tables.changed:
            result = tables.jobs.get(job)
            had, has = job in self._with_ports, result is not None and bool(result.exposed)
            concerned |= had or has or job == self._job()
            (self._with_ports.add if has else self._with_ports.discard)(job)
        if concerned:
            self._asked.set()

    async def _run(self) -> None:
        while True:
            await self._asked.wait()
            self._asked.clear()
            try:
                await self._update()
            except Exception:
                log.exception("exposed ports are not as wanted")
                self._refused = {"all": "see the log"}
            if self._again is not None:
                self._again.cancel()  # each of them would begin its own series
                self._again = None
            if self._refused:
                self._again = asyncio.get_running_loop().call_later(AGAIN_S, self._asked.set)

    async def _update(self) -> None:
        known = self._publication.jobs  # one copy of everything
        jobs = [result for name in sorted(self._with_ports) if (result := known.get(name)) is not None]
        here = self._here()
        await self._announce(needed=needs_ingress(jobs, here))
        found = wanted(jobs, here)
        taken = await self._ports.expose(found, with_ingress=bool(here.ingress))
        self._opened = [it for it in found if (it.protocol, it.port) not in taken]
        refused = {f"{port}/{protocol}": why for (protocol, port), why in taken.items()}
        for port, why in refused.items():
            if self._refused.get(port) != why:
                log.warning("port not opened", extra={"port": port, "error": why})
        self._refused = refused

    def _here(self) -> Here:
        containers = frozenset(address for it in self._environment.attachments() for address in it.addresses)
        hosts = self._catalogue.hosts
        works = tuple(it for it in self._ports.ingress if it in hosts and hosts[it].local and hosts[it].instance_ip)
        return Here(self._node(), containers, works)

    def _node(self) -> str:
        return "" if self._membership.identity is None else self._membership.identity.node

    def _job(self) -> str:
        return topics.ingress_job(self._node())

    async def _announce(self, *, needed: bool) -> None:
        """The node is an instance of the overlay, or not any more."""
        member, addresses = self._membership.member, self._ports.ingress
        wish = (member, self._job(), addresses) if needed and member is not None and addresses else None
        if wish == self._announced:
            return
        if wish is not None and member is not None:
            await member.deployed(self._job(), 0, v4_of(addresses), v6_of(addresses))
        elif member is not None and self._announced is not None:
            await member.undeployed(self._announced[1], 0)
        self._announced = wish

    def status(self) -> dict[str, Any]:
        """What operators see."""
        return {
            "address": [str(it) for it in self._ports.ingress] if self._announced else [],
            "ports": [_spoken(it) for it in self._opened],
            "refused": self._refused,
        }


def _spoken(port: NodePort) -> dict[str, Any]:
    return {
        "port": port.port,
        "protocol": port.protocol,
        "address": None if port.address is None else str(port.address),
        "targets": [
            f"[{it.address}]:{it.port}" if port.version == 6 else f"{it.address}:{it.port}" for it in port.targets
        ],
    }
