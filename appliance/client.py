"""A client of the local API: one HTTP/1.1 request over the unix socket, one answer or one sentence."""

import http.client
import json
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import quote

TIMEOUT = 30.0
"""Seconds for one request. An attachment waits for namespaces and links, a reload for tables."""


class ApiError(Exception):
    """No useful answer; `str()` is one sentence for the operator."""


class _UnixConnection(http.client.HTTPConnection):
    """HTTP over a unix socket. The host name is only what HTTP/1.1 demands in a header."""

    def __init__(self, path: Path, timeout: float | None) -> None:
        super().__init__("localhost", timeout=timeout)
        self._path = path

    def connect(self) -> None:
        """Connects to the socket's path. Raises OSError."""
        self.sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self.sock.settimeout(self.timeout)
        self.sock.connect(str(self._path))


class Client:
    """The API at one socket. Each method is one request and raises ApiError."""

    def __init__(self, path: Path, timeout: float = TIMEOUT) -> None:
        self._path = path
        self._timeout = timeout

    def status(self) -> dict[str, Any]:
        """Node, workers with counters, offloads, tables."""
        return self._request("GET", "/v1/status")

    def flows(self) -> list[dict[str, Any]]:
        """Live flows of all workers."""
        return list(self._request("GET", "/v1/flows")["flows"])

    def hosts(self) -> list[dict[str, Any]]:
        """The containers that packets can be sent to."""
        return list(self._request("GET", "/v1/hosts")["hosts"])

    def services(self) -> list[dict[str, Any]]:
        """The ServiceIPs that this node knows."""
        return list(self._request("GET", "/v1/services")["services"])

    def cluster(self) -> dict[str, Any]:
        """The node's membership in its cluster."""
        return self._request("GET", "/v1/cluster")

    def need(self, job: str) -> bool:
        """Has a job's instances in the tables; whether there are any."""
        return bool(self._request("POST", "/v1/need", {"job": job})["found"])

    def resolve(self, address: str) -> dict[str, Any]:
        """What an address is."""
        return self._request("GET", f"/v1/resolve/{quote(address, safe='')}")

    def name(self, name: str) -> dict[str, Any]:
        """Where a name leads, and why."""
        return self._request("GET", f"/v1/names/{quote(name, safe='')}")

    def trace(self, packet: dict[str, Any]) -> dict[str, Any]:
        """What would happen to a packet (`source`, `destination`, `protocol`, `sport`, `dport` …), step by step."""
        return self._request("POST", "/v1/trace", packet)

    @contextmanager
    def capture(self, wanted: dict[str, Any]) -> Iterator[Iterator[bytes]]:
        """Pieces of a pcapng file, as packets pass (`hosts`, `ports`, `protocol`, `drops`, `count`, `seconds`)."""
        connection = _UnixConnection(self._path, None)
        try:
            connection.request("POST", "/v1/capture", json.dumps(wanted).encode())
            response = connection.getresponse()
            if response.status != http.client.OK:
                self._answer(response.status, response.read())
            yield iter(lambda: response.read1(1 << 16), b"")
        except (OSError, http.client.HTTPException) as error:
            raise ApiError(self._sentence(error)) from error
        finally:
            connection.close()

    def restart(self) -> int:
        """Has the supervisor execute itself anew; its process id, which stays."""
        return int(self._request("POST", "/v1/restart")["pid"])

    def renew_workers(self) -> list[dict[str, Any]]:
        """Has the workers replaced one at a time; the new ones."""
        return list(self._request("POST", "/v1/workers/renew")["workers"])

    def stage(self, worker: int, seconds: float) -> int:
        """Has a worker call its stages from Python for so long, for a profiler; its process."""
        return int(self._request("POST", "/v1/workers/stage", {"worker": worker, "seconds": seconds})["pid"])

    def reload(self) -> list[str]:
        """Applies the configuration file and the static tables; the keys that changed."""
        return list(self._request("POST", "/v1/reload")["changed"])

    def attachments(self) -> list[dict[str, Any]]:
        """The containers that are attached."""
        return list(self._request("GET", "/v1/attachments")["attachments"])

    def attach(
        self, service: str, instance: int, namespace: dict[str, str | int], ports: str = ""
    ) -> dict[str, Any]:
        """Joins a namespace (`{"netns": …}`, `{"pid": …}` or `{"path": …}`), with ports of the node that lead to it
        (``8080:80/tcp;53/udp``); its interface and addresses."""
        body = {"service": service, "instance": instance, **namespace, **({"ports": ports} if ports else {})}
        return self._request("POST", "/v1/attachments", body)

    def detach(self, service: str, instance: int) -> None:
        """Undoes an attachment."""
        self._request("DELETE", f"/v1/attachments/{quote(service, safe='')}/{instance}")

    def attach_guest(self, service: str, instance: int) -> dict[str, Any]:
        """Makes a namespace with a TAP device for a unikernel or virtual machine; its addresses, and what the guest is
        to be told."""
        return self._request("POST", "/v1/guests", {"service": service, "instance": instance})

    def detach_guest(self, service: str, instance: int) -> None:
        """Undoes that."""
        self._request("DELETE", f"/v1/guests/{quote(service, safe='')}/{instance}")

    def _request(self, method: str, target: str, body: object = None) -> dict[str, Any]:
        connection = _UnixConnection(self._path, self._timeout)
        try:
            payload = None if body is None else json.dumps(body).encode()
            headers = {} if body is None else {"Content-Type": "application/json"}
            connection.request(method, target, payload, headers)
            response = connection.getresponse()
            return self._answer(response.status, response.read())
        except (OSError, http.client.HTTPException) as error:
            raise ApiError(self._sentence(error)) from error
        finally:
            connection.close()

    def _answer(self, status: int, raw: bytes) -> dict[str, Any]:
        """The JSON object of an answer; an error's own words if it is one."""
        try:
            data = json.loads(raw or b"{}")
        except ValueError:
            raise ApiError(f"{self._path}: expected JSON, got {raw[:60]!r} (status {status})") from None
        if status >= http.client.BAD_REQUEST:
            raise ApiError(str(data.get("error", f"status {status}")) if isinstance(data, dict) else str(data))
        if not isinstance(data, dict):
            raise ApiError(f"{self._path}: expected a JSON object, got {type(data).__name__}")
        return data

    def _sentence(self, error: Exception) -> str:
        """What an operator can do about a request that got no answer."""
        match error:
            case FileNotFoundError():
                return f"no socket {self._path}: the appliance is not running, or --socket names another"
            case ConnectionRefusedError():
                return f"nobody listens at {self._path}: the appliance is not running"
            case PermissionError():
                return f"no permission for {self._path}: expected root or a member of api.group"
            case TimeoutError():
                return f"no answer from {self._path} within {self._timeout:g} s"
        return f"{self._path}: {error or type(error).__name__}"
