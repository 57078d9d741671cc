"""The cluster's list of nodes: a retained message a node, which every node reads (``cluster/nodes/<id>``).

Theory of operation
-------------------
What the list should say follows from the state (``entry``, pure). What it says is read from the broker, by a
subscription to it on the outbox's connection; so what is published is the difference, whoever wrote what is there,
and however many managers there are. Nodes whose documents changed are compared after a short random pause, so that
of several managers mostly one speaks; should an older mirror overwrite a newer one, the newer one's manager sees it and
says it again. A new connection, as after the broker's or our own start, reads all anew: what is retained comes at once,
and after SETTLE_S everything is compared.

One node that changes costs one comparison and one message, which the broker hands to every node. Publishing that fails
is repeated. Many that change are published AT_ONCE at a time, as answers that nodes wait for share the way.
"""

from __future__ import annotations

import asyncio
import logging
import random
from collections.abc import Iterable
from typing import NoReturn

import orjson

from appliance.cluster.manager import topics
from appliance.cluster.manager.decide import Message
from appliance.cluster.manager.documents import Document, Instance, Node
from appliance.cluster.manager.outbox import Outbox
from appliance.cluster.manager.state import State
from appliance.cluster.manager.store import Store, UnavailableError

log = logging.getLogger(__name__)

SETTLE_S = 1.0
"""Seconds in which the broker delivers what is retained; if it takes longer, some of it is said again."""
AT_ONCE = 64
"""Messages on their way at a time: a part of what the outbox takes (`outbox.WINDOW`)."""
PAUSE_S = 0.1
"""Longest random pause before changes are compared."""
OURS, EXISTING = 2, 1
"""``overlay``: whether the node runs this appliance, which says itself where it is reached."""


def entry(state: State, name: str) -> bytes:
    """What the list should say of a node; nothing if it is lost, or cannot be reached."""
    node = state.node(name) or Node()  # an existing one that never asked for subnets has no document
    if node.online is False:
        return b""
    host, port, overlay = node.host, node.port, OURS
    if host is None:
        live = (state.live(*it) for it in state.placed_on(name))
        placement = next((it.placement for it in live if it is not None), None)
        if placement is None:
            return b""
        host, port, overlay = placement.host, placement.port, EXISTING
    subnets = [str(it) for it in (node.subnet_v4, node.subnet_v6) if it is not None]
    return orjson.dumps({"host_ip": str(host), "host_port": port, "subnets": subnets, "overlay": overlay})


class Listing:
    """See the module."""

    def __init__(self, store: Store, outbox: Outbox) -> None:
        self.sent = 0
        self._store = store
        self._outbox = outbox
        self._retained: dict[str, bytes] = {}
        self._dirty: set[str] = set()
        self._some = asyncio.Event()
        self._settled_at = 0.0
        outbox.follow(topics.ALL_NODES, self._connected, self._heard)

    async def run(self) -> NoReturn:
        """Keeps the list true for ever."""
        while True:
            await self._some.wait()
            wait = self._settled_at - asyncio.get_running_loop().time()
            await asyncio.sleep(max(wait, random.uniform(0, PAUSE_S)))
            self._some.clear()
            dirty, self._dirty = self._dirty, set()
            await self._say(dirty)

    async def _say(self, names: Iterable[str]) -> None:
        wanted = {name: entry(self._store.state, name) for name in names}
        different = {name: it for name, it in wanted.items() if it != self._retained.get(name, b"")}
        left = list(different.items())
        while left:
            some = left[:AT_ONCE]
            try:
                await self._outbox.send(Message(topics.listed(name), it, retain=True) for name, it in some)
            except UnavailableError as error:
                log.warning("list of nodes not published", extra={"error": error})
                self._mark(name for name, _ in left)
                return
            self.sent += len(some)
            del left[:AT_ONCE]

    def _connected(self) -> None:
        self._retained.clear()
        self._settled_at = asyncio.get_running_loop().time() + SETTLE_S
        self.reloaded()

    def _heard(self, topic: str, payload: bytes) -> None:
        name = topic.removeprefix(topics.LISTED)
        if payload:
            self._retained[name] = payload
        else:
            self._retained.pop(name, None)
        self._mark((name,))

    def reloaded(self) -> None:
        """All documents were read anew."""
        self._mark((*self._store.state.nodes(), *self._store.state.with_instances(), *self._retained))

    def changed(self, key: str, before: Document | None, after: Document | None) -> None:
        """A document has changed."""
        kind, _, rest = key.partition(".")
        if kind == "node":
            if not (isinstance(before, Node) and isinstance(after, Node) and _shown(before) == _shown(after)):
                self._mark((rest,))
            return
        placements = (it.placement for it in (before, after) if isinstance(it, Instance))
        self._mark({it.node for it in placements if it is not None})

    def _mark(self, names: Iterable[str]) -> None:
        self._dirty.update(names)
        if self._dirty:
            self._some.set()


def _shown(node: Node) -> tuple[object, ...]:
    """What of a node's document the list depends on."""
    return node.host, node.port, node.online, node.lost_at, node.subnet_v4, node.subnet_v6
