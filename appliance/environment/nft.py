"""Carries nft scripts out, reads rule sets, and forgets connections: the programs ``nft`` and ``conntrack``.

``nft`` is the kernel's rules' own front end (libnftables); each script is one transaction, all of it or nothing. Both
run in the namespace of the calling thread. Raises EnvironmentError_ where a program is missing or refuses.
"""

from __future__ import annotations

import asyncio
import logging
import os
import shutil
from collections.abc import Iterable
from typing import Any, Final

import orjson

from appliance.environment.errors import EnvironmentError_
from appliance.environment.firewall import Protocol, Target

log = logging.getLogger(__name__)

TIMEOUT_S: Final = 20.0
"""A rule set of 100,000 elements takes a second or two."""
_PATH: Final = f"{os.environ.get('PATH', '')}:/usr/sbin:/sbin"


def is_there() -> bool:
    """Whether this node has the program."""
    return shutil.which("nft", path=_PATH) is not None


async def apply(script: str) -> None:
    """Carries out a script, as a whole or not at all."""
    await _run("nft", "-f", "-", text=script)


async def table(name: str) -> str | None:
    """One table of ours as the kernel has it, in nft's words; None if there is none."""
    return await _listed("nft", "list", "table", "inet", name)


async def described(name: str) -> dict[str, Any]:
    """The same as data; empty if there is none."""
    return _parsed(await _listed("nft", "-j", "list", "table", "inet", name))


async def ruleset() -> dict[str, Any]:
    """Everybody's rules as data, without the content of sets and maps."""
    return _parsed(await _run("nft", "-j", "-t", "list", "ruleset"))


async def forget(protocol: Protocol, targets: Iterable[Target]) -> None:
    """Ends the connections that were translated to these targets: a UDP client that never stops sending would hold on
    to one for ever. Costs what there is of them; without the program they end by themselves, once silent."""
    for it in targets:
        family = "ipv4" if it.address.version == 4 else "ipv6"
        await _end("-f", family, "-p", protocol, "-r", str(it.address), "--reply-port-src", str(it.port))


async def forget_port(protocol: Protocol, port: int) -> None:
    """The same for those to a port that leads elsewhere from now on: they were not translated when they began."""
    for family in ("ipv4", "ipv6"):
        await _end("-f", family, "-p", protocol, "--orig-port-dst", str(port), "--reply-port-src", str(port))


async def _end(*arguments: str) -> None:
    try:
        await _run("conntrack", "-D", *arguments, good=(0, 1))  # 1: there was none
    except EnvironmentError_ as error:
        log.warning("connections are not ended", extra={"which": " ".join(arguments), "error": str(error)})


def _parsed(text: str | None) -> dict[str, Any]:
    found: dict[str, Any] = orjson.loads(text) if text else {}
    return found


async def _listed(*command: str) -> str | None:
    try:
        return await _run(*command)
    except EnvironmentError_ as error:
        if "No such file or directory" in str(error):
            return None
        raise


async def _run(*command: str, text: str = "", good: tuple[int, ...] = (0,)) -> str:
    pipe, env = asyncio.subprocess.PIPE, {**os.environ, "PATH": _PATH, "LC_ALL": "C"}
    source = pipe if text else asyncio.subprocess.DEVNULL
    try:
        process = await asyncio.create_subprocess_exec(*command, stdin=source, stdout=pipe, stderr=pipe, env=env)
    except OSError as error:
        raise EnvironmentError_(f"{command[0]}: expected the program on this node: {error.strerror}") from None
    try:
        out, problem = await asyncio.wait_for(process.communicate(text.encode() or None), TIMEOUT_S)
    except TimeoutError:
        raise EnvironmentError_(f"{command[0]}: expected an answer within {TIMEOUT_S:g} s") from None
    finally:
        if process.returncode is None:  # too slow, or nobody waits any more
            process.kill()
            await process.wait()
    if process.returncode not in good:
        raise EnvironmentError_(f"{command[0]}: {' '.join(problem.decode(errors='replace').split())[:400]}")
    return out.decode()
