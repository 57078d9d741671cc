"""A private authority and certificates of it, made with openssl."""

import subprocess
from dataclasses import dataclass
from pathlib import Path

CURVE = ["-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]


@dataclass(frozen=True)
class Pair:
    """A certificate and its key, in PEM; the key has mode 0600."""

    certificate: Path
    key: Path


class Authority:
    """Signs certificates, all in one directory."""

    def __init__(self, directory: Path, name: str = "authority") -> None:
        self._directory = directory
        self._pair = self._paths(name)
        self.certificate = self._pair.certificate
        self._openssl("req", "-x509", "-days", "2", "-subj", f"/CN={name}", *self._out(self._pair))

    def issue(self, name: str, alternative: str = "IP:127.0.0.1") -> Pair:
        """A certificate for a name, and for an address or host name."""
        pair = self._paths(name)
        signer = ["-CA", str(self.certificate), "-CAkey", str(self._pair.key), "-days", "2"]
        subject = ["-subj", f"/CN={name}", "-addext", f"subjectAltName={alternative}"]
        self._openssl("req", "-x509", *signer, *subject, "-addext", "basicConstraints=CA:FALSE", *self._out(pair))
        return pair

    def _paths(self, name: str) -> Pair:
        return Pair(self._directory / f"{name}.crt", self._directory / f"{name}.key")

    def _out(self, pair: Pair) -> list[str]:
        return [*CURVE, "-keyout", str(pair.key), "-out", str(pair.certificate)]

    def _openssl(self, *arguments: str) -> None:
        subprocess.run(["openssl", *arguments], check=True, capture_output=True)
