"""Where several brokers are one cluster: which nodes have a connection to any of them.

Theory of operation
-------------------
A node's end is told by its last will, which its broker publishes. A broker that dies takes the wills of its nodes with
it: most come back at another broker, and those that died with it nobody misses. So ROUNDS times in the time that nodes
have to come back (``--roll-call``) the brokers are asked for their MQTT connections (``$SYS.REQ.SERVER.PING.CONNZ``),
whose client identifiers begin with the nodes'.

- A node that counts as there, and in two rounds was nowhere, is lost (`decide.missed`), unless it spoke since.
- A node that counts as lost, and in two rounds was connected, has its connection ended (``KICK``). It comes back at
  once and says what it is and runs. That happens where brokers were apart: those that had the state saw no node of the
  others.

*Owns* one connection to the broker, in the system account, which only managers have the password of. A broker that does
not answer within GATHER_S counts as gone, and its nodes as absent in that round. Where that was wrong in two rounds,
the next ones put it right. If the state cannot be written, as on the smaller side of a partition, nothing changes.
Every manager does this; what one has decided the others find decided.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Awaitable, Callable, Collection
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, NoReturn

from nats.aio.client import Client
from nats.aio.subscription import Subscription
from nats.errors import Error as NatsError

from appliance.cluster.manager.addresses import ExhaustedError
from appliance.cluster.manager.store import UnavailableError

log = logging.getLogger(__name__)

ROUNDS = 3
"""Pauses before questions in the time that nodes have: with two of them, and as long as brokers take to answer, it is
over."""
GATHER_S = 3.0
"""How long brokers may take to answer the question to all."""
ANSWER_S = 5.0
"""How long one may take that was asked alone."""
PAGE = 4096
"""Connections in one answer, some 400 bytes each; a broker with more is asked again."""


@dataclass(frozen=True)
class Connected:
    """Where a client is connected: the server, and the connection's number there."""

    server: str
    number: int


@dataclass(frozen=True)
class Verdict:
    """What two rounds say: nodes that are lost, nodes that have to come back."""

    lost: tuple[str, ...] = ()
    back: tuple[str, ...] = ()


@dataclass
class Rounds:
    """The decision, without a clock: what is not as it should be in two rounds in a row."""

    _absent: set[str] = field(default_factory=set)
    _strange: set[str] = field(default_factory=set)

    def judge(self, connected: Collection[str], known: dict[str, bool | None]) -> Verdict:
        """Takes a round: who is connected, and who counts as there by the state (None: never said).

        A node that never said is an existing one. It counts as there, and a connection that ended is no reason to
        take its instances, as they do not announce them again at the next one.
        """
        absent = {node for node, there in known.items() if there and node not in connected}
        strange = {node for node, there in known.items() if there is False and node in connected}
        verdict = Verdict(tuple(sorted(absent & self._absent)), tuple(sorted(strange & self._strange)))
        self._absent, self._strange = absent - set(verdict.lost), strange - set(verdict.back)
        return verdict


class Presence:
    """See the module. ``pause``: seconds between questions. ``known``: the nodes of the state. ``last``: the number of
    the newest message. ``lose`` counts a node as lost that said nothing since such a number."""

    def __init__(
        self,
        client: Client,
        pause: float,
        known: Callable[[], dict[str, bool | None]],
        last: Callable[[], Awaitable[int]],
        lose: Callable[[str, int], Awaitable[None]],
    ) -> None:
        self._client = client
        self._pause = pause
        self._known = known
        self._last = last
        self._lose = lose
        self._rounds = Rounds()

    async def run(self) -> NoReturn:
        """Asks for ever."""
        while True:
            await asyncio.sleep(self._pause)
            try:
                await self._round()
            except (NatsError, TimeoutError, UnavailableError, ExhaustedError) as error:
                log.warning("nodes' connections are not known", extra={"error": repr(error)})

    async def _round(self) -> None:
        since = await self._last()
        connected = await self.ask()
        verdict = self._rounds.judge(connected, self._known())
        for node in verdict.lost:
            log.warning("node has no connection to any broker", extra={"node": node})
            await self._lose(node, since)
        for node in verdict.back:
            log.warning("node is connected and counts as lost", extra={"node": node})
            await self._kick(connected[node])

    async def _kick(self, where: Connected) -> None:
        await self._client.request(f"$SYS.REQ.SERVER.{where.server}.KICK", _json(cid=where.number), timeout=ANSWER_S)

    async def ask(self) -> dict[str, Connected]:
        """The MQTT clients of all brokers that answer, by node. Raises NatsError, TimeoutError if none does."""
        found: dict[str, Connected] = {}
        for server, answer in (await self._first_pages()).items():
            while answer["connections"]:
                found |= {_node(it): Connected(server, it["cid"]) for it in _clients(answer)}
                offset = answer["offset"] + len(answer["connections"])
                if offset >= answer["total"]:
                    break
                answer = await self._page(server, offset)
        return found

    async def _first_pages(self) -> dict[str, dict[str, Any]]:
        pages: dict[str, dict[str, Any]] = {}
        inbox = self._client.new_inbox()
        answers = await self._client.subscribe(inbox)
        try:
            await self._client.publish("$SYS.REQ.SERVER.PING.CONNZ", _json(limit=PAGE), reply=inbox)
            await self._gather(answers, pages)
        finally:
            await answers.unsubscribe()
        if not pages:
            raise TimeoutError
        return pages

    @staticmethod
    async def _gather(answers: Subscription, pages: dict[str, dict[str, Any]]) -> None:
        with suppress(TimeoutError):
            async with asyncio.timeout(GATHER_S):
                while True:
                    data = json.loads((await answers.next_msg(timeout=GATHER_S)).data)
                    pages[data["server"]["id"]] = data["data"]

    async def _page(self, server: str, offset: int) -> dict[str, Any]:
        question = _json(limit=PAGE, offset=offset)
        answer = await self._client.request(f"$SYS.REQ.SERVER.{server}.CONNZ", question, timeout=ANSWER_S)
        page: dict[str, Any] = json.loads(answer.data)["data"]
        return page


def _node(connection: dict[str, Any]) -> str:
    """Which node a client is: an identifier may have a mark after the name (`cluster.access`)."""
    return str(connection["mqtt_client"]).partition("-")[0]


def _clients(answer: dict[str, Any]) -> list[dict[str, Any]]:
    return [it for it in answer["connections"] if it.get("mqtt_client")]


def _json(**options: int) -> bytes:
    return json.dumps(options).encode()
