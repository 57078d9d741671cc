"""Keeps TCP connections to the demo service open, and says how many still work.

keeper.py ADDRESS COUNT: prints "ready"; for each line of input it makes a request over each connection, and prints how
many were answered.
"""

import http.client
import sys

from appliance.lab.plan import WEB_PORT

TIMEOUT_S = 10.0


def opened(address: str) -> http.client.HTTPConnection:
    """A connection that, once it is closed, stays so."""
    connection = http.client.HTTPConnection(address, WEB_PORT, timeout=TIMEOUT_S)
    connection.connect()
    connection.auto_open = 0
    return connection


def works(connection: http.client.HTTPConnection) -> bool:
    """Whether there is an answer."""
    try:
        connection.request("GET", "/")
        answer = connection.getresponse()
        answer.read()
    except (OSError, http.client.HTTPException):
        return False
    return answer.status == http.client.OK


def main() -> None:
    address, count = sys.argv[1], int(sys.argv[2])
    connections = [opened(address) for _ in range(count)]
    print("ready", flush=True)
    for _ in sys.stdin:
        print(sum(map(works, connections)), flush=True)


main()
