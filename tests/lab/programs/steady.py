"""Idle TCP connections and a UDP ping, 1,000 a second, to an echo server: what becomes of them meanwhile.

steady.py ADDRESS PORT CONNECTIONS: prints `ready`. For each line on standard input it prints what there was since the
last one, a JSON object: sent, lost (pings whose answer did not come), gap_ms (the longest time without an answer),
broken (connections that do not give back a byte).
"""

import json
import socket
import sys
import threading
import time

SO_RCVBUFFORCE = 33  # asm-generic/socket.h
BUFFER = 4 << 20
INTERVAL_S = 0.001
GRACE_S = 3.0
"""How late an answer may be."""


class Ping:
    """A thread that sends, one that receives; `take` tells of all since the last time."""

    def __init__(self, address: str, port: int) -> None:
        self.socket = socket.socket(socket.AF_INET6 if ":" in address else socket.AF_INET, socket.SOCK_DGRAM)
        self.socket.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, BUFFER)
        self.socket.connect((address, port))
        self.sent = 0
        self.first = 0
        self.missing: set[int] = set()
        self.gap = 0.0
        self.last = time.monotonic()
        for work in (self.send, self.receive):
            threading.Thread(target=work, daemon=True).start()

    def send(self) -> None:
        due = time.monotonic()
        while True:
            self.missing.add(self.sent)
            self.socket.send(self.sent.to_bytes(8, "big"))
            self.sent += 1
            due = max(due + INTERVAL_S, time.monotonic() - 10 * INTERVAL_S)  # who was held up does not flood
            time.sleep(max(0.0, due - time.monotonic()))

    def receive(self) -> None:
        while True:
            number = int.from_bytes(self.socket.recv(16), "big")
            now = time.monotonic()
            self.gap, self.last = max(self.gap, now - self.last), now
            self.missing.discard(number)

    def take(self) -> dict[str, float]:
        until = self.sent
        end = time.monotonic() + GRACE_S
        while (lost := [it for it in list(self.missing) if it < until]) and time.monotonic() < end:
            time.sleep(0.01)
        said = {"sent": until - self.first, "lost": len(lost), "gap_ms": round(1000 * self.gap, 1)}
        self.missing.difference_update(lost)
        self.first, self.gap = until, 0.0
        return said


def gives_back(connection: socket.socket) -> bool:
    try:
        connection.sendall(b"x")
        return connection.recv(1) == b"x"
    except OSError:
        return False


def main() -> None:
    address, port, count = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
    connections = [socket.create_connection((address, port), timeout=10) for _ in range(count)]
    assert all(map(gives_back, connections))
    ping = Ping(address, port)
    print("ready", flush=True)
    for _ in sys.stdin:
        broken = sum(not gives_back(it) for it in connections)
        print(json.dumps({**ping.take(), "broken": broken}), flush=True)


main()
