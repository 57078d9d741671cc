"""The outbox's window: how many messages are on their way to the broker at once."""

import asyncio
from typing import Any

from appliance.cluster.manager.decide import Message
from appliance.cluster.manager.outbox import WINDOW, Outbox


class Slow:
    """A connection that acknowledges nothing before it is told to."""

    def __init__(self) -> None:
        self.under_way = self.sent = 0
        self.acknowledge = asyncio.Event()

    async def publish(self, _topic: str, _payload: bytes, **_options: Any) -> None:
        """One message, until its acknowledgement."""
        self.under_way += 1
        await self.acknowledge.wait()
        self.under_way -= 1
        self.sent += 1


def test_a_burst_waits_for_its_turn_and_all_of_it_is_sent() -> None:
    async def main() -> None:
        outbox, slow = Outbox("127.0.0.1", 1), Slow()
        outbox._client = slow  # type: ignore[assignment]
        outbox._connected.set()
        sending = asyncio.create_task(outbox.send(Message(f"a/{number}", {}) for number in range(3 * WINDOW)))
        while slow.under_way < WINDOW:  # noqa: ASYNC110  # in this loop, at once
            await asyncio.sleep(0)
        for _ in range(10):
            await asyncio.sleep(0)
        assert slow.under_way == WINDOW
        slow.acknowledge.set()
        await sending
        assert slow.sent == 3 * WINDOW

    asyncio.run(main())
