"""A cable between two links that delays: what one receives leaves by the other, each frame after its time.

delayer.py ONE OTHER: prints "ready". Each line of input is `MILLISECONDS JITTER`: the delay of each direction from then
on, plus or minus up to JITTER per cent, evenly. Frames of a direction stay in their order, as in a cable. Ends with its
input.

Packet sockets hand on super-packets and checksums that are not finished as they are (PACKET_VNET_HDR, packet(7)).
"""

import heapq
import itertools
import random
import select
import socket
import sys
import time

ETH_P_ALL = 0x0003  # linux/if_ether.h
SOL_PACKET = 263  # linux/socket.h
PACKET_ADD_MEMBERSHIP, PACKET_VNET_HDR, PACKET_IGNORE_OUTGOING = 1, 15, 23  # linux/if_packet.h
PACKET_MR_PROMISC = 1
BUFFER = 1 << 24
SO_RCVBUFFORCE = 33  # asm-generic/socket.h
FRAME_MAX = 1 << 17
AT_ONCE = 64


def plugged(link: str) -> socket.socket:
    """All that arrives at a link."""
    plug = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
    plug.setsockopt(SOL_PACKET, PACKET_VNET_HDR, 1)
    plug.setsockopt(SOL_PACKET, PACKET_IGNORE_OUTGOING, 1)
    plug.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, BUFFER)
    plug.bind((link, ETH_P_ALL))
    index = socket.if_nametoindex(link)
    membership = index.to_bytes(4, sys.byteorder) + PACKET_MR_PROMISC.to_bytes(2, sys.byteorder) + bytes(10)
    plug.setsockopt(SOL_PACKET, PACKET_ADD_MEMBERSHIP, membership)
    plug.setblocking(False)
    return plug


def main() -> None:
    one, other = (plugged(link) for link in sys.argv[1:3])
    across = {one: other, other: one}
    last = dict.fromkeys(across, 0.0)
    number, waiting = itertools.count(), []  # type: ignore[var-annotated]
    delay = jitter = 0.0
    print("ready", flush=True)
    while True:
        wait = max(0.0, waiting[0][0] - time.monotonic()) if waiting else None
        ready, _, _ = select.select([*across, sys.stdin], [], [], wait)
        if sys.stdin in ready:
            words = sys.stdin.readline().split()
            if not words:
                return
            delay, jitter = float(words[0]) / 1000, float(words[1]) / 100
        for plug in across.keys() & ready:
            for _ in range(AT_ONCE):
                try:
                    frame = plug.recv(FRAME_MAX)
                except BlockingIOError:
                    break
                due = time.monotonic() + delay * random.uniform(1 - jitter, 1 + jitter)
                last[plug] = max(last[plug], due)
                heapq.heappush(waiting, (last[plug], next(number), across[plug], frame))
        while waiting and waiting[0][0] <= time.monotonic():
            _, _, plug, frame = heapq.heappop(waiting)
            try:
                plug.send(frame)
            except BlockingIOError:
                continue  # a full queue loses frames, as everywhere


main()
