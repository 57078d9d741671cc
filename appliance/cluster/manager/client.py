"""A client of a manager's `/v1`: one HTTP request, one answer or one sentence."""

from __future__ import annotations

import http.client
import json
from typing import Any
from urllib.parse import quote, urlsplit

from appliance.client import ApiError
from appliance.cluster.manager.descriptor import Descriptor

TIMEOUT = 60.0
"""Seconds for one request: a service of 10,000 instances is many transactions."""


class ManagerClient:
    """The manager at a URL such as http://127.0.0.1:10110. Each method raises ApiError."""

    def __init__(self, url: str, timeout: float = TIMEOUT) -> None:
        parts = urlsplit(url if "//" in url else f"//{url}")
        if parts.scheme not in ("", "http") or not parts.hostname:
            raise ApiError(f"manager: expected http://HOST:PORT, got {url}")
        self._host, self._port, self._timeout = parts.hostname, parts.port or 10110, timeout

    def deploy(self, descriptor: Descriptor) -> dict[str, Any]:
        """Makes a service what its descriptor says; the service as it then is."""
        body = descriptor.model_dump_json(exclude_defaults=True).encode()
        return self._request("PUT", f"/v1/services/{quote(descriptor.job, safe='')}", body)

    def preview(self, descriptor: Descriptor) -> list[dict[str, Any]]:
        """What `deploy` of the same would change: keys, each with what it is before and after."""
        body = descriptor.model_dump_json(exclude_defaults=True).encode()
        return list(self._request("POST", f"/v1/services/{quote(descriptor.job, safe='')}/preview", body)["changes"])

    def undeploy(self, job: str, *, now: bool = False) -> dict[str, Any]:
        """Removes a service. The service as it then is, while instances of it drain before; empty if it is gone, as it
        is in any case if ``now``."""
        return self._request("DELETE", f"/v1/services/{quote(job, safe='')}{'?now=true' if now else ''}")

    def services(self) -> list[dict[str, Any]]:
        """All services with their instances."""
        return list(self._request("GET", "/v1/services")["services"])

    def nodes(self) -> list[dict[str, Any]]:
        """All nodes with their subnets."""
        return list(self._request("GET", "/v1/nodes")["nodes"])

    def _request(self, method: str, target: str, body: bytes | None = None) -> dict[str, Any]:
        connection = http.client.HTTPConnection(self._host, self._port, timeout=self._timeout)
        try:
            connection.request(method, target, body, {"Content-Type": "application/json"} if body else {})
            response = connection.getresponse()
            return self._answer(response.status, response.read())
        except (OSError, http.client.HTTPException) as error:
            where = f"{self._host}:{self._port}"
            raise ApiError(f"no answer from the cluster service manager at {where}: {error}") from error
        finally:
            connection.close()

    def _answer(self, status: int, raw: bytes) -> dict[str, Any]:
        try:
            data = json.loads(raw or b"{}")
        except ValueError:
            raise ApiError(f"expected JSON, got {raw[:60]!r} (status {status})") from None
        if status >= http.client.BAD_REQUEST or not isinstance(data, dict):
            raise ApiError(str(data.get("error", f"status {status}")) if isinstance(data, dict) else f"got {data!r}")
        return data
