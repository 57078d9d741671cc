"""What a change in the kernel may mean for the node: events in, hints out. No input or output.

A hint says where to look, never what is so: the kernel tells of every step, of ours as of another's, and an event
is old news when it is read. A container's link gives none while it is being made, which is until it has its record, so
that an attachment costs no look at the kernel.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

from appliance.environment import names
from appliance.environment.plan import LINK_GROUP, ROUTE_PROTOCOL, Link

ROUTES: Final = "routes"
"""The mark of a hint at damage that belongs to no link."""


@dataclass(frozen=True, slots=True)
class LinkEvent:
    """A link is now so; or it was so, and is deleted, or was moved to another namespace."""

    link: Link
    deleted: bool


@dataclass(frozen=True, slots=True)
class AddressEvent:
    """A link, by its index, got or lost an address that reaches further than the link."""

    index: int


@dataclass(frozen=True, slots=True)
class RouteEvent:
    """A route came or went. `index` is the link that it leads out of, 0 if there are several or none."""

    index: int
    protocol: int


Event = LinkEvent | AddressEvent | RouteEvent


class Hints:
    """The links as events told of them, and the hints that nobody has taken yet."""

    def __init__(self, bridge: str, tun: str) -> None:
        self._node = (bridge, tun)
        self._links: dict[int, Link] = {}
        self._suspects: set[str] = set()
        self._damage: set[str] = set()
        self._uplink = False

    def reset(self, links: Iterable[Link], attached: Iterable[str], impaired: Iterable[str]) -> None:
        """Begins anew with all links there are: whatever may have changed is to be looked at."""
        self._links = {link.index: link for link in links}
        whole = {link.name for link in self._links.values() if _is_ours(link) and link.carrier}
        self._suspects.update(set(attached) - whole, impaired)
        self._damage.add(ROUTES)
        self._uplink = True

    def see(self, event: Event) -> None:
        """Takes note of an event."""
        match event:
            case LinkEvent(link, deleted=False):
                self._changed(self._links.get(link.index), link)
                self._links[link.index] = link
            case LinkEvent(link):
                self._deleted(self._links.pop(link.index, link))
            case AddressEvent(index):
                self._at(index)
            case RouteEvent(_, protocol) if protocol == ROUTE_PROTOCOL:
                self._damage.add(ROUTES)
            case RouteEvent(index):
                self._at(index)

    def take_suspects(self) -> set[str]:
        """Containers' links that may be gone, or impaired, or whole again."""
        taken, self._suspects = self._suspects, set()
        return taken

    @property
    def damage(self) -> bool:
        """Whether the node's part may not be as it should."""
        return bool(self._damage)

    def take_damage(self) -> bool:
        """The same, once."""
        taken, self._damage = self._damage, set()
        return bool(taken)

    @property
    def uplink(self) -> bool:
        """Whether the node may be reached elsewhere."""
        return self._uplink

    def take_uplink(self) -> bool:
        """The same, once."""
        taken, self._uplink = self._uplink, False
        return taken

    def _changed(self, before: Link | None, now: Link) -> None:
        if before is not None and before.name != now.name:
            self._deleted(before)
            before = None
        if _is_ours(now):
            self._container_changed(before, now)
        elif now.name in self._node:
            if before is None or _shape(before) != _shape(now):
                self._damage.add(now.name)
        elif now.group != LINK_GROUP and _usable(before) != _usable(now):
            self._uplink = True

    def _container_changed(self, before: Link | None, now: Link) -> None:
        if before is None or not now.alias:
            return
        if before.carrier != now.carrier or not (before.alias or now.carrier):
            self._suspects.add(now.name)
        if _is_worse(before, now):
            self._damage.add(now.name)

    def _deleted(self, link: Link) -> None:
        """A link is switched off and leaves its bridge before it goes: that was no damage, then."""
        if _is_ours(link):
            self._suspects.add(link.name)
            self._damage.discard(link.name)
        elif link.name in self._node:
            self._damage.add(link.name)
        elif link.group != LINK_GROUP:
            self._uplink = True

    def _at(self, index: int) -> None:
        """Something changed at a link that is not its own state."""
        link = self._links.get(index)
        if link is not None and link.name in self._node:
            self._damage.add(link.name)
        elif not self._is_container(index):
            self._uplink = True

    def _is_container(self, index: int) -> bool:
        link = self._links.get(index)
        return link is not None and _is_ours(link)


def _is_ours(link: Link) -> bool:
    return link.group == LINK_GROUP and names.is_veth_name(link.name)


def _shape(link: Link) -> tuple[object, ...]:
    """What `plan` looks at of the bridge and the TUN link."""
    return link.up, link.mtu, link.txqueuelen, link.group


def _is_worse(before: Link, now: Link) -> bool:
    left = before.master not in (0, now.master)
    return left or before.mtu != now.mtu or (before.up and not now.up)


def _usable(link: Link | None) -> bool:
    return link is not None and link.up and link.carrier


class Pace:
    """How long to wait before looking for damage again: longer each time that there was some.

    Whoever undoes our repairs at once is not fought at their speed. Times are monotonic seconds.
    """

    FIRST_S: Final = 0.1
    LONGEST_S: Final = 5.0
    CALM_S: Final = 10.0
    """After so long without damage the first delay counts again."""

    def __init__(self) -> None:
        self._delay = self.FIRST_S
        self._last = -self.CALM_S

    def delay(self, now: float) -> float:
        """Seconds to wait for further changes before looking."""
        if now - self._last >= self.CALM_S:
            self._delay = self.FIRST_S
        return self._delay

    def found(self, now: float) -> None:
        """There was damage."""
        self._delay = min(2 * self.delay(now), self.LONGEST_S)
        self._last = now
