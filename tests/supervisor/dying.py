"""A supervisor that is killed by itself: `python -m tests.supervisor.dying CONFIG AFTER`.

It is the appliance's own, but for its environment's fault point: at the given command of an attachment, or of a
detachment, it dies as by SIGKILL. What it does at its start does not count.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from appliance import config
from appliance.environment.addresses import IPAddress
from appliance.environment.attachment import Attachment, NetnsRef
from appliance.environment.portmap import PortMapping
from appliance.supervisor import main
from tests.environment.faults import Fault, kill


class Dying(main.Supervisor):
    """Dies after some commands of its first operation."""

    after = 0

    async def attach(
        self,
        service: str,
        instance: int,
        netns: NetnsRef,
        ports: Sequence[PortMapping] = (),
        interface: str = "",
        addresses: Sequence[IPAddress] = (),
    ) -> Attachment:
        """Dies, if the plan has so many commands."""
        self.environment.fault_point = Fault(self.after, kill)
        return await super().attach(service, instance, netns, ports, interface, addresses)

    async def detach(self, service: str, instance: int, netns: NetnsRef | None = None) -> bool:
        """Dies, if the plan has so many commands."""
        self.environment.fault_point = Fault(self.after, kill)
        return await super().detach(service, instance, netns)


if __name__ == "__main__":
    Dying.after = int(sys.argv[2])
    main.Supervisor = Dying  # type: ignore[misc]
    sys.exit(main.run(config.load(Path(sys.argv[1])), Path(sys.argv[1])))
