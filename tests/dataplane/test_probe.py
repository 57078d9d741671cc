"""Round-trip probes: what the worker sends back, and what it does not."""

from __future__ import annotations

from dataclasses import replace

import pytest

from appliance.dataplane.probe import ANSWER, REQUEST, answer_of, request
from appliance.observe.counters import Count
from tests.dataplane.path import CompiledPath
from tests.dataplane.test_worker import CLIENT, udp, world

TOKEN = b"12345678"


NODE, STRANGER = "192.0.2.2", "192.0.2.9"


@pytest.mark.parametrize("asker", [(NODE, 40_001), ("2001:db8::2", 1)])
def test_a_request_comes_back_to_its_sender_as_an_answer_of_the_same_length(asker: tuple[str, int]) -> None:
    path = CompiledPath(world(far_node=asker[0]))
    outcome = path.from_wire(asker, request(TOKEN))
    assert outcome.wire == [(*asker, ANSWER + TOKEN)]
    assert (outcome.tun, outcome.drops) == ([], {})
    assert path.calls.sent[0][0] == 4  # from the tunnel port
    assert path.count(Count.PROBES_ANSWERED) == 1
    assert answer_of(outcome.wire[0][2]) == TOKEN


@pytest.mark.parametrize(
    "payload",
    [
        ANSWER + TOKEN,  # an answer is never answered: two nodes cannot be made to play ping-pong
        REQUEST + TOKEN[:-1],
        REQUEST + TOKEN + b"9",
        REQUEST,
        REQUEST[:1] + bytes(15),
        b"\xe2" + REQUEST[1:] + TOKEN,
    ],
)
def test_anything_else_is_malformed_and_not_answered(payload: bytes) -> None:
    outcome = CompiledPath(world()).from_wire((NODE, 40_001), payload)
    assert (outcome.wire, outcome.tun, outcome.drops) == ([], [], {"malformed": 1})


def test_requests_that_came_as_one_train_are_answered_one_by_one() -> None:
    path = CompiledPath(world())
    outcome = path.from_wire((NODE, 40_001), request(TOKEN) + request(b"abcdefgh"), 16)
    assert [data for *_, data in outcome.wire] == [ANSWER + TOKEN, ANSWER + b"abcdefgh"]


def test_a_stranger_is_not_answered() -> None:
    path = CompiledPath(world())
    outcome = path.from_wire((STRANGER, 40_001), request(TOKEN) * 2, 16)
    assert (outcome.wire, outcome.tun, outcome.drops) == ([], [], {"unknown-peer": 2})


def test_a_stranger_is_answered_if_everybody_is_listened_to() -> None:
    path = CompiledPath(replace(world(), learn_hosts="any"))
    assert len(path.from_wire((STRANGER, 40_001), request(TOKEN)).wire) == 1


def test_packets_around_a_request_are_delivered() -> None:
    path = CompiledPath(world())
    for payload in (udp("10.30.0.2", CLIENT), request(TOKEN), udp("10.30.0.2", CLIENT)):
        path.calls.datagrams.append(((NODE, 50103), payload, 0))
        outcome = path.run()
        assert len(outcome.wire) + len(outcome.tun) == 1
