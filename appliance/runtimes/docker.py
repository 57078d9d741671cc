"""The network driver for Docker: libnetwork's remote API, NetworkDriver and IpamDriver, over a plugin's socket.

Theory of operation
-------------------
Docker asks by HTTP POST with a JSON object, one path a method, and gets a JSON object: `{}` or what the method gives,
or ``{"Err": "field: expected …"}`` with a status that is not 200 (libnetwork, drivers/remote/api and ipams/remote/api;
pkg/plugins). Everything ends in the calls that the local API makes, `Supervisor.attach` and `detach`.

Docker makes a container's namespace after it has joined the network, and moves the link there itself:

    CreateEndpoint   attach: the node's end on the bridge, its record with the endpoint's id, ports and announcement as
                     for any instance; the container's end waits on the node. Docker is told the addresses.
    Join             Docker is told what to move, its gateway, and routes to the overlay; the record gets the sandbox.
    Leave            nothing: Docker has the link yet.
    DeleteEndpoint   detach; nothing if the instance is in another container by now, or the link has gone.

*Owns* which service a network is for, in `paths.state`/`FILE`: Docker says it once in a network's life. An endpoint is
found by the record that the kernel keeps on its link, so a restart of Docker or of the supervisor loses nothing.
Everything runs in the supervisor's event loop.

Addresses are the appliance's. Its IpamDriver reserves one when Docker asks (`EnvironmentManager.reserve`), and the
endpoint is attached with it; what Docker did not ask for, such as IPv6 of a network without, or all with libnetwork's
own ``null`` driver, it is told with the endpoint. An address that a user wants is refused.

Docker hands a driver an endpoint's options and a network's: which instance it is must be in one of them. It hands over
neither labels, nor aliases, nor the container's name or id, and answers no question about a container that it is
starting.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Awaitable, Callable, Iterable, Mapping
from ipaddress import ip_address, ip_interface
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Final, TypeVar

import orjson
from aiohttp import web
from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from appliance.cluster.messages import MessageError
from appliance.cluster.store import write
from appliance.environment import names, portmap
from appliance.environment.addresses import IPNetwork, gateway_of
from appliance.environment.attachment import Attachment, NetnsRef
from appliance.environment.errors import EnvironmentError_
from appliance.runtimes.cni import LABELS
from appliance.supervisor.errors import NotReadyError

if TYPE_CHECKING:
    from appliance.supervisor.main import Supervisor

log = logging.getLogger(__name__)

CONTENT_TYPE: Final = "application/vnd.docker.plugins.v1.1+json"
SPACE: Final = "edge-appliance"
"""Our address space, and the beginning of our pools' ids."""
NULL_SPACE: Final = "null"
ANY: Final = "0.0.0.0/0"
SPACES: Final = {"LocalDefaultAddressSpace": SPACE, "GlobalDefaultAddressSpace": SPACE}
PREFIX: Final = "edge"
"""Docker numbers links of a prefix: it is edge0 in a container that is one instance, and eth0 is left to a bridge."""
INTERFACE: Final = f"{PREFIX}0"
FILE: Final = "docker.json"
BODY_MAX: Final = 1 << 20
GENERIC, PORTMAP = "com.docker.network.generic", "com.docker.network.portmap"
MAC_ADDRESS, REQUEST_TYPE, GATEWAY = (
    "com.docker.network.endpoint.macaddress", "RequestAddressType", "com.docker.network.gateway",
)  # fmt: skip
_PROTOCOLS: Final = {6: "tcp", 17: "udp"}
_ANY_HOST: Final = ("", "0.0.0.0", "::")
_NEXT_HOP: Final = 0


class DriverError(Exception):
    """A request that cannot be done; the text names the field and what was expected."""


# --- requests -------------------------------------------------------------------------------------------------------


def _address_text(text: str) -> str:
    """Raises ValueError."""
    return str(ip_address(text)) if text else text


def _interface_text(text: str) -> str:
    """Raises ValueError."""
    return str(ip_interface(text)) if text else text


def _nothing(value: Any) -> Any:
    return {} if value is None else value


IpText = Annotated[str, AfterValidator(_address_text)]
InterfaceText = Annotated[str, AfterValidator(_interface_text)]
Identity = Annotated[str, Field(pattern=r"^[0-9A-Za-z]{1,64}$")]
Options = Annotated[dict[str, Any], BeforeValidator(_nothing)]
M = TypeVar("M", bound=BaseModel)


class Request(BaseModel):
    """A request of which nothing is needed; fields that are not known are ignored, as versions of Docker differ."""

    model_config = ConfigDict(frozen=True, extra="ignore")


class Pool(Request):
    """An address pool that a network is made with."""

    space: str = Field("", alias="AddressSpace")
    pool: str = Field("", alias="Pool")


Pools = Annotated[list[Pool], BeforeValidator(lambda value: [] if value is None else value)]


class NetworkRequest(Request):
    """Which network."""

    network: Identity = Field(alias="NetworkID")


class CreateNetwork(NetworkRequest):
    """A new network, with the options of `docker network create -o`."""

    options: Options = Field({}, alias="Options")
    v4: Pools = Field([], alias="IPv4Data")
    v6: Pools = Field([], alias="IPv6Data")


class AllocateNetwork(NetworkRequest):
    """A network of a swarm."""

    options: Options = Field({}, alias="Options")


class EndpointRequest(NetworkRequest):
    """Which endpoint: a container's place on a network."""

    endpoint: Identity = Field(alias="EndpointID")


class Interface(Request):
    """What Docker has decided of a link."""

    address: InterfaceText = Field("", alias="Address")
    address_v6: InterfaceText = Field("", alias="AddressIPv6")
    mac: str = Field("", alias="MacAddress")


class CreateEndpoint(EndpointRequest):
    """A new endpoint, with the options of `docker run --network name=…,driver-opt=…`."""

    interface: Annotated[Interface, BeforeValidator(_nothing)] = Field(Interface(), alias="Interface")
    options: Options = Field({}, alias="Options")


class Join(EndpointRequest):
    """A container gets its endpoint."""

    sandbox: str = Field("", alias="SandboxKey")


class ExternalConnectivity(EndpointRequest):
    """An endpoint is the container's way out: its published ports are to lead there."""

    options: Options = Field({}, alias="Options")


class RequestPool(Request):
    """A pool for a network."""

    pool: str = Field("", alias="Pool")
    part: str = Field("", alias="SubPool")
    v6: bool = Field(False, alias="V6")


class PoolRequest(Request):
    """Which pool; empty for an address that was not asked of one."""

    pool: str = Field("", alias="PoolID")


class RequestAddress(PoolRequest):
    """An address of a pool."""

    address: str = Field("", alias="Address")
    options: Options = Field({}, alias="Options")


class ReleaseAddress(PoolRequest):
    """An address of a pool that is not used."""

    address: IpText = Field("", alias="Address")


class PortBinding(Request):
    """A published port."""

    protocol: int = Field(alias="Proto")
    port: Annotated[int, Field(alias="Port", ge=1, le=65535)]
    host: str = Field("", alias="HostIP")
    host_port: int = Field(0, alias="HostPort")


# --- decisions ------------------------------------------------------------------------------------------------------


def identity(endpoint: Mapping[str, Any], network: Mapping[str, Any]) -> tuple[str, int]:
    """Service and instance that a container is to be: of its endpoint's options, or else of its network's.

    Raises DriverError.
    """
    service, instance = (str(endpoint.get(key, network.get(key, ""))) for key in LABELS)
    if not service:
        raise DriverError(f"Options.{LABELS[0]}: expected the service, by --network name=…,driver-opt={LABELS[0]}=…")
    if not (instance.isascii() and instance.isdecimal()):
        raise DriverError(f"Options.{LABELS[1]}: expected a number for {service}, got {instance!r}")
    return service, int(instance)


def ports(options: Mapping[str, Any]) -> str:
    """Published ports as `environment.portmap` reads them. Raises DriverError or ValidationError."""
    return ";".join(_port(PortBinding.model_validate(it)) for it in options.get(PORTMAP) or ())


def _port(binding: PortBinding) -> str:
    if binding.protocol not in _PROTOCOLS:
        raise DriverError(f"{PORTMAP}.Proto: expected 6 (TCP) or 17 (UDP), got {binding.protocol}")
    if binding.host not in _ANY_HOST:
        raise DriverError(f"{PORTMAP}.HostIP: expected none, as ports are the whole node's, got {binding.host}")
    if not binding.host_port:
        raise DriverError(f"{PORTMAP}.HostPort: expected a port of the node for {binding.port}, got none")
    return f"{binding.host_port}:{binding.port}/{_PROTOCOLS[binding.protocol]}"


def joined(attachment: Attachment, overlay: Iterable[IPNetwork]) -> dict[str, Any]:
    """What Docker moves, and the routes that it sets: everything through us if it takes us for the container's way
    out, and the overlay in any case."""
    gateways = {it.version: str(it) for it in (attachment.gateway_v4, attachment.gateway_v6) if it is not None}
    routes = [
        {"Destination": str(it), "RouteType": _NEXT_HOP, "NextHop": gateways[it.version]}
        for it in overlay
        if it.version in gateways
    ]
    end = names.offered_name(attachment.service, attachment.instance)
    return {
        "InterfaceName": {"SrcName": end, "DstPrefix": PREFIX},
        "Gateway": gateways.get(4, ""),
        "GatewayIPv6": gateways.get(6, ""),
        "StaticRoutes": routes,
        "DisableGatewayService": True,
    }


def pool(wanted: RequestPool, subnets: Iterable[IPNetwork]) -> dict[str, Any]:
    """The pool of a family: the node's first subnet, or for IPv4, unless Docker's user names that, `ANY`. libnetwork
    asks for ever until it gets a pool that the node has no route to, `ANY` being the only one that it does not look up
    (network.requestPoolHelper). Raises DriverError or NotReadyError."""
    version = 6 if wanted.v6 or ":" in wanted.pool else 4
    have = [str(it) for it in subnets if it.version == version]
    if not have:
        raise NotReadyError(f"V6: expected a subnet of IPv{version}, of which this node has none")
    if wanted.part:
        raise DriverError(f"SubPool: expected none, as addresses are the appliance's, got {wanted.part}")
    if wanted.pool not in ("", ANY, *have):
        raise DriverError(f"Pool: expected none, or this node's {have[0]}, got {wanted.pool}")
    return {"PoolID": f"{SPACE}/{version}", "Pool": wanted.pool or (ANY if version == 4 else have[0]), "Data": {}}


def version_of(wanted: PoolRequest) -> int:
    """The family of a pool. Raises DriverError."""
    if wanted.pool not in (f"{SPACE}/4", f"{SPACE}/6"):
        raise DriverError(f"PoolID: expected {SPACE}/4 or {SPACE}/6, got {wanted.pool!r}")
    return int(wanted.pool[-1])


def gateway(wanted: RequestAddress, subnets: Iterable[IPNetwork]) -> str:
    """The gateway of a pool, with its length. Raises DriverError if it is to be another address."""
    gateways = [str(gateway_of(it)) for it in subnets if it.version == version_of(wanted)]
    if not gateways or not _is_one(wanted.address, gateways[0]):
        raise DriverError(f"Address: expected none, or this node's {' '.join(gateways)}, got {wanted.address!r}")
    return gateways[0]


def _is_one(wanted: str, gateway: str) -> bool:
    try:
        return not wanted or ip_address(wanted) == ip_interface(gateway).ip
    except ValueError:
        return False


def check_pools(pools: Iterable[Pool]) -> None:
    """Raises DriverError if a network has addresses that are not ours to give."""
    for it in pools:
        if it.space not in (SPACE, NULL_SPACE):
            raise DriverError(f"AddressSpace: expected {SPACE} (--ipam-driver {SPACE}), got {it.space or it.pool!r}")


# --- networks -------------------------------------------------------------------------------------------------------


class Networks:
    """Which instance a network's containers are that do not say it: its options, by its id, in a file."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._options = self._load()

    def of(self, network: str) -> Mapping[str, str]:
        """A network's options; none of one that is not known."""
        return self._options.get(network, {})

    def add(self, network: str, options: Mapping[str, Any]) -> None:
        """A network is made. Raises OSError: then it is not."""
        self._save({**self._options, network: {key: str(options[key]) for key in LABELS if key in options}})

    def remove(self, network: str) -> None:
        """A network goes. Raises OSError: then it stays."""
        if network in self._options:
            self._save({key: value for key, value in self._options.items() if key != network})

    def _save(self, options: dict[str, dict[str, str]]) -> None:
        write(self._path, json.dumps(options).encode())
        self._options = options

    def _load(self) -> dict[str, dict[str, str]]:
        try:
            return {str(key): dict(value) for key, value in json.loads(self._path.read_bytes()).items()}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, TypeError, AttributeError) as error:
            log.warning("expected Docker's networks", extra={"path": str(self._path), "error": str(error)})
            return {}


# --- the driver -----------------------------------------------------------------------------------------------------


class Driver:
    """The methods that ask or change something."""

    def __init__(self, supervisor: Supervisor) -> None:
        self._supervisor = supervisor
        self._networks = Networks(supervisor.config.paths.state / FILE)

    async def create_network(self, wanted: CreateNetwork) -> dict[str, Any]:
        """Keeps a network's options."""
        check_pools((*wanted.v4, *wanted.v6))
        self._networks.add(wanted.network, wanted.options.get(GENERIC) or {})
        return {}

    async def delete_network(self, wanted: NetworkRequest) -> dict[str, Any]:
        """Forgets them."""
        self._networks.remove(wanted.network)
        return {}

    async def create_endpoint(self, wanted: CreateEndpoint) -> dict[str, Any]:
        """Attaches an instance."""
        given = [ip_interface(it).ip for it in (wanted.interface.address, wanted.interface.address_v6) if it]
        service, instance = identity(wanted.options, self._networks.of(wanted.network))
        reference = NetnsRef.by_endpoint(wanted.endpoint)
        made = self._found(wanted.endpoint) or await self._supervisor.attach(
            service, instance, reference, interface=INTERFACE, addresses=given
        )
        told = self._supervisor.told(made)
        keys = {4: "Address", 6: "AddressIPv6"}
        news = (it for it in made.addresses if it not in given)
        interface = {keys[it.version]: f"{it}/{told['prefixes'][str(it)]}" for it in news}
        return {"Interface": interface if wanted.interface.mac else {**interface, "MacAddress": told["mac"]}}

    async def delete_endpoint(self, wanted: EndpointRequest) -> dict[str, Any]:
        """Detaches it, if it is there."""
        found = self._found(wanted.endpoint)
        if found is not None:
            await self._supervisor.detach(found.service, found.instance, found.netns)
        return {}

    async def info(self, wanted: EndpointRequest) -> dict[str, Any]:
        """What operators may see of an endpoint."""
        found = self._attached(wanted.endpoint)
        told = self._supervisor.told(found)
        return {"Value": {LABELS[0]: found.service, LABELS[1]: str(found.instance), MAC_ADDRESS: told["mac"]}}

    async def join(self, wanted: Join) -> dict[str, Any]:
        """Hands the link over."""
        found = self._attached(wanted.endpoint)
        if wanted.sandbox:
            await self._supervisor.environment.taken(found.veth, wanted.sandbox)
        return joined(found, self._supervisor.environment.wanted.overlay)

    async def program(self, wanted: ExternalConnectivity) -> dict[str, Any]:
        """Ports of the node lead to it."""
        found = self._attached(wanted.endpoint)
        mapped = portmap.parse(ports(wanted.options), self._supervisor.config.tunnel.port)
        await self._supervisor.map_ports(found, mapped)
        return {}

    async def revoke(self, wanted: EndpointRequest) -> dict[str, Any]:
        """They do no longer."""
        found = self._found(wanted.endpoint)
        if found is not None:
            await self._supervisor.map_ports(found, ())
        return {}

    async def request_pool(self, wanted: RequestPool) -> dict[str, Any]:
        """A subnet of this node."""
        return pool(wanted, self._subnets())

    async def request_address(self, wanted: RequestAddress) -> dict[str, Any]:
        """The gateway for who asks for it, or a free address."""
        subnets, version = self._subnets(), version_of(wanted)
        if wanted.options.get(REQUEST_TYPE) == GATEWAY:
            return {"Address": gateway(wanted, subnets), "Data": {}}
        if wanted.address:
            raise DriverError(f"Address: expected none, as addresses are the appliance's, got {wanted.address}")
        return {"Address": str(self._supervisor.environment.reserve(version)), "Data": {}}

    async def release_address(self, wanted: ReleaseAddress) -> dict[str, Any]:
        """An address is not used; nothing if it is, or is not ours: Docker releases also what it has not asked for."""
        if wanted.address:
            self._supervisor.environment.unreserve(ip_address(wanted.address))
        return {}

    def _subnets(self) -> tuple[IPNetwork, ...]:
        """Raises NotReadyError while there are none."""
        membership = self._supervisor.membership
        if not membership.provisioned.is_set():
            raise NotReadyError(membership.why_not_ready())
        return self._supervisor.environment.subnets

    def _found(self, endpoint: str) -> Attachment | None:
        """An endpoint's attachment; None if it has gone, or its instance is elsewhere by now."""
        short = NetnsRef.by_endpoint(endpoint).endpoint
        every = self._supervisor.environment.attachments()
        return next((it for it in every if it.netns.endpoint == short), None)

    def _attached(self, endpoint: str) -> Attachment:
        found = self._found(endpoint)
        if found is None:
            raise DriverError(f"EndpointID: expected one that is attached, got {endpoint}")
        return found


# --- the socket -----------------------------------------------------------------------------------------------------

Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


def application(supervisor: Supervisor) -> web.Application:
    """The routes of the published API, every one."""
    app = web.Application(middlewares=[_errors], client_max_size=BODY_MAX)
    driver = Driver(supervisor)
    for path, handler in {
        "/Plugin.Activate": _saying(Request, {"Implements": ["NetworkDriver", "IpamDriver"]}),
        "/NetworkDriver.GetCapabilities": _saying(Request, {"Scope": "local", "ConnectivityScope": "global"}),
        "/NetworkDriver.CreateNetwork": _asking(CreateNetwork, driver.create_network),
        "/NetworkDriver.DeleteNetwork": _asking(NetworkRequest, driver.delete_network),
        "/NetworkDriver.AllocateNetwork": _saying(AllocateNetwork, {"Options": {}}),
        "/NetworkDriver.FreeNetwork": _saying(NetworkRequest, {}),
        "/NetworkDriver.CreateEndpoint": _asking(CreateEndpoint, driver.create_endpoint),
        "/NetworkDriver.DeleteEndpoint": _asking(EndpointRequest, driver.delete_endpoint),
        "/NetworkDriver.EndpointOperInfo": _asking(EndpointRequest, driver.info),
        "/NetworkDriver.Join": _asking(Join, driver.join),
        "/NetworkDriver.Leave": _saying(EndpointRequest, {}),
        "/NetworkDriver.DiscoverNew": _saying(Request, {}),
        "/NetworkDriver.DiscoverDelete": _saying(Request, {}),
        "/NetworkDriver.ProgramExternalConnectivity": _asking(ExternalConnectivity, driver.program),
        "/NetworkDriver.RevokeExternalConnectivity": _asking(EndpointRequest, driver.revoke),
        "/IpamDriver.GetCapabilities": _saying(Request, {"RequiresMACAddress": False, "RequiresRequestReplay": False}),
        "/IpamDriver.GetDefaultAddressSpaces": _saying(Request, SPACES),
        "/IpamDriver.RequestPool": _asking(RequestPool, driver.request_pool),
        "/IpamDriver.ReleasePool": _saying(PoolRequest, {}),
        "/IpamDriver.RequestAddress": _asking(RequestAddress, driver.request_address),
        "/IpamDriver.ReleaseAddress": _asking(ReleaseAddress, driver.release_address),
    }.items():
        app.router.add_post(path, handler)
    return app


def _asking(kind: type[M], method: Callable[[M], Awaitable[dict[str, Any]]]) -> Handler:
    async def answer(request: web.Request) -> web.StreamResponse:
        return _reply(await method(_read(kind, await request.read())))

    return answer


def _saying(kind: type[BaseModel], said: dict[str, Any]) -> Handler:
    async def answer(request: web.Request) -> web.StreamResponse:
        _read(kind, await request.read())
        return _reply(said)

    return answer


def _read(kind: type[M], body: bytes) -> M:
    """Some methods have no body, some versions say null. Raises ValidationError."""
    return kind.model_validate_json(b"{}" if body.strip() in (b"", b"null") else body)


def _reply(value: Mapping[str, Any], status: int = 200) -> web.Response:
    return web.Response(body=orjson.dumps(value), status=status, content_type=CONTENT_TYPE)


@web.middleware
async def _errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Errors as the API has them. 404 would mean to Docker that there is no such method."""
    try:
        return await handler(request)
    except ValidationError as error:
        details = error.errors()[0]
        return _refuse(request, f"{'.'.join(map(str, details['loc'])) or 'body'}: {details['msg']}", 400)
    except (DriverError, EnvironmentError_, MessageError) as error:
        return _refuse(request, str(error), 400)
    except NotReadyError as error:
        return _refuse(request, str(error), 503)
    except web.HTTPException as error:
        return _refuse(request, f"{request.path}: {error.reason}", error.status)
    except Exception as error:
        log.exception("request failed", extra={"path": request.path})
        return _refuse(request, f"{type(error).__name__}: {error}", 500)


def _refuse(request: web.Request, reason: str, status: int) -> web.Response:
    log.warning("refused", extra={"path": request.path, "status": status, "error": reason})
    return _reply({"Err": reason}, status)
