"""The demonstration is only worth something if it can fail."""

from dataclasses import replace
from typing import Any

import pytest

from appliance.lab import demo
from appliance.lab.demo import Call, judge, owning, turns
from appliance.lab.lifecycle import Lab

INSTANCES = ["web0", "web1"]
CLIENT, SERVICE = "10.30.0.3", "10.30.30.30"
ANSWERED, TURNS, SEEN_AS, FROM = range(4)
"""The sentences of `judge`, in order."""


def call(worker: int, container: str) -> Call:
    return Call("v4", "tcp", 40000, worker, container, CLIENT, SERVICE)


RIGHT = [call(0, "web0"), call(1, "web1"), call(1, "web0"), call(0, "web1"), call(0, "web0")]


def wrong(calls: list[Call]) -> list[int]:
    """Which sentences are not true."""
    return [number for number, check in enumerate(judge(calls, INSTANCES, CLIENT, SERVICE)) if not check.true]


def test_calls_as_they_should_be() -> None:
    assert wrong(RIGHT) == []
    assert turns(RIGHT) == [["web0", "web1", "web0"], ["web1", "web0"]]


@pytest.mark.parametrize(
    ("calls", "sentences"),
    [
        ([call(0, "web0")], [ANSWERED]),
        ([*RIGHT, call(0, "web0")], [TURNS]),
        ([*RIGHT, call(1, "web0")], [TURNS]),
        ([*RIGHT, replace(call(0, "web1"), client="10.18.0.3")], [SEEN_AS]),
        ([*RIGHT, replace(call(0, "web1"), reply_from="10.30.0.2")], [FROM]),
    ],
)
def test_whatever_is_wrong_is_found(calls: list[Call], sentences: list[int]) -> None:
    assert wrong(calls) == sentences


def test_a_flow_to_elsewhere_from_the_same_port_is_another_one() -> None:
    ours = {"protocol": "udp", "local_port": 40000, "dialled": SERVICE, "worker": 0}
    assert owning([ours, ours | {"dialled": "fdff:2000::30", "worker": 1}], SERVICE) == {("udp", 40000): 0}


def test_one_instance_need_not_take_turns() -> None:
    calls = [call(0, "web0"), call(0, "web0")]
    assert all(check.true for check in judge(calls, ["web0"], CLIENT, SERVICE))


@pytest.mark.root
def test_everything_shown_is_right(lab: Lab, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(demo, "SECONDS", 1)
    assert demo.demonstrate(lab)
    shown = capsys.readouterr().out
    verdicts = [line.split()[0] for line in shown.splitlines() if line.startswith(("ok ", "wrong "))]
    assert verdicts == ["ok"] * 18


@pytest.mark.root
def test_a_service_that_does_not_answer_makes_it_fail(lab: Lab, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(demo, "COMMAND_TIMEOUT_S", 0.0)
    assert not demo.demonstrate(lab)
    assert "not done in 0 s" in capsys.readouterr().out
