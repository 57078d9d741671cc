"""The routes that an existing NodeEngine calls: register, deploy, undeploy, as they are.

A NodeEngine looks at the status alone: 200 or not. So errors have no body, as it expects; the reason is in the log, in
``last_error`` of ``status``, and in the header ``Appliance-Error``. It gives up after 10 s, and everything here answers
well before. Deployments run side by side.

| status | when |
|---|---|
| 200 | done; an undeployment also of what is not here |
| 400 | the body is no such request; nobody registered yet; a registration as another node |
| 500 | anything else, a port that somebody has among it |
"""

from __future__ import annotations

import logging
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Annotated, Any

import orjson
from aiohttp import web
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from appliance.cluster.errors import ClusterError
from appliance.cluster.messages import MessageError
from appliance.config import ConfigError
from appliance.environment import portmap
from appliance.environment.attachment import Attachment, NetnsRef
from appliance.environment.errors import EnvironmentError_
from appliance.supervisor.errors import NotReadyError, RegistrationError
from appliance.supervisor.identity import Identity

if TYPE_CHECKING:
    from appliance.supervisor.main import Supervisor

log = logging.getLogger(__name__)

REASON = "Appliance-Error"
Handler = Callable[[web.Request], Awaitable[web.Response]]
_WRONG = (ValidationError, ConfigError, ClusterError, RegistrationError)
"""The caller's mistakes: 400."""


class _Request(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", strict=True)


class Registration(_Request):
    """Which node this is, and of which cluster."""

    client_id: Annotated[str, Field(min_length=1)]
    cluster_address: str = ""


class Service(_Request):
    """An instance of a service."""

    name: str = Field(alias="serviceName")
    instance: Annotated[int, Field(alias="instanceNumber", ge=0)]


class Deployment(Service):
    """Which process's namespace becomes which instance."""

    pid: int
    port_mappings: str = Field("", alias="portMappings")


def _explain(error: Exception) -> str:
    if not isinstance(error, ValidationError):
        return " ".join(str(error).split()) or type(error).__name__
    details = error.errors()[0]
    return f"{'.'.join(map(str, details['loc'])) or 'body'}: {details['msg']}"


class NodeEngine:
    """The handlers."""

    def __init__(self, supervisor: Supervisor) -> None:
        self._supervisor = supervisor

    def add_routes(self, router: web.UrlDispatcher) -> None:
        """Adds the routes to an application's."""
        for path, handler in (
            ("/register", self.register),
            ("/container/deploy", self.deploy),
            ("/container/undeploy", self.undeploy),
            ("/docker/undeploy", self.undeploy),
            ("/unikernel/deploy", self.deploy_unikernel),
            ("/unikernel/undeploy", self.undeploy_unikernel),
        ):
            router.add_post(path, self._answering(handler))
            router.add_post(f"{path}/", _without_slash)

    def _answering(self, handler: Handler) -> Handler:
        """A handler whose errors are a status without a body."""

        async def answer(request: web.Request) -> web.Response:
            try:
                return await handler(request)
            except _WRONG as error:
                return self._refuse(request, _explain(error), 400)
            except (EnvironmentError_, MessageError, NotReadyError, OSError) as error:
                return self._refuse(request, _explain(error), 500)

        return answer

    def _refuse(self, request: web.Request, reason: str, status: int) -> web.Response:
        self._supervisor.last_error = f"{request.path}: {reason}"
        log.warning("refused", extra={"path": request.path, "status": status, "error": reason})
        return web.Response(status=status, headers={REASON: reason.encode("ascii", "replace").decode()})

    async def register(self, request: web.Request) -> web.Response:
        """Who this node is."""
        wanted = Registration.model_validate_json(await request.read())
        await self._supervisor.membership.register(Identity(wanted.client_id, wanted.cluster_address))
        return web.Response()

    async def deploy(self, request: web.Request) -> web.Response:
        """Join a container, which has not started yet, to the bridge."""
        wanted = Deployment.model_validate_json(await request.read())
        self._expect_registered()
        ports = portmap.parse(wanted.port_mappings, self._supervisor.config.tunnel.port)
        made = await self._supervisor.attach(wanted.name, wanted.instance, NetnsRef.by_pid(wanted.pid), ports)
        return _deployed(made)

    async def undeploy(self, request: web.Request) -> web.Response:
        """Take an instance off the bridge, if it is there."""
        wanted = Service.model_validate_json(await request.read())
        self._expect_registered()
        await self._supervisor.detach(wanted.name, wanted.instance)
        return web.Response()

    async def deploy_unikernel(self, request: web.Request) -> web.Response:
        """Make a namespace with a TAP device (``environment.guest``) and join it to the bridge."""
        wanted = Deployment.model_validate_json(await request.read())
        self._expect_registered()
        ports = portmap.parse(wanted.port_mappings, self._supervisor.config.tunnel.port)
        made, _ = await self._supervisor.attach_guest(wanted.name, wanted.instance, ports)
        return _deployed(made)

    async def undeploy_unikernel(self, request: web.Request) -> web.Response:
        """Take a unikernel off the bridge, if it is there, and its namespace away."""
        wanted = Service.model_validate_json(await request.read())
        self._expect_registered()
        await self._supervisor.detach_guest(wanted.name, wanted.instance)
        return web.Response()

    def _expect_registered(self) -> None:
        if self._supervisor.membership.identity is None:
            raise RegistrationError("register: expected a registration first, or node.id and cluster.url")


def _deployed(made: Attachment) -> web.Response:
    """What a NodeEngine is told of an instance."""
    body = {
        "serviceName": made.service,
        "nsAddress": str(made.address_v4 or ""),
        "nsAddressv6": str(made.address_v6 or ""),
    }
    return web.Response(body=orjson.dumps(body) + b"\n", content_type="application/json")


async def _without_slash(request: web.Request) -> web.Response:
    """A trailing slash leads to the path without it."""
    headers: dict[str, Any] = {"Location": request.path.rstrip("/")}
    return web.Response(status=301, headers=headers)
