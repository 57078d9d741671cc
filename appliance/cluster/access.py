"""How the brokers are reached: where they are, and with what this node shows who it is.

Everything is read and checked once, before anything is connected: what is configured and cannot be used is an error,
never a connection without it. Secrets are in files that only their owner may read, and in no ``repr``.

A broker ends a connection when another client presents its MQTT identifier (MQTT 3.1.1 section 3.1.4), whoever that
client is, and then announces the last will. So an identifier is made of the node's secret, if it has one: whoever does
not have that cannot guess it, and the node's next connection still takes the place of the one before.
"""

from __future__ import annotations

import hmac
import ssl
from dataclasses import dataclass, field
from pathlib import Path

from appliance.cluster.broker import parse_urls
from appliance.cluster.errors import ClusterError
from appliance.config import Cluster


@dataclass(frozen=True)
class Access:
    """The brokers' hosts and ports, and this node's credentials. ``tls`` is None for connections in cleartext."""

    brokers: tuple[tuple[str, int], ...]
    tls: ssl.SSLContext | None
    user: str | None
    password: str | None = field(repr=False)
    keepalive: int
    mark: str = field(default="", repr=False)
    """What of a secret is in the identifier; empty without one."""

    def identifier(self, node: str) -> str:
        """As which client the broker knows a node."""
        return f"{node}-{self.mark}" if self.mark else node

    def __str__(self) -> str:
        """The addresses, as URLs."""
        return ",".join(self.url(turn) for turn in range(len(self.brokers)))

    def broker(self, turn: int) -> tuple[str, int]:
        """Host and port of the broker that is tried at an attempt, counted from 0: each in turn."""
        return self.brokers[turn % len(self.brokers)]

    def url(self, turn: int) -> str:
        """The same, as an URL."""
        host, port = self.broker(turn)
        return f"{'mqtts' if self.tls else 'mqtt'}://{f'[{host}]' if ':' in host else host}:{port}"


def access(cluster: Cluster) -> Access:
    """What the configuration says. Raises ClusterError."""
    if not cluster.url:
        raise ClusterError("cluster.url: expected a broker, got none")
    urls = parse_urls(cluster.url)
    secured = urls[0].scheme == "mqtts" or bool(cluster.ca or cluster.certificate or cluster.key)
    return Access(
        brokers=tuple((url.host, url.port or cluster.port) for url in urls),
        tls=_tls(cluster) if secured else None,
        user=cluster.user or None,
        password=_password(cluster.password_file) if cluster.password_file else None,
        keepalive=cluster.keepalive,
        mark=_mark(cluster),
    )


def _tls(cluster: Cluster) -> ssl.SSLContext:
    """At least TLS 1.2; the broker's certificate and name are always checked."""
    try:
        context = ssl.create_default_context(cafile=cluster.ca or None)
    except OSError as error:  # ssl.SSLError is one
        raise ClusterError(f"cluster.ca: expected certificates in PEM in {cluster.ca}: {_reason(error)}") from error
    context.minimum_version = ssl.TLSVersion.TLSv1_2
    if cluster.certificate and cluster.key:
        _check_secret("cluster.key", cluster.key)
        try:
            context.load_cert_chain(cluster.certificate, cluster.key, password="")
        except (OSError, ValueError) as error:
            files = f"{cluster.certificate} and {cluster.key}"
            wanted = "cluster.certificate: expected a certificate and its key, without a passphrase, in PEM"
            raise ClusterError(f"{wanted} in {files}: {_reason(error)}") from error
    return context


def _password(path: Path) -> str:
    _check_secret("cluster.password_file", path)
    try:
        lines = path.read_text().splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise ClusterError(f"cluster.password_file: expected a readable text file, {path}: {_reason(error)}") from error
    if not lines or not lines[0]:
        raise ClusterError(f"cluster.password_file: expected a password in the first line of {path}")
    return lines[0]


def _mark(cluster: Cluster) -> str:
    """Of the key or the password, which were read before; 128 bits that tell nothing of either."""
    path = cluster.key or cluster.password_file
    return hmac.digest(path.read_bytes(), b"MQTT client identifier", "sha256")[:16].hex() if path else ""


def _check_secret(key: str, path: Path) -> None:
    try:
        mode = path.stat().st_mode & 0o777
    except OSError as error:
        raise ClusterError(f"{key}: expected a readable file, {path}: {_reason(error)}") from error
    if mode & 0o077:
        raise ClusterError(f"{key}: expected a file of mode 0600, {path} has {mode:04o}")


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or str(error)
