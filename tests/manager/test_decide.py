"""Decisions, as functions of state and message: what is written, what is said."""

from ipaddress import IPv4Network, IPv6Network, ip_address
from typing import Any

import pytest

from appliance.cluster.manager import services
from appliance.cluster.manager.addresses import ExhaustedError, Plan
from appliance.cluster.manager.decide import GONE_MAX, Origin, Outcome, RefusedError, decide, missed
from appliance.cluster.manager.descriptor import from_data, of_job
from appliance.cluster.manager.documents import Node, decode, encode, node_key
from appliance.cluster.manager.requests import parse
from appliance.cluster.manager.state import State
from tests.manager.node import placed

JOB = "app.ns.srv.test"
A, B = "a" * 24, "b" * 24
SMALL = Plan(subnets_v4=(IPv4Network("10.18.0.0/25"),), subnets_v6=(IPv6Network("fc00::/119"),))


class World:
    """A state that takes over every outcome, as the bucket would."""

    def __init__(self, plan: Plan | None = None) -> None:
        self.state = State()
        self.plan = plan or Plan()
        self.number = 0

    def take(self, outcome: Outcome) -> Outcome:
        """Writes an outcome, through the form in which it is stored."""
        for key, document in outcome.changes.items():
            self.number += 1
            self.state.apply(key, decode(key, encode(document)) if document else None, self.number)
        return outcome

    def say(self, node: str, kind: str, payload: bytes, number: int | None = None) -> Outcome:
        """A message from a node."""
        self.number += 1
        name, request = parse(f"nodes/{node}/net/{kind}", payload)
        assert request is not None
        origin = Origin(name, number or self.number)
        return self.take(decide(self.state, self.plan, "c1", origin, request))

    def deploy(self, job: str = JOB, instances: int = 1, **service_ips: Any) -> Outcome:
        """A service as an operator deploys it."""
        descriptor = of_job(job, instances)
        if service_ips:
            descriptor = from_data({**descriptor.model_dump(), "service_ips": service_ips}, "test")
        return self.take(services.put(self.plan, descriptor, self.state))

    def place(
        self, node: str, number: int = 0, v4: str = "10.18.0.2", at: int | None = None, job: str = JOB
    ) -> Outcome:
        """An announcement."""
        text = f'{{"appname":"{job}","instance_number":{number},"nsip":"{v4}","host_ip":"192.0.2.1","host_port":"1"}}'
        return self.say(node, "service/deployed", text.encode(), at)

    def subnet(self, node: str) -> Outcome:
        """A request for subnets."""
        return self.say(node, "subnet", b'{"METHOD":"GET"}')

    def listed(self) -> list[int]:
        """Instances with a place in the answer about the job."""
        answer = self.say(A, "tablequery/request", f'{{"sname":"{JOB}"}}'.encode()).messages[0].payload
        assert isinstance(answer, dict)
        return [it["instance_number"] for it in placed(answer)]


def told(outcome: Outcome) -> list[tuple[str, object]]:
    """Jobs and kinds of change that are announced."""
    kinds = [message.payload["type"] for message in outcome.messages if isinstance(message.payload, dict)]
    return list(zip((message.topic.split("/")[1] for message in outcome.messages), kinds, strict=True))


def gone_in(outcome: Outcome) -> dict[str, object]:
    """Namespace addresses that followers are told to send to no more, by job."""
    payloads = {it.topic.split("/")[1]: it.payload for it in outcome.messages}
    return {job: it["gone"] for job, it in payloads.items() if isinstance(it, dict) and "gone" in it}


def test_leases_are_disjoint_and_stay() -> None:
    world = World()
    first, second = world.subnet(A), world.subnet(B)
    payloads = [it.messages[0].payload for it in (first, second)]
    assert len({payload["address"] for payload in payloads if isinstance(payload, dict)}) == 2
    again = world.subnet(A)
    assert (again.changes, again.messages) == ({}, first.messages)


def test_a_full_cluster_gives_nothing_but_to_those_who_have() -> None:
    world = World(SMALL)
    first = world.subnet(A)
    world.subnet(B)
    with pytest.raises(ExhaustedError):
        world.subnet("c" * 24)
    assert world.subnet(A).messages == first.messages


def test_leases_of_another_size_are_not_given_again() -> None:
    """The plan of a cluster may change; what was given counts."""
    world = World()
    world.subnet(A)
    for prefix in (24, 28):
        changed = World(Plan(prefix_v4=prefix))
        changed.state = world.state
        changed.state.apply("pool.subnets", None, 9)
        lease = changed.subnet(f"{prefix}" * 12).changes[node_key(f"{prefix}" * 12)]
        assert isinstance(lease, Node)
        assert lease.subnet_v4 is not None
        assert not lease.subnet_v4.overlaps(IPv4Network("10.18.0.0/26"))


def test_an_announcement_places_and_tells() -> None:
    world = World()
    world.deploy()
    assert told(world.place(A)) == [(JOB, "DEPLOYMENT")]
    assert world.listed() == [0]


def test_the_same_announcement_twice_tells_twice() -> None:
    """The first manager may have died before it told anybody."""
    world = World()
    world.deploy()
    world.place(A, at=50)
    assert told(world.place(A, at=50)) == [(JOB, "DEPLOYMENT")]


def test_an_old_announcement_that_comes_back_changes_nothing() -> None:
    world = World()
    world.deploy()
    world.place(B, at=60)
    assert world.place(A, at=50) == Outcome()


def test_a_namespace_address_belongs_to_the_last_who_announced_it() -> None:
    world = World()
    other = "app.ns.other.test"
    world.deploy()
    world.deploy(other)
    world.place(A, job=other)
    assert told(world.place(A)) == [(JOB, "DEPLOYMENT"), (other, "UNDEPLOYMENT")]
    assert world.state.live(other, 0) is None


@pytest.mark.parametrize(
    ("v4", "words"),
    [("10.18.0.70", "nsip: expected an address in the node's subnet 10.18.0.0/26"), ("", "nsip, nsipv6: expected")],
)
def test_a_node_announces_only_addresses_of_its_own(v4: str, words: str) -> None:
    world = World()
    world.subnet(A)
    world.deploy()
    with pytest.raises(RefusedError, match=words):
        world.place(A, v4=v4)


def test_a_node_with_subnets_of_its_own_does_not_announce_another_nodes() -> None:
    world = World()
    world.subnet(A)
    world.deploy()
    with pytest.raises(RefusedError, match=f"of {A}"):
        world.place(B)
    assert told(world.place(B, v4="172.16.0.2")) == [(JOB, "DEPLOYMENT")]


def test_only_the_node_that_has_an_instance_takes_it_away() -> None:
    world = World()
    world.deploy()
    world.place(A)
    gone = f'{{"appname":"{JOB}","instance_number":0}}'.encode()
    assert world.say(B, "service/undeployed", gone) == Outcome()
    outcome = world.say(A, "service/undeployed", gone)
    assert told(outcome) == [(JOB, "UNDEPLOYMENT")]
    assert gone_in(outcome) == {JOB: ["10.18.0.2"]}
    assert world.listed() == []


def test_a_lost_node_costs_one_write() -> None:
    world = World()
    world.deploy(instances=40)
    for number in range(40):
        world.place(A, number, f"10.18.0.{number + 2}")
    outcome = world.say(A, "status", b'{"status":"offline"}')
    assert list(outcome.changes) == [node_key(A)]
    assert told(outcome) == [(JOB, "UNDEPLOYMENT")]
    assert gone_in(outcome) == {JOB: [f"10.18.0.{number + 2}" for number in range(40)]}
    assert all(world.state.live(JOB, number) is None for number in range(40))


def test_a_notice_lists_so_many_addresses_and_no_more() -> None:
    world = World()
    world.deploy(instances=GONE_MAX + 1)
    for number in range(GONE_MAX + 1):
        world.place(A, number, f"10.18.{number // 250}.{number % 250 + 2}")
    outcome = world.say(A, "status", b'{"status":"offline"}')
    assert told(outcome) == [(JOB, "UNDEPLOYMENT")]
    assert gone_in(outcome) == {}


def test_instances_return_one_by_one() -> None:
    world = World()
    world.deploy(instances=2)
    for number in range(2):
        world.place(A, number, f"10.18.0.{number + 2}")
    world.say(A, "status", b'{"status":"offline"}')
    world.say(A, "status", b'{"status":"online"}')
    world.place(A, 1, "10.18.0.3")
    assert world.listed() == [1]


def test_a_will_that_comes_late_is_corrected_by_the_next_announcement() -> None:
    world = World()
    world.deploy()
    world.say(A, "status", b'{"status":"online"}')
    world.say(A, "status", b'{"status":"offline"}')
    world.place(A)
    assert world.listed() == [0]


def test_an_old_status_that_comes_back_changes_nothing() -> None:
    world = World()
    world.say(A, "status", b'{"status":"online"}', 50)
    assert world.say(A, "status", b'{"status":"offline"}', 40) == Outcome()


def test_the_roll_call_spares_those_who_came_back_and_those_who_never_said() -> None:
    world = World()
    world.say(A, "status", b'{"status":"online"}', 10)
    world.say(B, "status", b'{"status":"online"}', 30)
    world.subnet("c" * 24)
    gone = [node for node in world.state.nodes() if missed(20, Origin(node, 40), world.state).changes]
    assert gone == [A]


def test_addresses_of_a_service_stay_when_it_grows_and_shrinks() -> None:
    world = World()
    world.deploy(instances=2)
    before = [world.state.instance(JOB, number) for number in (0, 1)]
    assert told(world.deploy(instances=3)) == [(JOB, "DEPLOYMENT")]
    assert told(world.deploy(instances=2)) == [(JOB, "UNDEPLOYMENT")]
    assert [world.state.instance(JOB, number) for number in (0, 1)] == before
    assert world.deploy(instances=2) == Outcome()


def test_a_pinned_address_is_kept_from_all_others() -> None:
    world = World()
    world.deploy(rr={"v4": "10.30.0.1", "v6": "fdff:2000::"})
    instance = world.state.instance(JOB, 0)
    assert instance is not None
    world.deploy("app.ns.other.test", 3)
    owners = {str(address): world.state.owner(address) for address in map(ip_address, ("10.30.0.1", "fdff:2000::"))}
    assert owners == {"10.30.0.1": JOB, "fdff:2000::": JOB}
    with pytest.raises(RefusedError, match=rf"service_ips\.rr\.v4: expected an address that is free, .* of {JOB}"):
        world.deploy("app.ns.third.test", rr={"v4": "10.30.0.1"})
    with pytest.raises(RefusedError, match=r"service_ips\.rr\.v4: expected an address in 10\.30\.0\.0/16"):
        world.deploy("app.ns.third.test", rr={"v4": "10.31.0.1"})
    with pytest.raises(RefusedError, match=r"service_ips\.rr\.v6: expected an address in fdff:2000::/21"):
        world.deploy("app.ns.third.test", rr={"v6": "fdff::5"})


def test_every_allocation_writes_the_pool() -> None:
    """It is what two managers meet at: neither can give what the other is giving."""
    world = World()
    assert "pool.services" in world.deploy(rr={"v4": "10.30.7.7", "v6": "none"}, instances=0).changes
    assert "pool.subnets" in world.subnet(A).changes


def test_a_large_service_is_made_and_removed_in_steps_that_each_are_a_service() -> None:
    world = World()
    sizes = []
    while (outcome := world.deploy(instances=1200)).changes:
        assert len(outcome.changes) < 1000
        sizes.append(len(world.state.numbers(JOB)))
        assert world.state.job(JOB) is not None
    assert sizes == [500, 1000, 1200]
    while (outcome := world.take(services.remove(JOB, world.state))).changes:
        assert len(outcome.changes) < 1000
        assert world.state.job(JOB) is not None or not world.state.numbers(JOB)
    assert world.state.jobs() == []


@pytest.mark.parametrize("instances", [0, 1, 499, 500, 501])
def test_nothing_stays_of_a_removed_service(instances: int) -> None:
    world = World()
    while world.deploy(instances=instances).changes:
        pass
    world.listed()
    while world.take(services.remove(JOB, world.state)).changes:
        pass
    assert (world.state.jobs(), world.state.numbers(JOB), world.state.interested(JOB)) == ([], [], [])
    assert world.state.owner(ip_address("10.30.0.0")) is None


def test_a_trial_leaves_no_trace() -> None:
    world = World()
    world.deploy()
    with world.state.trial() as trial:
        trial.apply(services.remove(JOB, world.state).changes)
        assert world.state.job(JOB) is None
    assert world.state.numbers(JOB) == [0]
    assert world.state.owner(ip_address("10.30.0.0")) == JOB
