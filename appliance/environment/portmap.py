"""Port mappings as a NodeEngine writes them: ``8080:80/tcp;5353:53/udp``. No input or output.

    mappings = [mapping *(";" mapping)]
    mapping  = host [":" container] ["/tcp" | "/udp"]

A lone port maps to itself, the default protocol is TCP, ports are decimal. Two mappings of one host port and protocol
would leave it to chance which one counts, and a mapping of the tunnel's own port would cut this node off: both are
errors, as is a port 0, which nobody can send to.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Final, Literal

from appliance.environment.errors import EnvironmentError_

PORT_MAX: Final = 65_535
_MAPPING = re.compile(r"([0-9]{1,5})(?::([0-9]{1,5}))?(?:/(tcp|udp))?", re.ASCII)


@dataclass(frozen=True)
class PortMapping:
    """A port of the node that leads to one of a container."""

    host: int
    container: int
    protocol: Literal["tcp", "udp"]


def parse(text: str, tunnel_port: int) -> tuple[PortMapping, ...]:
    """The mappings in a text, in its order; none in an empty one. Raises EnvironmentError_."""
    found: list[PortMapping] = []
    for part in text.split(";") if text else ():
        mapping = _parse_one(part)
        if (mapping.host, mapping.protocol) == (tunnel_port, "udp"):
            raise EnvironmentError_(f"portMappings: expected another port than the tunnel's own, got {part!r}")
        if any((it.host, it.protocol) == (mapping.host, mapping.protocol) for it in found):
            raise EnvironmentError_(f"portMappings: expected each host port once, got {part!r} again")
        found.append(mapping)
    return tuple(found)


def _parse_one(text: str) -> PortMapping:
    match = _MAPPING.fullmatch(text)
    if match is None:
        raise EnvironmentError_(
            f"portMappings: expected host:container/tcp or /udp, separated by ';', got {text[:40]!r}"
        )
    host, container = int(match[1]), int(match[2] or match[1])
    if not (0 < host <= PORT_MAX and 0 < container <= PORT_MAX):
        raise EnvironmentError_(f"portMappings: expected ports from 1 to {PORT_MAX}, got {text!r}")
    return PortMapping(host, container, "udp" if match[3] == "udp" else "tcp")
