"""Takes one TCP connection and tells what came over it and how long it ever paused.

sink.py PORT: prints `ready`, then at the end of the stream a JSON object: bytes, sha256, gap_ms (the longest
time between two reads that gave data), gap_at_s (when, since the first), peer.
"""

import hashlib
import json
import socket
import sys
import time

BLOCK = 1 << 18


def main() -> None:
    with socket.create_server(("::", int(sys.argv[1])), family=socket.AF_INET6, dualstack_ipv6=True) as listener:
        print("ready", flush=True)
        connection, peer = listener.accept()
    state, total, gap, gap_at = hashlib.sha256(), 0, 0.0, 0.0
    first = last = 0.0
    while data := connection.recv(BLOCK):
        now = time.monotonic()
        if total and now - last > gap:
            gap, gap_at = now - last, now - first
        first, last = first or now, now
        state.update(data)
        total += len(data)
    print(
        json.dumps(
            {
                "bytes": total,
                "sha256": state.hexdigest(),
                "gap_ms": gap * 1000,
                "gap_at_s": gap_at,
                "peer": peer[0],
            }
        )
    )


main()
