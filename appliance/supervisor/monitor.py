"""What a monitoring system asks: ``/metrics``, ``/healthz`` and ``/readyz``.

They are part of the local API, and at ``metrics.port`` they are alone: nothing can be changed there, so that port may
be reachable where the API must not be.
"""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING

import orjson
from aiohttp import web

from appliance.observe import metrics
from appliance.supervisor import picture

if TYPE_CHECKING:
    from appliance.supervisor.main import Supervisor


class Monitor:
    """The handlers."""

    def __init__(self, supervisor: Supervisor) -> None:
        self._supervisor = supervisor

    def add_routes(self, router: web.UrlDispatcher) -> None:
        """Make them part of an application."""
        router.add_get("/metrics", self.metrics)
        router.add_get("/healthz", self.healthz)
        router.add_get("/readyz", self.readyz)

    async def metrics(self, _request: web.Request) -> web.Response:
        """All metrics, in Prometheus' text format."""
        body = metrics.exposition(await picture.picture(self._supervisor))
        return web.Response(body=body, headers={"Content-Type": metrics.CONTENT_TYPE})

    async def healthz(self, _request: web.Request) -> web.Response:
        """200 if all workers run; 503 with the reasons if a restart may help. Waits for nobody."""
        return _verdict(picture.why_ill(picture.workers(self._supervisor)))

    async def readyz(self, _request: web.Request) -> web.Response:
        """200 if containers can be served here; 503 with the reasons."""
        return _verdict((await picture.status(self._supervisor))["not_ready"])


def _verdict(reasons: list[str]) -> web.Response:
    body = orjson.dumps({"ok": not reasons, "reasons": reasons})
    return web.Response(body=body, status=503 if reasons else 200, content_type="application/json")


async def serve(supervisor: Supervisor) -> Callable[[], Awaitable[None]]:
    """Listen at ``metrics.port``, if it is set; gives the coroutine function that ends it. Raises OSError."""
    config = supervisor.config.metrics
    app = web.Application()
    Monitor(supervisor).add_routes(app.router)
    runner = web.AppRunner(app, access_log=None)
    await runner.setup()
    try:
        if config.port:
            await web.TCPSite(runner, str(config.address), config.port).start()
    except BaseException:
        await runner.cleanup()
        raise
    return runner.cleanup
