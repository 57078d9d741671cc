"""What is read from ping's and iperf3's output."""

import json

import pytest

from appliance.lab import measure
from appliance.lab.measure import Echo, OutputError, Rate

PING = """\
PING 10.30.30.30 (10.30.30.30) 56(84) bytes of data.

--- 10.30.30.30 ping statistics ---
5 packets transmitted, 4 received, 20% packet loss, time 203ms
rtt min/avg/max/mdev = 0.140/0.157/0.187/0.021 ms
"""
LOST = """\
--- fdff:2000::30 ping statistics ---
2 packets transmitted, 0 received, 100% packet loss, time 51ms
"""


def test_ping() -> None:
    assert measure.ping_result(PING) == Echo(sent=5, received=4, average_ms=0.157)


def test_ping_without_any_reply_has_no_average() -> None:
    assert measure.ping_result(LOST) == Echo(sent=2, received=0, average_ms=None)


def test_ping_that_says_something_else() -> None:
    with pytest.raises(OutputError, match="ping: expected a summary, got 'Network is unreachable'"):
        measure.ping_result("Network is unreachable\n")


def test_iperf3() -> None:
    end = {"sum_sent": {"bits_per_second": 2e9, "retransmits": 7}, "sum_received": {"bits_per_second": 1.5e9}}
    assert measure.iperf_result(json.dumps({"end": end})) == Rate(bits_per_second=1.5e9, retransmits=7)


def test_iperf3_in_reverse_has_no_retransmits_where_the_sender_does_not_tell() -> None:
    end = {"sum_sent": {"bits_per_second": 2e9}, "sum_received": {"bits_per_second": 1.5e9}}
    assert measure.iperf_result(json.dumps({"end": end})).retransmits == 0


@pytest.mark.parametrize(
    ("output", "complaint"),
    [
        ('{"error": "unable to connect to server"}', "iperf3: unable to connect to server"),
        ("iperf3: command not found", "iperf3: expected its JSON, got 'iperf3: command"),
        ('{"end": {}}', "iperf3: expected its JSON"),
    ],
)
def test_iperf3_that_failed(output: str, complaint: str) -> None:
    with pytest.raises(OutputError, match=complaint):
        measure.iperf_result(output)
