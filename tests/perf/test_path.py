"""The compiled path over a kernel that costs nothing: what it is told is what it carries."""

from appliance.observe import counters
from appliance.observe.counters import Stage
from perf.path import Path


def test_every_packet_passes_in_both_directions_and_the_stages_have_their_time() -> None:
    path = Path()
    try:
        cost = path.cost(1_000, packets=20_000, repeats=2)
    finally:
        path.close()
    assert cost.out > 0 < cost.back
    counts, times = counters.snapshot(path.counters), counters.stages(path.counters)
    assert (counts["tun_packets"], counts["wire_packets"]) == (1_000 + 2 * 20_000, 2 * 20_000)
    assert (counts["sent_packets"], counts["written_packets"]) == (1_000 + 2 * 20_000, 2 * 20_000)
    assert (counts["flows_opened"], counters.drops(path.counters)) == (1_000, {"tun": {}, "wire": {}})
    assert all(times[stage.name.lower()] > 0 for stage in Stage)
    assert 0 < times["packets"] <= 2 * (counts["tun_packets"] + counts["wire_packets"]) // 64 + 128
    assert times["turns"] > 0
