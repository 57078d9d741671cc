"""An instance that is detached is withdrawn before its link is taken down, and announced again if it stays."""

from __future__ import annotations

import asyncio
from ipaddress import ip_address
from types import SimpleNamespace
from typing import Any

import pytest

from appliance.config import Config
from appliance.supervisor.membership import Membership

JOB = "app.ns.srv.test"


class Told:
    """What the cluster was told, instead of a member that tells it."""

    def __init__(self) -> None:
        self.said: list[str] = []

    async def deployed(self, *_: object) -> None:
        self.said.append("deployed")

    async def undeployed(self, *_: object) -> None:
        self.said.append("undeployed")


class Node:
    """A membership of a node with one container."""

    def __init__(self) -> None:
        address = ip_address("10.18.0.2")
        attachment = SimpleNamespace(service=JOB, instance=0, addresses=(address,), address_v4=address, address_v6=None)
        self.attached: list[Any] = [attachment]
        environment: Any = SimpleNamespace(attachments=lambda: self.attached, subnets=())
        nobody: Any = SimpleNamespace(answered=None)
        self.told = Told()
        self.membership = Membership(Config(), nobody, environment, nobody, nobody, nobody, lambda _: None)
        member: Any = self.told
        self.membership.member = member


def test_it_is_withdrawn_first_and_nobody_announces_it_meanwhile() -> None:
    async def scene(node: Node) -> None:
        await node.membership.reconcile()
        async with node.membership.leaving(JOB, 0):
            assert node.told.said == ["deployed", "undeployed"]
            await node.membership.reconcile()  # as another container comes
            node.attached.clear()
        assert node.told.said == ["deployed", "undeployed"]

    asyncio.run(scene(Node()))


def test_what_could_not_be_detached_is_announced_again() -> None:
    async def scene(node: Node) -> None:
        await node.membership.reconcile()
        with pytest.raises(OSError, match="busy"):
            async with node.membership.leaving(JOB, 0):
                raise OSError("busy")
        assert node.told.said == ["deployed", "undeployed", "deployed"]

    asyncio.run(scene(Node()))
