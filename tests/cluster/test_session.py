"""The session: what a node says, when, and what it makes of the answers. No broker, no sleep."""

import json
from collections.abc import Callable
from ipaddress import IPv4Address, IPv4Network, IPv6Network, ip_address
from itertools import cycle, pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from appliance.cluster import session as module
from appliance.cluster.commands import Assigned, Changed, Command, Flush, NodesChanged, Publish, Refused, Subscribe
from appliance.cluster.interests import HINT_QUIET
from appliance.cluster.messages import ClusterNode, MessageError, entries, parse_results
from appliance.cluster.nodes import SETTLE
from appliance.cluster.queries import OPEN_MAX, UNKNOWN_FOR, WAITED_MAX
from appliance.cluster.requests import Deployment, Endpoint
from appliance.cluster.session import ANNOUNCE_WAIT, Session, Times
from tests.cluster import wire
from tests.cluster.node import (
    HERE,
    OWN,
    RANGES,
    Node,
    answers,
    changed,
    queries,
    said,
    subscribed,
    unsubscribed,
)
from tests.cluster.wire import JOB, OTHER, RR, RR_V6, answer, instance

NOTICES = f"jobs/{JOB}/updates_available"


# --- The connection -----------------------------------------------------------------------------


def test_a_connection_begins_with_subscriptions_and_says_that_the_node_is_there() -> None:
    node = Node()
    first, status = node.last
    own = wire.topic("subnetwork/result"), wire.topic("tablequery/result")
    assert first == Subscribe((*own, "cluster/nodes/+", "cluster/exposed/+"))
    here = b'{"status":"online","host_ip":"192.0.2.1","host_port":"50103"}'
    assert status == Publish(wire.topic("status"), here, retain=True)


def test_without_a_connection_nothing_is_published() -> None:
    node = Node(connected=False)
    node.deploy()
    node.need(OTHER)
    node.resolve(RR)
    node.do(node.session.ask_subnetwork(node.now))
    node.do(node.session.move(Endpoint(ip_address("192.0.2.9"), 1), node.now))
    node.wait(60)
    assert not [it for it in node.commands if isinstance(it, Publish | Subscribe)]


def test_after_a_reconnect_live_interests_come_first_then_own_deployments() -> None:
    node = Node()
    node.follow()
    node.wait(1)
    node.follow(job=OTHER)
    node.deploy(OWN)
    node.disconnect()
    node.wait(30)
    commands = node.connect()
    kinds = [it.topic.removeprefix(wire.topic("")) for it in commands if isinstance(it, Publish)]
    assert kinds == ["status", "tablequery/request", "tablequery/request", "service/deployed"]
    assert queries(commands) == [JOB, OTHER], "the job that runs here is the more urgent one"
    assert {NOTICES, f"jobs/{OTHER}/updates_available"} < set(subscribed(commands))
    assert commands.index(Subscribe(tuple(subscribed(commands)))) == 0


def test_nothing_known_is_dropped_while_the_broker_is_away() -> None:
    node = Node()
    node.follow()
    node.disconnect()
    node.wait(3600)
    assert list(node.session.jobs) == [JOB]
    assert node.session.staleness(node.now) == 3600
    node.connect()
    node.answer(instance())
    assert node.session.staleness(node.now) == 0


def test_an_interest_unused_while_away_has_one_more_lifetime() -> None:
    node = Node()
    node.follow()
    node.disconnect()
    node.wait(3600)
    node.connect()
    node.answer(instance())
    assert queries(node.wait(9.9)) == []
    assert queries(node.wait(0.2)) == [JOB]


def test_a_thousand_interests_do_not_flood_the_manager() -> None:
    node = Node()
    jobs = [f"app.ns.s{number}.test" for number in range(1000)]
    for job in jobs:
        node.follow(job=job)
    node.disconnect()
    asked = queries(node.connect())
    assert len(asked) == OPEN_MAX
    while len(asked) < len(jobs):
        asked += queries(node.answer(instance(), job=asked[len(asked) - OPEN_MAX]))
    assert sorted(asked) == sorted(jobs)


def test_a_packet_that_waits_is_asked_for_before_what_nobody_waits_for() -> None:
    node = Node()
    jobs = [f"app.ns.s{number}.test" for number in range(2 * OPEN_MAX)]
    for job in jobs:
        node.follow(job=job)
    node.disconnect()
    asked = queries(node.connect())
    node.resolve("10.30.9.9")
    assert queries(node.answer(instance(), job=asked[0])) == ["10.30.9.9"]


def test_goodbye() -> None:
    node = Node()
    (goodbye,) = node.do(node.session.stopping(node.now))
    assert goodbye == Publish(wire.topic("status"), b'{"status":"offline"}', retain=True)


# --- Subnets ------------------------------------------------------------------------------------


def test_subnets_are_asked_for_until_they_come() -> None:
    node = Node()
    assert said(node.do(node.session.ask_subnetwork(node.now)), "subnet") == [{"METHOD": "GET"}]
    assert node.do(node.session.ask_subnetwork(node.now)) == []
    assert len(said(node.wait(60), "subnet")) == 6
    (assigned,) = node.hear("subnetwork/result", b'{"address":"10.18.0.64","addressv6":"fc00::100"}')
    assert isinstance(assigned, Assigned)
    assert assigned.subnetwork.v4 == IPv4Network("10.18.0.64/26")
    assert assigned.subnetwork.v6 == IPv6Network("fc00::100/120")
    assert said(node.wait(60), "subnet") == []


def test_subnets_are_asked_for_again_on_a_new_connection() -> None:
    node = Node(connected=False)
    node.do(node.session.ask_subnetwork(node.now))
    assert said(node.connect(), "subnet") == [{"METHOD": "GET"}]


@pytest.mark.parametrize(
    ("payload", "v4", "v6"),
    [
        (b'{"address":"10.18.4.0","prefix":22}', IPv4Network("10.18.4.0/22"), None),
        (b'{"address":"","addressv6":"fc00::"}', None, IPv6Network("fc00::/120")),
    ],
)
def test_subnets_of_one_family_or_another_size(payload: bytes, v4: object, v6: object) -> None:
    node = Node()
    node.do(node.session.ask_subnetwork(node.now))
    (assigned,) = node.hear("subnetwork/result", payload)
    assert isinstance(assigned, Assigned)
    assert (assigned.subnetwork.v4, assigned.subnetwork.v6) == (v4, v6)


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        (b'{"address":"192.0.2.0"}', "address: expected a subnet in the overlay, got 192.0.2.0/26"),
        (b'{"address":"10.30.0.0"}', "address: expected a subnet in the overlay, got 10.30.0.0/26"),
        (b'{"address":"10.18.0.5"}', "address: expected the first address of a /26, got 10.18.0.5"),
        (b'{"addressv6":"fdff::100"}', "addressv6: expected a subnet in the overlay, got fdff::100/120"),
        (b"{}", "address: expected a network address, or one in addressv6"),
        (b'{"address":7}', "address: expected an IP address"),
    ],
)
def test_wrong_subnets_are_refused_and_asked_for_again(payload: bytes, reason: str) -> None:
    node = Node()
    node.do(node.session.ask_subnetwork(node.now))
    assert node.hear("subnetwork/result", payload) == [Refused(wire.topic("subnetwork/result"), reason)]
    assert said(node.wait(10), "subnet")


# --- Questions ----------------------------------------------------------------------------------


def test_a_name_is_subscribed_to_before_it_is_asked_for() -> None:
    node = Node()
    subscription, question = node.need()
    assert subscription == Subscribe((NOTICES,))
    assert isinstance(question, Publish)
    assert said([question], "tablequery/request") == [{"sname": JOB, "sip": ""}]
    commands = node.answer(instance())
    assert answers(commands) == [(JOB, True)]
    assert changed(commands) == {JOB}


def test_who_waits_hears_after_the_change() -> None:
    node = Node()
    node.need()
    commands = node.answer(instance())
    assert [type(it).__name__ for it in commands] == ["Changed", "Answered"]


def test_callers_share_a_question() -> None:
    node = Node()
    assert queries(node.resolve(RR)) == [RR]
    assert queries(node.resolve(RR)) == []
    assert answers(node.answer(instance(), key=RR)) == [(RR, True)]


def test_an_address_leads_to_its_job_which_is_confirmed_by_name() -> None:
    node = Node()
    assert said(node.resolve(RR_V6), "tablequery/request") == [{"sname": "", "sip": RR_V6}]
    commands = node.answer(instance(), key=RR_V6)
    assert answers(commands) == [(RR_V6, True)]
    assert subscribed(commands) == [NOTICES]
    assert queries(commands) == [JOB]


def test_addresses_are_asked_for_in_canonical_text() -> None:
    assert queries(Node().resolve("FDFF:2000:0::0030")) == [RR_V6]


@pytest.mark.parametrize("address", [RR, RR_V6, "10.30.0.1", "fdff::1", "10.18.0.66", "fc00::100"])
def test_what_is_known_is_not_asked_for(address: str) -> None:
    node = Node()
    node.follow()
    assert node.resolve(address) == [*node.last]
    assert answers(node.last) == [(address, True)]
    assert queries(node.last) == []


def test_a_fresh_job_is_not_asked_for_again() -> None:
    node = Node()
    node.follow()
    assert answers(node.need()) == [(JOB, True)]
    assert queries(node.last) == []


def test_an_address_that_nobody_has_costs_one_question_for_a_while() -> None:
    node = Node()
    node.resolve("10.30.99.99")
    assert answers(node.hear("tablequery/result", wire.unknown("10.30.99.99"))) == [("10.30.99.99", False)]
    assert node.resolve("10.30.99.99") == node.last
    assert answers(node.last) == [("10.30.99.99", False)]
    assert queries(node.last) == []
    node.wait(UNKNOWN_FOR)
    assert queries(node.resolve("10.30.99.99")) == ["10.30.99.99"]


def test_an_answer_without_the_address_that_was_asked_for_is_none() -> None:
    node = Node()
    node.resolve("10.30.99.99")
    assert answers(node.answer(instance(), key="10.30.99.99")) == [("10.30.99.99", False)]


def test_a_question_ends_without_an_answer() -> None:
    node = Node()
    node.resolve(RR)
    assert answers(node.wait(4.9)) == []
    assert answers(node.wait(0.2)) == [(RR, False)]
    assert queries(node.resolve(RR)) == [RR], "no answer does not mean that nobody has it"


def test_a_question_waits_for_a_connection_that_comes_in_time() -> None:
    node = Node(connected=False)
    node.resolve(RR)
    node.wait(2)
    assert queries(node.connect()) == [RR]
    assert answers(node.wait(3.1)) == [(RR, False)], "who asked waits no longer than promised"


def test_a_question_that_a_lost_connection_took_is_repeated() -> None:
    node = Node()
    node.resolve(RR)
    node.disconnect()
    assert queries(node.connect()) == [RR]
    assert answers(node.answer(instance(), key=RR)) == [(RR, True)]


def test_too_many_questions_are_refused_at_once() -> None:
    node = Node()
    for number in range(WAITED_MAX):
        node.resolve(str(IPv4Address("10.30.0.0") + number))
        assert answers(node.last) == []
    assert answers(node.resolve("10.30.200.1")) == [("10.30.200.1", False)]
    assert answers(node.resolve("10.30.0.5")) == [], "who joins a question costs nothing"


def test_a_job_that_does_not_exist_yet_is_asked_for_soon_again() -> None:
    node = Node(interest=60)
    node.need()
    assert answers(node.answer()) == [(JOB, False)]
    assert queries(node.wait(5.1)) == [JOB]
    assert changed(node.answer(instance())) == {JOB}


@pytest.mark.parametrize("name", ["", "a.b.c", "a.b.c.d.e", "a.b.c.+", "a.b.c/d.#", "a.b..d", "10.18.0.1", "a.b.c.d\n"])
def test_a_name_that_would_be_another_topic_is_refused(name: str) -> None:
    node = Node()
    with pytest.raises(MessageError, match="job: expected a name of four parts"):
        node.need(name)
    with pytest.raises(MessageError, match="job: expected a name of four parts"):
        node.deploy(Deployment(name, 0, None, None))
    assert subscribed(node.session.tick(node.now)) == []


# --- Deployments --------------------------------------------------------------------------------


REGISTERED = instance(namespace_ip=None, namespace_ip_v6=None, host_ip=None, host_port=None)
"""As a manager lists an instance that does not run yet."""


def test_a_deployment_is_asked_for_and_announced_once_its_own_addresses_are_in_the_tables() -> None:
    node = Node()
    commands = node.deploy()
    assert subscribed(commands) == [NOTICES]
    assert queries(commands) == [JOB]
    assert changed(commands) == {JOB}
    assert said(commands, "service/deployed") == []
    commands = node.answer(REGISTERED)
    assert said(commands, "service/deployed") == [
        {
            "appname": JOB,
            "status": "DEPLOYED",
            "instance_number": 0,
            "nsip": "10.18.0.2",
            "nsipv6": "fc00::2",
            "host_port": "50103",
            "host_ip": "192.0.2.1",
        }
    ]
    kinds = [type(it) for it in commands]
    assert kinds.index(Changed) < kinds.index(Flush) < kinds.index(Publish)


def test_a_deployment_whose_addresses_are_known_is_announced_at_once() -> None:
    node = Node()
    node.follow(REGISTERED)
    assert len(said(node.deploy(), "service/deployed")) == 1


def test_a_deployment_without_addresses_is_announced_with_the_answer_that_says_so() -> None:
    node = Node()
    node.deploy()
    assert len(said(node.answer(), "service/deployed")) == 1
    assert said(node.wait(10 * ANNOUNCE_WAIT), "service/deployed") == [], "once"


def test_a_deployment_is_announced_in_time_though_the_cluster_does_not_answer() -> None:
    node = Node()
    node.deploy()
    assert said(node.wait(0.9 * ANNOUNCE_WAIT), "service/deployed") == []
    assert len(said(node.wait(0.2 * ANNOUNCE_WAIT), "service/deployed")) == 1
    assert said(node.answer(REGISTERED), "service/deployed") == []


def test_an_answer_to_a_question_from_before_a_deployment_is_asked_for_anew() -> None:
    node = Node()
    node.need()
    node.deploy()
    assert said(node.answer(instance(1)), "service/deployed") == [], "the manager may not have known of it"
    assert queries(node.wait(HINT_QUIET)) == [JOB]
    assert len(said(node.answer(instance(1), REGISTERED), "service/deployed")) == 1


def test_nothing_is_announced_before_the_node_carries_packets() -> None:
    node = Node(connected=False)
    node.session = Session(wire.NODE, HERE, Times(), RANGES)
    node.deploy()
    commands = node.connect() + node.answer(REGISTERED) + node.wait(10 * ANNOUNCE_WAIT)
    assert said(commands, "service/deployed") == []
    assert len(said(node.do(node.session.serve(node.now)), "service/deployed")) == 1


def test_what_goes_before_it_was_announced_is_not_announced() -> None:
    node = Node()
    node.deploy()
    commands = node.do(node.session.undeploy(JOB, 0, node.now))
    commands += node.wait(0.5 * ANNOUNCE_WAIT) + node.answer(REGISTERED) + node.wait(ANNOUNCE_WAIT)
    assert said(commands, "service/deployed") == []


def test_a_deployment_without_ipv6_sends_empty_text() -> None:
    node = Node()
    node.follow(REGISTERED)
    commands = node.deploy(Deployment(JOB, 0, IPv4Address("10.18.0.2"), None))
    assert said(commands, "service/deployed")[0]["nsipv6"] == ""


def test_an_interest_lasts_while_an_instance_runs_here() -> None:
    node = Node()
    node.deploy()
    node.answer(instance())
    for _ in range(10):
        commands = node.wait(30)
        assert said(commands, "interest/remove") == []
        node.answer(instance())


def test_what_is_deployed_here_is_known_before_the_cluster_answers() -> None:
    node = Node(connected=False)
    node.deploy()
    hosts, services = entries(node.session.jobs.values(), HERE.address, HERE.port)
    assert {(str(host.address), host.local) for host in hosts} == {("10.18.0.2", True), ("fc00::2", True)}
    assert services == []


def test_the_cluster_adds_the_service_ips_of_what_runs_here() -> None:
    node = Node()
    node.deploy()
    node.answer(instance(namespace_ip=None, namespace_ip_v6=None, host_ip=None, host_port=None))
    hosts, services = entries(node.session.jobs.values(), HERE.address, HERE.port)
    assert {str(host.instance_ip) for host in hosts} == {"10.30.0.1", "fdff::1"}
    assert RR in {str(service.address) for service in services}


def test_service_ips_of_what_runs_here_stay_while_the_cluster_thinks_us_lost() -> None:
    node = Node()
    node.deploy()
    node.answer(instance(node=wire.ADDRESS, namespace_ip="10.18.0.2", namespace_ip_v6="fc00::2"))
    before = dict(node.session.jobs)
    node.disconnect()
    node.connect()
    assert changed(node.answer()) == set()
    assert node.session.jobs == before


def test_what_runs_here_no_more_is_forgotten_at_once_and_announced() -> None:
    node = Node()
    node.deploy()
    listed = instance(node=wire.ADDRESS, namespace_ip="10.18.0.2", namespace_ip_v6="fc00::2")
    node.answer(listed, instance(1))
    commands = node.do(node.session.undeploy(JOB, 0, node.now))
    (message,) = said(commands, "service/undeployed")
    assert (message["appname"], message["instance_number"], message["status"]) == (JOB, 0, "UNDEPLOYED")
    node.hint()
    node.wait(1)
    node.answer(listed, instance(1))
    assert [it.number for it in node.session.jobs[JOB].instances] == [1], "the cluster may list it for a while"


def test_what_never_ran_here_is_not_undeployed() -> None:
    assert Node().session.undeploy(JOB, 0, 0) == []


def test_a_removal_is_repeated_until_the_broker_has_it() -> None:
    node = Node(connected=False)
    node.deploy()
    node.do(node.session.undeploy(JOB, 0, node.now))
    (first,) = [it for it in node.connect() if isinstance(it, Publish) and it.token]
    node.disconnect()
    assert said(node.connect(), "service/undeployed")
    node.session.delivered(first)
    node.disconnect()
    assert said(node.connect(), "service/undeployed") == []


def test_what_is_deployed_again_is_not_said_to_be_gone() -> None:
    node = Node(connected=False)
    node.deploy()
    node.do(node.session.undeploy(JOB, 0, node.now))
    node.deploy()
    commands = node.connect() + node.answer(REGISTERED)
    assert said(commands, "service/undeployed") == []
    assert len(said(commands, "service/deployed")) == 1


def test_an_address_change_names_every_instance_with_its_whole_job() -> None:
    node = Node()
    node.deploy()
    node.deploy(Deployment(OTHER, 3, IPv4Address("10.18.0.3"), None))
    moved = Endpoint(ip_address("192.0.2.77"), 50200)
    commands = node.do(node.session.move(moved, node.now))
    messages = said(commands, "service/address-changed")
    assert [(it["appname"], it["instance_number"]) for it in messages] == [(JOB, 0), (OTHER, 3)]
    assert messages[0] | {"appname": "", "instance_number": 0} == {
        "appname": "",
        "status": "",
        "instance_number": 0,
        "nsip": "",
        "nsipv6": "",
        "host_port": "50200",
        "host_ip": "192.0.2.77",
    }
    assert changed(commands) == {JOB, OTHER}
    hosts, _ = entries(node.session.jobs.values(), moved.address, moved.port)
    assert all(host.local for host in hosts)
    assert node.do(node.session.move(moved, node.now)) == []


# --- Interests ----------------------------------------------------------------------------------


def test_an_unused_interest_is_asked_for_once_more_and_removed_once() -> None:
    node = Node()
    node.follow()
    commands = node.wait(10.1)
    assert queries(commands) == [JOB]
    assert said(commands, "interest/remove") == []
    commands = node.answer(instance())
    question, removal = [it for it in commands if isinstance(it, Publish)]
    assert said([question], "tablequery/request") == [{"sname": JOB, "sip": ""}], "an existing manager needs it"
    assert said([removal], "interest/remove") == [{"appname": JOB}]
    assert unsubscribed(commands) == [NOTICES]
    assert changed(commands) == {JOB}
    assert node.session.jobs == {}
    assert said(node.wait(600), "interest/remove") == []
    assert said(node.hint(), "interest/remove") == []


def test_use_keeps_an_interest() -> None:
    node = Node()
    node.follow()
    for _ in range(5):
        node.wait(9)
        node.session.use(JOB, node.now)
    assert said(node.commands, "interest/remove") == []
    assert queries(node.wait(9.9)) == []
    assert queries(node.wait(0.2)) == [JOB]


@pytest.mark.parametrize("how", ["used", "needed", "resolved", "deployed"])
def test_an_interest_that_is_needed_at_the_last_moment_stays(how: str) -> None:
    node = Node()
    node.follow()
    node.wait(10.1)
    if how == "used":
        node.session.use(JOB, node.now)
    elif how == "needed":
        node.need()
    elif how == "resolved":
        node.resolve(RR)
    else:
        node.deploy(Deployment(JOB, 9, IPv4Address("10.18.0.2"), None))
    assert said(node.answer(instance()), "interest/remove") == []
    assert JOB in node.session.jobs


def test_without_an_answer_an_interest_stays_and_nothing_is_removed() -> None:
    node = Node()
    node.follow()
    commands = node.wait(300)
    assert said(commands, "interest/remove") == []
    assert list(node.session.jobs) == [JOB]


def test_an_answer_to_something_else_later_does_not_give_an_interest_up() -> None:
    node = Node()
    node.follow()
    assert queries(node.wait(15.2)) == [JOB]
    assert queries(node.hint()) == [JOB]
    assert said(node.answer(instance()), "interest/remove") == []
    assert list(node.session.jobs) == [JOB]


def test_an_interest_that_was_given_up_can_begin_again() -> None:
    node = Node()
    node.follow()
    node.wait(10.1)
    node.answer(instance())
    commands = node.need()
    assert subscribed(commands) == [NOTICES]
    assert queries(commands) == [JOB]


def test_an_answer_that_says_the_same_is_as_good_as_one_that_is_read_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    node = Node()
    node.follow(job=OTHER)
    node.follow()
    node.disconnect()
    node.connect()
    monkeypatch.setattr(module, "parse_answer", None)
    assert answers(node.answer(instance())) == [(JOB, True)]
    assert changed(node.last) == set()
    assert answers(node.answer(instance(), job=OTHER)) == [(OTHER, True)]
    assert node.session.staleness(node.now) == 0


def test_only_the_last_answer_about_a_job_is_remembered() -> None:
    node = Node()
    node.follow()
    assert changed(node.answer(instance(1))) == {JOB}
    assert changed(node.answer(instance())) == {JOB}
    assert [it.number for it in node.session.jobs[JOB].instances] == [0]


def test_an_answer_is_read_anew_once_its_job_was_given_up() -> None:
    node = Node()
    node.follow()
    node.wait(10.1)
    node.answer(instance())
    node.need()
    assert changed(node.answer(instance())) == {JOB}


class ExistingManager:
    """Who is interested in what, as an existing manager keeps it, and what makes it stop listening."""

    def __init__(self) -> None:
        self.restart()

    def restart(self) -> list[Command]:
        """It forgets all, and says nothing; another node asks for every job before we do."""
        self.interested = {job: {"another node"} for job in (JOB, OTHER)}
        return []

    def hear(self, commands: list[Command]) -> list[str]:
        """The jobs that were asked for."""
        asked = []
        for publish in commands:
            if not isinstance(publish, Publish):
                continue
            message = json.loads(publish.payload)
            if publish.topic == wire.topic("tablequery/request"):
                asked.append(message["sname"] or JOB)
                self.interested[asked[-1]].add(wire.NODE)
            elif publish.topic == wire.topic("interest/remove"):
                self.interested[message["appname"]].remove(wire.NODE)  # KeyError: the manager is deaf from here on
        return asked


class Life:
    """A node and an existing manager; ``answered`` says which questions it answers, and when: at once or late."""

    def __init__(self, answered: list[str]) -> None:
        self.node, self.manager = Node(), ExistingManager()
        self._answered = cycle(answered)
        self._late: list[str] = []

    def step(self, step: str | float) -> None:
        """Something happens, and then the answers arrive that were late before it."""
        late, self._late = self._late, []
        if isinstance(step, str):
            self._settle(self._acts()[step]())
        else:
            for _ in range(int(step)):
                self._settle(self.node.wait(1))
        for job in late:
            self._settle(self.node.answer(instance(), job=job))

    def _settle(self, commands: list[Command]) -> None:
        for job in self.manager.hear(commands):
            when = next(self._answered)
            if when == "late":
                self._late.append(job)
            elif when == "at once":
                self._settle(self.node.answer(instance(), job=job))

    def _acts(self) -> dict[str, Callable[[], list[Command]]]:
        node = self.node
        return {
            "need": node.need,
            "need another": lambda: node.need(OTHER),
            "resolve": lambda: node.resolve(RR),
            "notice": node.hint,
            "deploy": node.deploy,
            "undeploy": lambda: node.do(node.session.undeploy(JOB, 0, node.now)),
            "connection lost": node.disconnect,
            "connection": lambda: [*node.disconnect(), *node.connect()],
            "manager restarts": self.manager.restart,
        }


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.sampled_from(sorted(Life([])._acts())) | st.integers(1, 30).map(float), max_size=40),
    st.lists(st.sampled_from(["at once", "late", "never"]), min_size=1, max_size=7),
)
def test_an_existing_manager_never_hears_a_removal_that_it_cannot_take(
    steps: list[str | float], answered: list[str]
) -> None:
    life = Life(answered)
    for step in steps:
        life.step(step)


# --- Notices ------------------------------------------------------------------------------------


def test_a_notice_leads_to_a_question_at_once() -> None:
    node = Node()
    node.follow()
    node.wait(1)
    assert queries(node.hint()) == [JOB]
    assert changed(node.answer(instance(), instance(1))) == {JOB}


def test_a_storm_of_notices_leads_to_few_questions_and_one_after_the_last() -> None:
    node = Node()
    node.follow()
    node.wait(1)
    asked = 0
    for _ in range(100):
        asked += len(queries(node.hint()))
        asked += len(queries(node.answer(instance())))
        asked += len(queries(node.wait(0.001)))
    assert asked == 1
    assert queries(node.wait(HINT_QUIET)) == [JOB]
    node.answer(instance())
    assert queries(node.wait(3)) == []


def test_a_notice_during_a_question_is_not_lost() -> None:
    node = Node()
    node.follow()
    node.wait(1)
    node.hint()
    assert queries(node.hint()) == [], "at most one question at a time"
    node.answer(instance())
    assert node.session.staleness(node.now + 1) == 1, "the answer may be older than the notice"
    assert queries(node.wait(HINT_QUIET)) == [JOB]


def test_a_notice_is_only_a_hint() -> None:
    node = Node()
    node.follow()
    for payload in (b"", b"\xff", b"[1]", b'{"type":"ROUTING_CHANGE"}'):
        node.wait(1)
        assert queries(node.do(node.session.received(NOTICES, payload, node.now))) == [JOB]
        node.answer(instance())


def test_what_a_notice_calls_gone_is_not_sent_to_any_more_and_the_answer_has_the_last_word() -> None:
    node = Node()
    node.follow(instance(0), instance(1))
    node.wait(1)
    gone = instance(1)["namespace_ip"]
    commands = node.do(node.session.received(NOTICES, json.dumps({"gone": [gone]}).encode(), node.now))
    assert changed(commands) == {JOB}
    assert [it.number for it in node.session.jobs[JOB].instances] == [0]
    assert queries(commands) == [JOB]
    node.answer(instance(0), instance(1))
    assert [it.number for it in node.session.jobs[JOB].instances] == [0, 1]


@pytest.mark.parametrize("gone", ["[1]", '["10.18.0.999"]', '"10.18.0.66"', '["198.51.100.1"]', "[]", '[""]'])
def test_a_notice_about_nobody_here_is_only_a_hint(gone: str) -> None:
    node = Node()
    node.follow()
    node.wait(1)
    commands = node.do(node.session.received(NOTICES, f'{{"gone": {gone}}}'.encode(), node.now))
    assert (changed(commands), queries(commands)) == (set(), [JOB])


def test_a_notice_takes_nothing_away_that_runs_here() -> None:
    node = Node()
    node.deploy(OWN)
    node.answer(instance(OWN.number, node=str(HERE.address)), job=OWN.job)
    node.wait(1)
    before = node.session.jobs[OWN.job]
    node.do(node.session.received(f"jobs/{OWN.job}/updates_available", f'{{"gone": ["{OWN.v4}"]}}'.encode(), node.now))
    assert [it.address_v4 for it in node.session.jobs[OWN.job].instances] == [it.address_v4 for it in before.instances]


def test_an_answer_replaces_all_of_the_job_and_nothing_else() -> None:
    node = Node()
    node.follow(instance(0), instance(1))
    node.follow(job=OTHER)
    node.wait(1)
    node.hint()
    assert changed(node.answer(instance(1))) == {JOB}
    assert [it.number for it in node.session.jobs[JOB].instances] == [1]
    assert [it.number for it in node.session.jobs[OTHER].instances] == [0]


def test_no_answer_leaves_all_as_it_was_and_is_asked_for_again_with_growing_pauses() -> None:
    node = Node(interest=3600)
    node.follow()
    node.wait(1)
    node.hint()
    times = []
    for _ in range(3000):
        if queries(node.wait(0.1)):
            times.append(node.now)
    pauses = [round(after - before) for before, after in pairwise(times)]
    assert pauses == sorted(pauses)
    assert pauses[0] == 15
    assert pauses[-1] == 65
    assert list(node.session.jobs) == [JOB]


def test_a_job_without_news_is_asked_for_now_and_then() -> None:
    node = Node(interest=3600)
    node.follow()
    assert queries(node.wait(59)) == []
    assert queries(node.wait(2)) == [JOB]


def test_an_answer_that_says_the_same_changes_nothing() -> None:
    node = Node()
    node.follow()
    node.wait(1)
    node.hint()
    assert changed(node.answer(instance())) == set()


# --- Answers ------------------------------------------------------------------------------------


def test_an_instance_without_addresses_is_no_error() -> None:
    node = Node()
    node.need()
    bare = {"instance_number": 1, "service_ip": []}
    nulls = instance(2, namespace_ip=None, namespace_ip_v6=None, host_ip=None, host_port=None)
    unikernel = instance(3, namespace_ip_v6="<nil>")
    node.answer(instance(), bare, nulls, unikernel)
    hosts, _ = entries(node.session.jobs.values(), HERE.address, HERE.port)
    assert {host.owner for host in hosts} == {f"{JOB}.0", f"{JOB}.3"}


def test_one_address_of_two_jobs_is_tolerated() -> None:
    node = Node()
    node.follow()
    node.follow(instance(5), job=OTHER)
    assert set(node.session.jobs) == {JOB, OTHER}
    _, services = entries(node.session.jobs.values(), HERE.address, HERE.port)
    (shared,) = [service for service in services if str(service.address) == RR]
    assert shared.name == OTHER, "the first by name"
    assert answers(node.resolve(RR)) == [(RR, True)]


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        (b"not json", "the whole message: Invalid JSON"),
        (b"", "the whole message: Invalid JSON"),
        (b"[]", "the whole message: Input should be an object"),
        (b'{"instance_list":[]}', "app_name: Field required"),
        (answer(instance(instance_number="x")), "instance_list.0.instance_number"),
        (answer(instance(host_port=70000)), "instance_list.0.host_port"),
        (answer(instance(), instance(1, host_ip=["192.0.2.2"])), "instance_list.1.host_ip: expected an IP address"),
        (answer(instance(namespace_ip="fc00::1")), "instance_list.0.namespace_ip"),
        (answer(instance(namespace_ip="8.8.8.8")), "instance_list.0.namespace_ip: expected a container's address"),
        (answer(instance(namespace_ip="10.30.0.7")), "instance_list.0.namespace_ip: expected a container's address"),
        (answer(instance(namespace_ip_v6="fe80::1%eth0")), "instance_list.0.namespace_ip_v6: expected an IP address"),
        (answer(instance(host_ip="10.18.0.9")), "instance_list.0.host_ip: expected an address outside"),
        (answer(instance(host_ip="127.0.0.1")), "instance_list.0.host_ip: expected an address outside"),
        (answer(instance(host_ip="0.0.0.0")), "instance_list.0.host_ip: expected an address outside"),
        (answer(instance(rr="1.1.1.1")), "instance_list.0.service_ip.0: expected an address in network.services"),
        (answer(instance(), job="a.b.c.#", key=RR), "job: expected a name of four parts"),
        (answer(instance(), job="", key=RR), "app_name: expected a name"),
        (answer(instance(), job=OTHER, key=JOB), "query_key: expected the app_name"),
    ],
)
def test_a_wrong_answer_is_refused_as_a_whole(payload: bytes, reason: str) -> None:
    node = Node()
    node.follow()
    before = dict(node.session.jobs)
    node.wait(1)
    node.hint()
    (refused,) = node.hear("tablequery/result", payload)
    assert isinstance(refused, Refused)
    assert refused.reason.startswith(reason), refused.reason
    assert node.session.counters["refused"] == 1
    assert node.session.jobs == before
    assert changed(node.answer(instance(1))) == {JOB}, "the right answer is still waited for"


def test_what_was_not_asked_for_is_counted_and_ignored() -> None:
    node = Node()
    assert node.answer(instance()) == []
    assert node.hear("tablequery/result", wire.unknown(RR)) == []
    assert node.hear("subnetwork/result", b'{"address":"10.18.0.64"}') == []
    assert node.hint() == []
    assert node.hear("gateway/deploy", b"?") == []
    assert node.do(node.session.received("nodes/other/net/tablequery/result", answer(), node.now)) == []
    assert node.session.counters["unexpected"] == 6
    assert node.session.jobs == {}


def test_a_late_answer_about_a_live_interest_is_welcome() -> None:
    node = Node()
    node.follow()
    node.wait(1)
    node.hint()
    node.wait(5.1)
    assert changed(node.answer(instance(1))) == {JOB}


TOPICS = st.sampled_from([NOTICES, *map(wire.topic, ("subnetwork/result", "tablequery/result", "x"))])
RESULT_KEYS = [
    "app_name",
    "instance_list",
    "query_key",
    "instance_number",
    "namespace_ip",
    "namespace_ip_v6",
    "host_ip",
]
MORE_KEYS = ["host_port", "service_ip", "IpType", "Address", "Address_v6", "address", "addressv6", "prefix"]
KEYS = st.sampled_from([*RESULT_KEYS, *MORE_KEYS])
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text() | st.sampled_from([JOB, RR, "", "<nil>"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=6),
    max_leaves=20,
)


@settings(max_examples=200, deadline=None)
@given(st.lists(st.tuples(TOPICS, st.binary(max_size=40) | JSON.map(lambda it: json.dumps(it).encode())), max_size=4))
def test_no_message_ends_a_session(messages: list[tuple[str, bytes]]) -> None:
    node = Node()
    node.follow()
    node.resolve(RR_V6)
    node.do(node.session.ask_subnetwork(node.now))
    for topic, payload in messages:
        node.do(node.session.received(topic, payload, node.now))
        node.wait(1)
    entries(node.session.jobs.values(), HERE.address, HERE.port)


# --- The last process ---------------------------------------------------------------------------


def test_what_the_last_process_knew_counts_until_the_cluster_answers() -> None:
    node = Node(connected=False)
    results = parse_results(b"[" + answer(instance()) + b"]", "test")
    assert changed(node.do(node.session.restore(results, node.now - 500, node.now))) == {JOB}
    assert node.session.staleness(node.now) == 500
    assert answers(node.resolve(RR)) == [(RR, True)]
    commands = node.connect()
    assert queries(commands) == [JOB]
    assert NOTICES in subscribed(commands)
    node.answer(instance(1))
    assert node.session.staleness(node.now) == 0


def test_what_ran_here_before_a_reboot_is_not_there_until_it_is_deployed_again() -> None:
    node = Node(connected=False)
    listed = instance(node=wire.ADDRESS, namespace_ip="10.18.0.2", namespace_ip_v6="fc00::2")
    results = parse_results(b"[" + answer(listed, instance(1)) + b"]", "test")
    node.do(node.session.restore(results, node.now, node.now))
    assert [it.number for it in node.session.jobs[JOB].instances] == [1]
    node.deploy()
    own, _ = node.session.jobs[JOB].instances
    assert [str(ip.v4) for ip in own.service_ips] == [RR, "10.30.0.1"]


def test_what_does_not_fit_any_more_is_not_restored() -> None:
    node = Node(connected=False)
    wrong = answer(instance(namespace_ip="8.8.8.8"))
    results = parse_results(b"[" + wrong + b"," + answer(instance(), job=OTHER) + b"]", "test")
    node.do(node.session.restore(results, node.now, node.now))
    assert list(node.session.jobs) == [OTHER]
    assert node.session.counters["refused"] == 1


# --- The cluster's nodes ------------------------------------------------------------------------

PEER_NODE = "65f0000000000000000000b2"
PEER_LISTED = b'{"host_ip":"192.0.2.2","host_port":50103,"subnets":["10.18.0.64/26"],"overlay":2}'


def listed(node: Node, payload: bytes, name: str = PEER_NODE) -> list[Command]:
    """A message of the cluster's list."""
    return node.do(node.session.received(f"cluster/nodes/{name}", payload, node.now))


def test_a_node_of_the_list_is_known_until_it_is_removed() -> None:
    node = Node()
    assert listed(node, PEER_LISTED) == [NodesChanged(frozenset({PEER_NODE}))]
    assert node.session.nodes[PEER_NODE].address == ip_address("192.0.2.2")
    assert listed(node, PEER_LISTED) == [], "what is known already is no news"
    assert listed(node, b"") == [NodesChanged(frozenset({PEER_NODE}))]
    assert not node.session.nodes
    assert listed(node, b"") == []


def test_the_node_itself_is_none_of_its_peers() -> None:
    node = Node()
    assert listed(node, PEER_LISTED, wire.NODE) == []


@pytest.mark.parametrize(
    ("payload", "field"),
    [
        (b'{"host_ip":"10.18.0.2","host_port":50103}', "host_ip"),
        (b'{"host_ip":"127.0.0.1","host_port":50103}', "host_ip"),
        (b'{"host_ip":"","host_port":50103}', "host_ip"),
        (b'{"host_ip":"192.0.2.2","host_port":0}', "host_port"),
        (b'{"host_ip":"192.0.2.2","host_port":65536}', "host_port"),
        (b'{"host_port":50103}', "host_ip"),
        (b'{"host_ip":"192.0.2.2","host_port":50103,"subnets":["192.0.2.0/24"]}', "subnets.0"),
        (b"[]", "the whole message"),
    ],
)
def test_a_wrong_message_of_the_list_costs_nothing_but_itself(payload: bytes, field: str) -> None:
    node = Node()
    listed(node, PEER_LISTED)
    (refused,) = listed(node, payload)
    assert isinstance(refused, Refused)
    assert refused.reason.startswith(field)
    assert node.session.counters["refused"] == 1
    assert list(node.session.nodes) == [PEER_NODE]


def test_nodes_that_were_removed_while_there_was_no_connection_are_dropped() -> None:
    node, other = Node(), "65f0000000000000000000b3"
    listed(node, PEER_LISTED)
    listed(node, PEER_LISTED.replace(b"192.0.2.2", b"192.0.2.3"), other)
    node.disconnect()
    node.wait(3600)
    assert len(node.session.nodes) == 2, "nobody says that they are gone"
    node.connect()
    listed(node, PEER_LISTED)
    assert NodesChanged(frozenset({other})) in node.wait(SETTLE)
    assert list(node.session.nodes) == [PEER_NODE]
    assert node.wait(3600) == []


def test_the_list_outlives_a_restart() -> None:
    node = Node(connected=False)
    wrong = ClusterNode(host_ip=ip_address("10.18.0.9"), host_port=1)
    right = ClusterNode.model_validate_json(PEER_LISTED)
    first, second = node.do(node.session.restore([], node.now, node.now, {"x": wrong, PEER_NODE: right}))
    assert isinstance(first, Refused)
    assert second == NodesChanged(frozenset({PEER_NODE}))


def test_a_move_is_said_to_the_list() -> None:
    node = Node()
    (status,) = node.do(node.session.move(Endpoint(ip_address("192.0.2.9"), 7), node.now))
    there = b'{"status":"online","host_ip":"192.0.2.9","host_port":"7"}'
    assert status == Publish(wire.topic("status"), there, retain=True)
