"""Sends bytes to the demo service, or gets them from it; what each end saw.

transfer.py ADDRESS CONTAINER SIZE to|from: calls ADDRESS until CONTAINER answers, uses that connection, and prints a
JSON object of SHA-256 in hexadecimal: expected, and sent and received as the ends saw them.
"""

import base64
import hashlib
import http.client
import json
import sys
from collections.abc import Iterator

from appliance.lab.plan import WEB_PORT
from appliance.lab.service import BLOCK, digest, pattern

ATTEMPTS = 20


def connect(address: str, container: str) -> http.client.HTTPConnection:
    for _ in range(ATTEMPTS):
        connection = http.client.HTTPConnection(address, WEB_PORT, timeout=30)
        connection.request("GET", "/")
        if json.loads(connection.getresponse().read())["container"] == container:
            return connection
        connection.close()
    raise ConnectionError(f"{container} did not answer any of {ATTEMPTS} calls of {address}")


def upload(connection: http.client.HTTPConnection, size: int) -> dict[str, str]:
    state = hashlib.sha256()

    def blocks() -> Iterator[bytes]:
        for block in pattern(size):
            state.update(block)
            yield block

    connection.request("PUT", "/digest", blocks(), {"Content-Length": str(size)})
    answer = json.loads(connection.getresponse().read())
    assert answer["bytes"] == size, answer
    return {"sent": state.hexdigest(), "received": answer["sha256"]}


def download(connection: http.client.HTTPConnection, size: int) -> dict[str, str]:
    connection.request("GET", f"/stream/{size}")
    response = connection.getresponse()
    declared = response.headers["Repr-Digest"].removeprefix("sha-256=:").removesuffix(":")
    state, buffer = hashlib.sha256(), bytearray(BLOCK)
    while count := response.readinto(buffer):
        state.update(memoryview(buffer)[:count])
    return {"sent": base64.b64decode(declared).hex(), "received": state.hexdigest()}


def main() -> None:
    address, container, size = sys.argv[1], sys.argv[2], int(sys.argv[3])
    transfer = {"to": upload, "from": download}[sys.argv[4]]
    print(json.dumps({"expected": digest(size).hex(), **transfer(connect(address, container), size)}))


main()
