"""Names as labels, and what they mean by their form alone. Pure.

A service's name has four labels below its zone, one more for a policy or an instance, two more for both. As a job's
name has four parts exactly, the count tells which is which: ``7.web.…`` is an instance, ``web.…`` a service, even if
that service were called 7.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from hashlib import blake2s
from ipaddress import IPv4Address, IPv6Address
from typing import Final

import dns.name

from appliance.tables.layout import IPAddress, IPNetwork

Labels = tuple[bytes, ...]

PARTS: Final = 4
"""Parts of a job's name."""
LABEL_MAX: Final = 63
"""Bytes of a label (RFC 1035 section 2.3.4)."""
DIGITS_MAX: Final = 10
"""Digits of an instance's number: it is below 2³¹."""
_DIGEST: Final = 4


@dataclass(frozen=True, slots=True)
class Meaning:
    """What a name below a zone asks for."""

    job: Labels
    """The service's labels, ``SERVICE.SERVICENS.APP.APPNS``."""
    policy: bytes | None = None
    instance: int | None = None


def parse(text: str) -> Labels:
    """The labels of a name in text. Raises dns.exception.DNSException if it is none."""
    return of(dns.name.from_text(text))


def of(name: dns.name.Name) -> Labels:
    """The labels of a name of the library."""
    return tuple(label.lower() for label in name.labels if label)


@lru_cache(maxsize=4096)
def wire(labels: Labels) -> bytes:
    """A name in wire format, uncompressed."""
    return dns.name.Name((*labels, b"")).to_wire() or b""


def text(labels: Labels) -> str:
    """A name in text, with the final dot."""
    return dns.name.Name((*labels, b"")).to_text()


def below(labels: Labels, zone: Labels) -> Labels | None:
    """What precedes a zone in a name; None if the name is not in the zone."""
    cut = len(labels) - len(zone)
    return labels[:cut] if cut >= 0 and labels[cut:] == zone else None


def meaning(relative: Labels) -> Meaning | None:
    """What the labels before a zone ask for; None if no service's name has this form."""
    extra = len(relative) - PARTS
    job = relative[extra:]
    match extra:
        case 0:
            return Meaning(job)
        case 1 if _is_number(relative[0]):
            return Meaning(job, None, int(relative[0]))
        case 1:
            return Meaning(job, relative[0])
        case 2 if _is_number(relative[0]):
            return Meaning(job, relative[1], int(relative[0]))
    return None


def _is_number(label: bytes) -> bool:
    return label.isdigit() and len(label) <= DIGITS_MAX and (label == b"0" or label[:1] != b"0")


def of_job(job: str) -> Labels:
    """``app.appns.service.servicens`` as a service's labels."""
    app, app_ns, service, service_ns = job.lower().encode().split(b".")
    return service, service_ns, app, app_ns


def job_of(labels: Labels) -> str:
    """The job of a service's labels, in their spelling."""
    service, service_ns, app, app_ns = (label.decode(errors="replace") for label in labels)
    return f"{app}.{app_ns}.{service}.{service_ns}"


def browse_label(job: str) -> bytes:
    """A job's label among the instances of a DNS-SD type: its name in text, cut to a label's length."""
    whole = b".".join(of_job(job))
    if len(whole) <= LABEL_MAX:
        return whole
    digest = blake2s(whole, digest_size=_DIGEST).hexdigest().encode()
    return whole[: LABEL_MAX - 1 - len(digest)] + b"~" + digest


def reverse_name(address: IPAddress) -> Labels:
    """The name of an address in in-addr.arpa or ip6.arpa."""
    return tuple(label.encode() for label in address.reverse_pointer.split("."))


def reverse_network(labels: Labels) -> IPNetwork | None:
    """The addresses that a name in in-addr.arpa or ip6.arpa is about: one, or a network of whole labels."""
    from ipaddress import IPv4Network, IPv6Network

    digits = labels[-3::-1]
    try:
        if labels[-2:] == (b"in-addr", b"arpa") and len(digits) <= 4:
            octets = bytes(_octet(it) for it in digits)
            return IPv4Network((IPv4Address(octets.ljust(4, b"\0")), 8 * len(digits)))
        if labels[-2:] == (b"ip6", b"arpa") and len(digits) <= 32 and all(len(it) == 1 for it in digits):
            packed = bytes.fromhex(b"".join(digits).ljust(32, b"0").decode())
            return IPv6Network((IPv6Address(packed), 4 * len(digits)))
    except ValueError:
        return None
    return None


def _octet(label: bytes) -> int:
    if not _is_number(label):
        raise ValueError(label)
    return int(label)


def reverse_apex(address: IPAddress, networks: Iterable[IPNetwork]) -> Labels:
    """The reverse zone of an address: that of its network, rounded up to whole labels."""
    network = next(it for it in networks if address in it)
    labels = reverse_name(address)
    bits = 8 if address.version == 4 else 4
    return labels[len(labels) - 2 - -(-network.prefixlen // bits) :]
