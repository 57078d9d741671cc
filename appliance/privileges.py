"""What each process may do: who it is, which capabilities it has, which system calls it may make.

Theory of operation
-------------------
*The supervisor* has `SUPERVISOR` and no other capability in effect, and no_new_privs. What it executes, the template
and the resolver, may use `CHILDREN` besides, which is permitted and not in effect here: what they need to become
somebody else.

*A worker and the resolver* give up all of it for good (`drop`): bounding set, user and groups, capabilities,
no_new_privs. Then they install a list of the system calls that they make (`confine`), once everything is compiled and
imported. A worker that makes another one is killed (SIGSYS), and replaced as after any death: its code is fixed, so
there is no harmless reason. The resolver gets EPERM, as what libraries try first and can do without is not known for
all of their versions.

The lists are names, which libseccomp translates for this machine. If the kernel or the library cannot do it, that is
an error, never a process without it.
"""

from __future__ import annotations

import ctypes
import errno
import mmap
import os
import pwd
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Final

import pyseccomp

CAPABILITIES: Final = {
    "SETGID": 6,
    "SETUID": 7,
    "SETPCAP": 8,
    "NET_BIND_SERVICE": 10,
    "NET_ADMIN": 12,
    "SYS_PTRACE": 19,
    "SYS_ADMIN": 21,
    "PERFMON": 38,
    "BPF": 39,
}
"""Numbers of <linux/capability.h>."""
SUPERVISOR: Final = ("NET_ADMIN", "SYS_ADMIN", "NET_BIND_SERVICE", "BPF", "PERFMON", "SYS_PTRACE")
"""Links, addresses, routes · namespaces · DNS on port 53 · steering programs, both · the network namespace of a
container that is named by a process: /proc/PID/ns/net of one with other capabilities can be opened with it only."""
CHILDREN: Final = ("SETUID", "SETGID", "SETPCAP")
"""To become another user, and to empty the bounding set."""
WORKER_UID, RESOLVER_UID = 65_501, 65_502
"""Who workers and resolver are where no user is configured and none is called `USER`: numbers out of the range that
systemd gives to services (61184 to 65519), which no file belongs to."""
USER: Final = "edge-appliance"

_PR_CAPBSET_READ, _PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS, _PR_CAP_AMBIENT, _CLEAR_ALL = 23, 24, 38, 47, 4
_CAP_LAST: Final = 63
_VERSION_3 = 0x20080522
_LIBC = ctypes.CDLL(None, use_errno=True)


class PrivilegeError(Exception):
    """A process cannot be what it is to be; the text says why."""


@dataclass(frozen=True)
class Calls:
    """System calls that a process may make, and what becomes of it if it makes another one."""

    names: tuple[str, ...]
    otherwise: int
    reads_files: bool = False
    threads: bool = False


_MEMORY = ("brk", "munmap", "mremap", "madvise", "futex", "rt_sigreturn", "rt_sigprocmask", "restart_syscall")
_TIME = ("clock_gettime", "gettimeofday", "clock_nanosleep", "sched_yield")
_END = ("exit", "exit_group")

WORKER: Final = Calls(
    (
        *_MEMORY, *_TIME, *_END,
        "read", "write", "writev", "sendmsg", "recvmmsg", "epoll_wait", "epoll_pwait",
    ),
    pyseccomp.KILL_PROCESS,
)  # fmt: skip
"""What `dataplane.libc` calls, and what any process needs."""

RESOLVER: Final = Calls(
    (
        *_MEMORY, *_TIME, *_END,
        "read", "write", "readv", "writev", "close", "dup", "fcntl", "ioctl", "lseek", "pread64",
        "socket", "socketpair", "bind", "connect", "listen", "accept", "accept4", "shutdown",
        "getsockopt", "setsockopt", "getsockname", "getpeername",
        "sendto", "sendmsg", "sendmmsg", "recvfrom", "recvmsg", "recvmmsg",
        "epoll_create1", "epoll_ctl", "epoll_wait", "epoll_pwait", "poll", "ppoll", "select", "pselect6",
        "eventfd2", "pipe2", "inotify_init1", "inotify_add_watch", "inotify_rm_watch",
        "clock_getres", "nanosleep", "timerfd_create", "timerfd_settime",
        "rt_sigaction", "sigaltstack", "set_robust_list", "rseq", "getrandom", "uname", "sysinfo", "prlimit64",
        "getpid", "gettid", "getppid", "getuid", "geteuid", "getgid", "getegid", "sched_getaffinity", "membarrier",
        "fstat", "newfstatat", "statx", "stat", "lstat", "access", "faccessat", "faccessat2", "readlink", "readlinkat",
        "getdents64", "getcwd", "tgkill",
    ),
    pyseccomp.ERRNO(errno.EPERM),
    reads_files=True,
    threads=True,
)  # fmt: skip
"""An event loop, sockets, c-ares and its thread, and files that are only read (resolv.conf, late imports)."""


def identity(name: str, uid: int, key: str) -> tuple[int, int]:
    """User and group of a process: those of a configured user, of `USER` if there is one, or else a number.

    Raises PrivilegeError, which names the key, if the configured user does not exist, or is root.
    """
    try:
        entry = pwd.getpwnam(name or USER)
    except KeyError:
        if name:
            raise PrivilegeError(f"{key}: expected a user of this system, got {name}") from None
        return uid, uid
    if entry.pw_uid == 0:
        raise PrivilegeError(f"{key}: expected a user other than root, got {entry.pw_name}")
    return entry.pw_uid, entry.pw_gid


def drop(uid: int, gid: int) -> None:
    """Give up all privileges for good: bounding set, user and groups, capabilities, and what exec could regain.

    Raises OSError.
    """
    _bound(())
    os.setgroups([])
    os.setresgid(gid, gid, gid)
    os.setresuid(uid, uid, uid)
    _set_capabilities((), ())
    no_new_privileges()


def become(uid: int) -> None:
    """Be another user, without any privileges. CAP_SETUID need not be in effect, but permitted. Raises OSError."""
    _set_capabilities(("SETUID",), ("SETUID",))
    os.setresuid(uid, uid, uid)


def no_new_privileges() -> None:
    """Nothing that is executed from now on has more privileges. Raises OSError."""
    if _LIBC.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "no_new_privs")


def keep(names: Iterable[str], for_children: Iterable[str] = ()) -> None:
    """Keep these capabilities, as far as we have them, and have what we execute start with those for children besides.

    Nothing that is executed has more than that, whoever its file belongs to. Raises OSError.
    """
    names = tuple(names)
    permitted = (*names, *for_children)
    _bound(permitted)
    _set_capabilities(names, permitted)
    no_new_privileges()


def _bound(kept: Iterable[str]) -> None:
    numbers = {CAPABILITIES[name] for name in kept}
    for number in range(_CAP_LAST + 1):
        if number not in numbers and _LIBC.prctl(_PR_CAPBSET_READ, number, 0, 0, 0) == 1:  # -1: the kernel has none
            _check(_LIBC.prctl(_PR_CAPBSET_DROP, number, 0, 0, 0), "PR_CAPBSET_DROP")


def _bits(names: Iterable[str]) -> int:
    return sum(1 << CAPABILITIES[name] for name in names)


def _set_capabilities(effective: Iterable[str], permitted: Iterable[str]) -> None:
    header, data = (ctypes.c_uint32 * 2)(_VERSION_3, 0), (ctypes.c_uint32 * 6)()
    _check(_LIBC.capget(header, data), "capget")
    has = data[1] | data[4] << 32
    in_effect, kept = _bits(effective) & has, _bits(permitted) & has
    data[:] = [in_effect & 0xFFFFFFFF, kept & 0xFFFFFFFF, 0, in_effect >> 32, kept >> 32, 0]
    _check(_LIBC.prctl(_PR_CAP_AMBIENT, _CLEAR_ALL, 0, 0, 0), "PR_CAP_AMBIENT")
    _check(_LIBC.capset(header, data), "capset")


def _check(result: int, what: str) -> None:
    if result != 0:
        raise OSError(ctypes.get_errno(), f"{what}: {os.strerror(ctypes.get_errno())}")


def without_io_uring() -> None:
    """Have the kernel look as if it had no io_uring, which can do what a list of system calls forbids. libuv then works
    without it, as it finds out when its loop is made. Raises OSError."""
    rules = pyseccomp.SyscallFilter(pyseccomp.ALLOW)
    rules.add_rule(pyseccomp.ERRNO(errno.ENOSYS), "io_uring_setup")
    rules.load()


def confine(calls: Calls) -> None:
    """Make no system calls but these from now on, in all threads to come. Raises OSError."""
    rules = pyseccomp.SyscallFilter(calls.otherwise)
    for name in calls.names:
        rules.add_rule(pyseccomp.ALLOW, name)
    for name in ("mmap", "mprotect"):
        rules.add_rule(pyseccomp.ALLOW, name, pyseccomp.Arg(2, pyseccomp.MASKED_EQ, mmap.PROT_EXEC, 0))
    if calls.reads_files:
        writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
        rules.add_rule(pyseccomp.ALLOW, "openat", pyseccomp.Arg(2, pyseccomp.MASKED_EQ, writing, 0))
        rules.add_rule(pyseccomp.ALLOW, "open", pyseccomp.Arg(1, pyseccomp.MASKED_EQ, writing, 0))
    if calls.threads:
        thread = 0x00010000  # CLONE_THREAD
        rules.add_rule(pyseccomp.ALLOW, "clone", pyseccomp.Arg(0, pyseccomp.MASKED_EQ, thread, thread))
        rules.add_rule(pyseccomp.ERRNO(errno.ENOSYS), "clone3")  # its flags are in memory; glibc then takes clone
    rules.load()
