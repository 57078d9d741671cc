"""What a runtime has to be told about an attachment beyond what the environment's record of it holds."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from appliance.environment import names
from appliance.environment.addresses import IPNetwork
from appliance.environment.attachment import Attachment
from appliance.environment.plan import NodeWanted
from appliance.naming import resolv


def told(
    attachment: Attachment, wanted: NodeWanted, subnets: Iterable[IPNetwork], dns: dict[str, Any]
) -> dict[str, Any]:
    """The attachment as the API reports it, with its links, the lengths of its subnets, and its resolv.conf."""
    return {
        **attachment.reply(),
        "veth": attachment.veth,
        "mac": names.container_mac(attachment.addresses[0]),
        "mtu": wanted.mtu,
        "prefixes": {str(it): _length(it, subnets) for it in attachment.addresses},
        "dns": dns,
    }


def _length(address: Any, subnets: Iterable[IPNetwork]) -> int:
    """Bits of the subnet that an address is of; of the address itself if that has gone from the configuration."""
    found = (it.prefixlen for it in subnets if address in it)
    return int(next(found, address.max_prefixlen))


def dns(attachment: Attachment, zone: str, host_search: Iterable[str]) -> dict[str, Any]:
    """The lines of `naming.resolv.text` as lists."""
    servers, search = resolv.servers(attachment), resolv.search(attachment, zone, host_search)
    return {"nameservers": servers, "search": search, "options": [resolv.OPTIONS]}
