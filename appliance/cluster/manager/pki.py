"""The cluster's own authority: who is the broker, who a manager, who which node, and what each may say and hear.

Theory of operation
-------------------
`init` makes, in one directory, what is missing there, and never replaces anything::

    ca.crt ca.key             the authority; its key is needed for new nodes only, and is best kept elsewhere
    server.crt server.key     the brokers, by all names and addresses that nodes, and they themselves, reach them at
    manager.crt manager.key   managers, on the broker's MQTT side; manager.password on its NATS side
    nodes/ID.crt ID.key       a node: the subject's common name is its identity

Nothing is encrypted there: keys and password are files of mode 0600. A node gets ``ca.crt`` and its own pair.

`load` reads the directory for a broker or a manager, and checks everything: that certificates are of this authority and
in force, that keys fit and only their owner may read them. What is wrong is an error, and the broker does not
start, rather than let everybody in.

`authorization` is what the broker is told: a client is who its certificate says (``verify_and_map``), a node may
publish what nodes ask and hear what they are answered, both below its own topics only, and it hears the notices of
jobs, the list of nodes and that of exposed jobs. Everything else is refused. A certificate whose file is taken away
counts no more, as no user has that name.
"""

from __future__ import annotations

import datetime
import secrets
from collections.abc import Iterable
from dataclasses import dataclass
from ipaddress import ip_address
from pathlib import Path
from typing import Any, Final

from cryptography import x509
from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import ExtendedKeyUsageOID, NameOID

from appliance.cluster.manager import topics

YEARS: Final = 10
MANAGER: Final = "manager"
NODES: Final = "nodes"
NODE_ID: Final = r"[0-9a-f]{24}"
_EVERYWHERE: Final = ("localhost", "127.0.0.1", "::1")
"""Where managers on the broker's own machine reach it."""
_CLIENTS: Final = (ExtendedKeyUsageOID.CLIENT_AUTH,)
_BROKERS: Final = (ExtendedKeyUsageOID.SERVER_AUTH, ExtendedKeyUsageOID.CLIENT_AUTH)
"""Brokers of one cluster are each other's clients."""


class PkiError(Exception):
    """The directory is not what a secured cluster needs; the text says what was expected."""


@dataclass(frozen=True)
class Pair:
    """A certificate and its key, in PEM."""

    certificate: Path
    key: Path


@dataclass(frozen=True)
class Pki:
    """What a broker and a manager need."""

    ca: Path
    server: Pair
    manager: Pair
    password: str
    nodes: tuple[str, ...]

    def __repr__(self) -> str:
        """Without the password."""
        return f"Pki({self.ca.parent}, {len(self.nodes)} nodes)"


def pair(directory: Path, name: str) -> Pair:
    """Where a certificate and its key are."""
    return Pair(directory / f"{name}.crt", directory / f"{name}.key")


# --- making -------------------------------------------------------------------------------------------------------


def init(directory: Path, hosts: Iterable[str], nodes: Iterable[str], *, renew: bool = False) -> list[Path]:
    """Make what is missing; gives the files that were made. Raises PkiError or OSError.

    With ``renew`` the brokers' certificate is made anew if it is not for all ``hosts``.
    """
    made: list[Path] = []
    (directory / NODES).mkdir(parents=True, exist_ok=True, mode=0o700)
    authority = pair(directory, "ca")
    if not authority.certificate.exists():
        _make(authority, "Edge appliance cluster", None, (), made)
    issuer = _Issuer.read(authority)
    wanted = [(pair(directory, "server"), "server", (*_EVERYWHERE, *hosts)), (pair(directory, MANAGER), MANAGER, ())]
    wanted += [(pair(directory / NODES, node), node, ()) for node in nodes]
    for place, name, names in wanted:
        if not place.certificate.exists() or (renew and not _is_for(place.certificate, names)):
            _make(place, name, issuer, names, made)
    password = directory / f"{MANAGER}.password"
    if not password.exists():
        _write(password, secrets.token_urlsafe(32).encode(), made)
    return made


def _is_for(path: Path, hosts: Iterable[str]) -> bool:
    extensions = _certificate(path).extensions
    try:
        names = set(extensions.get_extension_for_class(x509.SubjectAlternativeName).value)
    except x509.ExtensionNotFound:
        names = set()
    return names >= {_alternative(host) for host in hosts}


@dataclass(frozen=True)
class _Issuer:
    certificate: x509.Certificate
    key: ec.EllipticCurvePrivateKey

    @classmethod
    def read(cls, authority: Pair) -> _Issuer:
        key = _key(authority.key)
        return cls(_certificate(authority.certificate), key)


def _make(place: Pair, name: str, issuer: _Issuer | None, hosts: Iterable[str], made: list[Path]) -> None:
    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.datetime.now(datetime.UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject if issuer is None else issuer.certificate.subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))  # a gateway's clock may be behind
        .not_valid_after(now + datetime.timedelta(days=366 * YEARS))
        .add_extension(x509.BasicConstraints(ca=issuer is None, path_length=0 if issuer is None else None), True)
    )
    if issuer is not None:
        builder = builder.add_extension(x509.ExtendedKeyUsage(_BROKERS if hosts else _CLIENTS), False)
    if hosts:
        builder = builder.add_extension(x509.SubjectAlternativeName(map(_alternative, dict.fromkeys(hosts))), False)
    certificate = builder.sign(key if issuer is None else issuer.key, hashes.SHA256())
    encoding, plain = serialization.Encoding.PEM, serialization.NoEncryption()
    _write(place.key, key.private_bytes(encoding, serialization.PrivateFormat.PKCS8, plain), made)
    _write(place.certificate, certificate.public_bytes(encoding), made, mode=0o644)


def _alternative(host: str) -> x509.GeneralName:
    try:
        return x509.IPAddress(ip_address(host))
    except ValueError:
        return x509.DNSName(host)


def _write(path: Path, data: bytes, made: list[Path], mode: int = 0o600) -> None:
    path.touch(mode=mode, exist_ok=True)
    path.chmod(mode)
    path.write_bytes(data)
    made.append(path)


# --- reading ------------------------------------------------------------------------------------------------------


def load(directory: Path) -> Pki:
    """Read and check the directory. Raises PkiError."""
    authority = pair(directory, "ca")
    ca = _certificate(authority.certificate)
    for name in ("server", MANAGER):
        _check(pair(directory, name), name, ca)
    names = sorted(path.stem for path in (directory / NODES).glob("*.crt"))
    for name in names:
        _check_certificate(directory / NODES / f"{name}.crt", name, ca)
    secret = directory / f"{MANAGER}.password"
    _check_secret(secret)
    server, manager = pair(directory, "server"), pair(directory, MANAGER)
    return Pki(authority.certificate, server, manager, secret.read_text().strip(), tuple(names))


def _check(place: Pair, name: str, ca: x509.Certificate) -> None:
    certificate = _check_certificate(place.certificate, name, ca)
    if _key(place.key).public_key() != certificate.public_key():
        raise PkiError(f"{place.key}: expected the key of {place.certificate.name}")


def _check_certificate(path: Path, name: str, ca: x509.Certificate) -> x509.Certificate:
    certificate = _certificate(path)
    try:
        certificate.verify_directly_issued_by(ca)
    except (ValueError, TypeError, InvalidSignature):
        raise PkiError(f"{path}: expected a certificate of this cluster's authority") from None
    if certificate.subject.rfc4514_string() != f"CN={name}":
        raise PkiError(f"{path}: expected CN={name}, got {certificate.subject.rfc4514_string()}")
    if not certificate.not_valid_before_utc <= datetime.datetime.now(datetime.UTC) <= certificate.not_valid_after_utc:
        raise PkiError(f"{path}: expected a certificate in force, it ends {certificate.not_valid_after_utc:%Y-%m-%d}")
    return certificate


def _certificate(path: Path) -> x509.Certificate:
    try:
        return x509.load_pem_x509_certificate(path.read_bytes())
    except (OSError, ValueError) as error:
        raise PkiError(f"{path}: expected a certificate in PEM: {_reason(error)}") from None


def _key(path: Path) -> ec.EllipticCurvePrivateKey:
    _check_secret(path)
    try:
        key = serialization.load_pem_private_key(path.read_bytes(), None)
    except (OSError, ValueError, TypeError) as error:
        raise PkiError(f"{path}: expected a key in PEM without a passphrase: {_reason(error)}") from None
    if not isinstance(key, ec.EllipticCurvePrivateKey):
        raise PkiError(f"{path}: expected a key on an elliptic curve")
    return key


def _check_secret(path: Path) -> None:
    try:
        mode = path.stat().st_mode & 0o777
    except OSError as error:
        raise PkiError(f"{path}: expected a readable file: {_reason(error)}") from None
    if mode & 0o077:
        raise PkiError(f"{path}: expected mode 0600, got {mode:04o}")


def _reason(error: Exception) -> str:
    return getattr(error, "strerror", None) or type(error).__name__


# --- what the broker is told --------------------------------------------------------------------------------------


def tls(pki: Pki) -> dict[str, Any]:
    """The listener for nodes: no client without a certificate, and each is who it says."""
    return {
        "cert_file": str(pki.server.certificate),
        "key_file": str(pki.server.key),
        "ca_file": str(pki.ca),
        "verify_and_map": True,
    }


def routes(pki: Pki) -> dict[str, Any]:
    """The brokers' connections between each other: both ends show a certificate."""
    return {
        "cert_file": str(pki.server.certificate),
        "key_file": str(pki.server.key),
        "ca_file": str(pki.ca),
        "verify": True,
    }


def authorization(pki: Pki) -> dict[str, Any]:
    """Users of the broker: managers may do everything, a node what `permissions` says."""
    managers = [{"user": MANAGER, "password": pki.password}, {"user": f"CN={MANAGER}"}]
    nodes = [{"user": f"CN={node}", "permissions": permissions(node)} for node in pki.nodes]
    return {"users": [*managers, *nodes]}


def permissions(node: str) -> dict[str, Any]:
    """What a node may publish and subscribe to, as NATS subjects. ``$MQTT.sub``: how the broker delivers with QoS 1."""
    says = [topics.to_subject(it.replace("+", node)) for it in topics.REQUEST_TOPICS]
    answers = [topics.subnet_result(node), topics.query_result(node)]
    hears = [*answers, topics.ALL_NODES, topics.ALL_EXPOSED, topics.updates("+")]
    return {"publish": {"allow": says}, "subscribe": {"allow": [*map(topics.to_filter, hears), "$MQTT.sub.>"]}}
