"""A container's place on the network, and the record of it that the kernel keeps for us.

The alias of the node's end of a container's link holds the attachment in one line:

    edge1 SERVICE INSTANCE INTERFACE IPV4|- IPV6|- NETNS

It is written last, so it is the commit mark: a link of ours without it is half-made. It lives and dies
with the link, so it can be neither lost nor stale, needs no disk, and `ip link` shows it.
"""

from dataclasses import dataclass
from enum import StrEnum
from ipaddress import IPv4Address, IPv6Address, ip_address
from pathlib import Path
from typing import Final, Literal
from urllib.parse import quote, unquote

from appliance.environment import names
from appliance.environment.addresses import IPAddress, IPInterface, v4_of, v6_of
from appliance.environment.errors import EnvironmentError_

RECORD_VERSION: Final = "edge1"
RECORD_MAX: Final = 255
"""IFALIASZ less one (linux/if.h), in bytes."""
SERVICE_MAX: Final = 123
"""Four parts of 30 characters and their dots, which is what the cluster accepts."""
INSTANCE_MAX: Final = 2**31 - 1
NETNS_DIRECTORY: Final = Path("/run/netns")
DOCKER_DIRECTORY: Final = Path("/run/docker/netns")
ENDPOINT_DIGITS: Final = 24
"""96 bits of Docker's 256: a record has no room for more."""
_ABSENT: Final = "-"
_UNQUOTED: Final = "/:@+,="


@dataclass(frozen=True, slots=True)
class NetnsRef:
    """A network namespace by the name that `ip netns` knows, by a process in it, or by a path; or as an endpoint of
    Docker's, ID or ID@PATH, whose namespace is made later and whose link Docker moves there."""

    kind: Literal["name", "pid", "path", "docker"]
    value: str

    @classmethod
    def by_name(cls, name: str) -> "NetnsRef":
        """A namespace below /run/netns. Raises EnvironmentError_ if that cannot be a name there."""
        if not name or name in (".", "..") or "/" in name or "\0" in name:
            raise EnvironmentError_(f"netns: expected a name below {NETNS_DIRECTORY}, got {name!r}")
        return cls("name", name)

    @classmethod
    def by_pid(cls, pid: int) -> "NetnsRef":
        """The namespace of a process. Raises EnvironmentError_ if that cannot be one."""
        if pid <= 0:
            raise EnvironmentError_(f"pid: expected a positive integer, got {pid}")
        return cls("pid", str(pid))

    @classmethod
    def by_path(cls, path: str | Path) -> "NetnsRef":
        """A namespace that is mounted at an absolute path, or /proc/…/ns/net. Raises EnvironmentError_."""
        if not Path(path).is_absolute() or "\0" in str(path):
            raise EnvironmentError_(f"path: expected an absolute path, got {str(path)!r}")
        return cls("path", str(path))

    @classmethod
    def by_endpoint(cls, identity: str, sandbox: str = "") -> "NetnsRef":
        """Docker's endpoint of this id, and its sandbox's path once that is known. Raises EnvironmentError_."""
        if not identity.isalnum():
            raise EnvironmentError_(f"docker: expected an endpoint's id, got {identity!r}")
        if not sandbox:
            return cls("docker", identity[:ENDPOINT_DIGITS])
        return cls("docker", f"{identity[:ENDPOINT_DIGITS]}@{cls.by_path(sandbox).value}")

    @classmethod
    def parse(cls, text: str) -> "NetnsRef":
        """The inverse of `str`. Raises EnvironmentError_."""
        kind, _, value = text.partition(":")
        match kind:
            case "name":
                return cls.by_name(value)
            case "path":
                return cls.by_path(value)
            case "pid" if value.isdecimal():
                return cls.by_pid(int(value))
            case "docker":
                identity, _, sandbox = value.partition("@")
                return cls.by_endpoint(identity, sandbox)
        raise EnvironmentError_(f"netns: expected name:…, pid:…, path:… or docker:…, got {text!r}")

    @property
    def endpoint(self) -> str:
        """The id of Docker's endpoint, shortened; empty if it is none."""
        return self.value.partition("@")[0] if self.kind == "docker" else ""

    @property
    def path(self) -> Path:
        """Where the namespace can be opened."""
        match self.kind:
            case "name":
                return NETNS_DIRECTORY / self.value
            case "pid":
                return Path("/proc") / self.value / "ns" / "net"
            case "path":
                return Path(self.value)
            case "docker":
                return Path(self.value.partition("@")[2] or DOCKER_DIRECTORY / self.value)

    def __str__(self) -> str:
        return f"{self.kind}:{self.value}"


class Condition(StrEnum):
    """What has become of an attachment's link, as the node's end of it tells."""

    UNKNOWN = "unknown"
    """There is no such attachment, or no more."""
    WHOLE = "whole"
    IMPAIRED = "impaired"
    """The link is there, but no packet passes: an end is down, as it is too after it was moved elsewhere."""
    OFFERED = "offered"
    """The container's end of the link is on the node: Docker has not moved it yet, or has moved it back."""
    GONE = "gone"


@dataclass(frozen=True, slots=True)
class Attachment:
    """A container on the node's bridge. `interface` is the link's name inside the container."""

    service: str
    instance: int
    interface: str
    address_v4: IPv4Address | None
    address_v6: IPv6Address | None
    gateway_v4: IPv4Address | None
    gateway_v6: IPv6Address | None
    netns: NetnsRef

    @property
    def veth(self) -> str:
        """The name of the link's end on the node."""
        return names.veth_name(self.service, self.instance)

    @property
    def addresses(self) -> tuple[IPAddress, ...]:
        """The addresses that the container has, IPv4 first."""
        return _present(self.address_v4, self.address_v6)

    def reply(self) -> dict[str, str | int | None]:
        """The attachment as the local API reports it: addresses as text, null where there is none."""
        return {
            "service": self.service,
            "instance": self.instance,
            "interface": self.interface,
            "address_v4": _text(self.address_v4),
            "address_v6": _text(self.address_v6),
            "gateway_v4": _text(self.gateway_v4),
            "gateway_v6": _text(self.gateway_v6),
            "netns": str(self.netns),
        }


@dataclass(frozen=True, slots=True)
class Record:
    """What a link's alias says. The gateways follow from the addresses, so they are not in it."""

    service: str
    instance: int
    interface: str
    address_v4: IPv4Address | None
    address_v6: IPv6Address | None
    netns: NetnsRef

    @property
    def addresses(self) -> tuple[IPAddress, ...]:
        """The addresses, IPv4 first."""
        return _present(self.address_v4, self.address_v6)

    def encode(self) -> str:
        """The alias. Raises EnvironmentError_ if it is longer than the kernel keeps."""
        addresses = (_text(self.address_v4) or _ABSENT, _text(self.address_v6) or _ABSENT)
        netns = quote(str(self.netns), safe=_UNQUOTED)
        head = (RECORD_VERSION, self.service, str(self.instance), self.interface, *addresses)
        line = " ".join((*head, netns))
        if len(line) > RECORD_MAX:
            room = RECORD_MAX - len(line) + len(netns)
            raise EnvironmentError_(f"netns: expected at most {room} characters, got {str(self.netns)!r}")
        return line

    @classmethod
    def decode(cls, alias: str) -> "Record | None":
        """The record in an alias, None if it holds none (half-made, or not ours)."""
        try:
            version, service, instance, interface, v4, v6, netns = alias.split(" ")
            check_key(service, int(instance))
            address_v4, address_v6 = _parse(v4), _parse(v6)
            reference = NetnsRef.parse(unquote(netns))
        except (ValueError, EnvironmentError_):
            return None
        if isinstance(address_v4, IPv6Address) or isinstance(address_v6, IPv4Address):
            return None
        if version != RECORD_VERSION:
            return None
        return cls(service, int(instance), interface, address_v4, address_v6, reference)


@dataclass(frozen=True, slots=True)
class Placement:
    """Where an attachment is to be: its key, its container, its addresses and their gateways."""

    service: str
    instance: int
    netns: NetnsRef
    addresses: tuple[IPInterface, ...]
    gateways: tuple[IPAddress, ...]

    @property
    def veth(self) -> str:
        """The name of the link's end on the node."""
        return names.veth_name(self.service, self.instance)

    def record(self, interface: str) -> Record:
        """What the link's alias is to say; `interface` is its name in the container."""
        addresses = [it.ip for it in self.addresses]
        v4, v6 = v4_of(addresses), v6_of(addresses)
        return Record(self.service, self.instance, interface, v4, v6, self.netns)


def check_key(service: str, instance: int) -> None:
    """Raises EnvironmentError_ if these cannot name an attachment."""
    graphic = service.isascii() and service.isprintable() and " " not in service
    if not graphic or not 0 < len(service) <= SERVICE_MAX:
        raise EnvironmentError_(
            f"service: expected 1 to {SERVICE_MAX} printable ASCII characters without spaces, got {service!r}"
        )
    if not 0 <= instance <= INSTANCE_MAX:
        raise EnvironmentError_(f"instance: expected an integer from 0 to {INSTANCE_MAX}, got {instance}")


def _present(*addresses: IPAddress | None) -> tuple[IPAddress, ...]:
    return tuple(address for address in addresses if address is not None)


def _text(address: IPAddress | None) -> str | None:
    return None if address is None else str(address)


def _parse(text: str) -> IPAddress | None:
    return None if text == _ABSENT else ip_address(text)
