"""The local API: HTTP over a unix socket, version 1, and what an existing NodeEngine calls (``nodeengine``).

Answers below ``/v1`` are JSON. An error is a 4xx or 5xx with ``{"error": "field: expected …"}``; fields that are not
known are ignored. Sockets have mode 0660 and the group ``api.group``. All routes are also at ``api.nodeengine`` and at
``api.tcp_port``, if these are set.
"""

from __future__ import annotations

import asyncio
import grp
import logging
import os
from collections.abc import Awaitable, Callable
from contextlib import aclosing, suppress
from ipaddress import ip_address
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import orjson
from aiohttp import web
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from appliance.cluster.messages import JOB_NAME, MessageError
from appliance.config import ConfigError
from appliance.environment import portmap
from appliance.environment.attachment import Attachment, NetnsRef
from appliance.environment.errors import EnvironmentError_
from appliance.observe.flows import listing
from appliance.runtimes import docker
from appliance.supervisor import choosing, picture, tracing
from appliance.supervisor.capturing import CaptureRequest, Capturing
from appliance.supervisor.errors import NotReadyError, StartError
from appliance.supervisor.monitor import Monitor
from appliance.supervisor.nodeengine import NodeEngine
from appliance.supervisor.ports import spoken
from appliance.supervisor.staging import StageRequest, Staging
from appliance.tables.catalogue import Host, Service
from appliance.tables.publish import TableFullError

if TYPE_CHECKING:
    from appliance.supervisor.main import Supervisor

log = logging.getLogger(__name__)

BODY_MAX = 1 << 20
END_S = 1.0
"""How long requests that are being answered may hold up the end."""
KEPT_S = 8.0
"""How long a restart waits for a template that is about to be ready."""
STALLED_S = 60.0
"""A capture whose reader has taken nothing for so long ends: there is only one at a time."""
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class InstanceRequest(BaseModel):
    """Which instance."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    service: Annotated[str, Field(pattern=JOB_NAME)]
    instance: Annotated[int, Field(ge=0)]


class AttachRequest(InstanceRequest):
    """Which namespace becomes which instance."""

    netns: str | None = None
    pid: Annotated[int, Field(gt=0)] | None = None
    path: str | None = None
    ports: str = ""
    interface: Annotated[str, Field(pattern=r"^[^\s/:]{0,15}$")] = ""

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
        self._capturing = Capturing(supervisor)
        self._staging: Staging | None = None

    def application(self) -> web.Application:
        """The routes."""
        app = web.Application(middlewares=[_errors], client_max_size=BODY_MAX)
        app.router.add_post("/v1/attachments", self.attach)
        app.router.add_get("/v1/attachments", self.attachments)
        app.router.add_get("/v1/attachments/{service}/{instance}", self.attachment)
        app.router.add_get("/v1/ready", self.ready)
        app.router.add_post("/v1/guests", self.attach_guest)
        app.router.add_delete("/v1/guests/{service}/{instance}", self.detach_guest)
        app.router.add_delete("/v1/attachments/{service}/{instance}", self.detach)
        app.router.add_post("/v1/reload", self.reload)
        app.router.add_post("/v1/restart", self.restart)
        app.router.add_post("/v1/workers/renew", self.renew)
        app.router.add_post("/v1/workers/stage", self.stage)
        app.router.add_get("/v1/status", self.status)
        app.router.add_get("/v1/flows", self.flows)
        app.router.add_get("/v1/hosts", self.hosts)
        app.router.add_get("/v1/services", self.services)
        app.router.add_get("/v1/cluster", self.cluster)
        app.router.add_post("/v1/need", self.need)
        app.router.add_post("/v1/trace", self.trace)
        app.router.add_post("/v1/capture", self.capture)
        app.router.add_get("/v1/resolve/{address}", self.resolve)
        app.router.add_get("/v1/names/{name}", self.name)
        Monitor(self._supervisor).add_routes(app.router)
        app.on_shutdown.append(self._capturing.stop)
        NodeEngine(self._supervisor).add_routes(app.router)
        return app

    async def attach(self, request: web.Request) -> web.Response:
        """Join a container's namespace to the bridge."""
        wanted = AttachRequest.model_validate_json(await request.read())
        ports = portmap.parse(wanted.ports, self._supervisor.config.tunnel.port)
        attachment = await self._supervisor.attach(
            wanted.service, wanted.instance, wanted.reference, ports, wanted.interface
        )
        return _reply({**self._attachment(attachment), **self._supervisor.told(attachment)}, 201)

    def _attachment(self, attachment: Attachment) -> dict[str, str | int | None]:
        return {**attachment.reply(), "ports": spoken(self._supervisor.ports.of(attachment))}

    async def detach(self, request: web.Request) -> web.Response:
        """Take a container off the bridge; 404 if it is not there, or not in the namespace `netns` of the query."""
        service, number = request.match_info["service"], request.match_info["instance"]
        if not number.isdecimal():
            return _refuse(f"instance: expected a whole number, got {number!r}")
        netns = NetnsRef.parse(request.query["netns"]) if "netns" in request.query else None
        if not await self._supervisor.detach(service, int(number), netns):
            return _refuse(f"service, instance: {service} {number} is not attached", 404)
        return web.Response(status=204)

    async def attach_guest(self, request: web.Request) -> web.Response:
        """Make a namespace with a TAP device for a unikernel or virtual machine, and join it to the bridge."""
        wanted = InstanceRequest.model_validate_json(await request.read())
        attachment, guest = await self._supervisor.attach_guest(wanted.service, wanted.instance)
        return _reply({**self._supervisor.told(attachment), "guest": guest}, 201)

    async def detach_guest(self, request: web.Request) -> web.Response:
        """Take one off the bridge, and its namespace away; 404 if it was not on it, as a container is not."""
        names = request.match_info
        wanted = InstanceRequest.model_validate({"service": names["service"], "instance": names["instance"]})
        if not await self._supervisor.detach_guest(wanted.service, wanted.instance):
            return _refuse(f"service, instance: {wanted.service} {wanted.instance} is not attached as a guest", 404)
        return web.Response(status=204)

    async def attachment(self, request: web.Request) -> web.Response:
        """An attached container and the condition of its link; 404 if it is not there."""
        service, number = request.match_info["service"], request.match_info["instance"]
        every = self._supervisor.environment.attachments()
        found = [it for it in every if (it.service, str(it.instance)) == (service, number)]
        if not found:
            return _refuse(f"service, instance: {service} {number} is not attached", 404)
        condition = await self._supervisor.environment.condition(found[0].veth)
        return _reply({**self._supervisor.told(found[0]), "condition": condition})

    async def ready(self, _request: web.Request) -> web.Response:
        """Whether containers can be attached; 503 and why not."""
        membership = self._supervisor.membership
        if not membership.provisioned.is_set():
            raise NotReadyError(membership.why_not_ready())
        return _reply({})

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

    async def trace(self, request: web.Request) -> web.Response:
        """What would happen to a packet."""
        wanted = tracing.TraceRequest.model_validate_json(await request.read())
        return _reply(await tracing.trace(self._supervisor, wanted))

    async def capture(self, request: web.Request) -> web.StreamResponse:
        """Packets as they pass, before and after translation: a pcapng stream, until its reader goes."""
        wanted = CaptureRequest.model_validate_json(await request.read())
        pieces = self._capturing.run(wanted, self._capturing.chosen(wanted))
        response = web.StreamResponse(headers={"Content-Type": "application/x-pcapng"})
        await response.prepare(request)
        async with aclosing(pieces):
            with suppress(ConnectionError):
                async for piece in pieces:
                    if request.transport is None:  # its reader has gone
                        break
                    if piece:
                        await _write(request, response, piece)
        return response

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
        """Execute the supervisor anew. The answer comes before it; 503 if no template keeps what the next one needs."""
        if not await self._supervisor.pool.is_kept(KEPT_S):
            raise NotReadyError("the worker template, from which the next supervisor takes over, is not ready yet")
        self._supervisor.leave(again=True)
        return _reply({"pid": os.getpid()}, 202)

    async def renew(self, _request: web.Request) -> web.Response:
        """Replace the workers, one at a time; answers when it is done."""
        await self._supervisor.pool.renew()
        return _reply({"workers": picture.workers(self._supervisor)})

    async def stage(self, request: web.Request) -> web.Response:
        """Have a worker call its stages from Python for a while, so that a profiler sees them."""
        if self._staging is None:
            self._staging = Staging(self._supervisor.pool)
        return _reply({"pid": self._staging.stage(StageRequest.model_validate_json(await request.read()))})

    async def status(self, _request: web.Request) -> web.Response:
        """The node at a glance."""
        return _reply(await picture.status(self._supervisor))

    async def flows(self, _request: web.Request) -> web.Response:
        """Live flows of all workers."""
        return _reply({"flows": [f for w in self._supervisor.pool.workers for f in listing(w.index, w.records)]})


async def _write(request: web.Request, response: web.StreamResponse, piece: bytes) -> None:
    """Send a piece to one who reads. Raises ConnectionError if nothing was read for ``STALLED_S``."""
    try:
        async with asyncio.timeout(STALLED_S):
            await response.write(piece)
    except TimeoutError:
        if request.transport is not None:
            request.transport.abort()  # whatever is said to it otherwise waits as well
        raise ConnectionAbortedError from None


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
        "weights": list(service.weights) or [1] * len(service.backends),
        "job": service.name,
    }


async def serve(supervisor: Supervisor) -> Callable[[], Awaitable[None]]:
    """Listen; gives the coroutine function that ends it. Raises OSError if a socket cannot be made."""
    config = supervisor.config.api
    paths = [path for path in (config.socket, config.nodeengine) if path]
    runner = web.AppRunner(Api(supervisor).application(), access_log=None, shutdown_timeout=END_S)
    driver = web.AppRunner(docker.application(supervisor), access_log=None, shutdown_timeout=END_S)
    await runner.setup()
    await driver.setup()

    async def close() -> None:
        await driver.cleanup()
        await runner.cleanup()
        for path in (*paths, config.docker):
            if path:
                path.unlink(missing_ok=True)

    try:
        for path in paths:
            await _listen(runner, path, config.group)
        if config.docker:
            await _listen(driver, config.docker, "")
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
