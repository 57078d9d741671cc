"""What a refusal of the kernel says."""

import errno
from ipaddress import ip_interface, ip_network

import pytest
from pyroute2 import NetlinkError

from appliance.environment import EnvironmentError_
from appliance.environment.netlink import Executor, Kernel, reason
from appliance.environment.plan import Command, DeleteLink, Place, RemoveAddress, RemoveRoute, SetSysctl, SetUp
from tests.environment.netns import TUN, Netns


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
@pytest.mark.parametrize("link", ["nosuch", TUN])
def test_removing_what_is_gone_is_no_error(node: Netns, link: str) -> None:
    """A TUN link may end with its last process at any moment, and what is on it with it."""
    route, address = ip_network("10.16.0.0/12"), ip_interface("10.18.0.1/32")
    gone: list[Command] = [RemoveRoute(link, route), RemoveAddress(link, address), DeleteLink(link)]

    async def main() -> None:
        async with Kernel.open() as kernel:
            for command in gone:
                await Executor(kernel).carry_out(command)

    node.run(main)
