"""Sends one UDP packet from any source address, through the container's default gateway.

spoofer.py LINK SOURCE TARGET
"""

import json
import socket
import subprocess
import sys
import time

from tests.oracle.build import udp

TRIES, PAUSE_S = 50, 0.02


def gateway_mac(version: str) -> bytes:
    """The link address of the default gateway, as the kernel knows it."""
    (route,) = json.loads(subprocess.check_output(["ip", version, "-j", "route", "show", "default"]))
    address = route["gateway"]
    with socket.socket(socket.AF_INET if version == "-4" else socket.AF_INET6, socket.SOCK_DGRAM) as talker:
        talker.sendto(b"?", (address, 9))  # so that the kernel asks
    for _ in range(TRIES):
        found = json.loads(subprocess.check_output(["ip", version, "-j", "neigh", "show", address]) or b"[]")
        if found and "lladdr" in found[0]:
            return bytes.fromhex(found[0]["lladdr"].replace(":", ""))
        time.sleep(PAUSE_S)
    raise TimeoutError(address)


def main() -> None:
    link, source, target = sys.argv[1:]
    v6 = ":" in source
    mac = gateway_mac("-6" if v6 else "-4")
    with socket.socket(socket.AF_PACKET, socket.SOCK_RAW) as talker:
        talker.bind((link, 0))
        own = talker.getsockname()[4]
        talker.send(mac + own + (b"\x86\xdd" if v6 else b"\x08\x00") + udp(source, target, 1, 9, b"spoofed"))


main()
