"""A supervisor that fails to repair: `python -m tests.supervisor.failing CONFIG AFTER`.

It is the appliance's own, but for its environment's fault point: the given command of an attachment that there is
already fails, as the kernel fails, once.
"""

import sys
from pathlib import Path
from typing import Any

from appliance import config
from appliance.environment.attachment import Attachment, NetnsRef
from appliance.supervisor import main
from tests.environment.faults import Fault, fail


class Failing(main.Supervisor):
    """Fails after some commands of the first attachment that is repeated."""

    after = 0

    async def attach(self, service: str, instance: int, netns: NetnsRef, *rest: Any) -> Attachment:
        """Fails, if the instance is attached and the plan has so many commands."""
        if self._known(service, instance):
            self.environment.fault_point = Fault(self.after, fail)
        return await super().attach(service, instance, netns, *rest)


if __name__ == "__main__":
    Failing.after = int(sys.argv[2])
    main.Supervisor = Failing  # type: ignore[misc]
    sys.exit(main.run(config.load(Path(sys.argv[1])), Path(sys.argv[1])))
