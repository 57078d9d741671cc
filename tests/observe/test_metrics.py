"""A node's picture as metrics: complete, bounded, and readable by Prometheus' own parser."""

from ipaddress import ip_address
from typing import Any

from prometheus_client.parser import text_string_to_metric_families

from appliance.observe import metrics
from appliance.observe.counters import Count, Drop
from appliance.observe.meanings import SENTENCES, totals
from appliance.observe.rates import rates

COUNTERS = {count.name.lower(): number for number, count in enumerate(Count)}


def worker(index: int, **changes: Any) -> dict[str, Any]:
    given = {"pid": 7, "restarts": 0, "silent": 0.1, "flows": 1024, "cpu": index, "counters": COUNTERS}
    return {"index": index, **given, "drops": {"tun": {}, "wire": {}}, **changes}


def picture(**changes: Any) -> dict[str, Any]:
    """A node of two workers that has no cluster and no resolver."""
    return {
        "node": {"id": "", "address": "192.0.2.1", "port": 50103, "version": "1", "started": 5.0, "last_error": ""},
        "workers": [worker(0), worker(1)],
        "offloads": {"tun_tso": {"wanted": True, "on": False, "reason": "refused"}},
        "tables": {"epoch": 3, "hosts": 4, "capacity": {"hosts": 16}},
        "membership": {"member": False, "misses": {}, "peers": {"nodes": 0, "smallest_path_mtu": 0}},
        "naming": None,
        "upkeep": {"gone": 1, "impaired_now": [], "last_error": ""},
        "operations": {("reload", "refused"): 2},
        "reload": {"successful": False, "at": 1.0},
        "flow_log": {"enabled": True, "written": 5, "suppressed": 2, "failed": 0, "missed": 1, "last_error": ""},
        "attachments": 0,
        "round_trips": {},
        "ill": [],
        "not_ready": ["no subnets"],
        **changes,
    }


def samples(**changes: Any) -> dict[tuple[str, ...], float]:
    """Every sample by its name and the values of its labels, which are in the order of their names."""
    text = metrics.exposition(picture(**changes)).decode()
    found = [it for family in text_string_to_metric_families(text) for it in family.samples]
    return {(it.name, *it.labels.values()): it.value for it in found}


def test_every_counter_of_a_worker_is_a_metric() -> None:
    shown = {f"{stage}_{kind}" for stage in metrics.STAGES for kind in ("packets", "bytes")}
    shown |= {"tun_reads", "wire_reads", "sent_calls", "written_calls"}
    assert {*metrics.EVENTS, *metrics.GAUGES, *shown} == {count.name.lower() for count in Count}
    found = samples()
    for name in metrics.EVENTS:
        assert found[f"appliance_worker_{name}_total", "1"] == Count[name.upper()]
    assert found["appliance_packets_total", "to_node", "0"] == Count.SENT_PACKETS
    assert found["appliance_system_calls_total", "from_container", "0"] == Count.TUN_READS


def test_every_reason_is_there_before_the_first_drop_and_means_something() -> None:
    workers = [worker(0, drops={"tun": {"no-route": 3}, "wire": {}}), worker(1, drops={"tun": {"no-route": 4}})]
    found = samples(workers=workers)
    assert found["appliance_drops_total", "tun", "no-route"] == 7
    assert sum(name == "appliance_drops_total" for name, *_ in found) == 2 * (len(Drop) - 1)
    assert set(SENTENCES) == {reason.label for reason in Drop if reason}
    assert totals(workers)[0]["meaning"] == SENTENCES["no-route"]


def test_state_of_a_node_without_anything() -> None:
    found = samples()
    assert found["appliance_healthy",] == 1
    assert found["appliance_ready",] == 0
    assert found["appliance_offload_enabled", "tun_tso"] == 0
    assert found["appliance_config_last_reload_successful",] == 0
    assert found["appliance_reloads_total", "reload", "refused"] == 2
    assert found["appliance_cluster_connected",] == 0


def test_no_more_than_the_nearest_peers() -> None:
    nodes: dict[Any, float | None] = {(ip_address("2001:db8::") + n, 50103): 1 / (n + 1) for n in range(5_000)}
    nodes[ip_address("192.0.2.9"), 1] = None
    found = samples(round_trips=nodes)
    shown = [peer for name, *rest in found if name == "appliance_peer_rtt_seconds" for peer in rest]
    assert len(shown) == metrics.PEERS_MAX
    assert "[2001:db8::1387]:50103" in shown
    assert found["appliance_peers_unanswered",] == 1


def test_rates_are_differences_a_second_and_survive_a_new_beginning() -> None:
    before = {"workers": [worker(0, drops={"tun": {"no-route": 10}})]}
    grown = COUNTERS | {"tun_packets": COUNTERS["tun_packets"] + 500, "sent_bytes": 1_000_000, "waits": 0}
    after = {"workers": [worker(0, counters=grown, drops={"tun": {"no-route": 13}}), worker(1)]}
    found = rates(before, after, 2.0)
    assert found["workers"][0]["from container packets"] == 250
    assert found["workers"][0]["system calls"] == 0
    assert found["workers"][1]["from container packets"] == round(Count.TUN_PACKETS / 2)
    assert [(it["reason"], it["packets"]) for it in found["drops"]] == [("no-route", 1.5)]
