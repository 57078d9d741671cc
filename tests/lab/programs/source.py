"""Sends over one TCP connection for some seconds and tells what it sent.

source.py ADDRESS PORT SECONDS: prints the local port, then a JSON object: bytes, sha256. A connection that
breaks is an exception.
"""

import hashlib
import json
import socket
import sys
import time

from appliance.lab.service import pattern

ENDLESS = 1 << 50


def main() -> None:
    address, port, seconds = sys.argv[1], int(sys.argv[2]), float(sys.argv[3])
    state, total = hashlib.sha256(), 0
    with socket.create_connection((address, port), timeout=10) as connection:
        print(connection.getsockname()[1], flush=True)
        end = time.monotonic() + seconds
        for block in pattern(ENDLESS):
            connection.sendall(block)
            state.update(block)
            total += len(block)
            if time.monotonic() > end:
                break
    print(json.dumps({"bytes": total, "sha256": state.hexdigest()}))


main()
