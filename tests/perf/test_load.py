"""The generators against their counterparts over loopback, and iperf3's report."""

import socket
import threading
import time

import numpy as np
import pytest

from appliance.dataplane.steering import steer
from appliance.tables import layout
from perf import flows
from perf.load import connects, crowd, histogram, iperf, openloop, tcp, udp
from perf.load.sockets import limit
from perf.load.tool import ToolError

MORE_THAN_A_DATAGRAM_HOLDS = 65_536


@pytest.mark.parametrize("flows", [1, 3, 64])
@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_the_sink_counts_every_packet_that_the_generator_sent(address, flows):
    found = []
    with udp.sink(0) as sink:
        thread = threading.Thread(target=lambda: found.append(udp.count(sink)))
        thread.start()
        with udp.Generator(address, sink.getsockname()[1], flows) as source:
            sent = source.generate(64, 0.02)  # all of it fits the sink's buffer, should that have to wait for a CPU
        thread.join(10)
    assert sent.packets > udp.BATCH
    assert sent.refused == 0
    assert found[0].packets == sent.packets
    assert 0 < found[0].seconds < sent.seconds + udp.IDLE
    assert found[0].reordered == 0
    assert found[0].latency["p50"] > 0


def test_a_packet_has_the_size_that_was_asked_for():
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sink:
        sink.bind(("127.0.0.1", 0))
        limit(sink, 1)
        with udp.Generator("127.0.0.1", sink.getsockname()[1]) as source:
            source.generate(64, 0.001)
        assert len(sink.recv(2048)) == 64


def test_flows_take_turns_with_a_packet_each():
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sink:
        sink.bind(("127.0.0.1", 0))
        limit(sink, 1)
        with udp.Generator("127.0.0.1", sink.getsockname()[1], flows=udp.BATCH) as source:
            source.generate(64, 0.002)
        ports = [sink.recvfrom(2048)[1][1] for _ in range(2 * udp.BATCH)]
    assert len(set(ports)) == udp.BATCH
    assert ports[: udp.BATCH] == ports[udp.BATCH :]


def test_refused_packets_are_not_counted_as_sent():
    with udp.Generator("127.0.0.1", 9) as source:
        sent = source.generate(MORE_THAN_A_DATAGRAM_HOLDS, 0.005)
    assert sent.packets == 0
    assert sent.refused >= udp.BATCH


def test_round_trips_are_measured_over_several_connections(monkeypatch):
    monkeypatch.setattr(tcp, "CONNECTIONS", 3)
    echoed = []
    with tcp.server(0) as server:
        thread = threading.Thread(target=lambda: echoed.append(tcp.echo(server)))
        thread.start()
        exchanged = tcp.client("127.0.0.1", server.getsockname()[1]).exchange(0.15)
        thread.join(10)
    assert exchanged.exchanges > 3
    assert echoed[0].exchanges > exchanged.exchanges, "the warm-up is not among the round trips"
    ordered = list(exchanged.percentiles.values())
    assert ordered == sorted(ordered)
    assert exchanged.seconds <= 0.15


def test_a_server_that_stays_silent_is_an_error(monkeypatch):
    monkeypatch.setattr(tcp, "WAIT", 0.05)
    monkeypatch.setattr("perf.load.sockets.WAIT", 0.05)
    with tcp.server(0) as server:
        client = tcp.client("127.0.0.1", server.getsockname()[1])
        with pytest.raises(OSError, match="expected an answer"):
            client.exchange(1)


def test_percentiles_are_of_the_round_trips_themselves():
    found = tcp.summary(np.arange(1_000, 101_001, 1_000, dtype=np.int64))
    assert found.percentiles == {"p50": 51.0, "p90": 91.0, "p99": 100.0, "p99.9": 100.9, "p100": 101.0}
    assert found.exchanges == 101


def test_iperf3_says_what_it_lacked():
    with pytest.raises(ToolError, match="unable to connect"):
        iperf.parsed({"start": {}, "error": "unable to connect to server"})


def test_a_rate_is_held():
    with udp.Generator("127.0.0.1", 9, flows=4) as source:
        sent = source.generate(64, 0.2, rate=50_000)
    assert sent.packets + sent.refused == pytest.approx(10_000, rel=0.05)


def test_what_comes_after_a_later_packet_of_its_flow_is_reordered():
    found = []
    with udp.sink(0) as sink, socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as source:
        for flow, number in ((0, 0), (0, 2), (1, 0), (0, 1), (0, 3), (1, 1)):
            words = np.array([flow, number, 0], np.int64)
            source.sendto(words.tobytes(), ("127.0.0.1", sink.getsockname()[1]))
        found.append(udp.count(sink))
    assert (found[0].packets, found[0].reordered) == (6, 1)


def test_the_histogram_is_as_exact_as_it_says():
    times = np.random.default_rng(1).lognormal(10, 3, 10_000).astype(np.int64)
    counts = histogram.empty()
    for each in times:
        histogram.record(counts, each)
    found = histogram.percentiles(counts)
    for name, value in found.items():
        exact = np.percentile(times, float(name[1:]), method="inverted_cdf") / 1e3
        assert exact <= value <= exact * (1 + 1 / histogram.STEPS) + 0.001


def test_the_histogram_takes_any_time():
    counts = histogram.empty()
    for each in (-5, 0, 1, 255, 256, 1 << 62):
        histogram.record(counts, each)
    assert counts.sum() == 6
    assert histogram.percentiles(histogram.empty()) == {}


def in_turn(serve, ask):
    """What a server and its client each found."""
    served = []
    thread = threading.Thread(target=lambda: served.append(serve()))
    thread.start()
    asked = ask()
    thread.join(10)
    return served[0], asked


def test_open_loop_requests_are_answered_and_keep_their_schedule():
    with openloop.server(0) as server, openloop.client("127.0.0.1", server.getsockname()[1]) as client:
        served, asked = in_turn(lambda: openloop.serve(server), lambda: openloop.ask(client, 5_000, 0.2))
    assert asked.requests == 1_000
    assert served.responses == 1_000 - asked.lost
    assert asked.percentiles["p50"] >= asked.late["p50"]


def test_a_stall_is_felt_by_all_that_arrive_in_it():
    """The server begins after the last request: a closed loop would count one long response, here all of them are."""
    with openloop.server(0) as server, openloop.client("127.0.0.1", server.getsockname()[1]) as client:

        def late():
            time.sleep(0.4)
            return openloop.serve(server)

        _, asked = in_turn(late, lambda: openloop.ask(client, 2_000, 0.1))
    assert asked.percentiles["p50"] > 10_000
    assert asked.lost == 0


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_connections_are_counted_by_both_ends(address):
    with connects.server(0) as server:
        port = server.getsockname()[1]
        connects.prepare()
        taken, made = in_turn(lambda: connects.accept_all(server), lambda: connects.connect_for(address, port, 0.1))
    assert made.failed == 0
    assert made.connections == taken.connections > 10


def test_a_refused_connection_is_a_failure():
    found = connects.connect_for("127.0.0.1", 9, 0.01)
    assert found.connections == 0
    assert found.failed > 0


def test_a_crowd_has_each_flow_as_often_as_any_other():
    rows = crowd.datagrams(100_000)
    flows, counts = np.unique(rows[:, :4], axis=0, return_counts=True)
    assert len(flows) == 100_000
    assert set(counts) == {1, 2}


def test_a_nodes_trains_are_packets_that_the_receiver_steers_alike():
    local = layout.words("10.18.0.66")
    rows = crowd.packets("10.18.0.2", "10.18.0.66", flows=64)[: 64 * crowd.TRAIN]
    ports = rows[:, 20:24].copy().view(">u2").astype(int).tolist()
    owners = np.array([int(steer(*local, sport, dport)) % crowd.CLASSES for sport, dport in ports])
    assert (owners.reshape(-1, crowd.TRAIN) == owners[:: crowd.TRAIN, None]).all()
    assert len(set(owners)) > 2
    sums = rows[:, :20].copy().view(">u2").astype(int).sum(1)
    assert set((sums & 0xFFFF) + (sums >> 16)) == {0xFFFF}


def test_the_model_of_a_packets_cost_finds_the_terms_that_it_is_made_of():
    sides = [flows.Side(0.8 + 2.4 / batch, batch, 1_000, (1.0,)) for batch in (1, 2, 4, 32)]
    assert flows.fitted(sides) == pytest.approx((0.8, 2.4))
