"""`appliance profile`: py-spy on a running process, from outside.

The supervisor is not changed and hardly slowed. A worker is one compiled loop, in which py-spy would see nothing; so
for that time it calls its stages one by one from Python (``dataplane.staged``), which costs it microseconds a turn.
"""

import socket
import struct
import subprocess
import sys
import time
from pathlib import Path

from appliance.client import ApiError, Client

RATE = 100
"""Samples a second."""
START_S = 5.0
"""For which a worker calls its stages beyond the time asked for: until py-spy has found its way."""
LOOK_S = 0.5


def supervisor(api: Path, file: Path, seconds: int) -> None:
    """A flame graph of the process that serves an API socket. Raises ApiError with a sentence."""
    _record(owner(api), file, seconds)


def worker(api: Path, file: Path, seconds: int, index: int | None) -> int:
    """A flame graph of a worker by its stages, asleep or not; of the busiest if None. Gives which.

    Raises ApiError with a sentence.
    """
    client = Client(api)
    chosen = busiest(client) if index is None else index
    pid = client.stage(chosen, seconds + START_S)
    _record(pid, file, seconds, "--idle")
    return chosen


def busiest(client: Client) -> int:
    """The worker that uses most processor time while somebody looks. Raises ApiError."""
    pids = {it["index"]: it["pid"] for it in client.status()["workers"] if it["pid"]}
    before = {index: _used(pid) for index, pid in pids.items()}
    time.sleep(LOOK_S)
    used = {index: _used(pid) - before[index] for index, pid in pids.items()}
    if not used:
        raise ApiError("workers: expected one that runs")
    return int(max(used, key=lambda index: used[index]))


def _used(pid: int) -> int:
    """Clock ticks of a process, its own and the kernel's for it (proc(5)); 0 if it has ended."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return 0
    return int(fields[11]) + int(fields[12])


def _record(pid: int, file: Path, seconds: int, *more: str) -> None:
    program = Path(sys.executable).with_name("py-spy")
    line = [str(program), "record", "--pid", str(pid), "--duration", str(seconds), "--rate", str(RATE)]
    line += ["--output", str(file), "--nonblocking", *more]
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
