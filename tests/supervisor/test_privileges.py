"""A worker, or the resolver, that somebody has taken over can do nothing but what it is there for."""

import ctypes
import errno
import faulthandler
import mmap
import os
import resource
import signal
import socket
import threading
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyseccomp
import pytest

from appliance import privileges
from appliance.supervisor import record
from appliance.tables import layout, segment
from appliance.tables.publish import Publisher
from tests.supervisor.test_handover import alone
from tests.supervisor.world import World, until

pytestmark = pytest.mark.root

SMALL = layout.Capacity(16, 16, 16, 1, 16)
_LIBC = ctypes.CDLL(None, use_errno=True)


def outcome(calls: privileges.Calls, act: Callable[[], object]) -> str:
    """What becomes of a process of a kind that does something: `done`, the error's name, or the signal's."""
    child = os.fork()
    if child == 0:
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
        faulthandler.disable()  # pytest's: it would make system calls of its own
        privileges.drop(privileges.WORKER_UID, privileges.WORKER_UID)
        privileges.confine(calls)
        try:
            act()
        except OSError as error:
            os._exit(error.errno or 0)
        except BaseException:
            os._exit(255)
        os._exit(0)
    status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    if status < 0:
        return signal.Signals(-status).name
    return "done" if status == 0 else errno.errorcode.get(status, "failed")


def call(name: str, *arguments: int) -> Callable[[], None]:
    """A call of the C library, that raises its error."""

    def act() -> None:
        if getattr(_LIBC, name)(*map(ctypes.c_long, arguments)) < 0:
            raise OSError(ctypes.get_errno(), name)

    return act


def numbered(name: str, *arguments: int) -> Callable[[], None]:
    """A system call that the C library may have no function for."""
    return call("syscall", pyseccomp.resolve_syscall(pyseccomp.Arch.NATIVE, name), *arguments)


FORBIDDEN: dict[str, Callable[[], object]] = {
    "a file": lambda: os.open("/etc/passwd", os.O_RDONLY),
    "a socket": lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM),
    "another descriptor of a table": lambda: os.open("/proc/self/fd/0", os.O_RDWR),
    "a program": lambda: os.execv("/bin/true", ["true"]),
    "a process": os.fork,
    "a thread": lambda: threading.Thread(target=print).start(),
    "a signal to others": lambda: os.kill(1, signal.SIGTERM),
    "a namespace": lambda: call("unshare", 0x40000000)(),
    "tracing": lambda: call("ptrace", 16, 1, 0, 0)(),
    "code of its own": lambda: mmap.mmap(-1, 4096, prot=mmap.PROT_READ | mmap.PROT_WRITE | mmap.PROT_EXEC),
    "a timer": lambda: call("timerfd_create", 1, 0)(),
    "an answer of who it is": os.getppid,
    "a mount": call("mount", 0, 0, 0, 0, 0),
    "another root": lambda: os.chroot("/"),
    "another name for a file": lambda: os.link("/etc/hosts", "/etc/hosts2"),
    "a file's mode": lambda: Path("/etc/hosts").chmod(0o666),
    "a module": numbered("finit_module", 0, 0, 0),
    "a BPF program": numbered("bpf", 5, 0, 0),
    "io_uring": numbered("io_uring_setup", 1, 0),
    "another's memory": numbered("process_vm_readv", 1, 0, 0, 0, 0, 0),
    "another's descriptor": numbered("pidfd_getfd", 0, 0, 0),
    "a namespace of others": numbered("setns", 0, 0),
    "to be root": lambda: os.setuid(0),
    "capabilities": numbered("capset", 0, 0),
    "a filter of its own": numbered("seccomp", 0, 0, 0),
    "faults of its own": numbered("userfaultfd", 0),
    "a debugger's view of the kernel": numbered("perf_event_open", 0, 0, 0, 0, 0),
    "the machine's name": lambda: socket.sethostname("x"),
}


@pytest.mark.parametrize("what", FORBIDDEN)
def test_a_worker_is_killed_that_wants(what: str) -> None:
    assert outcome(privileges.WORKER, FORBIDDEN[what]) == "SIGSYS"


def test_a_worker_may_do_its_work() -> None:
    reading, writing = os.pipe()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)

    def work() -> None:
        os.write(writing, b"packet")
        os.writev(writing, [b"head", b"body"])
        os.read(reading, 64)
        ours.sendmsg([b"packet"])
        bytearray(1 << 24)  # memory from the kernel, and back

    assert outcome(privileges.WORKER, work) == "done"
    assert theirs.recv(64) == b"packet"


def test_nobody_can_write_a_table() -> None:
    publisher = Publisher(SMALL)
    reader = publisher.descriptor()
    size = os.fstat(reader).st_size
    anything = privileges.Calls(("openat", "open", "close", *privileges.RESOLVER.names), privileges.RESOLVER.otherwise)
    with pytest.raises(PermissionError):
        mmap.mmap(reader, size, prot=mmap.PROT_READ | mmap.PROT_WRITE)
    reopened = f"/proc/self/fd/{reader}"
    assert outcome(anything, lambda: os.open(reopened, os.O_RDWR)) == "EACCES"
    assert outcome(anything, lambda: os.ftruncate(reader, 0)) in ("EPERM", "EINVAL")
    assert segment.arrays(reader, layout.sections(SMALL), writable=False)["header"][layout.H_MAGIC] == layout.MAGIC


def test_a_worker_cannot_make_what_it_has_of_the_tables_writable() -> None:
    publisher = Publisher(SMALL)
    reader = publisher.descriptor()
    size = os.fstat(reader).st_size
    mapped = mmap.mmap(reader, size, prot=mmap.PROT_READ)
    address = np.frombuffer(mapped, np.uint8).ctypes.data
    writable = mmap.PROT_READ | mmap.PROT_WRITE
    attempts: dict[str, Callable[[], object]] = {
        "another protection": numbered("mprotect", address, size, writable),
        "another mapping": numbered("mmap", 0, size, writable, mmap.MAP_SHARED, reader, 0),
        "a write to the descriptor": lambda: os.write(reader, b"x"),
        "a write behind the descriptor's back": lambda: os.pwrite(reader, b"x", 0),
        "another size": lambda: os.ftruncate(reader, 0),
        "a store": lambda: ctypes.memset(address, 1, 8),
    }
    found = {what: outcome(privileges.WORKER, act) for what, act in attempts.items()}
    refused = {"another protection": "EACCES", "another mapping": "EACCES", "a write to the descriptor": "EBADF"}
    assert found == {what: refused.get(what, "SIGSYS") for what in attempts} | {"a store": "SIGSEGV"}
    assert segment.arrays(reader, layout.sections(SMALL), writable=False)["header"][layout.H_MAGIC] == layout.MAGIC


@pytest.mark.parametrize(
    ("what", "expected"),
    {
        "reading": ("/etc/hosts", os.O_RDONLY, "done"),
        "writing": ("/etc/hosts", os.O_WRONLY, "EPERM"),
        "creating": ("/tmp/edge-new", os.O_CREAT | os.O_RDONLY, "EPERM"),
    }.items(),
)
def test_the_resolver_reads_files_only(what: str, expected: tuple[str, int, str]) -> None:
    path, flags, result = expected
    assert outcome(privileges.RESOLVER, lambda: os.open(path, flags)) == result, what


ALLOWED_TO_THE_RESOLVER = ("a file", "a socket", "a thread", "a timer", "an answer of who it is")


@pytest.mark.parametrize("what", [it for it in FORBIDDEN if it not in ALLOWED_TO_THE_RESOLVER])
def test_the_resolver_may_not(what: str) -> None:
    assert outcome(privileges.RESOLVER, FORBIDDEN[what]) == "EPERM"


def test_the_resolver_may_have_a_thread() -> None:
    assert outcome(privileges.RESOLVER, FORBIDDEN["a thread"]) == "done"


def test_a_user_that_is_not_there_or_is_root_is_refused() -> None:
    for name in ("nobody-of-that-name", "root"):
        with pytest.raises(privileges.PrivilegeError, match=r"workers\.user: expected a user"):
            privileges.identity(name, 1, "workers.user")
    assert privileges.identity("nobody", 1, "workers.user")[0] == 65534


def status_of(pid: int) -> dict[str, str]:
    """/proc/PID/status."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return {name: value.strip() for name, _, value in (line.partition(":") for line in lines)}


def bits(names: tuple[str, ...]) -> int:
    return sum(1 << privileges.CAPABILITIES[name] for name in names)


def test_a_worker_that_does_not_listen_is_killed(hub: World) -> None:
    """By the template, which may not signal other users' processes, and is root without that right."""
    node = alone(hub).start()
    before = record.alive(node.directory / "run")
    os.kill(before["worker.1"], signal.SIGSTOP)
    node.api.renew_workers()
    now = record.alive(node.directory / "run")
    assert now["worker.1"] != before["worker.1"]
    assert record.started(before["worker.1"]) == 0


def test_what_the_processes_of_a_node_are(hub: World) -> None:
    node = alone(hub).start()
    runtime = node.directory / "run"
    until(lambda: node.api.status()["naming"]["ready"], "the resolver answers")
    living = record.alive(runtime)
    users = {"worker.0": privileges.WORKER_UID, "worker.1": privileges.WORKER_UID, "resolver": privileges.RESOLVER_UID}
    for part, uid in users.items():
        found = status_of(living[part])
        assert set(found["Uid"].split()) == set(found["Gid"].split()) == {str(uid)}, part
        assert found["Groups"] == "", part
        assert (found["NoNewPrivs"], found["Seccomp"]) == ("1", "2"), part
        for kind in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb"):
            assert int(found[kind], 16) == 0, (part, kind)
    supervisor = status_of(living["supervisor"])
    assert int(supervisor["CapEff"], 16) == bits(privileges.SUPERVISOR)
    assert int(supervisor["CapPrm"], 16) == bits(privileges.SUPERVISOR + privileges.CHILDREN)
    assert int(supervisor["CapBnd"], 16) == int(supervisor["CapPrm"], 16)
    assert supervisor["NoNewPrivs"] == "1"
    own = {os.readlink(it) for it in Path(f"/proc/{living['worker.0']}/fd").iterdir()}  # noqa: PTH115
    assert not any("-1 " in it or it.startswith("/memfd:edge-manifest") for it in own), "nothing of a sibling's"
    mapped = Path(f"/proc/{living['worker.0']}/maps").read_text().splitlines()
    tables = [line.split()[1] for line in mapped if "edge-tables" in line]
    assert tables
    assert set(tables) == {"r--s"}
