"""What is noticed of flows between two looks at their table, what is told of them, and how much."""

from datetime import UTC, datetime
from ipaddress import ip_address
from typing import Any

import numpy as np
import pytest

from appliance.dataplane import flow
from appliance.observe import counters
from appliance.observe.flowlog import Allowance, Describer, Tracker, sampled, spread
from appliance.tables import layout

SECOND = 10**9
NOW = 1_000 * SECOND


class Table:
    """A worker's flow table, with one entry for each flow that a test opens."""

    def __init__(self, size: int = 8) -> None:
        self.records = np.zeros(size, flow.FLOW)
        self.words = np.zeros(counters.WORDS, np.int64)
        self.tracker = Tracker()

    def open(self, at: int, port: int = 4000, target: str = "10.18.0.66", now: int = NOW) -> Any:
        f = self.records[at : at + 1].view(np.recarray)[0]
        f.local_port, f.remote_port, f.protocol, f.local_generation, f.generation = port, 80, flow.TCP, 3, 4
        for name, address in (("local", "10.18.0.2"), ("dialled", "10.30.30.30"), ("target", target)):
            hi, lo = layout.words(ip_address(address))
            setattr(f, f"{name}_hi", hi)
            setattr(f, f"{name}_lo", lo)
        f.packets_out = f.packets_in = f.bytes_out = f.bytes_in = 0
        f.state = flow.OPENING
        self.words[counters.COUNTS + counters.Count.FLOWS_OPENED] += 1
        self.packet(at, 0, now)
        return f

    def packet(self, at: int, tcp_flags: int = 0, now: int = NOW, *, outbound: bool = True) -> None:
        f = self.records[at : at + 1].view(np.recarray)[0]
        flow.touch.py_func(f, outbound, tcp_flags, now)
        side = "out" if outbound else "in"
        self.records[f"packets_{side}"][at] += 1
        self.records[f"bytes_{side}"][at] += 100

    def free(self, at: int) -> None:
        self.records["state"][at] = flow.FREE

    def look(self, now: int = NOW) -> Any:
        return self.tracker.look(self.records, self.words, now)


def ports(rows: Any) -> list[int]:
    return [int(it) for it in rows["local_port"]]


def test_what_was_there_at_the_first_look_did_not_begin() -> None:
    table = Table()
    table.open(0)
    assert ports(table.look().began) == []
    table.open(1, 4001)
    seen = table.look()
    assert (ports(seen.began), ports(seen.ended), seen.missed) == ([4001], [], 0)
    table.free(0)
    table.free(1)
    seen = table.look(NOW + SECOND)
    assert (ports(seen.ended), list(seen.is_known)) == ([4000, 4001], [False, True])
    assert ports(table.look().ended) == []


def test_an_ended_flow_has_its_final_counts_and_its_last_packet() -> None:
    table = Table()
    table.look()
    table.open(0)
    table.look()
    table.packet(0, now=NOW + 2 * SECOND, outbound=False)
    table.packet(0, 1, now=NOW + 3 * SECOND)  # FIN
    table.look()
    table.free(0)
    seen = table.look(NOW + 13 * SECOND)
    assert (seen.ended["packets_out"][0], seen.ended["packets_in"][0], seen.ended["bytes_out"][0]) == (2, 1, 200)
    assert (seen.since[0], seen.last[0]) == (NOW, NOW + 3 * SECOND)
    assert (seen.closed[0], seen.idle[0]) == (True, True)


def test_a_record_that_is_used_again_is_the_end_of_one_flow_and_the_beginning_of_another() -> None:
    table = Table()
    table.look()
    table.open(0)
    table.packet(0)
    table.look()
    table.open(0, 4001)
    seen = table.look()
    assert (ports(seen.ended), ports(seen.began), seen.ended["packets_out"][0]) == ([4000], [4001], 2)
    table.open(0, 4001, target="10.18.0.67")  # its instance is gone
    seen = table.look()
    assert (ports(seen.ended), ports(seen.began), seen.missed) == ([4001], [4001], 0)
    table.packet(0)
    table.look()
    table.open(0, 4001, target="10.18.0.67")  # the same connection anew
    assert ports(table.look().began) == [4001]
    table.open(0, 4001, target="10.18.0.67", now=NOW + SECOND)  # and again, with as many packets
    assert ports(table.look().began) == [4001]
    assert ports(table.look().began) == []


def test_a_flow_that_no_look_saw_is_counted() -> None:
    table = Table()
    table.open(0)
    table.look()
    for port in (5000, 5001, 5002):
        table.open(1, port)
    assert [table.look().missed, table.look().missed] == [2, 0]


@pytest.mark.parametrize("protocol", [flow.TCP, flow.UDP, flow.ICMP, flow.ICMP6, 47])
def test_the_time_of_the_last_packet_is_what_the_packet_path_made_the_deadline_of(protocol: int) -> None:
    for fin in (0, 1):
        table = Table()
        table.look()
        table.open(0)
        table.records["protocol"][0] = protocol
        for outbound in (True, False):
            table.packet(0, fin, NOW + 5 * SECOND, outbound=outbound)
        table.look()
        table.free(0)
        assert list(table.look().last) == [NOW + 5 * SECOND]


def test_a_sample_keeps_whole_flows_and_about_its_share() -> None:
    rows = np.zeros(10_000, flow.FLOW)
    rows["local_port"], rows["protocol"] = np.arange(10_000), flow.UDP
    chosen = sampled(rows, 10)
    assert 850 < chosen.sum() < 1150
    rows["packets_out"], rows["state"] = 7, flow.CLOSING
    assert (sampled(rows, 10) == chosen).all()
    assert sampled(rows, 1).all()


def test_no_more_than_the_rate_and_all_workers_alike() -> None:
    allowance = Allowance(100, since=0.0)
    assert [allowance.take(1000, at) for at in (1.0, 1.0, 1.5, 60.0)] == [100, 0, 50, 200]
    assert list(spread(10, 5)) == [0, 2, 4, 6, 8]
    assert list(spread(3, 3)) == [0, 1, 2]
    assert list(spread(0, 0)) == []


def test_a_record_names_instances_as_they_were_when_the_flow_began() -> None:
    owners = {ip_address("10.18.0.2"): "app.ns.client.test.0", ip_address("10.18.0.66"): "app.ns.web.test.1"}
    told = Describer("65f0", lambda it: owners.get(it, ""), {ip_address("10.30.30.30"): "app.ns.web.test"}.__getitem__)
    table = Table()
    table.look()
    table.open(0)
    wall = datetime(2026, 1, 2, tzinfo=UTC).timestamp()
    began = told.began(1, table.look().began[0], wall)
    assert began == {
        "time": "2026-01-02T00:00:00.000Z", "event": "start", "node": "65f0", "worker": 1, "protocol": "tcp",
        "source": "10.18.0.2", "source_port": 4000, "destination": "10.30.30.30", "destination_port": 80,
        "target": "10.18.0.66", "target_node": "::", "client": "app.ns.client.test.0", "service": "app.ns.web.test",
        "instance": "app.ns.web.test.1",
    }  # fmt: skip
    owners.clear()
    table.packet(0, now=NOW + 2 * SECOND)
    table.look()
    table.free(0)
    ended = told.ended(1, table.look(NOW + 4 * SECOND), 0, wall + 4, NOW + 4 * SECOND)
    same = {name: value for name, value in began.items() if name not in ("time", "event")}
    assert ended == same | {
        "time": "2026-01-02T00:00:02.000Z", "event": "end", "reason": "removed", "start": "2026-01-02T00:00:00.000Z",
        "duration": 2.0, "packets_out": 2, "packets_in": 0, "bytes_out": 200, "bytes_in": 0,
    }  # fmt: skip
