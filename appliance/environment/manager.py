"""The environment of one node: what the supervisor asks for, made and kept.

Theory of operation
-------------------
*Owns* the addresses of this node's subnets and the list of attachments; in the kernel the bridge, our
routes into the TUN link, and one pair of links a container. The TUN link itself is its opener's.
*Read and written* by the supervisor's event loop alone, so nothing here is locked against threads. The
work on the kernel runs apart, one thread an operation (`namespace.apart`), at most `OPERATIONS_MAX` at
once: it takes values and returns values.

An operation observes, plans and carries out (`work`). What is wanted is known from the configuration and
the call; what is there is read from the kernel, never remembered. Hence:

- every call may be repeated, and does only what is missing;
- the last command of an attachment commits it (`attachment.Record`). If a command fails, the link is
  removed again, and with it whatever was made on it; a loopback link that was switched on stays on. If
  the process dies instead, the first `converge` of the next one removes the links without a record and
  adopts those with one: their containers notice nothing;
- a caller that is cancelled stops waiting, not the operation: it ends, and is accounted for.

Operations on one attachment, or in one container, wait for each other; others do not.

A container that is gone takes its link with it. The kernel tells `watch`, or else `converge` notices; `forget_link`
drops the attachment and lets its addresses rest. Nothing is ever attached by itself, as a process number may have
become another container's. `on_gone` is called for each attachment that was dropped so, whoever noticed.

`condition` and `is_damaged` look at the kernel between operations, never at what one is about to change.

The subnets are the configuration's, or come later (`assign`). Until there is one, nobody knows which links
belong here: `converge` leaves everything as it is, and nothing is attached.

`fault_point` is called after each command that was carried out, in the operation's thread. It does
nothing, unless a test makes it raise, or kill the process.
"""

import asyncio
import logging
import time
from collections.abc import Callable, Coroutine, Sequence
from dataclasses import replace
from typing import Any, Final, TypeVar
from weakref import WeakValueDictionary

from appliance.config import Config
from appliance.environment import names, work
from appliance.environment.addresses import IPAddress, IPInterface, IPNetwork, gateway_of
from appliance.environment.attachment import Attachment, Condition, NetnsRef, Record, check_key
from appliance.environment.book import Book
from appliance.environment.errors import EnvironmentError_
from appliance.environment.namespace import Namespace, apart
from appliance.environment.plan import Command, NodeWanted
from appliance.environment.work import FaultPoint

T = TypeVar("T")
log = logging.getLogger(__name__)

OPERATIONS_MAX: Final = 16
"""The kernel changes links one at a time; a few more operations hide the latency of the rest."""


def subnets_of(config: Config) -> tuple[IPNetwork, ...]:
    """The subnets of this node's containers."""
    both = (config.network.subnet_v4, config.network.subnet_v6)
    return tuple(subnet for subnet in both if subnet != "")


def node_wanted(config: Config) -> NodeWanted:
    """What a configuration wants of the node, with the subnets that it has itself."""
    network = config.network
    return NodeWanted(
        bridge=network.bridge,
        tun=network.tun,
        mtu=config.tunnel.mtu,
        txqueuelen=network.txqueuelen,
        gateways=tuple(gateway_of(subnet) for subnet in subnets_of(config)),
        overlay=tuple(network.overlay),
    )


class EnvironmentManager:
    """See the module's theory of operation. To be used within one running event loop."""

    def __init__(self, config: Config, clock: Callable[[], float] = time.monotonic) -> None:
        self.fault_point: FaultPoint = _no_fault
        self.on_gone: Callable[[Attachment], object] = _told_nobody
        self._wanted = node_wanted(config)
        self._kept = False
        self._book = Book(subnets_of(config), clock)
        self._locks: WeakValueDictionary[str, asyncio.Lock] = WeakValueDictionary()
        self._slots = asyncio.Semaphore(OPERATIONS_MAX)
        self._running: set[asyncio.Task[Any]] = set()

    @property
    def subnets(self) -> tuple[IPNetwork, ...]:
        """The subnets of this node's containers, IPv4 first."""
        return self._book.subnets

    async def assign(self, subnets: Sequence[IPNetwork]) -> None:
        """Gives this node its subnets, which `converge` then puts into force. More may come while containers have
        addresses. Raises EnvironmentError_ if a subnet is missing while they do: then all stays as it is.
        """
        async with self._lock("converge"):
            self._book.assign(subnets)
            self._wanted = replace(self._wanted, gateways=tuple(gateway_of(it) for it in self._book.subnets))

    @property
    def wanted(self) -> NodeWanted:
        """What is kept of the node's own part."""
        return self._wanted

    def attachment(self, veth: str) -> Attachment | None:
        """A container on the bridge, by the name of the node's end of its link."""
        return self._book.attachments.get(veth)

    def attachments(self) -> list[Attachment]:
        """Every container on the bridge, by service and instance."""
        return sorted(self._book.attachments.values(), key=lambda it: (it.service, it.instance))

    async def converge(self) -> None:
        """Makes the node as configured, whatever state it is in; the first call adopts what a previous
        process attached. Raises EnvironmentError_: what was done until then stays, the next call goes on.
        """
        await self._to_the_end(self._converge())

    def reserve(self, version: int) -> IPInterface:
        """An address of a family, for `attach` within `book.RESERVED_S`. Raises EnvironmentError_ as `attach` does."""
        return self._book.reserve(version)

    def unreserve(self, address: IPAddress) -> None:
        """It is not wanted after all; nothing if it was attached, or not reserved."""
        self._book.unreserve(address)

    async def attach(
        self, service: str, instance: int, netns: NetnsRef, interface: str = "", addresses: Sequence[IPAddress] = ()
    ) -> Attachment:
        """Puts a container on the bridge; repeats and repairs are no error. An instance that was in
        another container moves, with its addresses. `interface` is the link's name there, the first free one of eth0 …
        if it is empty.

        Of a namespace of Docker's, only the node's part is made: the other end waits on the node (`names.offered_name`)
        for Docker to move it, and to set addresses and routes. A repetition makes it anew; with `addresses` that were
        reserved, in place of those that it had.

        Raises EnvironmentError_, AddressesExhausted among them: then nothing of this attachment is left; or
        AttachmentRefused, which leaves it as it was.
        """
        check_key(service, instance)
        return await self._to_the_end(self._attach(service, instance, netns, interface, addresses))

    async def taken(self, veth: str, sandbox: str) -> Attachment | None:
        """An attachment of Docker's, once the path of its namespace is known; None if there is no such attachment.
        Raises EnvironmentError_: then it is as before."""
        return await self._to_the_end(self._taken(veth, sandbox))

    async def detach(self, service: str, instance: int, netns: NetnsRef | None = None) -> bool:
        """Takes a container off the bridge; False if it was not on it, or is in another namespace than `netns`. Its
        addresses rest from now.

        Raises EnvironmentError_: then it is still attached.
        """
        return await self._to_the_end(self._detach(names.veth_name(service, instance), netns))

    async def forget(self, service: str, instance: int) -> bool:
        """Drops an attachment whose link is gone with its container; False if it is still there, or was not known."""
        return await self._to_the_end(self._forget(names.veth_name(service, instance))) is not None

    async def forget_link(self, veth: str) -> Attachment | None:
        """Drops an attachment whose link is gone, by the name of the node's end; its addresses rest from now.
        None if there is none, or the link is there (again). Raises EnvironmentError_ if the kernel does not tell."""
        return await self._to_the_end(self._forget(veth))

    async def condition(self, veth: str) -> Condition:
        """What has become of an attachment's link. Raises EnvironmentError_ if the kernel does not tell."""
        async with self._lock(veth):
            if veth not in self._book.attachments:
                return Condition.UNKNOWN
            link = await self._apart(lambda: work.veth(veth))
        if link is None:
            return Condition.GONE
        if not link.carrier and link.peer_namespace < 0:
            return Condition.OFFERED
        return Condition.WHOLE if link.carrier else Condition.IMPAIRED

    async def forged(self) -> dict[tuple[str, int], int]:
        """How many frames that were not their own containers have sent (`guard`), by service and instance; only where
        there are any. Raises EnvironmentError_ if the kernel does not tell."""
        dropped = await self._apart(work.forged)
        return {(it.service, it.instance): n for it in self.attachments() if (n := dropped.get(it.veth, 0))}

    async def is_damaged(self) -> bool:
        """Whether `converge` has something to do, or would fail. Not before the first one, nor after `remove`."""
        async with self._lock("converge"):
            try:
                return self._kept and bool(await self._apart(lambda: work.repairs(self._wanted)))
            except EnvironmentError_:
                return True

    async def remove(self) -> None:
        """Takes away all that was made here and nothing else. Raises EnvironmentError_ as converge does."""
        await self._to_the_end(self._remove())

    async def close(self) -> None:
        """Waits for the operations under way. The environment stays; no handle is open between operations."""
        await asyncio.gather(*self._running, return_exceptions=True)

    async def _converge(self) -> None:
        async with self._lock("converge"):
            if not self.subnets:
                return
            known = dict(self._book.attachments)
            self._kept = True
            links = await self._apart(lambda: work.converge(self._wanted, self.fault_point))
            if not self._book.is_open:
                self._book.adopt(links)
            present = {link.name for link in links}
            for name in known.keys() - present:
                await self._forget(name)
            for name in present - self._book.attachments.keys():
                await self._remove_leftover(name)

    async def _forget(self, name: str) -> Attachment | None:
        """`forget_link`, unless that has changed in the meantime."""
        async with self._lock(name):
            if name not in self._book.attachments or await self._apart(lambda: work.veth(name)) is not None:
                return None
            lost = self._book.drop(name)
        log.warning("lost service=%s instance=%d: its link is gone", lost.service, lost.instance)
        self.on_gone(lost)
        return lost

    async def _remove_leftover(self, name: str) -> None:
        """Removes a link that belongs to no attachment, unless that has changed in the meantime."""
        async with self._lock(name):
            if name not in self._book.attachments:
                await self._apart(lambda: work.detach(name, self.fault_point))
                log.warning("removed link=%s: it belongs to no attachment", name)

    async def _attach(
        self, service: str, instance: int, netns: NetnsRef, wanted: str, given: Sequence[IPAddress]
    ) -> Attachment:
        name, started = names.veth_name(service, instance), time.monotonic()
        if netns.kind == "docker":
            return await self._offer(service, instance, netns, wanted, given)
        with Namespace.open(netns) as namespace:
            async with self._lock(name), self._lock(f"netns {namespace.inode}"):
                with self._book.placing(service, instance, netns) as placement:
                    interface = await self._apart(
                        lambda: work.attach(self._wanted, placement, namespace, self.fault_point, wanted)
                    )
                    attachment = self._book.enter(placement, interface)
        took = (time.monotonic() - started) * 1000
        log.info("attached service=%s instance=%d link=%s ms=%.1f", service, instance, name, took)
        return attachment

    async def _offer(
        self, service: str, instance: int, netns: NetnsRef, interface: str, given: Sequence[IPAddress]
    ) -> Attachment:
        name = names.veth_name(service, instance)
        async with self._lock(name):
            with self._book.placing(service, instance, netns, given) as placement:
                await self._apart(lambda: work.offer(self._wanted, placement, interface, self.fault_point))
                attachment = self._book.enter(placement, interface)
        log.info("offered service=%s instance=%d link=%s", service, instance, name)
        return attachment

    async def _taken(self, name: str, sandbox: str) -> Attachment | None:
        async with self._lock(name):
            known = self._book.attachments.get(name)
            if known is None or known.netns.kind != "docker":
                return None
            netns = NetnsRef.by_endpoint(known.netns.endpoint, sandbox)
            record = Record(
                known.service, known.instance, known.interface, known.address_v4, known.address_v6, netns
            )
            await self._apart(lambda: work.rename(name, record, self.fault_point))
            return self._book.rename(record)

    async def _detach(self, name: str, netns: NetnsRef | None = None) -> bool:
        async with self._lock(name):
            known = self._book.attachments.get(name)
            if known is None or netns not in (None, known.netns):
                return False
            await self._apart(lambda: work.detach(name, self.fault_point))
            gone = self._book.drop(name)
        log.info("detached service=%s instance=%d link=%s", gone.service, gone.instance, name)
        return True

    async def _remove(self) -> None:
        async with self._lock("converge"):
            self._kept = False
            for name in list(self._book.attachments):
                await self._detach(name)
            await self._apart(lambda: work.remove(self._wanted, self.fault_point))

    def _lock(self, key: str) -> asyncio.Lock:
        """The lock of a key, which exists as long as somebody holds it or waits for it."""
        return self._locks.setdefault(key, asyncio.Lock())

    async def _apart(self, operation: Callable[[], Coroutine[Any, Any, T]]) -> T:
        async with self._slots:
            return await apart(operation)

    async def _to_the_end(self, operation: Coroutine[Any, Any, T]) -> T:
        """The result of an operation that goes on if its caller is cancelled."""
        task = asyncio.ensure_future(operation)
        self._running.add(task)
        task.add_done_callback(self._running.discard)
        return await asyncio.shield(task)


def _told_nobody(_: Attachment) -> None:
    """Nobody asked."""


def _no_fault(_: Command) -> None:
    """Nothing goes wrong on purpose."""
