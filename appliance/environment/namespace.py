"""Network namespaces: opening one, being in one, and the thread in which that is safe.

Theory of operation
-------------------
A namespace belongs to a thread, not to a process. Netlink sockets keep the one they were opened in, but
sysctls and ioctls act on the caller's. So every operation on the environment runs in a thread of its own
(`apart`), which may enter namespaces as it likes, because nothing else ever runs in it, and which ends
with the operation, so that no thread is left holding a container's namespace alive.

That thread has a plain selector loop of its own, for two reasons. pyroute2's AsyncIPRoute opens its
transport on an AF_NETLINK socket, which uvloop refuses ("cannot open a UDP handle, invalid family 16").
And a netlink request is carried out by the kernel inside send(2), under a lock of the whole machine:
deleting a link takes 10 ms and more, in which the supervisor's loop must go on.

The namespace of the node is the one that the thread was started in: never that of process 1, as a whole
node may itself be in a namespace.
"""

import asyncio
import fcntl
import os
from collections.abc import Callable, Coroutine, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Final, TypeVar

from pyroute2 import netns

from appliance.environment.attachment import NetnsRef
from appliance.environment.errors import EnvironmentError_

T = TypeVar("T")

OWN_NAMESPACE: Final = Path("/proc/thread-self/ns/net")
_NS_GET_NSTYPE: Final = 0xB703
"""_IO(0xb7, 3) (linux/nsfs.h)."""


async def apart(operation: Callable[[], Coroutine[Any, Any, T]]) -> T:
    """The result of a coroutine that runs in a new thread, on a loop of its own; raises what it raises.

    Cancelling the caller does not stop the operation; the caller then waits until it ends.
    """
    with ThreadPoolExecutor(max_workers=1, thread_name_prefix="environment") as pool:
        return await asyncio.get_running_loop().run_in_executor(pool, _run, operation)


def _run(operation: Callable[[], Coroutine[Any, Any, T]]) -> T:
    with asyncio.Runner(loop_factory=asyncio.SelectorEventLoop) as runner:
        return runner.run(operation())


class Namespace:
    """An open network namespace. The descriptor keeps it alive, so it is to be closed soon."""

    def __init__(self, fd: int) -> None:
        self.fd = fd
        self.inode = os.fstat(fd).st_ino

    def __enter__(self) -> "Namespace":
        return self

    def __exit__(self, *_: object) -> None:
        os.close(self.fd)

    @classmethod
    def own(cls) -> "Namespace":
        """The calling thread's."""
        return cls(os.open(OWN_NAMESPACE, os.O_RDONLY | os.O_CLOEXEC))

    @classmethod
    def open(cls, reference: NetnsRef) -> "Namespace":
        """A container's. Raises EnvironmentError_ if there is none, or it is the node's own."""
        try:
            fd = os.open(reference.path, os.O_RDONLY | os.O_CLOEXEC)
        except OSError as error:
            raise EnvironmentError_(f"{_wanted(reference)}, got: {error.strerror}") from None
        namespace = cls(fd)
        try:
            namespace._check(reference)
        except BaseException:
            os.close(fd)
            raise
        return namespace

    def _check(self, reference: NetnsRef) -> None:
        try:
            kind = fcntl.ioctl(self.fd, _NS_GET_NSTYPE)
        except OSError:
            kind = 0
        if kind != netns.CLONE_NEWNET:
            raise EnvironmentError_(f"{_wanted(reference)}, got something else")
        if self.inode == OWN_NAMESPACE.stat().st_ino:
            raise EnvironmentError_(f"{_wanted(reference)} of a container, got the node's own")

    @contextmanager
    def entered(self) -> Iterator[None]:
        """The calling thread is in this namespace; then it is where it was. Only in a thread of `apart`."""
        with Namespace.own() as before:
            netns.setns(self.fd)
            try:
                yield
            finally:
                netns.setns(before.fd)


def _wanted(reference: NetnsRef) -> str:
    return f"netns: expected a network namespace at {reference.path}"
