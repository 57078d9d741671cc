"""The configuration that these tests run with."""

from typing import Any

from appliance.config import Config
from appliance.environment import Attachment, EnvironmentManager, NetnsRef
from tests.environment.netns import Netns

SERVICE = "web.demo.api.test"
SUBNETS = {"subnet_v4": "10.18.0.0/26", "subnet_v6": "fc00::/120"}


def config(mtu: int = 1450, **network: Any) -> Config:
    """A configuration with two subnets, and with these keys of its section `network`."""
    return Config.model_validate({"network": SUBNETS | network, "tunnel": {"mtu": mtu}})


async def converged(**network: Any) -> EnvironmentManager:
    """A manager whose node is as wanted."""
    manager = EnvironmentManager(config(**network))
    await manager.converge()
    return manager


async def attach(manager: EnvironmentManager, container: Netns, instance: int = 0) -> Attachment:
    """Attaches a container as an instance of the service."""
    return await manager.attach(SERVICE, instance, NetnsRef.by_name(container.name))
