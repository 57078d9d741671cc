"""The local API: HTTP over a unix socket, version 1, and what an existing NodeEngine calls (``nodeengine``).

Answers below ``/v1`` are JSON. An error is a 4xx or 5xx with ``{"error": "field: expected …"}``; fields that are not
known are ignored. Sockets have mode 0660 and the group ``api.group``. All routes are also at ``api.nodeengine`` and at
``api.tcp_port``, if these are set.
"""

from __future__ import annotations

import grp
import logging
import os
from collections.abc import Awaitable, Callable
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import orjson
from aiohttp import web
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from appliance import __version__
from appliance.cluster.messages import JOB_NAME, MessageError
from appliance.config import ConfigError
from appliance.environment import portmap
from appliance.environment.attachment import Attachment, NetnsRef
from appliance.environment.errors import EnvironmentError_
from appliance.observe.counters import HEARTBEAT, drops, snapshot, stages
from appliance.observe.flows import listing
from appliance.supervisor import choosing
from appliance.supervisor.errors import NotReadyError, StartError
from appliance.supervisor.nodeengine import NodeEngine
from appliance.supervisor.ports import spoken
from appliance.tables.catalogue import Host, Service
from appliance.tables.publish import TableFullError

if TYPE_CHECKING:
    from appliance.supervisor.main import Supervisor

log = logging.getLogger(__name__)

BODY_MAX = 1 << 20
_SUMMARY = ("member", "node", "broker", "connected", "since", "last_error", "subnets", "ready", "jobs", "instances")
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class AttachRequest(BaseModel):
    """Which namespace becomes which instance."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    service: Annotated[str, Field(pattern=JOB_NAME)]
    instance: Annotated[int, Field(ge=0)]
    netns: str | None = None
    pid: Annotated[int, Field(gt=0)] | None = None
    path: str | None = None
    ports: str = ""

    @model_validator(mode="after")
    def _one_namespace(self) -> AttachRequest:
        if sum(value is not None for value in (self.netns, self.pid, self.path)) != 1:
            raise ValueError("expected exactly one of netns, pid and path")
        return self

    @property
    def reference(self) -> NetnsRef:
        """The namespace. Raises EnvironmentError_ if the name or path cannot be one."""
        if self.netns is not None:
            return NetnsRef.by_name(self.netns)
        if self.pid is not None:
            return NetnsRef.by_pid(self.pid)
        return NetnsRef.by_path(self.path or "")


class NeedRequest(BaseModel):
    """Which job is needed here."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    job: Annotated[str, Field(pattern=JOB_NAME)]


def _reply(value: Any, status: int = 200) -> web.Response:
    return web.Response(body=orjson.dumps(value, default=str), status=status, content_type="application/json")


def _refuse(message: str, status: int = 400) -> web.Response:
    return _reply({"error": message}, status)


def _explain(error: ValidationError) -> str:
    details = error.errors()[0]
    where = ".".join(str(part) for part in details["loc"]) or "body"
    return f"{where}: {details['msg']}"


@web.middleware
async def _errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Errors of any handler as one JSON sentence."""
    try:
        return await handler(request)
    except ValidationError as error:
        return _refuse(_explain(error))
    except (ConfigError, MessageError, EnvironmentError_, StartError) as error:
        return _refuse(str(error))
    except NotReadyError as error:
        return _refuse(str(error), 503)
    except TableFullError as error:
        return _refuse(str(error), 507)
    except web.HTTPException as error:
        return _refuse(error.reason, error.status)
    except Exception as error:
        log.exception("request failed", extra={"path": request.path})
        return _refuse(f"{type(error).__name__}: {error}", 500)


class Api:
    """The handlers."""

    def __init__(self, supervisor: Supervisor) -> None:
        self._supervisor = supervisor

    def application(self) -> web.Application:
        """The routes."""
        app = web.Application(middlewares=[_errors], client_max_size=BODY_MAX)
        app.router.add_post("/v1/attachments", self.attach)
        app.router.add_get("/v1/attachments", self.attachments)
        app.router.add_delete("/v1/attachments/{service}/{instance}", self.detach)
        app.router.add_post("/v1/reload", self.reload)
        app.router.add_post("/v1/restart", self.restart)
        app.router.add_post("/v1/workers/renew", self.renew)
        app.router.add_get("/v1/status", self.status)
        app.router.add_get("/v1/flows", self.flows)
        app.router.add_get("/v1/hosts", self.hosts)
        app.router.add_get("/v1/services", self.services)
        app.router.add_get("/v1/cluster", self.cluster)
        app.router.add_post("/v1/need", self.need)
        app.router.add_get("/v1/resolve/{address}", self.resolve)
        app.router.add_get("/v1/names/{name}", self.name)
        NodeEngine(self._supervisor).add_routes(app.router)
        return app

    async def attach(self, request: web.Request) -> web.Response:
        """Join a container's namespace to the bridge."""
        wanted = AttachRequest.model_validate_json(await request.read())
        ports = portmap.parse(wanted.ports, self._supervisor.config.tunnel.port)
        attachment = await self._supervisor.attach(wanted.service, wanted.instance, wanted.reference, ports)
        return _reply(self._attachment(attachment), 201)

    def _attachment(self, attachment: Attachment) -> dict[str, str | int | None]:
        return {**attachment.reply(), "ports": spoken(self._supervisor.ports.of(attachment))}

    async def detach(self, request: web.Request) -> web.Response:
        """Take a container off the bridge; 404 if it is not there."""
        service, number = request.match_info["service"], request.match_info["instance"]
        if not number.isdecimal():
            return _refuse(f"instance: expected a whole number, got {number!r}")
        if not await self._supervisor.detach(service, int(number)):
            return _refuse(f"service, instance: {service} {number} is not attached", 404)
        return web.Response(status=204)

    async def attachments(self, _request: web.Request) -> web.Response:
        """All attached containers."""
        return _reply({"attachments": [self._attachment(it) for it in self._supervisor.environment.attachments()]})

    async def hosts(self, _request: web.Request) -> web.Response:
        """All containers that packets can be sent to, and where they are."""
        return _reply({"hosts": [_host(host) for host in self._supervisor.catalogue.hosts.values()]})

    async def services(self, _request: web.Request) -> web.Response:
        """All ServiceIPs, and the containers behind them."""
        return _reply({"services": [_service(it) for it in self._supervisor.catalogue.services.values()]})

    async def cluster(self, _request: web.Request) -> web.Response:
        """The membership: connection, interests, what was counted."""
        return _reply(self._supervisor.membership.status())

    async def need(self, request: web.Request) -> web.Response:
        """Something here is about to use a job: have its instances in the tables."""
        wanted = NeedRequest.model_validate_json(await request.read())
        return _reply({"job": wanted.job, "found": await self._supervisor.membership.need(wanted.job)})

    async def resolve(self, request: web.Request) -> web.Response:
        """What an address is, asking the cluster if the tables lack it."""
        try:
            address = ip_address(request.match_info["address"])
        except ValueError:
            return _refuse(f"address: expected an IP address, got {request.match_info['address']!r}")
        found = await self._supervisor.membership.resolve(address)
        service = self._supervisor.catalogue.services.get(address)
        host = self._supervisor.catalogue.hosts.get(address)
        return _reply(
            {
                "address": str(address),
                "found": found,
                "service": None if service is None else _service(service),
                "host": None if host is None else _host(host),
            }
        )

    async def name(self, request: web.Request) -> web.Response:
        """Where a name leads, and why; behind a ServiceIP, the containers that its policy chooses from."""
        supervisor = self._supervisor
        if supervisor.naming is None:
            return _refuse("naming.enabled: expected true")
        explained = await supervisor.naming.explain(request.match_info["name"])
        if "error" in explained:
            return _refuse(explained["error"])
        return _reply({**explained, "behind": _behind(supervisor, explained.get("records", []))})

    async def reload(self, _request: web.Request) -> web.Response:
        """Read the configuration and the static tables again."""
        return _reply({"changed": await self._supervisor.reload()})

    async def restart(self, _request: web.Request) -> web.Response:
        """Execute the supervisor anew. The answer comes before it."""
        self._supervisor.leave(again=True)
        return _reply({"pid": os.getpid()}, 202)

    async def renew(self, _request: web.Request) -> web.Response:
        """Replace the workers, one at a time; answers when it is done."""
        await self._supervisor.pool.renew()
        return _reply({"workers": [_worker(worker) for worker in self._supervisor.pool.workers]})

    async def status(self, _request: web.Request) -> web.Response:
        """The node at a glance."""
        supervisor = self._supervisor
        return _reply(
            {
                "node": {
                    "id": supervisor.config.node.id,
                    "address": str(supervisor.address),
                    "port": supervisor.port,
                    "version": __version__,
                    "pid": os.getpid(),
                    "started": supervisor.started,
                    "last_error": supervisor.last_error,
                },
                "workers": [_worker(worker) for worker in supervisor.pool.workers],
                "offloads": {name: offload.reply() for name, offload in supervisor.offloads.items()},
                "tables": {
                    "epoch": supervisor.publisher.epoch,
                    "hosts": len(supervisor.catalogue.hosts),
                    "services": len(supervisor.catalogue.services),
                    **_age(supervisor.membership.status()),
                },
                "cluster": _summary(supervisor.membership.status()),
                "naming": None if supervisor.naming is None else await supervisor.naming.status(),
                "upkeep": supervisor.upkeep.status(),
                "firewall": supervisor.ports.status(),
                "exposed": supervisor.ingress.status(),
                "checks": supervisor.checks.status(),
            }
        )

    async def flows(self, _request: web.Request) -> web.Response:
        """Live flows of all workers."""
        return _reply({"flows": [f for w in self._supervisor.pool.workers for f in listing(w.index, w.records)]})


def _behind(supervisor: Supervisor, records: list[str]) -> list[dict[str, Any]]:
    """The tables' entries of the ServiceIPs among some records."""
    found = []
    for kind, _, text in (record.partition(" ") for record in records):
        service = supervisor.catalogue.services.get(ip_address(text)) if kind in ("A", "AAAA") else None
        if service is not None:
            job = supervisor.publication.jobs.get(service.name)
            found.append({**_service(service), **choosing.explain(service, supervisor.catalogue.hosts, job)})
    return found


def _host(host: Host) -> dict[str, Any]:
    return {
        "address": str(host.address),
        "node": str(host.node),
        "port": host.port,
        "instance_ip": None if host.instance_ip is None else str(host.instance_ip),
        "local": host.local,
        "owner": host.owner,
    }


def _service(service: Service) -> dict[str, Any]:
    return {
        "address": str(service.address),
        "policy": service.policy,
        "backends": [str(address) for address in service.backends],
        "job": service.name,
    }


def _age(cluster: dict[str, Any]) -> dict[str, float]:
    """Seconds for which the oldest of what the cluster said may have been outdated; nothing without a cluster."""
    return {"staleness": cluster["staleness"]} if "staleness" in cluster else {}


def _summary(cluster: dict[str, Any]) -> dict[str, Any]:
    """The membership in few words."""
    return {name: cluster[name] for name in _SUMMARY if name in cluster}


def _worker(worker: Any) -> dict[str, Any]:
    return {
        "index": worker.index,
        "pid": worker.pid,
        "cpu": worker.cpu,
        "restarts": worker.restarts,
        "heartbeat_ns": int(worker.counters[HEARTBEAT]),
        "counters": snapshot(worker.counters),
        "drops": drops(worker.counters),
        "stages": stages(worker.counters),
    }


async def serve(supervisor: Supervisor) -> Callable[[], Awaitable[None]]:
    """Listen; gives the coroutine function that ends it. Raises OSError if a socket cannot be made."""
    config = supervisor.config.api
    paths = [path for path in (config.socket, config.nodeengine) if path]
    runner = web.AppRunner(Api(supervisor).application(), access_log=None)
    await runner.setup()

    async def close() -> None:
        await runner.cleanup()
        for path in paths:
            path.unlink(missing_ok=True)

    try:
        for path in paths:
            await _listen(runner, path, config.group)
        if config.tcp_port:
            await web.TCPSite(runner, str(config.tcp_address), config.tcp_port).start()
    except BaseException:
        await close()
        raise
    return close


async def _listen(runner: web.AppRunner, path: Path, group: str) -> None:
    _make_way(path)
    await web.UnixSite(runner, str(path)).start()
    _permit(path, group)


def _make_way(path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)


def _permit(path: Path, group: str) -> None:
    path.chmod(0o660)
    if group:
        os.chown(path, -1, grp.getgrnam(group).gr_gid)
