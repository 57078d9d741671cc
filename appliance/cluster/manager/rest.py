"""The manager's HTTP interface.

``/v1`` is ours: JSON in and out, an error is ``{"error": "field: expected …"}`` with status 400 for what is wrong in a
request, 404 for what does not exist, 409 for what cannot be had, 503 while the broker is away. ``/api/net`` is what
existing orchestrators call, answered with their words.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import orjson
from aiohttp import web

from appliance.cluster.manager import services
from appliance.cluster.manager.addresses import ExhaustedError
from appliance.cluster.manager.answers import found
from appliance.cluster.manager.decide import DEPLOYMENT, UNDEPLOYMENT, Outcome, RefusedError, notices
from appliance.cluster.manager.descriptor import Descriptor, from_json, of_job
from appliance.cluster.manager.requests import JOB, canonical
from appliance.cluster.manager.state import State
from appliance.cluster.manager.store import UnavailableError
from appliance.config import ConfigError, Problem

if TYPE_CHECKING:
    from appliance.cluster.manager.manager import Manager

log = logging.getLogger(__name__)

BODY_MAX = 1 << 20
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


async def serve(manager: Manager) -> web.AppRunner:
    """Listens at the manager's REST address. Raises OSError."""
    runner = web.AppRunner(application(manager), access_log=None)
    await runner.setup()
    host, port = manager.settings.rest
    await web.TCPSite(runner, host, port).start()
    return runner


def application(manager: Manager) -> web.Application:
    """All routes."""
    app = web.Application(middlewares=[_errors], client_max_size=BODY_MAX)
    ours, existing = Services(manager), Existing(manager)
    app.add_routes(
        [
            web.get("/healthz", ours.health),
            web.get("/v1/services", ours.listing),
            web.get("/v1/services/{job}", ours.get),
            web.put("/v1/services/{job}", ours.put),
            web.delete("/v1/services/{job}", ours.delete),
            web.post("/v1/services/{job}/preview", ours.preview),
            web.get("/v1/nodes", ours.nodes),
            web.delete("/v1/nodes/{node}", ours.release),
            web.post("/api/net/deployment", existing.deploy),
            web.delete("/api/net/deployment/{job}", existing.undeploy),
            web.post("/api/net/job/update", existing.update),
            web.get("/api/net/service/{job}/instances", existing.by_name),
            web.get("/api/net/service/ip/{address}/instances", existing.by_address),
        ]
    )
    return app


@web.middleware
async def _errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Errors of any handler as one JSON sentence."""
    try:
        return await handler(request)
    except ConfigError as error:
        return _refuse("; ".join(f"{it.key}: expected {it.expected}, got {it.got}" for it in error.problems), 400)
    except RefusedError as error:
        return _refuse(str(error), 409)
    except ExhaustedError as error:
        return _refuse(str(error), 507)
    except UnavailableError as error:
        return _refuse(str(error), 503)
    except web.HTTPException as error:
        return _refuse(error.reason, error.status)
    except Exception as error:
        log.exception("request failed", extra={"path": request.path})
        return _refuse(f"{type(error).__name__}: {error}", 500)


def _reply(value: Any, status: int = 200) -> web.Response:
    return web.Response(body=orjson.dumps(value), status=status, content_type="application/json")


def _refuse(message: str, status: int) -> web.Response:
    return _reply({"error": message}, status)


def _text(words: str, status: int = 200) -> web.Response:
    return web.Response(text=words, status=status, content_type="text/html")


class Services:
    """Our own interface."""

    def __init__(self, manager: Manager) -> None:
        self._manager = manager

    async def health(self, _request: web.Request) -> web.Response:
        """Whether nodes get answers; 503 if not."""
        health = self._manager.health
        return _reply(health, 200 if health["ok"] else 503)

    async def listing(self, _request: web.Request) -> web.Response:
        """All services."""
        state = await self._fresh()
        return _reply({"services": [services.view(state, job) for job in state.jobs()]})

    async def get(self, request: web.Request) -> web.Response:
        """One service."""
        return _reply(services.view(await self._known(request), request.match_info["job"]))

    async def put(self, request: web.Request) -> web.Response:
        """Makes a service what its descriptor says: 201 if there was none of that name."""
        descriptor, job = await self._described(request), request.match_info["job"]
        new = (await self._fresh()).job(job) is None
        await deploy(self._manager, descriptor)
        return _reply(services.view(await self._fresh(), job), 201 if new else 200)

    async def preview(self, request: web.Request) -> web.Response:
        """What `put` of the same would change; nothing is changed."""
        descriptor = await self._described(request)
        changes = services.preview(self._manager.settings.plan, descriptor, await self._fresh())
        return _reply({"name": descriptor.job, "changes": changes})

    async def _described(self, request: web.Request) -> Descriptor:
        """The descriptor in a request. Raises ConfigError."""
        descriptor, job = from_json(await request.read()), request.match_info["job"]
        if descriptor.job != job:
            raise ConfigError([Problem("request", None, "name", f"the name in the path, {job}", descriptor.job)])
        return descriptor

    async def delete(self, request: web.Request) -> web.Response:
        """Removes a service and all its instances: 202 and the service if some of them drain before, unless the query
        says ``now=true``; 204 if it is gone."""
        await self._known(request)
        job, now = request.match_info["job"], request.query.get("now", "false")
        if now not in ("true", "false"):
            return _refuse(f"now: expected true or false, got {now}", 400)
        await self._manager.do_all(partial(services.remove if now == "true" else services.undeploy, job))
        state = await self._fresh()
        return web.Response(status=204) if state.job(job) is None else _reply(services.view(state, job), 202)

    async def nodes(self, _request: web.Request) -> web.Response:
        """All nodes that were ever heard of."""
        state = await self._fresh()
        return _reply({"nodes": [services.node_view(state, node) for node in state.nodes()]})

    async def release(self, request: web.Request) -> web.Response:
        """Forgets a node that will not come back: its subnets may be given to another."""
        node = request.match_info["node"]
        if (await self._fresh()).node(node) is None:
            raise web.HTTPNotFound(reason=f"node: expected a known node, got {node}")
        await self._manager.do_all(partial(services.release, node))
        return web.Response(status=204)

    async def _known(self, request: web.Request) -> State:
        state, job = await self._fresh(), request.match_info["job"]
        if state.job(job) is None:
            raise web.HTTPNotFound(reason=f"service: expected a deployed service, got {job}")
        return state

    async def _fresh(self) -> State:
        return await fresh(self._manager)


class Existing:
    """What existing orchestrators call."""

    def __init__(self, manager: Manager) -> None:
        self._manager = manager

    async def deploy(self, request: web.Request) -> web.Response:
        """Creates a job with its ServiceIPs and instances; one that exists already stays as it is."""
        body = await _object(request)
        job, instances = body.get("job_name"), body.get("instances", 1)
        if not isinstance(job, str):
            return _text("Invalid argument", 400)
        descriptor = of_job(job, instances)
        if "instances" in body or (await fresh(self._manager)).job(job) is None:
            await deploy(self._manager, descriptor)
        return _text("job stored succesfully")

    async def undeploy(self, request: web.Request) -> web.Response:
        """Removes a job, if there is one; what runs of it drains before, if it was deployed so."""
        await self._manager.do_all(partial(services.undeploy, request.match_info["job"]))
        return _text("job removed succesfully")

    async def update(self, request: web.Request) -> web.Response:
        """Passes on that a job changed."""
        body = await _object(request)
        job, number, change = body.get("job_name"), body.get("instance_number"), body.get("type")
        if not isinstance(job, str) or not JOB.fullmatch(job) or number is None or change is None:
            return _text("Invalid Parameters", 400)
        if not isinstance(number, int) or number < -1:
            return _text("Invalid instancenum", 400)
        if change not in (DEPLOYMENT, UNDEPLOYMENT):
            return _text("Invalid type", 400)
        await self._manager.do(lambda _state: Outcome({}, notices([job], change)))
        return _text("update notification received")

    async def by_name(self, request: web.Request) -> web.Response:
        """A job by its name, with `_` for dots; `{}` if there is none."""
        return await self._job(request.match_info["job"].replace("_", "."))

    async def by_address(self, request: web.Request) -> web.Response:
        """A job by one of its addresses, version 4 with `_` for dots; `{}` if there is none."""
        address = canonical(request.match_info["address"].replace("_", "."))
        owner = (await fresh(self._manager)).owner(address) if address else None
        return await self._job(owner or "")

    async def _job(self, job: str) -> web.Response:
        state = await fresh(self._manager)
        if state.job(job) is None:
            return _reply({})
        listed = found(state, self._manager.settings.cluster, job, "")["instance_list"]
        addresses = services.view(state, job)["service_ips"]
        return _reply({"job_name": job, "app_name": job, "service_ip_list": addresses, "instance_list": listed})


async def deploy(manager: Manager, descriptor: Descriptor) -> None:
    """Carries out a descriptor, step by step."""
    await manager.do_all(partial(services.put, manager.settings.plan, descriptor))


async def fresh(manager: Manager) -> State:
    """The state as of now. Raises UnavailableError if the broker stays away."""
    await manager.executor.submit(lambda _state: Outcome())
    return manager.store.state


async def _object(request: web.Request) -> dict[str, Any]:
    """A request's JSON object; empty if it is something else."""
    try:
        data = json.loads(await request.read())
    except ValueError:
        return {}
    return data if isinstance(data, dict) else {}
