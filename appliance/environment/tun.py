"""The queues of the TUN device: opened once by the supervisor, handed to the workers.

The supervisor keeps every descriptor for as long as it runs, and has them kept for the next one (``adopt``). A queue
that nobody reads would be a black hole for the flows that are steered to it, and closing one renumbers the others
(drivers/net/tun.c, __tun_detach); so a worker that dies costs neither.
"""

from __future__ import annotations

import fcntl
import io
import logging
import os
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Self

from pytun import IFF_MULTI_QUEUE, IFF_NO_PI, IFF_TUN, IFF_VNET_HDR, TunTapDevice

log = logging.getLogger(__name__)

# <linux/if_tun.h>: python-pytun stops short of these.
TUNSETOFFLOAD = 0x400454D0
TUNSETSTEERINGEBPF = 0x800454E0
TUN_F_CSUM, TUN_F_TSO4, TUN_F_TSO6, TUN_F_TSO_ECN, TUN_F_USO4, TUN_F_USO6 = 0x01, 0x02, 0x04, 0x08, 0x20, 0x40
_TSO = TUN_F_TSO4 | TUN_F_TSO6 | TUN_F_TSO_ECN
_USO = TUN_F_USO4 | TUN_F_USO6


@dataclass(frozen=True)
class TunOffloads:
    """Which super-packets the device gives us."""

    tso: bool
    uso: bool


class TunDevice:
    """A multi-queue TUN device with virtio headers."""

    def __init__(self, name: str, queues: int) -> None:
        """Create it. Raises OSError if a device of that name exists with other flags, or without permission."""
        flags = IFF_TUN | IFF_NO_PI | IFF_VNET_HDR | IFF_MULTI_QUEUE
        self.name = name
        self._queues: list[TunTapDevice | io.FileIO] = []
        try:
            for _ in range(queues):
                self._queues.append(TunTapDevice(name=name, flags=flags))
        except Exception as error:
            self.close()
            raise OSError(f"network.tun: cannot open queue {len(self._queues)} of {name}: {error}") from error
        for fd in self.descriptors:
            os.set_blocking(fd, False)

    @classmethod
    def adopt(cls, name: str, descriptors: Iterable[int]) -> Self:
        """The queues of a device that exists, in its order; they are ours from now on."""
        device = cls(name, 0)
        device._queues = [io.FileIO(fd, "r+") for fd in descriptors]
        return device

    @property
    def descriptors(self) -> list[int]:
        """One a queue, in the kernel's order."""
        return [queue.fileno() for queue in self._queues]

    def set_offloads(self, *, tso: bool, uso: bool) -> TunOffloads:
        """Ask for super-packets; what the kernel refuses is left out. Checksums are always left to us."""
        if uso and self._try(TUN_F_CSUM | (_TSO if tso else 0) | _USO):
            return TunOffloads(tso=tso, uso=True)
        if tso and self._try(TUN_F_CSUM | _TSO):
            return TunOffloads(tso=True, uso=False)
        if not self._try(TUN_F_CSUM):
            raise OSError(f"network.tun: {self.name}: the kernel refuses TUN_F_CSUM")
        return TunOffloads(tso=False, uso=False)

    def _try(self, flags: int) -> bool:
        try:
            fcntl.ioctl(self.descriptors[0], TUNSETOFFLOAD, flags)
        except OSError as error:
            log.info("tun offload refused", extra={"flags": hex(flags), "error": error.strerror})
            return False
        return True

    def steer(self, program: int) -> None:
        """Let a loaded eBPF program choose the queue of each packet. Raises OSError if the kernel cannot."""
        fcntl.ioctl(self.descriptors[0], TUNSETSTEERINGEBPF, struct.pack("i", program))

    def close(self) -> None:
        """Close all queues; with the last one the device goes."""
        for queue in self._queues:
            queue.close()
        self._queues = []
