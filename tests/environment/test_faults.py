"""A failure, and a kill, after each command of a plan: nothing is leaked, and the next call converges.

Each test breaks after the first command, then after the second, and so on until the plan has no more:
a command that is added to a plan is broken here without being named here.
"""

import itertools
from collections.abc import Awaitable, Callable, Iterator

import pytest

from appliance.environment import Attachment, EnvironmentError_, EnvironmentManager
from tests.environment.dying import Dying, dying
from tests.environment.faults import Fault, fail, nothing
from tests.environment.netns import BRIDGE, TUN, Netns
from tests.environment.settings import SERVICE, attach, config, converged

pytestmark = pytest.mark.root

MakeNetns = Callable[[], Netns]


@pytest.fixture(scope="module")
def process() -> Iterator[Dying]:
    """Where operations run that are killed."""
    with dying() as made:
        yield made


@pytest.fixture
def make_node(make_netns: MakeNetns) -> MakeNetns:
    """Makes namespaces of nodes."""

    def make() -> Netns:
        node = make_netns()
        node.ip("tuntap", "add", "dev", TUN, "mode", "tun")
        return node

    return make


def test_a_node_that_fails_converges(make_node: MakeNetns) -> None:
    async def main(node: Netns, after: int) -> bool:
        manager = EnvironmentManager(config())
        fault = manager.fault_point = Fault(after, fail)
        if await failed(manager.converge()):
            manager.fault_point = nothing
            await manager.converge()
        await is_whole(node, manager)
        return fault.hit

    assert commands_broken(lambda after: (node := make_node()).run(lambda: main(node, after))) >= 10


def test_an_attachment_that_fails_leaves_nothing(node: Netns, container: Netns) -> None:
    async def main(after: int) -> bool:
        manager = await converged()
        before = node.state(), container.state()
        fault = manager.fault_point = Fault(after, fail)
        if await failed(attach(manager, container)):
            assert (node.state(), container.state()) == before
            assert manager.attachments() == []
        manager.fault_point = nothing
        await manager.converge()
        attachment = await attach(manager, container)
        assert str(attachment.address_v4) == "10.18.0.2", "an address that nobody had does not rest"
        await manager.detach(SERVICE, 0)
        assert (node.state(), container.state()) == before
        return fault.hit

    assert commands_broken(lambda after: node.run(lambda: main(after))) >= 10


def test_a_node_whose_process_is_killed_converges(make_node: MakeNetns, process: Dying) -> None:
    async def main(node: Netns) -> None:
        await is_whole(node, await converged())

    def broken(after: int) -> bool:
        node = make_node()
        died = process.dies(node.name, "converge", after)
        node.run(lambda: main(node))
        return died

    assert commands_broken(broken) >= 10


def test_what_a_killed_process_left_is_removed_or_adopted(node: Netns, container: Netns, process: Dying) -> None:
    """A link is either complete, and then adopted, or gone after the next convergence."""
    adopted: list[bool] = []

    async def main() -> None:
        manager = await converged()
        attachments = manager.attachments()
        adopted.append(attachments != [])
        if attachments:
            is_attached(container, attachments)
            await manager.detach(SERVICE, 0)
        assert (node.state(), container.state()) == empty

    node.run(converged)
    empty = node.state(), container.state()

    def broken(after: int) -> bool:
        died = process.dies(node.name, "attach", after, container.name)
        node.run(main)
        return died

    last = commands_broken(broken)
    assert adopted == [False] * (last - 1) + [True] * 2, "only the last command of a plan commits"


def test_what_a_killed_process_left_is_attached_again(node: Netns, container: Netns, process: Dying) -> None:
    async def main() -> None:
        manager = await converged()
        await attach(manager, container)
        is_attached(container, manager.attachments())
        await manager.detach(SERVICE, 0)

    def broken(after: int) -> bool:
        died = process.dies(node.name, "attach", after, container.name)
        node.run(main)
        return died

    assert commands_broken(broken) >= 10


def test_a_detachment_whose_process_is_killed(node: Netns, container: Netns, process: Dying) -> None:
    async def before() -> None:
        await attach(await converged(), container)

    async def after() -> list[Attachment]:
        return (await converged()).attachments()

    node.run(before)
    assert process.dies(node.name, "detach", 1)
    assert node.run(after) == []
    assert container.state()["links"] == ["lo"]


def commands_broken(broken: Callable[[int], bool]) -> int:
    """How many commands a plan has: breaks after the first, the second, … until there is none left."""
    return next(after for after in itertools.count() if not broken(after + 1))


async def failed(operation: Awaitable[object]) -> bool:
    """Whether an operation failed, as it was made to."""
    try:
        await operation
    except EnvironmentError_ as error:
        return "injected after" in str(error)
    return False


async def is_whole(node: Netns, manager: EnvironmentManager) -> None:
    """The node is as one that never failed; and removing it leaves nothing."""
    whole = node.state()
    bridge = [f"{BRIDGE} 10.18.0.1/26", f"{BRIDGE} fc00::1/120"]
    assert whole["addresses"] == [*bridge, f"{TUN} 10.18.0.1/32"]
    assert whole["routes"] == ["10.16.0.0/12 None edge-tun0 234", "fc00::/7 None edge-tun0 234"]
    manager.fault_point = Fault(1, fail)
    await manager.converge()  # nothing is left to do, so nothing fails
    manager.fault_point = nothing
    await manager.remove()
    assert node.state() == {"links": [TUN, "lo"], "addresses": [], "routes": []}


def is_attached(container: Netns, attachments: list[Attachment]) -> None:
    """The container is attached, completely, and is the only one."""
    (only,) = attachments
    assert (only.service, only.instance, str(only.address_v4)) == (SERVICE, 0, "10.18.0.2")
    assert container.state()["addresses"] == ["eth0 10.18.0.2/26", "eth0 fc00::2/120"]
    assert len(container.state()["routes"]) == 2
