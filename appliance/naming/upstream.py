"""Questions that are not ours, put to other servers.

*Owns* the cache of their answers and what is under way, in the resolver's event loop. c-ares (aiodns) asks: it goes
from server to server, remembers which are slow or down, and repeats over TCP what was cut off. The types that it
does not know or keep whole (`CARES`) are asked by dnspython, from server to server.

An answer takes at most ``timeout`` seconds; then, or when every server fails, it is SERVFAIL, which is remembered for
`FAILED_S`. Who asks what somebody else is asking joins. At most `PENDING_MAX` questions are under way; one more is
SERVFAIL at once, so that servers that are down cost neither memory nor the local names' time.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Final

import aiodns
import dns.asyncquery
import dns.exception
import dns.message
import dns.rdata
import dns.rdatatype
import pycares
from dns.name import Name
from dns.rdataclass import IN

from appliance.naming import names, packet
from appliance.naming.packet import Question, Record, Tail
from appliance.tasks import end

log = logging.getLogger(__name__)

PENDING_MAX: Final = 1024
FAILED_S: Final = 1.0
TTL_MAX: Final = 3600
"""Seconds for which an answer is kept at most, whatever its own records say."""
RESOLV_CONF: Final = Path("/etc/resolv.conf")
CARES: Final = aiodns.query_type_map.keys() - {"ANY", "TXT"}
"""Types that c-ares is asked for. Its TXT is one string, which loses where each of several ends."""
_NAMES: Final = {pycares.QUERY_TYPE_CNAME: "cname", pycares.QUERY_TYPE_NS: "nsdname", pycares.QUERY_TYPE_PTR: "dname"}

Key = tuple[names.Labels, int]
Answered = Callable[[Tail, int], None]


def of_host(path: Path = RESOLV_CONF) -> tuple[list[str], list[str]]:
    """The servers and the search list of a resolv.conf; empty if it cannot be read."""
    servers, search = [], []
    try:
        lines = path.read_text().splitlines()
    except OSError:
        return [], []
    for line in lines:
        match line.split("#")[0].split(";")[0].split():
            case ["nameserver", address, *_]:
                servers.append(address)
            case ["search" | "domain", *domains]:
                search = domains
    return servers, search


class Upstream:
    """See the module. ``servers`` are addresses, with a port if it is not 53. Needs a running event loop."""

    def __init__(self, servers: Sequence[str], timeout: float, cache: int, ttl_negative: int) -> None:
        self.counters: Counter[str] = Counter()
        self._servers = list(servers)
        self._timeout = timeout
        self._capacity = cache
        self._ttl_negative = ttl_negative
        self._cache: OrderedDict[Key, tuple[Tail, float, float]] = OrderedDict()
        self._pending: dict[Key, list[Answered]] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._resolver: aiodns.DNSResolver | None = None

    def ask(self, question: Question, answered: Answered) -> None:
        """Answers a question, now or later."""
        key = question.labels, question.kind
        now = time.monotonic()
        kept = self._cache.get(key)
        if kept is not None and now < kept[2]:
            self.counters["cached"] += 1
            answered(kept[0], int(now - kept[1]))
        elif key in self._pending:
            self._pending[key].append(answered)
        elif len(self._pending) >= PENDING_MAX or not self._servers:
            self.counters["refused" if self._servers else "no-servers"] += 1
            answered(packet.plain(packet.SERVFAIL), 0)
        else:
            self._pending[key] = [answered]
            task = asyncio.get_running_loop().create_task(self._fetch(key))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _fetch(self, key: Key) -> None:
        try:
            async with asyncio.timeout(self._timeout):
                tail, ttl = await self._query(*key)
            self.counters["answered"] += 1
        except Exception as error:  # whatever another server says must not cost us anything
            self.counters["failed"] += 1
            log.debug("upstream failed", extra={"name": names.text(key[0]), "error": str(error)})
            tail, ttl = packet.plain(packet.SERVFAIL), FAILED_S
        self._keep(key, tail, ttl)
        for answered in self._pending.pop(key, ()):
            answered(tail, 0)

    def _keep(self, key: Key, tail: Tail, ttl: float) -> None:
        now = time.monotonic()
        self._cache[key] = tail, now, now + min(ttl, TTL_MAX)
        self._cache.move_to_end(key)
        while len(self._cache) > self._capacity:
            self._cache.popitem(last=False)

    async def _query(self, labels: names.Labels, kind: int) -> tuple[Tail, float]:
        kind_name = dns.rdatatype.to_text(dns.rdatatype.RdataType(kind))
        if kind_name not in CARES:
            return await self._by_library(labels, kind)
        try:
            result = await self._channel().query_dns(names.text(labels), kind_name)
        except aiodns.error.DNSError as error:
            return self._absent(error.args[0])
        return _tail([_of_cares(record) for record in result.answer], self._ttl_negative)

    def _absent(self, code: int) -> tuple[Tail, float]:
        """What c-ares calls an error and is an answer."""
        rcode = {aiodns.error.ARES_ENOTFOUND: packet.NXDOMAIN, aiodns.error.ARES_ENODATA: packet.NOERROR}.get(code)
        if rcode is None:
            raise OSError(f"c-ares: error {code}")
        return packet.plain(rcode), float(self._ttl_negative)

    def _channel(self) -> aiodns.DNSResolver:
        """c-ares, once somebody needs it: its thread need not be there otherwise."""
        if self._resolver is None:
            each = max(0.2, self._timeout / max(2, len(self._servers)))
            self._resolver = aiodns.DNSResolver(self._servers, timeout=each, tries=2, flags=pycares.ARES_FLAG_NOSEARCH)
        return self._resolver

    async def _by_library(self, labels: names.Labels, kind: int) -> tuple[Tail, float]:
        query = dns.message.make_query(Name((*labels, b"")), dns.rdatatype.RdataType(kind))
        for server in self._servers:
            try:
                host, port = split(server)
                each = self._timeout / len(self._servers)
                reply, _ = await dns.asyncquery.udp_with_fallback(query, host, each, port)
            except (OSError, dns.exception.DNSException):
                continue
            if reply.rcode() in (packet.NOERROR, packet.NXDOMAIN):
                return _of_message(reply, self._ttl_negative)
        raise OSError("no server answers")

    async def close(self) -> None:
        """Ends what is under way."""
        await end(self._tasks)
        if self._resolver is not None:
            await self._resolver.close()


def split(server: str) -> tuple[str, int]:
    """Address and port of a server: ``192.0.2.1``, ``192.0.2.1:53``, ``2001:db8::1``, ``[2001:db8::1]:53``. Raises
    ValueError."""
    if server.startswith("["):
        host, _, port = server[1:].partition("]")
        return str(ip_address(host)), int(port[1:] or 53)
    if server.count(":") == 1:
        host, _, port = server.partition(":")
        return str(ip_address(host)), int(port)
    return str(ip_address(server)), 53


def _tail(records: list[Record], ttl_negative: int) -> tuple[Tail, float]:
    ttl = min((it.ttl for it in records), default=ttl_negative)
    return packet.tail(packet.NOERROR, records, authoritative=False), float(ttl)


def _of_cares(record: Any) -> Record:
    """A record of c-ares. Its data has a class a type; dnspython knows the wire format of each."""
    kind = dns.rdatatype.RdataType(record.type)
    rdata = dns.rdata.from_text(IN, kind, _text(record.type, record.data)).to_wire() or b""
    return Record(names.parse(record.name), int(kind), record.ttl, rdata)


def _text(kind: int, data: Any) -> str:
    """A record's data as a zone file has it."""
    match kind:
        case pycares.QUERY_TYPE_A | pycares.QUERY_TYPE_AAAA:
            return str(data.addr)
        case pycares.QUERY_TYPE_MX:
            return f"{data.priority} {_dotted(data.exchange)}"
        case pycares.QUERY_TYPE_SRV:
            return f"{data.priority} {data.weight} {data.port} {_dotted(data.target)}"
        case pycares.QUERY_TYPE_SOA:
            times = f"{data.serial} {data.refresh} {data.retry} {data.expire} {data.minimum}"
            return f"{_dotted(data.mname)} {_dotted(data.rname)} {times}"
        case pycares.QUERY_TYPE_CAA:
            value = data.value.decode(errors="replace") if isinstance(data.value, bytes) else data.value
            return f'{data.critical} {data.tag} "{value}"'
        case pycares.QUERY_TYPE_NAPTR:
            strings = f'"{data.flags}" "{data.service}" "{data.regexp}"'
            return f"{data.order} {data.preference} {strings} {_dotted(data.replacement)}"
    return _dotted(getattr(data, _NAMES[kind]))


def _dotted(name: str) -> str:
    return name if name.endswith(".") else f"{name}."


def _of_message(reply: dns.message.Message, ttl_negative: int) -> tuple[Tail, float]:
    records = [
        Record(names.of(rrset.name), int(rrset.rdtype), rrset.ttl, rdata.to_wire() or b"")
        for rrset in reply.answer
        for rdata in rrset
    ]
    tail, ttl = _tail(records, ttl_negative)
    return Tail(int(reply.rcode()), False, tail.counts, tail.data, tail.ttls), ttl
