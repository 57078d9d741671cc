"""`appliance profile`: py-spy on a running process, from outside; the process is not changed and hardly slowed."""

import socket
import struct
import subprocess
import sys
from pathlib import Path

from appliance.client import ApiError

RATE = 100
"""Samples a second."""


def record(api: Path, file: Path, seconds: int) -> None:
    """A flame graph of the process that serves an API socket. Raises ApiError with a sentence."""
    program = Path(sys.executable).with_name("py-spy")
    line = [str(program), "record", "--pid", str(owner(api)), "--duration", str(seconds), "--rate", str(RATE)]
    line += ["--output", str(file), "--nonblocking"]
    try:
        done = subprocess.run(line, capture_output=True, text=True)
    except FileNotFoundError:
        raise ApiError(f"no {program}: expected py-spy, which is installed with the appliance") from None
    if "No stack counts found" in done.stderr:
        raise ApiError(f"the process did nothing in {seconds} s that a sample met")
    if done.returncode != 0:
        raise ApiError(f"py-spy: {done.stderr.strip() or 'it failed without a word'}")


def owner(api: Path) -> int:
    """The process that listens at a unix socket (SO_PEERCRED). Raises ApiError."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        try:
            sock.connect(str(api))
        except OSError as error:
            raise ApiError(f"{api}: {error.strerror or error}: the appliance is not running") from error
        pid, _, _ = struct.unpack("3i", sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))
    return int(pid)
