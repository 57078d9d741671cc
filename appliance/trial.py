"""What the kernel lets the appliance do, tried: `python -m appliance.trial` prints a JSON object.

Modules, kernel options and permissions are not looked up but used, by the functions that the appliance uses, in a
network namespace that ends with this process and takes everything with it. The object has a key for each of ``TRIALS``,
with the kernel's reason, or an empty text if it worked. Status 1 and one line on standard error if no namespace can be
made.
"""

from __future__ import annotations

import asyncio
import ctypes
import json
import os
import sys
from collections.abc import Awaitable, Callable
from ipaddress import ip_address
from typing import Final

from pyroute2 import NetlinkError

from appliance.dataplane import bpf, steering
from appliance.environment import plan
from appliance.environment.errors import EnvironmentError_
from appliance.environment.netlink import Executor, Kernel, reason
from appliance.environment.tun import TunDevice
from appliance.supervisor import sockets

_CLONE_NEWNET: Final = 0x40000000
_TUN, _BRIDGE, _VETH, _PEER = "trial-tun0", "trial-br0", "trial0", "trial1"
_QUEUES: Final = 2
_PORT, _BUFFER = 50103, 65_536
_ADDRESSES: Final = (ip_address("192.0.2.2"), ip_address("2001:db8::2"))


def multi_queue_tun() -> None:
    """A TUN device with several queues and virtio headers, whose queue a program of ours chooses."""
    device = TunDevice(_TUN, _QUEUES)
    try:
        device.set_offloads(tso=False, uso=False)
        _with_program(inbound=False, use=device.steer)
    finally:
        device.close()


def reuseport() -> None:
    """Sockets at one port, of which a program of ours chooses."""
    opened = sockets.open_all(_QUEUES, _PORT, 0, _BUFFER, gro=False)
    try:
        _with_program(inbound=True, use=lambda fd: sockets.steer(opened, fd))
    finally:
        for it in opened:
            it.close()


def _with_program(*, inbound: bool, use: Callable[[int], None]) -> None:
    fd = bpf.load(bpf.SOCKET_FILTER, steering.program(_QUEUES, inbound=inbound), "edge_trial")
    try:
        use(fd)
    finally:
        os.close(fd)


async def bridge(executor: Executor, _: Kernel) -> None:
    """The bridge of the containers."""
    await executor.carry_out(plan.CreateBridge(_BRIDGE, "02:00:00:00:00:01"))


async def veth(executor: Executor, kernel: Kernel) -> None:
    """A container's link."""
    await kernel.ipr.link("add", ifname=_VETH, kind="veth", peer=_PEER)


async def sch_ingress(_: Executor, kernel: Kernel) -> None:
    """Where frames of a container arrive (clsact)."""
    await kernel.ipr.tc("add", "clsact", await kernel.index(_VETH))


async def cls_bpf(executor: Executor, _: Kernel) -> None:
    """What looks at them there."""
    await executor.carry_out(plan.Guard(_VETH, _ADDRESSES))


OF_DESCRIPTORS: Final[tuple[Callable[[], None], ...]] = (multi_queue_tun, reuseport)
OF_LINKS: Final[tuple[Callable[[Executor, Kernel], Awaitable[None]], ...]] = (bridge, veth, sch_ingress, cls_bpf)
TRIALS: Final = tuple(it.__name__ for it in (*OF_LINKS, *OF_DESCRIPTORS))


async def _links() -> dict[str, str]:
    async with Kernel.open() as kernel:
        executor = Executor(kernel)
        await executor.carry_out(plan.SetUp(plan.Place.NODE, "lo"))
        return {it.__name__: await _said(it(executor, kernel)) for it in OF_LINKS}


async def _said(trial: Awaitable[None]) -> str:
    try:
        await trial
    except (EnvironmentError_, NetlinkError, OSError) as error:
        return reason(error) if isinstance(error, NetlinkError | OSError) else str(error)
    return ""


def _tried(trial: Callable[[], None]) -> str:
    try:
        trial()
    except OSError as error:
        return str(error)
    return ""


def apart() -> None:
    """Have this process in a network namespace of its own. Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(_CLONE_NEWNET) != 0:
        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code))


def all_tried() -> dict[str, str]:
    """Of each trial what the kernel said, in the network namespace that we are in."""
    return asyncio.run(_links()) | {it.__name__: _tried(it) for it in OF_DESCRIPTORS}


def main() -> int:
    """Entry of the process."""
    try:
        apart()
    except OSError as error:
        sys.stderr.write(f"{error.strerror}\n")
        return 1
    print(json.dumps(all_tried()))
    return 0


if __name__ == "__main__":
    sys.exit(main())
