"""Which container gets which address: one pool a family, over any number of subnets.

Theory of operation
-------------------
A pool owns every address of its subnets but the first (the network), the second (the gateway) and, in
IPv4, the last (broadcast). The last one of a subnet that has room (`ingress_of`) is the node's own in the
overlay, and given to no container; one that has it from an earlier time keeps it. An address is
*fresh* (never given out by this pool), *in use*, or *freed*.

- A freed address rests `REST_S` seconds, because flows and caches elsewhere may still lead to it; then
  freed addresses are given out first come, first served, before fresh ones, so that the pool's memory
  is bounded by the number of containers that ever were here at once.
- An address that was allocated but never used by a container is given back, and does not rest.
- A pool that starts with addresses in use (a restart) cannot know when the ones between them were
  freed: they rest from now. Those above the highest one in use count as fresh.

Fresh addresses are kept as runs, never listed: a /64 costs as much as a /26, and the time of a call does
not depend on how many addresses are in use.
No input or output, no clock: `now` is an argument, in seconds of a monotonic clock.
Not thread-safe; the manager's event loop is its only caller.
"""

from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from ipaddress import IPv4Address, IPv4Interface, IPv4Network, IPv6Address, IPv6Interface, IPv6Network
from typing import Final

from appliance.environment.errors import AddressesExhausted

IPAddress = IPv4Address | IPv6Address
IPInterface = IPv4Interface | IPv6Interface
IPNetwork = IPv4Network | IPv6Network

REST_S: Final = 60.0
"""Longer than an unanswered UDP flow is remembered anywhere (30 s)."""
GATEWAY_OFFSET: Final = 1
FIRST_OFFSET: Final = 2
INGRESS_ROOM: Final = 16
"""Addresses of the smallest subnet of which one is kept back for what comes in through node ports."""
_AT_ONCE: Final = float("-inf")


@dataclass(slots=True)
class _Run:
    """Fresh addresses `first`..`last` of a subnet, to be given out from `ready_at` on."""

    ready_at: float
    subnet: IPNetwork
    first: int
    last: int


def default_route(version: int) -> IPNetwork:
    """The network that holds every address of an IP version."""
    return IPv4Network("0.0.0.0/0") if version == 4 else IPv6Network("::/0")


def v4_of(addresses: Iterable[IPAddress]) -> IPv4Address | None:
    """The first IPv4 address, None if there is none."""
    return next((it for it in addresses if isinstance(it, IPv4Address)), None)


def v6_of(addresses: Iterable[IPAddress]) -> IPv6Address | None:
    """The first IPv6 address, None if there is none."""
    return next((it for it in addresses if isinstance(it, IPv6Address)), None)


def gateway_of(subnet: IPNetwork) -> IPInterface:
    """The bridge's own address in a subnet."""
    return _interface(subnet, subnet[GATEWAY_OFFSET])


def ingress_of(subnet: IPNetwork) -> IPAddress | None:
    """The node's own address in the overlay, which no link has; None in a subnet without room for it."""
    return None if subnet.num_addresses < INGRESS_ROOM else subnet[bounds(subnet)[1] - int(subnet.network_address)]


def bounds(subnet: IPNetwork) -> tuple[int, int]:
    """The first and the last address for containers, as integers."""
    last = int(subnet.broadcast_address)  # in IPv6 merely the last address, and usable
    return int(subnet.network_address) + FIRST_OFFSET, last - 1 if subnet.version == 4 else last


class AddressPool:
    """The containers' addresses of one family. See the module's theory of operation."""

    def __init__(self, subnets: Sequence[IPNetwork], taken: Iterable[IPAddress] = (), now: float = 0.0) -> None:
        """Raises ValueError if an address in `taken` is in no subnet or is not for containers."""
        self._subnets = tuple(subnets)
        self._used = set(taken)
        self._freed: deque[tuple[float, IPAddress]] = deque()
        for address in self._used:
            if not self.holds(address):
                raise ValueError(f"{address}: expected a container's address in {self._text()}")
        runs = [run for subnet in self._subnets for run in _runs(subnet, self._used, now + REST_S)]
        self._fresh = deque(sorted(runs, key=lambda run: run.ready_at))

    @property
    def in_use(self) -> int:
        """Addresses that containers have."""
        return len(self._used)

    def extend(self, subnets: Iterable[IPNetwork]) -> None:
        """These subnets are the pool's too from now on."""
        for subnet in subnets:
            self._subnets += (subnet,)
            self._fresh.extendleft(_runs(subnet, set(), _AT_ONCE))

    def holds(self, address: IPAddress) -> bool:
        """Whether an address is one of this pool's, in use or not."""
        subnet = self._find(address)
        if subnet is None:
            return False
        first, last = bounds(subnet)
        return first <= int(address) <= last

    def interface(self, address: IPAddress) -> IPInterface:
        """An address with the prefix of its subnet. Raises ValueError if it is in none."""
        return _interface(self._of(address), address)

    def gateway(self, address: IPAddress) -> IPAddress:
        """The gateway for a container's address. Raises ValueError if it is in no subnet."""
        return gateway_of(self._of(address)).ip

    def allocate(self, now: float) -> IPAddress:
        """An address that is in use from here on. Raises AddressesExhausted."""
        address = self._from_freed(now) or self._from_fresh(now)
        if address is None:
            raise AddressesExhausted(self._exhausted(now))
        self._used.add(address)
        return address

    def release(self, address: IPAddress, now: float) -> None:
        """The container with this address is gone: the address rests. Raises KeyError if not in use."""
        self._used.remove(address)
        self._freed.append((now + REST_S, address))

    def give_back(self, address: IPAddress) -> None:
        """No container ever had this address: it is fresh again. Raises KeyError if not in use."""
        self._used.remove(address)
        self._fresh.appendleft(_Run(_AT_ONCE, self._of(address), int(address), int(address)))

    def _from_freed(self, now: float) -> IPAddress | None:
        if self._freed and self._freed[0][0] <= now:
            return self._freed.popleft()[1]
        return None

    def _from_fresh(self, now: float) -> IPAddress | None:
        """Runs are in the order of `ready_at`, so that the first one tells for all."""
        if not self._fresh or self._fresh[0].ready_at > now:
            return None
        run = self._fresh[0]
        address = run.subnet[run.first - int(run.subnet.network_address)]
        run.first += 1
        if run.first > run.last:
            self._fresh.popleft()
        return address

    def _find(self, address: IPAddress) -> IPNetwork | None:
        return next((subnet for subnet in self._subnets if address in subnet), None)

    def _of(self, address: IPAddress) -> IPNetwork:
        subnet = self._find(address)
        if subnet is None:
            raise ValueError(f"{address}: expected an address in {self._text()}")
        return subnet

    def _text(self) -> str:
        return ", ".join(map(str, self._subnets)) or "a subnet (none is configured)"

    def _exhausted(self, now: float) -> str:
        waits = [ready_at for ready_at, _ in self._freed] + [run.ready_at for run in self._fresh]
        then = f", the next is free in {min(waits) - now:.0f} s" if waits else ""
        return f"expected a free address in {self._text()}, got none ({self.in_use} in use{then})"


def _runs(subnet: IPNetwork, used: set[IPAddress], rested_at: float) -> Iterator[_Run]:
    """The fresh addresses of a subnet: what lies between those in use rests, what follows them does not."""
    first, last = bounds(subnet)
    if ingress_of(subnet) is not None:
        last -= 1
    for taken in sorted(int(address) for address in used if address in subnet):
        if first < taken:
            yield _Run(rested_at, subnet, first, taken - 1)
        first = taken + 1
    if first <= last:
        yield _Run(_AT_ONCE, subnet, first, last)


def _interface(subnet: IPNetwork, address: IPAddress) -> IPInterface:
    if isinstance(address, IPv4Address):
        return IPv4Interface((address, subnet.prefixlen))
    return IPv6Interface((address, subnet.prefixlen))
