"""The policies in plain Python: in which order a new flow tries the backends of a ServiceIP.

Theory of operation. A Balancer is what one worker remembers: a round robin position a ServiceIP, how many random
numbers it has drawn, its flows a backend, and the clients of sticky ServiceIPs. `order` gives backends, best first;
the caller takes the first that can be used and says so (`opened`). Nothing expires.

A list of backends has each as often as its weight says, spread by smooth weighted round robin: in each turn everybody
gains its weight, the richest is next and pays what all gained together. Maglev and the far backends of CLOSEST are
listed once.

Random numbers and hashes are those of the keyed hash `mix`, spelled here over Python's integers.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Container, Iterator
from dataclasses import dataclass, field
from fractions import Fraction
from ipaddress import ip_address
from math import gcd, inf

from tests.oracle import model
from tests.oracle.model import Address, Service

WORD = (1 << 64) - 1
SLOTS = 2039
CLIENT, OFFSET, SKIP = (int.from_bytes(text, "big") for text in (b"Client\0\0", b"Offset\0\0", b"Skip\0\0\0\0"))


def words(address: Address) -> tuple[int, int]:
    """The two halves of an address, IPv4 as IPv4-mapped, as a little-endian machine reads them."""
    mapped = bytes(10) + b"\xff\xff" + address.packed if address.version == 4 else address.packed
    return int.from_bytes(mapped[:8], "little"), int.from_bytes(mapped[8:], "little")


def mix(first: int, second: int, seed: int) -> int:
    """A hash of two words, 63 bits."""
    h = ((first ^ seed) * 0x9E3779B97F4A7C15) & WORD
    h = ((h ^ (h >> 32) ^ second) * 0xD6E8FEB86659FD93) & WORD
    h = ((h ^ (h >> 29)) * 0xBF58476D1CE4E5B9) & WORD
    return (h ^ (h >> 32)) & (WORD >> 1)


def weighted(service: Service) -> list[tuple[Address, int]]:
    """Backends that new flows may get, with their weights."""
    weights = service.weights or [1] * len(service.backends)
    return [(ip_address(text), weight) for text, weight in zip(service.backends, weights, strict=True) if weight]


def smooth(backends: list[tuple[Address, int]]) -> list[Address]:
    """Each backend as often as its weight says, spread evenly."""
    shares = [weight // gcd(*(w for _, w in backends)) for _, weight in backends]
    wealth, turns = [0] * len(shares), []
    for _ in range(sum(shares)):
        wealth = [have + share for have, share in zip(wealth, shares, strict=True)]
        richest = wealth.index(max(wealth))
        wealth[richest] -= sum(shares)
        turns.append(backends[richest][0])
    return turns


def maglev(backends: list[tuple[Address, int]]) -> list[Address]:
    """Who has each slot: in turn, as often as its weight allows, everybody takes the next of its slots that is free."""
    slots: dict[int, Address] = {}
    credit: Counter[Address] = Counter()
    preferred = {address: permutation(address) for address, _ in backends}
    while len(slots) < SLOTS:
        for address, weight in backends:
            credit[address] += weight
            if len(slots) < SLOTS and credit[address] >= max(w for _, w in backends):
                credit[address] -= max(w for _, w in backends)
                slots[next(slot for slot in preferred[address] if slot not in slots)] = address
    return [slots[slot] for slot in range(SLOTS)]


def permutation(address: Address) -> Iterator[int]:
    """All slots in the order in which a backend wants them."""
    offset, skip = mix(*words(address), OFFSET) % SLOTS, mix(*words(address), SKIP) % (SLOTS - 1) + 1
    return ((offset + turn * skip) % SLOTS for turn in range(SLOTS))


def rotated(places: list[Address], start: int) -> list[Address]:
    """The list from a place on, and round."""
    at = start % len(places)
    return places[at:] + places[:at]


@dataclass(frozen=True)
class Client:
    """Who opens a flow. The port of an echo reply, which has none, is negative and counts as 0."""

    address: Address
    port: int


@dataclass
class Balancer:
    """One worker's memory of what it chose."""

    start: int = 0
    drawn: int = 0
    flows: Counter[Address] = field(default_factory=Counter)
    _turns: Counter[str] = field(default_factory=Counter)
    _kept: dict[tuple[Address, str], Address] = field(default_factory=dict)

    def order(self, service: Service, client: Client, known: Container[Address]) -> Iterator[Address]:
        """Backends, the one to be tried first at the front; some may come more than once.

        Random numbers are drawn only if it comes to the policy.
        """
        backends = weighted(service)
        last = self._kept.get((client.address, service.address)) if service.sticky else None
        if last in dict(backends):
            yield last
        if backends:
            yield from self._by_policy(service, backends, client, known)

    def opened(self, service: Service, client: Client, known: Container[Address], chosen: Address) -> None:
        """A flow was opened: by the policy, unless its client comes back to where it was.

        A client that could not come back for these ports alone still will for others.
        """
        key = client.address, service.address
        last = self._kept.get(key) if service.sticky else None
        lasts = last in dict(weighted(service)) and last in known
        if not lasts:
            self._kept[key] = chosen
        if not lasts or chosen != last:
            self._turns[service.address] += 1

    def _by_policy(
        self, service: Service, backends: list[tuple[Address, int]], client: Client, known: Container[Address]
    ) -> list[Address]:
        if service.policy == model.MAGLEV:
            return self._maglev(service, backends, client)
        if service.policy == model.LEAST_FLOWS:
            return self._least_flows(backends, known)
        near = backends
        if service.policy == model.CLOSEST and service.near:
            first = {ip_address(text) for text in service.backends[: service.near]}
            near = [it for it in backends if it[0] in first] or backends
        far = [address for address, _ in backends if address not in dict(near)]
        return rotated(smooth(near), self.start + self._turns[service.address]) + far

    def _maglev(self, service: Service, backends: list[tuple[Address, int]], client: Client) -> list[Address]:
        together: Counter[Address] = Counter()
        for address, weight in backends:
            together[address] += weight
        listed = sorted(together.items(), key=lambda it: it[0].packed)
        slot = mix(*words(client.address), CLIENT + (max(client.port, 0) + 1 if service.hash_port else 0)) % SLOTS
        places = [address for address, _ in listed]
        return rotated(places, places.index(maglev(listed)[slot]))

    def _least_flows(self, backends: list[tuple[Address, int]], known: Container[Address]) -> list[Address]:
        """From the better of two places on: fewer flows for its weight; unknown ones are worst."""
        places = smooth(backends)
        if len(places) == 1:
            return places
        drawn = mix(self.drawn, 0, 0)
        self.drawn += 1
        one = drawn % len(places)
        other = (one + 1 + (drawn >> 32) % (len(places) - 1)) % len(places)
        weights = dict(backends)

        def burden(place: int) -> Fraction | float:
            address = places[place]
            return Fraction(self.flows[address], weights[address]) if address in known else inf

        return rotated(places, other if burden(other) < burden(one) else one)
