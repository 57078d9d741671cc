"""The node's nftables rules, kept: node ports of containers and of exposed services, egress.

Theory of operation
-------------------
*Owns* which container has which port mappings, the exposed services' node ports, and the task that watches others.
*Runs* in the supervisor's event loop; the kernel's rules are changed by ``nft`` alone (``environment.nft``), one script
at a time, always the whole table (``environment.firewall``). One that is as this process made it keeps its place among
others'; any other one is made anew.

**Nothing is taken away from anybody.** A mapping is refused before anything changes if another container, an exposed
service or a program that listens has the port. ``reserve`` holds it from the check on; what cannot be put into force
is given back.

**What is in force outlives this process**, as the containers do: a supervisor that starts reads its predecessor's
mappings from the table, and keeps those whose container it adopts.

**Others change rules too.** The kernel tells of each change (NFNLGRP_NFTABLES); ``SETTLE_S`` later the table is
compared with what it was made, and made again if it differs, as after ``nft flush ruleset``. The same look gives
forward chains that drop by default the rules that accept our links.

If ``nft`` is missing or refuses, containers are attached nevertheless, unless they want ports; ``last_error`` says why,
and it is tried again with the next change, and every ``AGAIN_S`` seconds.
"""

from __future__ import annotations

import asyncio
import logging
import socket
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Final

from appliance.config import Config
from appliance.environment import firewall, names, nft
from appliance.environment.addresses import IPAddress, ingress_of
from appliance.environment.attachment import Attachment
from appliance.environment.errors import EnvironmentError_
from appliance.environment.firewall import NodePort, Protocol, Rules, Target
from appliance.environment.listeners import Listener, holder, listeners
from appliance.environment.manager import EnvironmentManager
from appliance.environment.portmap import PortMapping
from appliance.tasks import end

log = logging.getLogger(__name__)

SETTLE_S: Final = 0.3
"""Seconds from a change of the kernel's rules to the look at ours: a firewall reloads in several steps."""
AGAIN_S: Final = 5.0
"""Seconds until what failed is tried again."""
_NETLINK_NETFILTER: Final = 12
_NFNLGRP_NFTABLES: Final = 7
_READ: Final = 65536

Mappings = Sequence[PortMapping]


class Ports:
    """See the module. ``tunnel_port``: where this node's own socket waits for the others."""

    def __init__(self, config: Config, environment: EnvironmentManager) -> None:
        self.counters: Counter[str] = Counter()
        self.last_error = ""
        self._config = config
        self._environment = environment
        self._mapped: dict[str, tuple[PortMapping, ...]] = {}
        self._found: list[NodePort] = []
        self._exposed: tuple[NodePort, ...] = ()
        self._with_ingress = False
        self._is_withdrawing = False
        self._lock = asyncio.Lock()
        self._asked = self._done = 0
        self._is_started = False
        self._listed: str | None = None
        self._socket: socket.socket | None = None
        self._look: asyncio.TimerHandle | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    # --- life ------------------------------------------------------------------------------------------------------

    async def start(self) -> None:
        """Puts the table into force, with what an earlier process left in it, and watches it."""
        try:
            self._found = firewall.mapped(await nft.described(self._table), self._table)
        except EnvironmentError_ as error:
            self._failed(error)
        self._claim()
        if self._environment.subnets:  # all containers that there are have been adopted
            self._found = []
        self._is_started = True
        self._watch()
        await self.apply_or_log()

    async def stop(self) -> None:
        """Ends watching; the rules stay, as the containers do."""
        self._is_started = False
        if self._look is not None:
            self._look.cancel()
        if self._socket is not None:
            asyncio.get_running_loop().remove_reader(self._socket)
            self._socket.close()
        await end(self._tasks)

    async def reconfigure(self, config: Config) -> None:
        """Another configuration is in force; before ``start`` it is only noted, as the mappings are not known yet."""
        before, self._config = self._config.firewall, config
        if not self._is_started:
            return
        await self.apply_or_log()
        if before.accept != config.firewall.accept:
            self._is_withdrawing = before.accept
            await self._accept_or_log()

    # --- containers ------------------------------------------------------------------------------------------------

    async def reserve(self, service: str, instance: int, mappings: Mappings) -> tuple[PortMapping, ...]:
        """Holds the ports for a container, whatever it had; gives what that was. Raises EnvironmentError_ if one
        cannot be had: then nothing has changed."""
        veth = names.veth_name(service, instance)
        listening = await _listening() if mappings else []
        self._check(veth, mappings, listening)
        before = self._mapped.get(veth, ())
        self._keep(veth, mappings)
        return before

    async def put(self, attachment: Attachment, before: Mappings) -> None:
        """Puts a container's ports into force in place of those that it had. Raises EnvironmentError_."""
        now = self.of(attachment)
        if not now and not before:
            return
        await self.apply()
        for it in set(now) - set(before):
            if it.protocol == "udp":
                await nft.forget_port(it.protocol, it.host)
        await self._forget(attachment, set(before) - set(now))

    async def drop(self, service: str, instance: int, keep: Mappings = ()) -> None:
        """A container has these ports instead of its own from now on, by default none."""
        veth = names.veth_name(service, instance)
        attachment, gone = self._environment.attachment(veth), set(self._mapped.get(veth, ())) - set(keep)
        self._keep(veth, keep)
        if gone:
            await self.apply_or_log()
            if attachment is not None:
                await self._forget(attachment, gone)

    async def _forget(self, attachment: Attachment, gone: Iterable[PortMapping]) -> None:
        """TCP connections end by themselves, with the container; UDP has no end."""
        for it in gone:
            if it.protocol == "udp":
                await nft.forget(it.protocol, (Target(address, it.container) for address in attachment.addresses))

    def of(self, attachment: Attachment) -> tuple[PortMapping, ...]:
        """The ports of a container."""
        return self._mapped.get(attachment.veth, ())

    def _keep(self, veth: str, mappings: Mappings) -> None:
        self._mapped.pop(veth, None)
        if mappings:
            self._mapped[veth] = tuple(mappings)

    def _check(self, veth: str, mappings: Mappings, listening: list[Listener]) -> None:
        self._claim()
        others = {(it.protocol, it.host): name for name, own in self._mapped.items() for it in own if name != veth}
        for it in mappings:
            if (it.protocol, it.host) in others:
                raise EnvironmentError_(f"portMappings: expected a free port, {_text(it)} is another container's")
            if any((own.protocol, own.port) == (it.protocol, it.host) for own in self._exposed):
                raise EnvironmentError_(f"portMappings: expected a free port, {_text(it)} is an exposed service's")
            found = holder(it.protocol, it.host, None, listening)
            if found is not None:
                raise EnvironmentError_(
                    f"portMappings: expected a free port, somebody listens on {found.address} {_text(it)}"
                )

    # --- exposed services ------------------------------------------------------------------------------------------

    @property
    def ingress(self) -> tuple[IPAddress, ...]:
        """The node's own addresses in the overlay."""
        found = (ingress_of(subnet) for subnet in self._environment.subnets)
        taken = {address for it in self._environment.attachments() for address in it.addresses}
        return tuple(it for it in found if it is not None and it not in taken)

    async def expose(self, ports: Sequence[NodePort], *, with_ingress: bool) -> dict[tuple[Protocol, int], str]:
        """These are the exposed services' ports, except those that somebody has: gives who, by port."""
        listening = await _listening() if ports else []
        self._claim()
        reasons = (((it.protocol, it.port), self._why_taken(it, listening)) for it in ports)
        taken = {key: why for key, why in reasons if why is not None}
        wanted = tuple(it for it in ports if (it.protocol, it.port) not in taken)
        if (wanted, with_ingress) != (self._exposed, self._with_ingress):
            gone = [it for it in self._exposed if it not in wanted and it.protocol == "udp"]
            self._exposed, self._with_ingress = wanted, with_ingress
            await self.apply_or_log()
            for it in gone:
                await nft.forget(it.protocol, it.targets)
        return taken

    def _why_taken(self, port: NodePort, listening: list[Listener]) -> str | None:
        key = port.protocol, port.port
        if any((it.protocol, it.host) == key for own in self._mapped.values() for it in own):
            return "a container has the port"
        if key == ("udp", self._config.tunnel.port):
            return "it is the tunnel's own port"
        found = holder(*key, port.address, listening)
        return None if found is None else f"somebody listens on {found.address}"

    # --- the table -------------------------------------------------------------------------------------------------

    @property
    def _table(self) -> str:
        return self._config.firewall.table

    def rules(self) -> Rules:
        """What the table is to say now."""
        self._claim()
        config = self._config
        return Rules(
            table=self._table,
            bridge=config.network.bridge,
            tun=config.network.tun,
            tunnel_port=config.tunnel.port,
            overlay=tuple(config.network.overlay),
            subnets=self._environment.subnets,
            ingress=self.ingress if self._with_ingress else (),
            egress=config.firewall.egress,
            uplinks=tuple(config.firewall.uplinks),
            ports=(*self._of_containers(), *self._found, *self._exposed),
        )

    def _of_containers(self) -> Iterator[NodePort]:
        for attachment in self._environment.attachments():
            for it in self._mapped.get(attachment.veth, ()):
                for address in attachment.addresses:
                    yield NodePort(it.protocol, it.host, (Target(address, it.container),))

    def _claim(self) -> None:
        """What an earlier process left belongs to the containers that are there; before any are, nobody knows."""
        attached = self._environment.attachments() if self._found else ()
        for attachment in attached:
            own = (it for it in self._found if it.targets[0].address in attachment.addresses)
            mappings = dict.fromkeys(PortMapping(it.port, it.targets[0].port, it.protocol) for it in own)
            if mappings and attachment.veth not in self._mapped:
                self._mapped[attachment.veth] = tuple(mappings)
        if attached:
            self._found = []

    async def apply(self) -> None:
        """All that was decided until now is in force when this returns. Raises EnvironmentError_."""
        self._asked += 1
        mine = self._asked
        async with self._lock:
            if self._done < mine:
                serial = self._asked
                await self._make()
                self._done = serial

    async def apply_or_log(self) -> None:
        """The same where nobody is to be told."""
        try:
            await self.apply()
        except EnvironmentError_ as error:
            self._failed(error)

    def ask(self) -> None:
        """Have it done soon; not before ``start``, which first reads what an earlier process left."""
        if not self._is_started:
            return
        task = asyncio.ensure_future(self.apply_or_log())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _make(self) -> None:
        try:
            is_ours = self._listed is not None and _lines(await nft.table(self._table)) == _lines(self._listed)
            await nft.apply((firewall.revision if is_ours else firewall.script)(self.rules()))
            self._listed = await nft.table(self._table)
        except EnvironmentError_:
            self._listed = None
            self.counters["failed"] += 1
            raise
        self.counters["made"] += 1
        self.last_error = ""

    def _failed(self, error: EnvironmentError_) -> None:
        if self.last_error != str(error):
            log.error("rules are not in force", extra={"error": str(error)})
        self.last_error = str(error)
        if self._is_started:
            self._soon(AGAIN_S)

    # --- what others do --------------------------------------------------------------------------------------------

    def _watch(self) -> None:
        self._socket = socket.socket(socket.AF_NETLINK, socket.SOCK_RAW | socket.SOCK_NONBLOCK, _NETLINK_NETFILTER)
        self._socket.bind((0, 1 << (_NFNLGRP_NFTABLES - 1)))
        asyncio.get_running_loop().add_reader(self._socket, self._heard)
        self._soon()

    def _heard(self) -> None:
        assert self._socket is not None
        try:
            while self._socket.recv(_READ):
                pass
        except BlockingIOError:
            pass
        except OSError:  # ENOBUFS: more than fits was said, and a look tells what it came to
            self.counters["events_lost"] += 1
        self._soon()

    def _soon(self, delay: float = SETTLE_S) -> None:
        """Have a look by then; the sooner of two."""
        loop = asyncio.get_running_loop()
        if self._look is not None:
            if self._look.when() <= loop.time() + delay:
                return
            self._look.cancel()
        self._look = loop.call_later(delay, self._begin_look)

    def _begin_look(self) -> None:
        self._look = None
        task = asyncio.ensure_future(self._compare())
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _compare(self) -> None:
        """Makes the table again if that failed or somebody changed it, and has our links accepted where others drop."""
        try:
            async with self._lock:
                if self.last_error:
                    await self._make()
                elif _lines(await nft.table(self._table)) != _lines(self._listed):
                    self.counters["restored"] += 1
                    log.warning("somebody changed our rules, made again")
                    await self._make()
                await self._accept()
        except EnvironmentError_ as error:
            self._failed(error)

    async def _accept_or_log(self) -> None:
        try:
            async with self._lock:
                await self._accept()
        except EnvironmentError_ as error:
            self._failed(error)

    async def _accept(self) -> None:
        """Our rules in others' chains: where they are needed, or none any more."""
        if self._is_withdrawing:
            await _withdraw()
            self._is_withdrawing = False
        script = firewall.acceptance(await nft.ruleset(), self.rules()) if self._config.firewall.accept else ""
        if script:
            await nft.apply(script)
            self.counters["accepted"] += 1
            log.info("others' forward chains accept our links now", extra={"rules": script.count("\n")})

    def status(self) -> dict[str, Any]:
        """What operators see."""
        return {
            "table": self._table,
            "in_force": self._listed is not None and not self.last_error,
            "ports": len({(it.protocol, it.port) for it in self.rules().ports}),
            **{name: self.counters[name] for name in ("made", "restored", "accepted", "failed")},
            "last_error": self.last_error,
        }


def _lines(listing: str | None) -> list[str]:
    """What a listing says; the kernel keeps the elements of a map in no order."""
    return sorted(line.strip(" \t,{}") for line in (listing or "").replace("elements = {", "").splitlines())


async def _listening() -> list[Listener]:
    """Who listens on the node. With many sockets the kernel takes its time to tell, in which the event loop goes on."""
    return await asyncio.to_thread(listeners)


def _text(mapping: PortMapping) -> str:
    return f"{mapping.host}/{mapping.protocol}"


async def _withdraw() -> int:
    """Takes our rules out of others' chains; how many there were."""
    script = firewall.withdrawal(await nft.ruleset())
    if script:
        await nft.apply(script)
    return script.count("\n")


async def remove(table: str) -> list[str]:
    """Takes away the table, and our rules in others' chains, and nothing else, as for an uninstallation; what that was.

    Raises EnvironmentError_.
    """
    count = await _withdraw()
    removed = [f"{count} rules in others' chains"] if count else []
    if await nft.table(table) is not None:
        await nft.apply(firewall.removal(table))
        removed.append(f"table inet {table}")
    return removed


def spoken(mappings: Iterable[PortMapping]) -> str:
    """Mappings as ``portmap.parse`` reads them."""
    return ";".join(f"{it.host}:{it.container}/{it.protocol}" for it in mappings)
