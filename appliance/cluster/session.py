"""What a node says to its cluster and makes of the answers: state, event and time give commands. No input or output.

Theory of operation
-------------------
*Owns* everything that the node knows of the cluster (``Known``), its open questions (``Queries``) and its interests.
*Read and written* by one caller, the member (``appliance.cluster.member``), who reports events, carries out the
commands in their order, and calls ``tick`` when ``deadline`` says so. Time is an argument, in seconds that never go
back.

A **question** has one open instance a key and ``query_timeout`` seconds; callers that ask for the same share its
answer (``Answered``). An address that we know is not asked for, nor one that nobody had a moment ago.

An **interest** begins with a question, or with a deployment here. The topic of its notices is subscribed to
before the job is asked for by name, so that no change is lost in between; an answer that came by address is
therefore confirmed by name. It ends after ``interest`` seconds without use, unless an instance runs here: the
job is asked for once more, and given up only if there is an answer, as a cluster that is away could not tell us
of it again. An existing manager that hears ``interest/remove`` from a node that is not on its list stops listening
altogether; so it is said once, right after a question, which puts us on the list.

**Notices** lead to a question by name (``Interest`` says when), and what they call gone is out of the tables at once:
a removal takes one message, and not every node's question and answer. An answer replaces all of the job; no answer
leaves all as it was. As notices can be lost with a manager, a job is asked for every ``refresh`` seconds too.

**Without a connection** nothing is dropped, and nothing is queued but questions that somebody waits for and
removals that were not acknowledged: what has to be said follows from the state. On the connection's return that
is, in this order: subscriptions; a question for each interest, first those of jobs that run here, then the most
recently used; the instances that run here, and the removals. ``OPEN_MAX`` questions are under way at a time.

**The cluster's nodes** are listed by a manager of ours, in retained messages (``nodes``), and so are the jobs that
nodes open ports for: a node that is to open some follows the job as if it were used.

**An instance that begins here** is announced once this node knows the instance's own addresses and has them in its
tables: the others call it as soon as they hear of it, and its answers leave under those addresses. A manager lists an
instance with them before it runs; so the job is asked for first, and ``ANNOUNCE_WAIT`` bounds the wait. Nothing is
announced before the node can carry packets (``serve``).

**Health** of the instances here is said when it changes, and again on each connection.

**Messages** are checked as a whole before anything is changed. A wrong one is counted, and reported as ``Refused``.
"""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Final

from appliance.cluster import requests, topics
from appliance.cluster.checks import Ranges, check_job, is_address
from appliance.cluster.commands import (
    Answered,
    Assigned,
    Changed,
    Command,
    Flush,
    NodesChanged,
    Publish,
    Refused,
    Subscribe,
    Unsubscribe,
)
from appliance.cluster.interests import HINT_QUIET, Interest
from appliance.cluster.known import Known
from appliance.cluster.memo import Memo
from appliance.cluster.messages import (
    ClusterNode,
    Exposed,
    MessageError,
    Notice,
    SubnetworkResult,
    TableQueryResult,
    parse_answer,
)
from appliance.cluster.nodes import SETTLE, Retained
from appliance.cluster.queries import Queries, Query
from appliance.cluster.requests import Deployment, Endpoint, Request
from appliance.cluster.timers import Timer, Timers
from appliance.tables.layout import IPAddress

SUBNET_RETRY_FIRST: Final = 3.0
SUBNET_RETRY_LONGEST: Final = 12.0
"""Seconds. An existing manager gives out a fresh subnet for each request, so a slow one should not hear many."""
ANNOUNCE_WAIT: Final = 1.0
"""Seconds. A cluster that does not answer, or knows no addresses of the instance, is told of it all the same."""
REFRESH_SPREAD: Final = 0.2
"""Share of the refresh interval by which it varies, so that questions do not come in step."""
_SUBNET: Final = Timer("subnet")
_NODES: Final = Timer("nodes")


@dataclass(frozen=True)
class Times:
    """Seconds, as the configuration has them."""

    query_timeout: float = 5.0
    interest: float = 10.0
    refresh: float = 60.0


class Session:
    """One node's membership in its cluster. Each event gives the commands that it leads to."""

    def __init__(
        self, node: str, here: Endpoint, times: Times, ranges: Ranges, chance: Callable[[], float] = random.random
    ) -> None:
        self.counters: Counter[str] = Counter()
        self._node = node
        self._times = times
        self._ranges = ranges
        self._chance = chance
        self._known = Known(here)
        self._memo = Memo()
        self._list: Retained[ClusterNode] = Retained()
        self._exposed: Retained[Exposed] = Retained()
        self._health: dict[tuple[str, int], bool] = {}
        self._queries = Queries(times.query_timeout)
        self._interests: dict[str, Interest] = {}
        self._removed: dict[tuple[str, int], Deployment] = {}
        self._unannounced: dict[str, set[int]] = {}
        self._is_serving = False
        self._timers = Timers()
        self._connected = False
        self._subnet_requests = 0
        self._commands: list[Command] = []

    # --- what there is ---------------------------------------------------------------------------------------------

    @property
    def jobs(self) -> Mapping[str, TableQueryResult]:
        """What is known, by job."""
        return self._known.jobs

    @property
    def answers(self) -> Mapping[str, TableQueryResult]:
        """What the cluster said, by job: what is worth keeping for the next start."""
        return self._known.answers

    @property
    def nodes(self) -> Mapping[str, ClusterNode]:
        """The cluster's nodes, by id; none if its manager has no such list."""
        return self._list.entries

    @property
    def interests(self) -> Mapping[str, Interest]:
        """What the cluster tells us about, by job."""
        return self._interests

    def staleness(self, now: float) -> float:
        """Seconds for which the oldest thing known may have been outdated; 0 if all is fresh."""
        since = [it.stale_since for it in self._interests.values() if it.stale_since is not None]
        return max(0.0, now - min(since, default=now))

    def deadline(self) -> float | None:
        """When ``tick`` is to be called; None if nothing is waited for."""
        return self._timers.next()

    # --- the connection --------------------------------------------------------------------------------------------

    def restore(
        self,
        results: Iterable[TableQueryResult],
        stale_since: float,
        now: float,
        nodes: Mapping[str, ClusterNode] | None = None,
    ) -> list[Command]:
        """What an earlier process knew. Wrong entries are left out and reported."""
        for name, node in (nodes or {}).items():
            try:
                self._list_node(name, node)
            except MessageError as error:
                self._refuse("the nodes that were known last", error)
        for result in results:
            try:
                check_job(result.job)
                self._ranges.check_result(result)
            except MessageError as error:
                self._refuse("what was known last", error)
                continue
            self._interests[result.job] = Interest(result.job, now, stale_since)
            self._change(self._known.answer(result))
        return self._drain(now)

    def connected(self, now: float) -> list[Command]:
        """A new connection is there; the broker knows nothing of an earlier one."""
        self._connected = True
        ordered = sorted(self._interests.values(), key=self._precedence)
        results = [topics.of_node(self._node, kind) for kind in (topics.SUBNETWORK_RESULT, topics.QUERY_RESULT)]
        updates = (topics.updates(it.job) for it in ordered)
        self._commands.append(Subscribe((*results, topics.ALL_NODES, topics.ALL_EXPOSED, *updates)))
        self._list.doubt()
        self._exposed.doubt()
        self._timers.set(_NODES, now + SETTLE)
        self._say(requests.status(self._known.here), retain=True)
        for interest in ordered:
            self._timers.set(Timer("interest", interest.job), now + self._times.interest)
            self._queries.ask(interest.job)
        self._send_queries(now)
        self._announce_all(now)
        if self._subnet_requests:
            self._subnet_requests = 0
            self._request_subnet(now)
        return self._drain(now)

    def _precedence(self, interest: Interest) -> tuple[bool, float]:
        return not self._known.is_deployed(interest.job), -interest.used_at

    def _announce_all(self, now: float) -> None:
        self._unannounced.clear()
        for deployment in self._known.deployments():
            self._announce(deployment, now)
        for (job, number), is_good in self._health.items():
            self._say(requests.health(job, number, is_good=is_good))
        for deployment in self._removed.values():
            self._say_undeployed(deployment)

    def disconnected(self, now: float) -> list[Command]:
        """The connection is lost. All that is known stays."""
        self._connected = False
        self._timers.cancel(_NODES)
        self._queries.interrupt()
        for interest in self._interests.values():
            interest.age(now)
            interest.leaving = interest.again = False
        return self._drain(now)

    def delivered(self, publish: Publish) -> None:
        """The broker has a message."""
        if publish.token is not None:
            self._removed.pop(publish.token, None)

    def stopping(self, now: float) -> list[Command]:
        """The node leaves on purpose: the last thing it says."""
        self._say(requests.status(None), retain=True)
        return self._drain(now)

    # --- what the node wants ---------------------------------------------------------------------------------------

    def ask_subnetwork(self, now: float) -> list[Command]:
        """Asks for the node's subnets until the cluster answers (``Assigned``)."""
        if not self._subnet_requests:
            self._request_subnet(now)
        return self._drain(now)

    def serve(self, now: float) -> list[Command]:
        """The node carries packets from now on: what runs here may be called."""
        self._is_serving = True
        for deployment in self._known.deployments():
            self._announce(deployment, now)
        return self._drain(now)

    def deploy(self, deployment: Deployment, now: float) -> list[Command]:
        """An instance runs here. Raises MessageError if its job's name is none."""
        check_job(deployment.job)
        self._removed.pop((deployment.job, deployment.number), None)
        self._change(self._known.deploy(deployment))
        interest = self._interest(deployment.job, now)
        interest.again |= self._queries.ask(interest.job).sent
        self._announce(deployment, now)
        return self._drain(now)

    def _announce(self, deployment: Deployment, now: float) -> None:
        """Says that an instance runs here, or lets that wait for its addresses."""
        if not self._is_serving:
            return
        if self._known.is_addressed(deployment):
            self._say_deployed(deployment)
            return
        if deployment.job not in self._unannounced:
            self._timers.set(Timer("announce", deployment.job), now + ANNOUNCE_WAIT)
        self._unannounced.setdefault(deployment.job, set()).add(deployment.number)

    def _announce_waiting(self, job: str, *, all_of_them: bool) -> None:
        """Says which instances of a job run here, of those that waited: the ones with addresses, or all of them."""
        left = set()
        for number in sorted(self._unannounced.pop(job, ())):
            deployment = self._known.deployment(job, number)
            if deployment is not None and (all_of_them or self._known.is_addressed(deployment)):
                self._say_deployed(deployment)
            elif deployment is not None:
                left.add(number)
        if left:
            self._unannounced[job] = left

    def undeploy(self, job: str, number: int, now: float) -> list[Command]:
        """An instance runs here no more; nothing if it did not. What is known of its job stays for a lifetime."""
        deployment = self._known.deployment(job, number)
        if deployment is not None:
            self._change(self._known.undeploy(deployment))
            self._health.pop((job, number), None)
            self._removed[(job, number)] = deployment
            self._say_undeployed(deployment)
            self._interest(job, now)
        return self._drain(now)

    def check(self, job: str, number: int, now: float, *, is_good: bool) -> list[Command]:
        """Whether an instance that runs here works; nothing if it does not run here."""
        if self._known.deployment(job, number) is not None:
            self._health[job, number] = is_good
            self._say(requests.health(job, number, is_good=is_good))
        return self._drain(now)

    def need(self, job: str, now: float) -> list[Command]:
        """Somebody here needs a job: leads to ``Answered`` with its name. Raises MessageError if that is none."""
        interest = self._interest(check_job(job), now)
        if interest.stale_since is None and job in self.jobs:
            self._commands.append(Answered(job, True))
        else:
            self._wait_unless_unknown(job, now)
        return self._drain(now)

    def resolve(self, address: IPAddress, now: float) -> list[Command]:
        """A packet to an unknown address: leads to ``Answered`` with the address in text."""
        key, owner = str(address), self._known.owner(address)
        if owner is not None:
            self.use(owner, now)
            self._commands.append(Answered(key, True))
        else:
            self._wait_unless_unknown(key, now)
        return self._drain(now)

    def use(self, job: str, now: float) -> None:
        """Packets to a job were seen."""
        interest = self._interests.get(job)
        if interest is not None:
            interest.use(now)

    def move(self, here: Endpoint, now: float) -> list[Command]:
        """The node is reached elsewhere from now on."""
        if here != self._known.here:
            self._change(self._known.move(here))
            self._say(requests.status(here), retain=True)
            for deployment in self._known.deployments():
                self._say(requests.address_changed(deployment, here))
        return self._drain(now)

    # --- what the cluster says -------------------------------------------------------------------------------------

    def received(self, topic: str, payload: bytes, now: float) -> list[Command]:
        """A message from the broker."""
        try:
            self._take(topic, payload, now)
        except MessageError as error:
            self._refuse(topic, error)
        return self._drain(now)

    def _take(self, topic: str, payload: bytes, now: float) -> None:
        job = topic.removeprefix("jobs/").removesuffix("/updates_available")
        if topic == topics.of_node(self._node, topics.QUERY_RESULT):
            self._take_result(payload, now)
        elif topic == topics.of_node(self._node, topics.SUBNETWORK_RESULT):
            self._take_subnetwork(parse_answer(SubnetworkResult, payload))
        elif topic == topics.updates(job) and job in self._interests:
            self._take_hint(self._interests[job], payload, now)
        elif topic.startswith(topics.NODES):
            self._list_node(topic.removeprefix(topics.NODES), parse_answer(ClusterNode, payload) if payload else None)
        elif topic.startswith(topics.EXPOSED):
            self._expose(topic.removeprefix(topics.EXPOSED), parse_answer(Exposed, payload) if payload else None, now)
        else:
            self.counters["unexpected"] += 1

    def _expose(self, job: str, exposed: Exposed | None, now: float) -> None:
        """Nodes open ports for a job: whoever has one follows it, from now on and as long as that is so."""
        check_job(job)
        if self._exposed.put(job, exposed) and self._is_exposed(job):
            self._queries.ask(self._interest(job, now).job)

    def _is_exposed(self, job: str) -> bool:
        """Whether this node has ports for a job. One that only hosting nodes have ports for is followed anyway."""
        exposed = self._exposed.entries.get(job)
        return exposed is not None and (exposed.nodes == "all" or self._node in exposed.nodes)

    def _list_node(self, name: str, node: ClusterNode | None) -> None:
        """The node itself is on the list too; what others are told about it is no news to it."""
        if node is not None:
            self._ranges.check_node(node)
        self._change_nodes(self._list.put(name, None if name == self._node else node))

    def _take_subnetwork(self, result: SubnetworkResult) -> None:
        subnetwork = self._ranges.subnetwork(result)
        if not self._subnet_requests:
            self.counters["unexpected"] += 1
            return
        self._subnet_requests = 0
        self._timers.cancel(_SUBNET)
        self._commands.append(Assigned(subnetwork))

    def _take_hint(self, interest: Interest, payload: bytes, now: float) -> None:
        self.counters["hints"] += 1
        self._lose(interest.job, payload)
        interest.age(now)
        query = self._queries.get(interest.job)
        if query is not None:
            interest.again = query.sent
        else:
            self._ask_quietly(interest, now)

    def _lose(self, job: str, payload: bytes) -> None:
        """What a notice calls gone is not sent to any more; the question that follows confirms it. A notice that says
        something else is one all the same."""
        with suppress(MessageError):
            gone = {it for it in parse_answer(Notice, payload).gone if it is not None}
            self._change(self._known.lose(job, gone))

    def _ask_quietly(self, interest: Interest, now: float) -> None:
        """Asks for a job, but not within HINT_QUIET of the last time."""
        at = interest.asked_at + HINT_QUIET
        if now >= at:
            self._queries.ask(interest.job)
        else:
            self._timers.set(Timer("hint", interest.job), at)

    def _take_result(self, payload: bytes, now: float) -> None:
        """An answer is for the question that it repeats; without one, news of an interest are welcome all the same."""
        result = self._memo.get(payload) or self._checked(payload)
        key = result.query_key or result.job
        query = self._queries.get(key)
        if (query is None or not query.sent) and result.job not in self._interests:
            self.counters["unexpected"] += 1
            return
        self.counters["answers"] += 1
        self._close(key)
        if result.job:
            self._learn(result, now)
        if result.job in self._interests:
            self._memo.put(payload, result)
        self._settle(key, result, now)

    def _checked(self, payload: bytes) -> TableQueryResult:
        """An answer. Raises MessageError with the first field that is wrong, or that no table may have."""
        result = parse_answer(TableQueryResult, payload)
        self._ranges.check_result(result)
        key = result.query_key
        if key and key != result.job and not is_address(key):
            raise MessageError(f"query_key: expected the app_name, or an address, got {key[:80]!r}")
        return result

    def _learn(self, result: TableQueryResult, now: float) -> None:
        interest = self._interests.get(result.job)
        if interest is None and (result.instances or result.service_ips):
            interest = self._interest(result.job, now)
        if interest is None:
            return
        self._change(self._known.answer(result.model_copy(update={"query_key": ""})))
        if result.query_key in ("", result.job):
            self._refreshed(interest, bool(result.instances), now)
        elif interest.stale_since is not None:
            self._queries.ask(interest.job)

    def _refreshed(self, interest: Interest, exists: bool, now: float) -> None:
        """A question by name was answered. A manager that does not know a job will not tell when it begins to exist."""
        if interest.leaving:
            self._leave(interest)
            return
        interest.refreshed(now)
        self._announce_waiting(interest.job, all_of_them=not interest.again)
        vary = 1 + REFRESH_SPREAD * (self._chance() - 0.5)
        pause = self._times.refresh * vary if exists else self._times.query_timeout
        self._timers.set(Timer("refresh", interest.job), now + pause)
        if interest.again:
            interest.again = False
            self._ask_quietly(interest, now)

    def _leave(self, interest: Interest) -> None:
        """Gives an interest up. The manager may have forgotten us since it answered: a question just before the removal
        puts us on its list again. Nobody waits for the answer, which is counted as unexpected."""
        self.counters["given_up"] += 1
        del self._interests[interest.job]
        for kind in ("interest", "refresh", "hint"):
            self._timers.cancel(Timer(kind, interest.job))
        self._say(requests.query(interest.job, is_address=False))
        self._say(requests.interest_remove(interest.job))
        self._commands.append(Unsubscribe((topics.updates(interest.job),)))
        self._change(self._known.forget(interest.job))
        self._memo.forget(interest.job)

    def _settle(self, key: str, result: TableQueryResult, now: float) -> None:
        """Tells those who wait for a key. An answer without the address that was asked for is none."""
        by_address = is_address(key)
        found = self._known.owner(ip_address(key)) is not None if by_address else key in self.jobs
        if not found and (by_address or not result.instances):
            self.counters["unknown"] += 1
            self._queries.nobody_has(key, now)
        self._commands.append(Answered(key, found))

    # --- time ------------------------------------------------------------------------------------------------------

    def tick(self, now: float) -> list[Command]:
        """Does what is due."""
        for timer in self._timers.due(now):
            if timer.kind == "query":
                self._time_out(timer.key, now)
            elif timer == _SUBNET:
                self._request_subnet(now)
            elif timer == _NODES:
                self._change_nodes(self._list.settle())
                self._exposed.settle()
            elif timer.kind == "announce":
                self._announce_waiting(timer.key, all_of_them=True)
            elif self._connected and timer.key in self._interests:
                self._review(timer.kind, self._interests[timer.key], now)
        return self._drain(now)

    def _review(self, kind: str, interest: Interest, now: float) -> None:
        if kind == "interest":
            self._expire(interest, now)
        else:
            self._queries.ask(interest.job)

    def _expire(self, interest: Interest, now: float) -> None:
        """Asks once more before the interest is given up, or looks again later."""
        ends = interest.used_at + self._times.interest
        if self._known.is_deployed(interest.job) or self._is_exposed(interest.job):
            interest.used_at = now
        elif now >= ends and self._queries.get(interest.job) is None:
            interest.leaving = True
            self._queries.ask(interest.job)
        again = ends if ends > now else now + self._times.interest
        self._timers.set(Timer("interest", interest.job), again)

    def _time_out(self, key: str, now: float) -> None:
        if self._close(key) is None:
            return
        self.counters["timeouts"] += 1
        interest = self._interests.get(key)
        if interest is not None:
            interest.failed(now)
            pause = interest.pause(self._times.query_timeout, self._times.refresh)
            self._timers.set(Timer("refresh", key), now + pause)
        self._commands.append(Answered(key, False))

    def _request_subnet(self, now: float) -> None:
        pause = min(SUBNET_RETRY_LONGEST, SUBNET_RETRY_FIRST * 2 ** min(self._subnet_requests, 16))
        self._subnet_requests += 1
        self._timers.set(_SUBNET, now + pause)
        self._say(requests.subnet())

    # --- in common -------------------------------------------------------------------------------------------------

    def _interest(self, job: str, now: float) -> Interest:
        """The interest in a job, which is used now; a new one has to be asked for by the caller."""
        interest = self._interests.get(job)
        if interest is None:
            interest = self._interests[job] = Interest(job, now, stale_since=now)
            if self._connected:
                self._commands.append(Subscribe((topics.updates(job),)))
                self._timers.set(Timer("interest", job), now + self._times.interest)
        interest.use(now)
        return interest

    def _wait_unless_unknown(self, key: str, now: float) -> None:
        """Opens or joins a question that somebody waits for."""
        query = None if self._queries.is_unknown(key, now) else self._queries.wait(key, now)
        if query is None:
            self._commands.append(Answered(key, False))
        elif query.deadline is not None:
            self._timers.set(Timer("query", key), query.deadline)

    def _send_queries(self, now: float) -> None:
        for query in self._queries.to_send(now) if self._connected else ():
            self.counters["queries"] += 1
            self._timers.set(Timer("query", query.key), query.deadline or now)
            if query.key in self._interests:
                self._interests[query.key].asked_at = now
            self._say(requests.query(query.key, is_address=is_address(query.key)))

    def _close(self, key: str) -> Query | None:
        self._timers.cancel(Timer("query", key))
        return self._queries.close(key)

    def _say(self, request: Request, *, retain: bool = False, token: tuple[str, int] | None = None) -> None:
        """Publishes, if there is a connection; otherwise the state says it when there is one again."""
        if self._connected:
            kind, payload = request
            self._commands.append(Publish(topics.of_node(self._node, kind), payload, retain, token))

    def _say_deployed(self, deployment: Deployment) -> None:
        self._commands.append(Flush())
        self._say(requests.deployed(deployment, self._known.here))

    def _say_undeployed(self, deployment: Deployment) -> None:
        token = (deployment.job, deployment.number)
        self._say(requests.undeployed(deployment, self._known.here), token=token)

    def _change(self, jobs: set[str]) -> None:
        if jobs:
            self._commands.append(Changed(frozenset(jobs)))

    def _change_nodes(self, nodes: frozenset[str]) -> None:
        if nodes:
            self._commands.append(NodesChanged(nodes))

    def _refuse(self, what: str, error: MessageError) -> None:
        self.counters["refused"] += 1
        self._commands.append(Refused(what, str(error)))

    def _drain(self, now: float) -> list[Command]:
        """The commands of this event, with the questions that may be sent now."""
        self._send_queries(now)
        commands, self._commands = self._commands, []
        return commands
