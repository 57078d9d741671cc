"""What is known of the names of all zones, and what a question finds there. Pure: no input, no output, no clock.

*Owned* by the resolver's event loop; ``update`` is the only writer. Besides the services by name there are indices
for addresses (PTR), for DNS-SD types, and the number of services below each name between a service and its zone: such
a name exists, and has NODATA. NXDOMAIN for it would deny all the names below it (RFC 8020).

Two jobs that differ in case only are one name; the first by spelling has it. So has the first of two jobs that claim
one address, as in the tables.

What `find` gives depends on the services alone, so whoever keeps it has to forget it when `update` names its job; what
depends on more than one service has no job, and is to be forgotten at any change.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import dns.rdtypes.ANY.HINFO
import dns.rdtypes.ANY.SOA
import dns.rdtypes.ANY.TXT
import dns.rdtypes.IN.SRV
from dns.name import Name
from dns.rdataclass import IN
from dns.rdatatype import AAAA, HINFO, NS, PTR, SOA, SRV, TXT, A

from appliance.naming import names
from appliance.naming.names import Labels
from appliance.naming.service import Addresses, Port, Service
from appliance.tables.layout import IPAddress, IPNetwork

NAME_SERVER: Final = (b"ns",)
BROWSE: Final = (b"_services", b"_dns-sd", b"_udp")
DOMAINS: Final = frozenset((kind, b"_dns-sd", b"_udp") for kind in (b"b", b"lb", b"db"))
"""Which domain to browse (RFC 6763 section 11): this one."""
PROTOCOLS: Final = frozenset({b"_tcp", b"_udp"})
SOA_TIMES: Final = (3600, 600, 86_400)
"""Refresh, retry and expiry: nobody transfers this zone, and the form demands them."""
WhenDown = Literal["address", "nxdomain", "nodata"]


@dataclass(frozen=True, slots=True)
class Settings:
    """How to answer. The first zone is the one that PTR records lead to. ``servers`` are the resolver's addresses."""

    zones: tuple[Labels, ...] = ((b"local",),)
    ttl: int = 5
    ttl_down: int = 1
    ttl_negative: int = 2
    when_down: WhenDown = "address"
    servers: tuple[IPAddress, ...] = ()
    services: tuple[IPNetwork, ...] = ()
    overlay: tuple[IPNetwork, ...] = ()


@dataclass(frozen=True, slots=True)
class Found:
    """A name of ours. Without ``exists`` nobody has it; without records it has none at all (yet).

    ``records`` are RDATA in wire format by type; ``extra`` are records of other names that whoever asks will want.
    """

    zone: Labels
    exists: bool = True
    records: dict[int, tuple[bytes, ...]] = field(default_factory=dict)
    extra: tuple[tuple[Labels, int, bytes], ...] = ()
    ttl: int = 0
    job: str | None = None
    why: str = ""
    shared: bool = False
    """Whether others may have records of this name and type too (mDNS)."""


@dataclass(frozen=True, slots=True)
class Unknown:
    """Only the cluster knows. ``key`` is a job or an address in text."""

    key: str
    zone: Labels


class Zone:
    """See the module."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.services: dict[str, Service] = {}
        self._by_name: dict[Labels, set[str]] = {}
        self._parents: Counter[Labels] = Counter()
        self._owners: dict[IPAddress, dict[str, tuple[str | None, int | None]]] = {}
        self._types: dict[Labels, dict[bytes, str]] = {}

    # --- what is known ----------------------------------------------------------------------------------------------

    def update(self, put: Iterable[Service], gone: Iterable[str]) -> set[str]:
        """Makes services known, or forgotten. Gives the jobs of which `find` may give something else now."""
        changed: set[str] = set()
        for job in gone:
            changed |= self._remove(job)
        for service in put:
            if self.services.get(service.job) != service:
                changed |= self._remove(service.job) | {service.job}
                self._add(service)
        return changed

    def _add(self, service: Service) -> None:
        labels = names.of_job(service.job)
        self.services[service.job] = service
        self._by_name.setdefault(labels, set()).add(service.job)
        for depth in range(1, len(labels)):
            self._parents[labels[depth:]] += 1
        for address, policy, number in _addresses(service):
            self._owners.setdefault(address, {})[service.job] = (policy, number)
        for port in service.ports:
            self._types.setdefault(type_of(port), {})[names.browse_label(service.job)] = service.job

    def _remove(self, job: str) -> set[str]:
        service = self.services.pop(job, None)
        if service is None:
            return set()
        labels = names.of_job(job)
        same = self._by_name[labels]
        same.discard(job)
        if not same:
            del self._by_name[labels]
        for depth in range(1, len(labels)):
            self._parents[labels[depth:]] -= 1
            if not self._parents[labels[depth:]]:
                del self._parents[labels[depth:]]
        affected = {job, *same}
        for address, _, _ in _addresses(service):
            claims = self._owners.get(address, {})
            claims.pop(job, None)
            affected |= claims.keys()
            if not claims:
                self._owners.pop(address, None)
        for port in service.ports:
            self._forget_type(type_of(port), names.browse_label(job))
        return affected

    def _forget_type(self, kind: Labels, label: bytes) -> None:
        jobs = self._types.get(kind, {})
        jobs.pop(label, None)
        if not jobs:
            self._types.pop(kind, None)

    def service(self, labels: Labels) -> Service | None:
        """The service of four labels."""
        jobs = self._by_name.get(labels)
        return self.services[min(jobs)] if jobs else None

    # --- questions --------------------------------------------------------------------------------------------------

    def find(self, labels: Labels) -> Found | Unknown | None:
        """What a name is. None: not ours."""
        zones = (zone for zone in self.settings.zones if labels[len(labels) - len(zone) :] == zone)
        zone = max(zones, key=len, default=None)
        if zone is not None:
            return self._below(labels[: len(labels) - len(zone)], zone)
        return self._reverse(labels) if labels[-1:] == (b"arpa",) else None

    def _below(self, relative: Labels, zone: Labels) -> Found | Unknown:
        if not relative:
            return self._apex(zone)
        if relative == NAME_SERVER:
            records = _address_records(Addresses(*_one_of_each(self.settings.servers)))
            return Found(zone, True, records, ttl=self.settings.ttl, why="this resolver")
        if any(label[:1] == b"_" for label in relative):
            return self._discovery(relative, zone)
        wanted = names.meaning(relative)
        if wanted is None:
            return self._between(relative, zone)
        service = self.service(wanted.job)
        if service is None:
            return Unknown(names.job_of(wanted.job), zone)
        return self._of_service(service, wanted, zone)

    def _apex(self, zone: Labels) -> Found:
        server = names.wire((*NAME_SERVER, *zone))
        return Found(zone, True, {SOA: (self.soa(zone),), NS: (server,)}, ttl=self.settings.ttl, why="the zone itself")

    def soa(self, zone: Labels) -> bytes:
        """The zone's SOA record; its last field is how long a negative answer counts (RFC 2308)."""
        server, contact = Name((*NAME_SERVER, *zone, b"")), Name((b"hostmaster", *zone, b""))
        return _wire(dns.rdtypes.ANY.SOA.SOA(IN, SOA, server, contact, 1, *SOA_TIMES, self.settings.ttl_negative))

    def _between(self, relative: Labels, zone: Labels) -> Found:
        """A name above services, or one that no service can have."""
        exists = relative in self._parents
        return Found(zone, exists, why="services are below it" if exists else "no service has a name of this form")

    def _of_service(self, service: Service, wanted: names.Meaning, zone: Labels) -> Found:
        addresses, up, why = _choose(service, wanted)
        if addresses is None:
            return Found(zone, False, job=service.job, why=why)
        if not up and self.settings.when_down != "address":
            exists = self.settings.when_down == "nodata"
            return Found(zone, exists, job=service.job, why=f"{why}; nothing of it is up (naming.when_down)")
        records = _address_records(addresses)
        extra: tuple[tuple[Labels, int, bytes], ...] = ()
        target = (*_prefix(wanted), *names.of_job(service.job), *zone)
        if service.ports:
            records[SRV] = tuple(_srv(port, target) for port in service.ports)
            extra = _extra(target, records)
        if service.metadata:
            records[TXT] = (_txt(service),)
        return Found(zone, True, records, extra, self._ttl(up), service.job, why)

    def _ttl(self, up: bool) -> int:
        return self.settings.ttl if up else self.settings.ttl_down

    # --- DNS-SD and SRV ---------------------------------------------------------------------------------------------

    def _discovery(self, relative: Labels, zone: Labels) -> Found | Unknown:
        ttl = self.settings.ttl
        if relative == BROWSE:
            kinds = tuple(names.wire((*kind, *zone)) for kind in sorted(self._types))
            return Found(zone, bool(kinds), {PTR: kinds} if kinds else {}, ttl=ttl, why="DNS-SD types", shared=True)
        if relative in DOMAINS:
            return Found(zone, True, {PTR: (names.wire(zone),)}, ttl=ttl, why="the domain to browse", shared=True)
        if relative in self._types:
            return self._type(relative, zone)
        if len(relative) == 3 and relative[1:] in self._types:
            return self._instance(relative, zone)
        if relative[1:2] and relative[1] in PROTOCOLS and relative[0][:1] == b"_":
            return self._port(relative, zone)
        return Found(zone, relative in _PARENTS_OF_TYPES and bool(self._types), why="no such DNS-SD name")

    def _type(self, kind: Labels, zone: Labels) -> Found:
        """Everything of a DNS-SD type."""
        labels = sorted(self._types[kind])
        pointers = tuple(names.wire((label, *kind, *zone)) for label in labels)
        return Found(zone, True, {PTR: pointers}, ttl=self.settings.ttl, why="services of this type", shared=True)

    def _instance(self, relative: Labels, zone: Labels) -> Found:
        """A service as DNS-SD sees it: SRV and TXT."""
        job = self._types[relative[1:]].get(relative[0])
        if job is None:
            return Found(zone, False, why="no such service of this type")
        service = self.services[job]
        target = (*names.of_job(job), *zone)
        port = next(it for it in service.ports if type_of(it) == relative[1:])
        records: dict[int, tuple[bytes, ...]] = {SRV: (_srv(port, target),), TXT: (_txt(service),)}
        extra = _extra(target, _address_records(service.policies.get(service.default, Addresses())))
        return Found(zone, True, records, extra, self._ttl(service.up), job, f"service {job}, DNS-SD")

    def _port(self, relative: Labels, zone: Labels) -> Found | Unknown:
        """``_NAME._PROTOCOL`` before a service's name (RFC 2782)."""
        found = self._below(relative[2:], zone) if len(relative) >= 2 + names.PARTS else None
        if not isinstance(found, Found) or found.job is None or not found.exists:
            return found or Found(zone, False, why="no such DNS-SD name")
        service, target = self.services[found.job], (*relative[2:], *zone)
        ports = tuple(_srv(it, target) for it in service.ports if type_of(it) == relative[:2])
        return Found(zone, bool(ports), {SRV: ports} if ports else {}, found.extra, found.ttl, found.job, found.why)

    # --- addresses --------------------------------------------------------------------------------------------------

    def _reverse(self, labels: Labels) -> Found | Unknown | None:
        asked = names.reverse_network(labels)
        if asked is None:
            return None
        ours = (*self.settings.services, *self.settings.overlay)
        if not any(it.version == asked.version and asked.subnet_of(it) for it in ours):  # type: ignore[arg-type]
            return None
        address = asked.network_address
        apex = names.reverse_apex(address, ours)
        if len(labels) < len(apex):
            return None
        if asked.prefixlen != asked.max_prefixlen:
            return Found(apex, True, why="addresses are below it")
        return self._pointer(address, apex)

    def _pointer(self, address: IPAddress, apex: Labels) -> Found | Unknown:
        claims = self._owners.get(address)
        if claims is None:
            if any(address in it for it in self.settings.services):
                return Unknown(str(address), apex)
            return Found(apex, False, why="no service has this address")
        job = min(claims)
        policy, number = claims[job]
        prefix = _prefix(names.Meaning((), policy.encode() if policy else None, number))
        target = (*prefix, *names.of_job(job), *self.settings.zones[0])
        return Found(apex, True, {PTR: (names.wire(target),)}, ttl=self.settings.ttl, job=job, why=f"service {job}")

    def discoverable(self, service: Service) -> Iterator[tuple[Labels, bytes]]:
        """The DNS-SD types of a service, and its label in each."""
        for kind in dict.fromkeys(type_of(port) for port in service.ports):
            yield kind, names.browse_label(service.job)


ANY_ANSWER: Final = dns.rdtypes.ANY.HINFO.HINFO(IN, HINFO, b"RFC8482", b"").to_wire() or b""
"""What a question for every type gets (RFC 8482 section 4.2)."""
_PARENTS_OF_TYPES: Final = frozenset({(b"_tcp",), (b"_udp",), (b"_dns-sd", b"_udp")})


def type_of(port: Port) -> Labels:
    """The DNS-SD type of a port."""
    return f"_{port.name}".encode(), f"_{port.protocol}".encode()


def _choose(service: Service, wanted: names.Meaning) -> tuple[Addresses | None, bool, str]:
    """The addresses that a name means, whether anything is behind them, and why it is these."""
    policy = wanted.policy.decode(errors="replace") if wanted.policy is not None else service.default
    if wanted.policy is not None and policy not in service.policies:
        return None, False, f"service {service.job} has no ServiceIP for policy {policy}"
    if wanted.instance is not None:
        member = service.members.get(wanted.instance)
        if member is None:
            return None, False, f"service {service.job} has no instance {wanted.instance}"
        return member.addresses, member.up, f"service {service.job}, instance {wanted.instance}"
    reason = f"policy {policy}" if wanted.policy is not None else f"policy {policy}, its default"
    return service.policies.get(policy, Addresses()), service.up, f"service {service.job}, {reason}"


def _prefix(wanted: names.Meaning) -> Labels:
    number = () if wanted.instance is None else (str(wanted.instance).encode(),)
    return (*number, *(() if wanted.policy is None else (wanted.policy,)))


def _addresses(service: Service) -> Iterator[tuple[IPAddress, str | None, int | None]]:
    """Every address with the policy or the instance that it stands for; the default policy goes without saying."""
    for policy, addresses in service.policies.items():
        for address in addresses:
            yield address, None if policy == service.default else policy, None
    for number, member in service.members.items():
        for address in member.addresses:
            yield address, None, number


def _address_records(addresses: Addresses) -> dict[int, tuple[bytes, ...]]:
    both = ((A, addresses.v4), (AAAA, addresses.v6))
    return {int(kind): (it.packed,) for kind, it in both if it is not None}


def _one_of_each(addresses: Iterable[IPAddress]) -> tuple[Any, Any]:
    by_version = {it.version: it for it in addresses}
    return by_version.get(4), by_version.get(6)


def _extra(target: Labels, records: dict[int, tuple[bytes, ...]]) -> tuple[tuple[Labels, int, bytes], ...]:
    return tuple((target, kind, rdata) for kind in (A, AAAA) for rdata in records.get(kind, ()))


def _srv(port: Port, target: Labels) -> bytes:
    return _wire(dns.rdtypes.IN.SRV.SRV(IN, SRV, 0, 0, port.number, Name((*target, b""))))


def _txt(service: Service) -> bytes:
    return _wire(dns.rdtypes.ANY.TXT.TXT(IN, TXT, [line.encode() for line in service.metadata] or [b""]))


def _wire(rdata: Any) -> bytes:
    return bytes(rdata.to_wire())
