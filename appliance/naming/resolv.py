"""The resolv.conf of a container, where it is ours to write.

A namespace that has a name gets ``/etc/netns/NAME/resolv.conf``, which `ip netns exec` mounts over /etc/resolv.conf
(ip-netns(8)). A file that somebody else put there is left alone: ours begins with `MARK`. Other containers belong to
their runtime; `docs/naming.md` says how to tell it.

The search list has the service's own namespace, so that ``web`` and ``closest.web`` are enough for what is beside it,
and then the host's domains. It has not the application as a whole: ``google.com`` would be a service's name there, for
which the cluster would be asked. With ``ndots:2`` the list comes first for names with at most one dot.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Final

from appliance.environment.attachment import Attachment, Record
from appliance.naming import names

MARK: Final = "# edge-appliance\n"
DIRECTORY: Final = Path("/etc/netns")
FILE: Final = "resolv.conf"
OPTIONS: Final = "ndots:2"
SEARCH_MAX: Final = 6
"""Domains that every resolver takes (resolv.conf(5), before glibc 2.26)."""


def text(attachment: Attachment, zone: str, host_search: Iterable[str]) -> str:
    """The file's content."""
    lines = "".join(f"nameserver {it}\n" for it in servers(attachment))
    return f"{MARK}{lines}search {' '.join(search(attachment, zone, host_search))}\noptions {OPTIONS}\n"


def servers(attachment: Attachment) -> list[str]:
    """The resolver's addresses, as a container reaches them."""
    return [str(it) for it in (attachment.gateway_v4, attachment.gateway_v6) if it is not None]


def search(attachment: Attachment, zone: str, host_search: Iterable[str]) -> list[str]:
    """The search list."""
    service_ns, app, app_ns = (label.decode() for label in names.of_job(attachment.service)[1:])
    own = f"{service_ns}.{app}.{app_ns}.{zone.rstrip('.')}"
    return [own, *(it for it in host_search if it != own)][:SEARCH_MAX]


def path(attachment: Attachment | Record, directory: Path = DIRECTORY) -> Path | None:
    """Where the file is; None if the container's is not ours."""
    netns = attachment.netns
    return directory / netns.value / FILE if netns.kind == "name" else None


def write(file: Path, content: str) -> bool:
    """Writes the file, unless it is somebody else's; False then. Raises OSError."""
    if file.exists() and not is_ours(file):
        return False
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(content)
    file.chmod(0o644)
    return True


def remove(file: Path) -> None:
    """Removes the file if it is ours, and its directory if that is empty then. Raises OSError."""
    if not file.exists() or not is_ours(file):
        return
    file.unlink()
    if not any(file.parent.iterdir()):
        file.parent.rmdir()


def is_ours(file: Path) -> bool:
    """Whether this wrote a file, or was killed before its first byte. Raises OSError."""
    content = file.read_text(errors="replace")
    return content.startswith(MARK) or not content
