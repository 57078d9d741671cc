"""Where the cluster's brokers are: the value of ``cluster.url``."""

from __future__ import annotations

from typing import NamedTuple
from urllib.parse import urlsplit

SCHEMES = ("mqtt", "mqtts")


class BrokerUrl(NamedTuple):
    """A broker's address; scheme and port are empty and 0 where the text leaves them open."""

    scheme: str
    host: str
    port: int


def parse_url(text: str) -> BrokerUrl:
    """A host, or ``mqtt://host:port`` or ``mqtts://host:port``. Raises ValueError."""
    if "://" not in text:
        return BrokerUrl("", _host(text[1:-1] if text.startswith("[") and text.endswith("]") else text), 0)
    parts = urlsplit(text)
    if parts.scheme not in SCHEMES or "@" in parts.netloc or parts.path.strip("/") or parts.query or parts.fragment:
        raise ValueError(text)
    if parts.port == 0:
        raise ValueError(text)
    return BrokerUrl(parts.scheme, _host(parts.hostname or ""), parts.port or 0)


def parse_urls(text: str) -> tuple[BrokerUrl, ...]:
    """One broker, or several of one cluster separated by commas, of one scheme. Raises ValueError."""
    urls = tuple(parse_url(one.strip()) for one in text.split(","))
    if len({it.scheme for it in urls}) != 1:
        raise ValueError(text)
    return urls


def _host(text: str) -> str:
    """A name or an address: one colon alone would be a port, which needs a scheme."""
    if not text or text.count(":") == 1 or any(character.isspace() or character in "/@?#[]" for character in text):
        raise ValueError(text)
    return text
