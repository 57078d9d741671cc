"""What a refusal of the kernel says."""

import errno

import pytest
from pyroute2 import NetlinkError

from appliance.environment import EnvironmentError_
from appliance.environment.netlink import Executor, Kernel, reason
from appliance.environment.plan import Command, DeleteLink, Place, SetSysctl, SetUp
from tests.environment.netns import Netns


@pytest.mark.parametrize(
    ("error", "text"),
    [
        (NetlinkError(errno.EXFULL), "the bridge has 1023 ports already, the kernel's limit"),
        (NetlinkError(errno.EINVAL, "ipv4: Invalid prefix length"), "ipv4: Invalid prefix length"),
        (NetlinkError(errno.EPERM), "Operation not permitted"),
        (OSError(errno.EROFS, "Read-only file system"), "Read-only file system"),
        (OSError("plain"), "plain"),
    ],
    ids=str,
)
def test_reasons(error: NetlinkError | OSError, text: str) -> None:
    assert reason(error) == text


@pytest.mark.root
@pytest.mark.parametrize(
    ("command", "message"),
    [
        (SetUp(Place.NODE, "nosuch"), "^SetUp place=node link=nosuch: no such link$"),
        (
            SetSysctl(Place.NODE, "net/ipv4/nosuch", "1"),
            "^SetSysctl place=node path=net/ipv4/nosuch value=1: No such file or directory$",
        ),
    ],
)
def test_a_refused_command_is_named(node: Netns, command: Command, message: str) -> None:
    async def main() -> None:
        async with Kernel.open() as kernel:
            await Executor(kernel).carry_out(command)

    with pytest.raises(EnvironmentError_, match=message):
        node.run(main)


@pytest.mark.root
def test_deleting_a_link_that_is_gone_is_no_error(node: Netns) -> None:
    async def main() -> None:
        async with Kernel.open() as kernel:
            await Executor(kernel).carry_out(DeleteLink("nosuch"))

    node.run(main)
