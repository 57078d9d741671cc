"""Does this kernel do what it says? Offloads of UDP sockets, tried on the loopback with real datagrams.

Some kernels and hypervisors accept the options and mangle what goes through them; so a train is sent and its bytes
are compared.
"""

from __future__ import annotations

import socket
import struct
from dataclasses import dataclass

from appliance.supervisor.sockets import SOL_UDP, UDP_GRO, UDP_SEGMENT

_SEGMENT, _COUNT = 1_200, 3
_PAYLOAD = bytes(i * 7 & 0xFF for i in range(_SEGMENT * _COUNT - 100))  # the last segment is shorter
_TIMEOUT_S = 1.0


@dataclass(frozen=True)
class Probe:
    """Whether an offload works, and why not."""

    works: bool
    reason: str = ""


def _pair() -> tuple[socket.socket, socket.socket]:
    receiver = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    receiver.bind(("127.0.0.1", 0))
    receiver.settimeout(_TIMEOUT_S)
    sender = socket.socket(socket.AF_INET, socket.SOCK_DGRAM)
    sender.connect(receiver.getsockname())
    return sender, receiver


def _send_train(sender: socket.socket) -> None:
    sender.sendmsg([_PAYLOAD], [(SOL_UDP, UDP_SEGMENT, struct.pack("=H", _SEGMENT))])


def udp_gso() -> Probe:
    """Send a train to a plain socket: it must arrive as its segments."""
    sender, receiver = _pair()
    with sender, receiver:
        try:
            _send_train(sender)
            parts = [receiver.recv(65_536) for _ in range(_COUNT)]
        except OSError as error:
            return Probe(False, f"UDP_SEGMENT: {error.strerror or error}")
    if b"".join(parts) != _PAYLOAD or len(parts[0]) != _SEGMENT:
        return Probe(False, "UDP_SEGMENT: a train arrived with other bytes than were sent")
    return Probe(True)


def udp_gro() -> Probe:
    """Send a train to a socket with UDP_GRO: it must arrive whole, with its segment size, or as its segments."""
    sender, receiver = _pair()
    with sender, receiver:
        try:
            receiver.setsockopt(SOL_UDP, UDP_GRO, 1)
            _send_train(sender)
            received = _receive_all(receiver)
        except OSError as error:
            return Probe(False, f"UDP_GRO: {error.strerror or error}")
    if received != _PAYLOAD:
        return Probe(False, "UDP_GRO: a train arrived with other bytes than were sent")
    return Probe(True)


def _receive_all(receiver: socket.socket) -> bytes:
    """All segments, whether joined or not. Raises OSError if a joined one does not tell its segment size."""
    data = b""
    while len(data) < len(_PAYLOAD):
        part, ancillary, _, _ = receiver.recvmsg(65_536, 64)
        sizes = [struct.unpack("=i", value[:4])[0] for *kind, value in ancillary if kind == [SOL_UDP, UDP_GRO]]
        if len(part) > _SEGMENT and sizes != [_SEGMENT]:
            raise OSError(0, f"a joined train of {len(part)} bytes said segment size {sizes}")
        data += part
    return data
