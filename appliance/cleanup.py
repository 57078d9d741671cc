"""Takes away what the appliance made on this node, after whatever end: processes, links, routes, rules, files.

It goes by what is there and recognisably ours, never by what somebody believes to have made: the template that answers,
recorded processes with their start time, links of our group and names, files of known names. Directories go if they are
empty then. What another program made stays, also in our directories. It refuses while a supervisor runs.

Sysctls of the whole node stay, as others may have come to rely on them.
"""

from __future__ import annotations

import asyncio
import shutil
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path
from typing import Final

from appliance.cluster import store
from appliance.config import Config
from appliance.environment import guest, nft, work
from appliance.environment.attachment import Record
from appliance.environment.manager import node_wanted
from appliance.environment.plan import describe
from appliance.naming import resolv
from appliance.supervisor import estate, identity, naming, ports, record
from appliance.supervisor.errors import StartError

STATE: Final = (store.TABLES, store.SUBNETWORK, identity.FILE)
RUNTIME: Final = (estate.SOCKET, naming.CONTROL, record.FILE)
CNI: Final = "cni"
"""What the CNI plugin notes of each attachment, by network (``runtimes.cni.STATE``), in ``paths.runtime``."""


def processes(config: Config) -> list[str]:
    """End what a supervisor that is gone has left running; what that was. Raises StartError while one runs."""
    runtime = config.paths.runtime
    living = record.alive(runtime)
    if record.SUPERVISOR in living:
        raise StartError(f"process {living[record.SUPERVISOR]}: expected no supervisor that runs; stop it first")
    with suppress(StartError):  # a template that does not answer is ended by its record
        if (left := estate.found(runtime, {})) is not None:
            left.dissolve()
    record.end(runtime, living)
    naming.dismiss(runtime)  # those whose record a later one has overwritten
    return [f"process {pid} ({name})" for name, pid in living.items()]


def everything(config: Config, *, purge: bool) -> list[str]:
    """End and remove everything; what was removed. ``purge``: also what was to survive a reboot, and compiled code.

    Raises StartError while a supervisor runs, EnvironmentError_ if the kernel refuses, OSError.
    """
    removed = processes(config)
    removed += asyncio.run(_environment(config))
    removed += asyncio.run(_rules(config))
    runtime = config.paths.runtime
    sockets = [path for path in (config.api.socket, config.api.nodeengine) if path]
    plugins = [path for path in (config.api.docker,) if path]  # in a directory that may be Docker's
    networks = [path for path in (runtime / CNI).glob("*") if path.is_dir()]
    noted = [path for it in networks for path in it.iterdir() if path.is_file()]
    removed += _files([*sockets, *plugins, *_with_new(runtime, RUNTIME), *noted])
    removed += _directories([*networks, runtime / CNI, runtime, *(path.parent for path in sockets)])
    if purge:
        removed += _files(_with_new(config.paths.state, STATE))
        for directory in sorted(config.paths.cache.glob("numba-*")):
            shutil.rmtree(directory)
            removed.append(f"directory {directory}")
        removed += _directories([config.paths.state, config.paths.cache])
    return removed


async def _environment(config: Config) -> list[str]:
    """Links, addresses and routes, guests' namespaces, and what containers were told of our resolver."""
    links, commands = await work.remove(node_wanted(config), lambda _: None)
    records = [it for link in links if (it := Record.decode(link.alias)) is not None]
    files = [file for it in records if (file := resolv.path(it)) is not None and file.exists() and resolv.is_ours(file)]
    for file in files:
        resolv.remove(file)
    guests = [it.netns.value for it in records if guest.is_guest(it)]
    for name in guests:
        await guest.remove_namespace(name)
    return [*map(describe, commands), *(f"file {file}" for file in files), *(f"namespace {name}" for name in guests)]


async def _rules(config: Config) -> list[str]:
    """Nftables rules; a node without ``nft`` has none."""
    return await ports.remove(config.firewall.table) if nft.is_there() else []


def _with_new(directory: Path, names: Iterable[str]) -> list[Path]:
    """Files, and what a writer that was killed left beside them."""
    return [path for name in names for path in (directory / name, *directory.glob(f"{name.partition('.')[0]}*.new"))]


def _files(paths: Iterable[Path]) -> list[str]:
    removed = []
    for path in dict.fromkeys(paths):
        with suppress(FileNotFoundError):
            path.unlink()
            removed.append(f"file {path}")
    return removed


def _directories(paths: Iterable[Path]) -> list[str]:
    removed = []
    for path in dict.fromkeys(paths):
        with suppress(OSError):  # not there, or not empty
            path.rmdir()
            removed.append(f"directory {path}")
    return removed
