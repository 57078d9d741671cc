"""UDP in bursts that the kernel takes as one super-packet (UDP_SEGMENT), each burst answered before the next.

datagrams.py serve PORT: answers each datagram with its sequence number and its SHA-256.

datagrams.py send ADDRESS PORT SIZE COUNT N: N bursts of COUNT datagrams of SIZE bytes, the last shorter,
and prints a JSON object: datagrams, repeated (bursts sent again), wrong (answers).
"""

import errno
import hashlib
import json
import socket
import sys
from random import Random

UDP_SEGMENT = 103  # linux/udp.h
HEADER = 4
ATTEMPTS = 5


def serve(port: int) -> None:
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as listener:
        listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        listener.bind(("::", port))
        print("ready", flush=True)
        while True:
            data, peer = listener.recvfrom(65535)
            listener.sendto(reply(data), peer)


def reply(datagram: bytes) -> bytes:
    return datagram[:HEADER] + hashlib.sha256(datagram).digest()


def burst(number: int, size: int, count: int) -> list[bytes]:
    """Datagrams of equal size but the last of several, each with its own sequence number and content."""
    random = Random(number)
    sizes = [size] * (count - 1) + [random.randint(HEADER, size) if count > 1 else size]
    numbers = range(number * count, (number + 1) * count)
    return [n.to_bytes(HEADER, "big") + random.randbytes(it - HEADER) for n, it in zip(numbers, sizes, strict=True)]


def exchange(talker: socket.socket, datagrams: list[bytes]) -> tuple[int, int]:
    """Sends a burst until all of it is answered; how often it was repeated, how many answers were wrong."""
    expected = {it[:HEADER]: reply(it) for it in datagrams}
    wrong = 0
    for attempt in range(ATTEMPTS):
        try:
            talker.send(b"".join(datagrams))
            while expected:
                answer = talker.recv(65535)
                wrong += answer != expected.pop(answer[:HEADER], answer)
        except TimeoutError:
            continue
        except OSError as error:
            if error.errno != errno.EMSGSIZE:  # IPv6 tells a connected socket of the path's MTU (net/ipv6/udp.c)
                raise
            continue
        return attempt, wrong
    raise TimeoutError(f"{len(expected)} datagrams were never answered")


def send(address: str, port: int, size: int, count: int, bursts: int) -> None:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    repeated = wrong = 0
    with socket.socket(family, socket.SOCK_DGRAM) as talker:
        if count > 1:  # one datagram may be larger than a packet, then it is fragmented
            talker.setsockopt(socket.IPPROTO_UDP, UDP_SEGMENT, size)
        talker.settimeout(1.0)
        talker.connect((address, port))
        for number in range(bursts):
            again, bad = exchange(talker, burst(number, size, count))
            repeated, wrong = repeated + again, wrong + bad
    print(json.dumps({"datagrams": bursts * count, "repeated": repeated, "wrong": wrong}))


if sys.argv[1] == "serve":
    serve(int(sys.argv[2]))
else:
    send(sys.argv[2], *map(int, sys.argv[3:7]))
