"""Checks of the instances on this node, as their jobs' descriptors want them.

Theory of operation
-------------------
*Owns* a task for each instance here whose job says how it is checked. *Runs* in the supervisor's event loop. A job that
changes, and a container that comes or goes, changes the tasks (``changed``); one whose check stays the same goes on.

A check runs every ``interval`` seconds from the moment the container is there. ``rise`` good ones in a row make the
instance good, ``fall`` bad ones bad (``Tally``, pure), and only that is told to the cluster, which tells all nodes.
TCP and HTTP come from the node itself, over the bridge; a command runs in the container's network namespace with this
node's files and our rights. The cluster says which, so the node has to permit it: ``health.commands``.

A check that cannot be made (no such program, namespace gone, a command that is not permitted) is a bad one. ``cancel``
ends what is under way.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from typing import Any, Final

import aiohttp

from appliance.cluster.feed import Tables
from appliance.cluster.messages import Health, TableQueryResult
from appliance.config import Config
from appliance.environment.attachment import Attachment
from appliance.environment.manager import EnvironmentManager
from appliance.tasks import end

log = logging.getLogger(__name__)

HTTP_GOOD: Final = range(200, 400)
NOT_PERMITTED: Final = "health.commands: expected true in this node's configuration, as the check is a command"

Report = Callable[[str, int, bool], object]
"""Takes a job, an instance's number, and whether it is good; gives what heard it, None if nobody did."""
Key = tuple[Attachment, Health]


@dataclass
class Tally:
    """Checks in a row. ``verdict``: None until there were enough."""

    rise: int
    fall: int
    verdict: bool | None = None
    row: int = 0
    last: bool | None = None

    def count(self, *, is_good: bool) -> bool:
        """One more check; whether that changes the verdict."""
        self.row = self.row + 1 if is_good == self.last else 1
        self.last = is_good
        if is_good == self.verdict or self.row < (self.rise if is_good else self.fall):
            return False
        self.verdict = is_good
        return True


class Checks:
    """See the module."""

    def __init__(self, config: Config, environment: EnvironmentManager, report: Report) -> None:
        self._permitted = config.health.commands
        self._environment = environment
        self._report = report
        self._tasks: dict[Key, asyncio.Task[None]] = {}
        self._states: dict[Key, tuple[Tally, str]] = {}

    def reconfigure(self, config: Config) -> None:
        """Another configuration is in force, from each instance's next check on."""
        self._permitted = config.health.commands

    def changed(self, tables: Tables) -> None:
        """These jobs are other ones now; so may be the containers."""
        wanted = set(self._wanted(tables))
        for key in self._tasks.keys() - wanted:
            self._tasks.pop(key).cancel()
            self._states.pop(key, None)
        for key in wanted - self._tasks.keys():
            self._tasks[key] = asyncio.create_task(self._follow(*key), name=f"check of {key[0].service}")

    def _wanted(self, tables: Tables) -> list[Key]:
        found: list[Key] = []
        for attachment in self._environment.attachments():
            result: TableQueryResult | None = tables.jobs.get(attachment.service)
            if result is not None and result.health is not None:
                found.append((attachment, result.health))
        return found

    async def stop(self) -> None:
        """Ends all checks."""
        await end(self._tasks.values())

    async def _follow(self, attachment: Attachment, health: Health) -> None:
        tally, told = Tally(health.rise, health.fall), None
        loop = asyncio.get_running_loop()
        while True:
            began = loop.time()
            reason = await why_bad(attachment, health, commands=self._permitted)
            self._states[attachment, health] = tally, reason
            if tally.count(is_good=not reason):
                told = None
                log.info(
                    "checked",
                    extra={"instance": _name(attachment), "good": tally.verdict, "reason": reason},
                )
            if told is None and tally.verdict is not None:
                told = self._report(attachment.service, attachment.instance, tally.verdict)
            await asyncio.sleep(max(0.0, began + health.interval - loop.time()))

    def status(self) -> dict[str, dict[str, Any]]:
        """What operators see, by instance."""
        return {
            _name(attachment): {"good": tally.verdict, "in_a_row": tally.row, "reason": reason}
            for (attachment, _), (tally, reason) in self._states.items()
        }


async def why_bad(attachment: Attachment, health: Health, *, commands: bool) -> str:
    """One check: what is wrong with an instance; empty if nothing is. ``commands``: whether they are permitted."""
    try:
        async with asyncio.timeout(health.timeout):
            if health.http is not None:
                return await _http(attachment, health.http.port, health.http.path)
            if health.tcp is not None:
                return await _tcp(attachment, health.tcp)
            return await _command(attachment, health.command) if commands else NOT_PERMITTED
    except TimeoutError:
        return f"no answer within {health.timeout:g} s"
    except (OSError, aiohttp.ClientError, ValueError) as error:
        return str(error) or type(error).__name__


async def _tcp(attachment: Attachment, port: int) -> str:
    _, writer = await asyncio.open_connection(str(attachment.addresses[0]), port)
    writer.close()
    with suppress(OSError):
        await writer.wait_closed()
    return ""


async def _http(attachment: Attachment, port: int, path: str) -> str:
    address = attachment.addresses[0]
    host = f"[{address}]" if address.version == 6 else str(address)
    connector = aiohttp.TCPConnector(force_close=True)
    async with (
        aiohttp.ClientSession(connector=connector) as session,
        session.get(f"http://{host}:{port}{path}", allow_redirects=False) as response,
    ):
        return "" if response.status in HTTP_GOOD else f"status {response.status}"


async def _command(attachment: Attachment, command: tuple[str, ...]) -> str:
    nothing = asyncio.subprocess.DEVNULL
    line = ("nsenter", f"--net={attachment.netns.path}", "--", *command)
    process = await asyncio.create_subprocess_exec(*line, stdin=nothing, stdout=nothing, stderr=nothing)
    try:
        status = await process.wait()
    finally:
        if process.returncode is None:
            process.kill()
            await process.wait()
    return f"exit status {status}" if status else ""


def _name(attachment: Attachment) -> str:
    return f"{attachment.service}.{attachment.instance}"
