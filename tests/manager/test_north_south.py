"""Decisions about exposed ports, nodes' own places in the overlay, health, and what leaves slowly."""

from typing import Any

import pytest

from appliance.cluster.manager import exposing, services
from appliance.cluster.manager.answers import effective
from appliance.cluster.manager.decide import RefusedError
from appliance.cluster.manager.descriptor import from_data
from appliance.cluster.topics import ingress_job
from tests.manager.node import placed
from tests.manager.test_decide import JOB, A, B, World, told

OTHER = "app.ns.other.test"
HEALTH = {"tcp": 80, "panic": 50}


def described(job: str = JOB, **more: Any) -> dict[str, Any]:
    names = ("app", "namespace", "service", "service_namespace")
    return {**dict(zip(names, job.split("."), strict=True)), **more}


def put(world: World, job: str = JOB, **more: Any) -> None:
    world.take(services.put(world.plan, from_data(described(job, **more), "test"), world.state))


def answer(world: World, job: str = JOB) -> dict[str, Any]:
    payload = world.say(A, "tablequery/request", f'{{"sname":"{job}"}}'.encode()).messages[0].payload
    assert isinstance(payload, dict)
    return payload


def check(world: World, node: str, number: int, *, healthy: bool, job: str = JOB) -> list[tuple[str, object]]:
    text = f'{{"appname":"{job}","instance_number":{number},"healthy":{str(healthy).lower()}}}'
    return told(world.say(node, "service/health", text.encode()))


# --- Exposed ports ------------------------------------------------------------------------------


def test_nodes_are_told_of_exposed_ports_and_of_the_check() -> None:
    world = World()
    put(world, exposed=[{"port": 80}, {"port": 53, "protocol": "udp", "to": 5353, "nodes": "hosting"}], health=HEALTH)
    said = answer(world)
    assert said["exposed"] == [{"port": 80}, {"port": 53, "protocol": "udp", "to": 5353, "nodes": "hosting"}]
    assert said["health"] == {"tcp": 80}
    put(world)
    assert "exposed" not in answer(world)


@pytest.mark.parametrize(
    ("nodes", "said"),
    [
        (["all"], b'{"nodes":"all"}'),
        (["hosting"], b'{"nodes":"hosting"}'),
        ([[B], [A]], f'{{"nodes":["{A}","{B}"]}}'.encode()),
        ([[A], "all"], b'{"nodes":"all"}'),
        ([], b""),
    ],
)
def test_all_nodes_are_told_which_of_them_are_meant(nodes: list[object], said: bytes) -> None:
    world = World()
    put(world, exposed=[{"port": 80 + number, "nodes": it} for number, it in enumerate(nodes)])
    assert exposing.entry(world.state, JOB) == said
    assert exposing.entry(world.state, OTHER) == b""


@pytest.mark.parametrize(
    ("theirs", "ours", "meets"),
    [
        ({}, {}, True),
        ({"protocol": "udp"}, {}, False),
        ({"address": "198.51.100.7"}, {"address": "198.51.100.8"}, False),
        ({"address": "198.51.100.7"}, {}, True),
        ({"nodes": [A]}, {"nodes": [B]}, False),
        ({"nodes": [A]}, {"nodes": [B, A]}, True),
        ({"nodes": "hosting"}, {"nodes": [B]}, True),
    ],
)
def test_a_port_of_one_node_is_one_services(theirs: dict[str, Any], ours: dict[str, Any], meets: bool) -> None:
    world = World()
    put(world, OTHER, exposed=[{"port": 80, **theirs}])
    if meets:
        with pytest.raises(RefusedError, match=rf"^exposed\.0\.port: expected a port that is free, 80 is {OTHER}'s$"):
            put(world, exposed=[{"port": 80, **ours}])
    else:
        put(world, exposed=[{"port": 80, **ours}])


# --- The node's own place -----------------------------------------------------------------------


def test_a_node_is_an_instance_of_a_job_of_its_own_until_it_is_released() -> None:
    world, own = World(), ingress_job(A)
    world.subnet(A)
    world.place(A, 0, "10.18.0.62", job=own)
    (it,) = answer(world, own)["instance_list"]
    assert (it["namespace_ip"], it["worker_id"]) == ("10.18.0.62", A)
    assert [sip["IpType"] for sip in it["service_ip"]] == ["instance_ip"]
    world.place(A, 0, "10.18.0.62", job=own)
    assert answer(world, own)["instance_list"][0]["instance_ip"] == it["instance_ip"]
    put(world)
    taken = {it["instance_ip"], *(str(i.v4) for i in [world.state.instance(JOB, 0)] if i)}
    assert len(taken) == 2, "an address of its own"
    world.say(A, "status", b'{"status":"offline"}')
    world.take(services.release(A, world.state))
    assert world.state.jobs() == [JOB]


def test_another_node_cannot_take_it() -> None:
    world = World()
    with pytest.raises(RefusedError):
        world.place(B, 0, "10.18.0.62", job=ingress_job(A))


# --- Health -------------------------------------------------------------------------------------


def checked(states: list[bool | None], panic: int) -> list[str]:
    world = World()
    put(world, instances=len(states), health={"tcp": 80, "panic": panic})
    for number, healthy in enumerate(states):
        world.place(A, number, f"10.18.0.{number + 2}")
        if healthy is not None:
            check(world, A, number, healthy=healthy)
    return list(effective(world.state, JOB).values())


@pytest.mark.parametrize(
    ("states", "panic", "effective_states"),
    [
        ([True, True], 50, ["up", "up"]),
        ([True, False], 50, ["up", "down"]),
        ([True, False], 51, ["up", "up"]),
        ([False, False], 0, ["up", "up"]),
        ([True, None], 50, ["up", "down"]),
        ([None], 50, ["up"]),
        ([True, False, False], 0, ["up", "down", "down"]),
    ],
)
def test_what_checks_found_counts_unless_in_panic(
    states: list[bool | None], panic: int, effective_states: list[str]
) -> None:
    assert checked(states, panic) == effective_states


def test_a_verdict_is_told_to_those_who_follow_the_job_once() -> None:
    world = World()
    put(world, instances=2, health=HEALTH)
    for number in range(2):
        world.place(A, number, f"10.18.0.{number + 2}")
    assert check(world, A, 0, healthy=True) == [(JOB, "DEPLOYMENT")]
    assert check(world, A, 0, healthy=True) == []
    assert check(world, A, 1, healthy=False) == [(JOB, "UNDEPLOYMENT")]
    assert [it.get("state", "up") for it in answer(world)["instance_list"]] == ["up", "down"]
    assert check(world, B, 1, healthy=True) == [], "it does not run there"
    world.place(A, 1, "10.18.0.3")
    assert list(effective(world.state, JOB).values()) == ["up", "down"], "announced again, and as bad as before"
    world.place(B, 1, "10.18.0.70")
    assert world.state.instance(JOB, 1).healthy is None  # type: ignore[union-attr]


# --- Leaving ------------------------------------------------------------------------------------


def test_what_runs_and_is_not_wanted_any_more_drains_first() -> None:
    world = World()
    put(world, instances=3, drain=5)
    world.place(A, 1)
    put(world, instances=1, drain=5)
    assert world.state.numbers(JOB) == [0, 1], "2 did not run"
    assert world.listed() == [1]
    assert placed(answer(world))[0]["state"] == "draining"
    put(world, instances=1, drain=5)
    assert world.state.numbers(JOB) == [0, 1]
    assert told(world.take(services.leave(JOB, 1, world.state))) == [(JOB, "UNDEPLOYMENT")]
    assert world.state.numbers(JOB) == [0]
    assert world.take(services.leave(JOB, 1, world.state)).changes == {}


def test_one_that_is_wanted_again_stays() -> None:
    world = World()
    put(world, instances=2, drain=5)
    world.place(A, 1)
    put(world, instances=1, drain=5)
    put(world, instances=2, drain=5)
    assert world.take(services.leave(JOB, 1, world.state)).changes == {}
    assert [it.get("state", "up") for it in placed(answer(world))] == ["up"]


def test_an_undeployed_service_drains_first_and_goes_with_its_last_instance() -> None:
    world = World()
    put(world, instances=3, drain=5, exposed=[{"port": 80}])
    for number in range(2):
        world.place(A, number, f"10.18.0.{number + 2}")
    assert told(world.take(services.undeploy(JOB, world.state))) == [(JOB, "UNDEPLOYMENT")]
    assert world.state.numbers(JOB) == [0, 1], "2 did not run"
    assert [it["state"] for it in placed(answer(world))] == ["draining", "draining"]
    assert answer(world)["exposed"] == [{"port": 80}], "connections through it go on"
    assert world.take(services.undeploy(JOB, world.state)).changes == {}, "nothing is left to do but to wait"
    world.take(services.leave(JOB, 0, world.state))
    assert (world.state.jobs(), world.state.numbers(JOB)) == ([JOB], [1])
    assert told(world.take(services.leave(JOB, 1, world.state))) == [(JOB, "UNDEPLOYMENT")]
    assert (world.state.jobs(), world.state.interested(JOB)) == ([], [])
    assert world.take(services.leave(JOB, 1, world.state)).changes == {}


def test_a_service_without_a_drain_time_or_anything_that_runs_goes_at_once() -> None:
    world = World()
    for drain, runs in ((0, True), (5, False)):
        put(world, drain=drain)
        if runs:
            world.place(A, 0)
        world.take(services.undeploy(JOB, world.state))
        assert world.state.jobs() == []


def test_a_service_that_leaves_and_is_deployed_again_stays() -> None:
    world = World()
    put(world, drain=5)
    world.place(A, 0)
    world.take(services.undeploy(JOB, world.state))
    put(world, drain=5)
    assert world.take(services.leave(JOB, 0, world.state)).changes == {}
    assert services.view(world.state, JOB)["leaving"] is False
    assert [it.get("state", "up") for it in placed(answer(world))] == ["up"]


def test_a_service_that_more_nodes_follow_than_fit_a_transaction_goes_in_steps() -> None:
    world = World()
    put(world, drain=5)
    world.place(A, 0)
    for number in range(services.STEP):
        world.say(f"{number:024x}", "tablequery/request", f'{{"sname":"{JOB}"}}'.encode())
    world.take(services.undeploy(JOB, world.state))
    world.take(services.leave(JOB, 0, world.state))
    assert (world.state.jobs(), world.state.numbers(JOB)) == ([JOB], [])
    while world.take(services.leave(JOB, 0, world.state)).changes:
        pass
    assert (world.state.jobs(), world.state.interested(JOB)) == ([], [])


# --- Preview ------------------------------------------------------------------------------------


def preview(world: World, **more: Any) -> list[tuple[str, Any, Any]]:
    found = services.preview(world.plan, from_data(described(**more), "test"), world.state)
    return [(it["key"], it["before"], it["after"]) for it in found]


def test_a_preview_names_what_would_change_and_changes_nothing() -> None:
    world = World()
    wish: dict[str, Any] = {"exposed": [{"port": 80}], "weights": {0: 3}, "health": HEALTH}
    keys = [key for key, *_ in preview(world, **wish)]
    assert keys == ["instances", "service_ips.rr.v4", "service_ips.rr.v6", "weights.0", "exposed", "health.tcp"]
    assert world.state.jobs() == []
    put(world, **wish)
    assert preview(world, **wish) == []
    assert preview(world, instances=2, service_ips={"rr": {"v6": "none"}}, weights={0: 2}, drain=3) == [
        ("instances", 1, 2),
        ("service_ips.rr.v6", "fdff:2000::", None),
        ("weights.0", 3, 2),
        ("drain", 0.0, 3.0),
        ("exposed", [{"port": 80}], None),
        ("health.tcp", 80, None),
    ]
    with pytest.raises(RefusedError):
        preview(world, service_ips={"rr": {"v4": "10.31.0.1"}})
