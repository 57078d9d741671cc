"""The first minutes with the tables of another supervisor.

Before anything is written, every worker must have begun a batch since the takeover (``quiet``). What the tables hold
beyond what this supervisor knows, from the file and from what the cluster said last, stays in force until the cluster
has been asked (``settle``): for each address that flows use and nobody here knows, as for a miss, and the rest had
``SETTLE_S`` to be announced.
"""

from __future__ import annotations

import asyncio
import logging
import time
from typing import TYPE_CHECKING, Final

from appliance import limits
from appliance.cluster.messages import MessageError
from appliance.observe.usage import addresses_in_use
from appliance.tables.catalogue import Catalogue
from appliance.tables.publish import Publisher

if TYPE_CHECKING:
    from appliance.supervisor.membership import Membership
    from appliance.supervisor.workers import WorkerPool

log = logging.getLogger(__name__)

SETTLE_S: Final = 10.0
"""Seconds of a connection to the cluster after which everything that it knows has been said."""
POLL_S: Final = 0.01
CONNECTED_S: Final = 1.0


async def quiet(publisher: Publisher, pool: WorkerPool) -> None:
    """Wait until no worker holds what was free at the takeover; one that does not go on is killed."""
    deadline = time.monotonic() + limits.WORKER_EXIT_S
    while not publisher.is_quiet():
        if time.monotonic() > deadline:
            pool.kill_stuck(publisher.epoch)
            deadline += limits.WORKER_EXIT_S
        await asyncio.sleep(POLL_S)


async def settle(catalogue: Catalogue, membership: Membership, pool: WorkerPool) -> None:
    """Ask for what only the tables know, and give up what nobody confirms."""
    while membership.member is not None and not membership.member.status()["connected"]:  # noqa: ASYNC110
        await asyncio.sleep(CONNECTED_S)
    if membership.member is not None:
        records = [worker.records for worker in pool.workers]
        used = await asyncio.to_thread(addresses_in_use, records, time.monotonic_ns())
        for address in used:
            if address in catalogue.legacy.services.at or address in catalogue.legacy.hosts.at:
                try:
                    await membership.resolve(address)
                except MessageError as error:
                    log.warning("nobody knows", extra={"address": str(address), "error": str(error)})
        await asyncio.sleep(SETTLE_S)
    count = catalogue.disinherit()
    log.info("the tables are ours", extra={"given_up": count})
