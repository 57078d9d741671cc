"""The operations on the kernel, as the manager runs them apart: observe, plan, carry out.

Each opens what it needs and closes it, takes values and returns values, and says what it leaves behind
when it fails. All raise EnvironmentError_.
"""

import logging
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace

from appliance.environment import names, observe, plan
from appliance.environment.attachment import Placement, Record
from appliance.environment.errors import AttachmentRefused, EnvironmentError_
from appliance.environment.namespace import Namespace
from appliance.environment.netlink import Executor, Kernel
from appliance.environment.plan import AttachmentActual, AttachmentWanted, Command, Link, NodeWanted

log = logging.getLogger(__name__)

FaultPoint = Callable[[Command], None]
"""Called with each command after it was carried out."""


async def carry_out(executor: Executor, commands: Iterable[Command], fault_point: FaultPoint) -> None:
    """Carries out commands in order, up to the first that fails."""
    for command in commands:
        await executor.carry_out(command)
        log.debug("carried out %s", plan.describe(command))
        fault_point(command)


async def converge(wanted: NodeWanted, fault_point: FaultPoint) -> tuple[Link, ...]:
    """Makes the node as wanted; returns the containers' links on it. If it fails, the next call goes on."""
    async with Kernel.open() as kernel:
        actual = await observe.node(kernel, wanted)
        await carry_out(Executor(kernel), plan.plan_node(wanted, actual), fault_point)
        return actual.veths


async def repairs(wanted: NodeWanted) -> list[Command]:
    """What `converge` would do now. Also raises where no command helps."""
    async with Kernel.open() as kernel:
        return plan.plan_node(wanted, await observe.node(kernel, wanted))


async def links() -> list[Link]:
    """All links of the node."""
    async with Kernel.open() as kernel:
        return await kernel.links()


async def remove(wanted: NodeWanted, fault_point: FaultPoint) -> tuple[tuple[Link, ...], list[Command]]:
    """Takes away all that was made on the node; returns the containers' links that were there, and what was done.
    If it fails, the next call goes on."""
    async with Kernel.open() as kernel:
        actual = await observe.node(kernel, wanted)
        commands = plan.plan_removal(wanted, actual)
        await carry_out(Executor(kernel), commands, fault_point)
        return actual.veths, commands


async def attach(
    wanted: NodeWanted, placement: Placement, namespace: Namespace, fault_point: FaultPoint, interface: str = ""
) -> str:
    """Makes a container's link; returns its name there, which is free if none is wanted. If it fails, there is no link
    of this attachment, unless it was there before and has another name."""
    async with Kernel.open() as node, Kernel.open(namespace) as container:
        with _nothing_done():
            actual = await observe.attachment(node, container, namespace, wanted.bridge, placement.veth)
            interface = _interface(actual, interface)
            commands = plan.plan_attachment(_link_wanted(wanted, placement, interface), actual)
        executor = Executor(node, container, namespace)
        try:
            await carry_out(executor, commands, fault_point)
        except BaseException:
            await _undo(executor, placement.veth)
            raise
        return interface


@contextmanager
def _nothing_done() -> Iterator[None]:
    """What fails in the block fails before the first command. Raises AttachmentRefused in its place."""
    try:
        yield
    except EnvironmentError_ as error:
        raise AttachmentRefused(*error.args) from error


async def offer(wanted: NodeWanted, placement: Placement, interface: str, fault_point: FaultPoint) -> None:
    """Makes a container's link, and leaves the container's end on the node, down; `interface` is what the record says
    that it is to be called. If it fails, there is no link of this attachment."""
    end = names.offered_name(placement.service, placement.instance)
    async with Kernel.open() as node:
        with Namespace.own() as here:
            with _nothing_done():
                actual = await observe.offer(node, wanted.bridge, placement.veth)
                link = replace(_link_wanted(wanted, placement, interface), interface=end)
            executor = Executor(node, None, here)
            try:
                await carry_out(executor, plan.plan_offer(link, actual), fault_point)
            except BaseException:
                await _undo(executor, placement.veth)
                raise


async def rename(veth: str, record: Record, fault_point: FaultPoint) -> None:
    """Writes an attachment's record anew, as its namespace has become known."""
    async with Kernel.open() as kernel:
        await carry_out(Executor(kernel), [plan.SetRecord(veth, record.encode())], fault_point)


async def detach(veth: str, fault_point: FaultPoint) -> None:
    """Removes a container's link, if there is one."""
    async with Kernel.open() as kernel:
        await carry_out(Executor(kernel), plan.plan_detachment(veth), fault_point)


async def veth(name: str) -> Link | None:
    """A container's link as it is now, None if there is none that we made."""
    async with Kernel.open() as kernel:
        return await observe.veth(kernel, name)


async def forged() -> dict[str, int]:
    """How many frames the guards of containers' links have dropped, by the link's name on the node."""
    async with Kernel.open() as kernel:
        dropped, links = await kernel.forged(), await kernel.veths()
        return {link.name: dropped[link.index] for link in links if link.index in dropped}


def _interface(actual: AttachmentActual, wanted: str) -> str:
    """The link's name in the container."""
    if actual.peer is not None:
        if wanted not in ("", actual.peer.name):
            raise EnvironmentError_(f"interface: expected {actual.peer.name}, as it is attached so, got {wanted}")
        return actual.peer.name
    if wanted in actual.names:
        raise EnvironmentError_(f"interface: expected a name that is free in the container, got {wanted}")
    return wanted or names.free_interface_name(actual.names)


def _link_wanted(wanted: NodeWanted, placement: Placement, interface: str) -> AttachmentWanted:
    return AttachmentWanted(
        veth=placement.veth,
        bridge=wanted.bridge,
        interface=interface,
        mac=names.container_mac(placement.addresses[0].ip),
        mtu=wanted.mtu,
        addresses=placement.addresses,
        gateways=placement.gateways,
        overlay=wanted.overlay,
        record=placement.record(interface).encode(),
    )


async def _undo(executor: Executor, veth: str) -> None:
    """If this fails too, the link has no record, and the next `converge` removes it; the first error is
    the one to report."""
    for command in plan.plan_detachment(veth):
        try:
            await executor.carry_out(command)
        except EnvironmentError_:
            log.exception("left behind for the next convergence: link=%s", veth)
