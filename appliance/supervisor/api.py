"""The local API: HTTP over a unix socket, version 1.

Answers are JSON. An error is a 4xx or 5xx with ``{"error": "field: expected …"}``. The socket has mode 0660 and the
group ``api.group``.
"""

from __future__ import annotations

import grp
import logging
import os
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Annotated, Any

import orjson
from aiohttp import web
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from appliance import __version__
from appliance.cluster.messages import JOB_NAME, MessageError
from appliance.config import ConfigError
from appliance.environment.attachment import NetnsRef
from appliance.environment.errors import EnvironmentError_
from appliance.observe.counters import HEARTBEAT, drops, snapshot
from appliance.observe.flows import listing
from appliance.supervisor.errors import StartError
from appliance.tables.publish import TableFullError

if TYPE_CHECKING:
    from appliance.supervisor.main import Supervisor

log = logging.getLogger(__name__)

BODY_MAX = 1 << 20
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


class AttachRequest(BaseModel):
    """Which namespace becomes which instance."""

    model_config = ConfigDict(frozen=True, extra="ignore")

    service: Annotated[str, Field(pattern=JOB_NAME)]
    instance: Annotated[int, Field(ge=0)]
    netns: str | None = None
    pid: Annotated[int, Field(gt=0)] | None = None
    path: str | None = None

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
        app.router.add_get("/v1/status", self.status)
        app.router.add_get("/v1/flows", self.flows)
        return app

    async def attach(self, request: web.Request) -> web.Response:
        """Join a container's namespace to the bridge."""
        wanted = AttachRequest.model_validate_json(await request.read())
        attachment = await self._supervisor.environment.attach(wanted.service, wanted.instance, wanted.reference)
        return _reply(attachment.reply(), 201)

    async def detach(self, request: web.Request) -> web.Response:
        """Take a container off the bridge; 404 if it is not there."""
        service, number = request.match_info["service"], request.match_info["instance"]
        if not number.isdecimal():
            return _refuse(f"instance: expected a whole number, got {number!r}")
        if not await self._supervisor.environment.detach(service, int(number)):
            return _refuse(f"service, instance: {service} {number} is not attached", 404)
        return web.Response(status=204)

    async def attachments(self, _request: web.Request) -> web.Response:
        """All attached containers."""
        return _reply({"attachments": [a.reply() for a in self._supervisor.environment.attachments()]})

    async def reload(self, _request: web.Request) -> web.Response:
        """Read the configuration and the static tables again."""
        return _reply({"changed": await self._supervisor.reload()})

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
                    "last_error": supervisor.last_error,
                },
                "workers": [_worker(worker) for worker in supervisor.pool.workers],
                "offloads": {name: offload.reply() for name, offload in supervisor.offloads.items()},
                "tables": {
                    "epoch": supervisor.publisher.epoch,
                    "hosts": len(supervisor.catalogue.hosts),
                    "services": len(supervisor.catalogue.services),
                },
            }
        )

    async def flows(self, _request: web.Request) -> web.Response:
        """Live flows of all workers."""
        return _reply({"flows": [f for w in self._supervisor.pool.workers for f in listing(w.index, w.records)]})


def _worker(worker: Any) -> dict[str, Any]:
    return {
        "index": worker.index,
        "pid": worker.pid,
        "cpu": worker.cpu,
        "restarts": worker.restarts,
        "heartbeat_ns": int(worker.counters[HEARTBEAT]),
        "counters": snapshot(worker.counters),
        "drops": drops(worker.counters),
    }


async def serve(supervisor: Supervisor) -> Callable[[], Awaitable[None]]:
    """Listen; gives the coroutine function that ends it. Raises OSError if the socket cannot be made."""
    path = supervisor.config.api.socket
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    runner = web.AppRunner(Api(supervisor).application(), access_log=None)
    await runner.setup()
    await web.UnixSite(runner, str(path)).start()
    path.chmod(0o660)
    if supervisor.config.api.group:
        os.chown(path, -1, grp.getgrnam(supervisor.config.api.group).gr_gid)

    async def close() -> None:
        await runner.cleanup()
        path.unlink(missing_ok=True)

    return close
