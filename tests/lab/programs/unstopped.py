"""One UDP client that never stops: a datagram each millisecond from one socket, until its input ends.

unstopped.py ADDRESS: prints "ready" once it was answered; for each line of input who answered last; and at the end a
JSON list of [container, seconds of its first answer, of its last answer] (CLOCK_MONOTONIC), in the order of the first.
"""

import json
import select
import socket
import sys
import time

from appliance.lab.plan import WEB_PORT

PAUSE_S = 0.001


def main() -> None:
    answers: list[list[object]] = []
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as talker:
        while True:
            talker.sendto(b"who are you?", (sys.argv[1], WEB_PORT))
            due = time.monotonic() + PAUSE_S
            while (left := due - time.monotonic()) > 0:
                ready, _, _ = select.select([talker, sys.stdin], [], [], left)
                if talker in ready:
                    _note(answers, json.loads(talker.recv(65535))["container"])
                elif ready and not sys.stdin.readline():
                    print(json.dumps(answers))
                    return
                elif ready:
                    print(answers[-1][0], flush=True)


def _note(answers: list[list[object]], container: str) -> None:
    now = time.monotonic()
    if not answers:
        print("ready", flush=True)
    if not answers or answers[-1][0] != container:
        answers.append([container, now, now])
    answers[-1][2] = now


main()
