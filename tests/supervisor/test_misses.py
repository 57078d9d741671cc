"""Addresses that workers lack: asked for once, answered each time."""

import asyncio
from ipaddress import ip_address

from appliance.supervisor import misses
from appliance.supervisor.misses import Misses
from appliance.tables.layout import IPAddress

S = ip_address("10.30.30.30")


class Cluster:
    """Answers when the test says so."""

    def __init__(self) -> None:
        self.asked: list[IPAddress] = []
        self.told: list[tuple[IPAddress, bool]] = []
        self.answer: asyncio.Future[bool] = asyncio.get_running_loop().create_future()

    async def resolve(self, address: IPAddress) -> bool:
        self.asked.append(address)
        return await asyncio.shield(self.answer)

    def misses(self) -> Misses:
        return Misses(self.resolve, lambda address, found: self.told.append((address, found)))


async def settle() -> None:
    for _ in range(5):
        await asyncio.sleep(0)


def test_one_question_for_many_packets_and_another_after_its_answer() -> None:
    async def main() -> None:
        cluster = Cluster()
        subject = cluster.misses()
        for _ in range(3):
            subject.missed(S)
        await settle()
        assert (cluster.asked, cluster.told) == ([S], [])
        cluster.answer.set_result(True)
        await settle()
        assert cluster.told == [(S, True)]
        subject.missed(S)
        await settle()
        assert (cluster.asked, cluster.told) == ([S, S], [(S, True), (S, True)])

    asyncio.run(main())


def test_a_question_that_fails_is_answered_with_no() -> None:
    async def main() -> None:
        cluster = Cluster()
        cluster.answer.set_exception(RuntimeError())
        cluster.misses().missed(S)
        await settle()
        assert cluster.told == [(S, False)]

    asyncio.run(main())


def test_a_scan_of_the_range_is_not_passed_on() -> None:
    async def main() -> None:
        cluster = Cluster()
        subject = cluster.misses()
        for number in range(misses.OPEN_MAX + 1):
            subject.missed(S + number)
        assert cluster.told == [(S + misses.OPEN_MAX, False)]
        assert subject.counters["not_asked"] == 1
        await subject.stop()

    asyncio.run(main())
