"""What is done about a node's message: pure functions of state and request to changes and messages.

Every decision may be taken twice for the same message: a manager may die between writing and answering, and the
broker then hands the message to another one. So a decision that finds its change already made still answers.

Messages carry a number, higher for later ones, by which an old one that comes back is told from a new one.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from ipaddress import IPv4Address, IPv6Address
from typing import Any

from appliance.cluster.manager import topics
from appliance.cluster.manager.addresses import Plan
from appliance.cluster.manager.answers import found, nothing
from appliance.cluster.manager.documents import (
    SERVICES,
    SUBNETS,
    Instance,
    Interest,
    Job,
    Node,
    Placement,
    Pool,
    instance_key,
    interest_key,
    job_key,
    node_key,
)
from appliance.cluster.manager.requests import (
    AddressChanged,
    Checked,
    Deployed,
    InterestRemoved,
    Request,
    StatusChanged,
    SubnetWanted,
    TableQuery,
    Undeployed,
)
from appliance.cluster.manager.state import Changes, State
from appliance.cluster.topics import ingress_job

DEPLOYMENT = "DEPLOYMENT"
UNDEPLOYMENT = "UNDEPLOYMENT"
GONE_MAX = 256
"""Addresses that a notice lists: a message of a few kilobytes to everybody who follows the job."""


@dataclass(frozen=True)
class Message:
    """A JSON payload for a topic, or one that is encoded already, to be delivered at least once."""

    topic: str
    payload: dict[str, Any] | bytes
    retain: bool = False


@dataclass(frozen=True)
class Outcome:
    """What a decision wants: documents to write, all or none, then messages to send."""

    changes: Changes = field(default_factory=dict)
    messages: tuple[Message, ...] = ()


class RefusedError(Exception):
    """A decision against a request; the text names the field and what was expected. Nothing changes."""


@dataclass(frozen=True)
class Origin:
    """Who sent a message, and its number."""

    node: str
    number: int


Decision = Callable[[State], Outcome]


def notices(jobs: Iterable[str], change: str, gone: Iterable[tuple[str, Instance]] = ()) -> tuple[Message, ...]:
    """Hints to all who follow these jobs that there is something new to ask for.

    `gone`: jobs with instances whose namespace addresses are nobody's from now on. Nodes of ours stop sending there
    before they ask, others ignore it. Where there are more than GONE_MAX the answer has to tell.
    """
    lists: dict[str, list[str]] = {}
    for job, instance in gone:
        lists.setdefault(job, []).extend(map(str, _addresses(instance)))
    listed = {job: {"gone": found} for job, found in lists.items() if 0 < len(found) <= GONE_MAX}
    return tuple(Message(topics.updates(job), {"type": change, **listed.get(job, {})}) for job in sorted(set(jobs)))


def _addresses(instance: Instance) -> list[IPv4Address | IPv6Address]:
    """An instance's namespace addresses; none if it does not run."""
    placed = instance.placement
    return [] if placed is None else [it for it in (placed.address_v4, placed.address_v6) if it is not None]


def decide(state: State, plan: Plan, cluster: str, origin: Origin, request: Request) -> Outcome:
    """The outcome of a node's message. Raises RefusedError or ExhaustedError."""
    match request:
        case SubnetWanted():
            return lease(state, plan, origin)
        case Deployed():
            return deployed(state, plan, origin, request)
        case Checked():
            return checked(state, origin, request)
        case Undeployed():
            return undeployed(state, origin, request)
        case AddressChanged():
            return address_changed(state, origin, request)
        case TableQuery():
            return query(state, cluster, origin, request)
        case InterestRemoved():
            return interest_removed(state, origin, request)
        case StatusChanged():
            return came(state, origin, request) if request.online else lost(state, origin)


# --- subnets ------------------------------------------------------------------------------------


def lease(state: State, plan: Plan, origin: Origin) -> Outcome:
    """One subnet of each family a node, the same ones whenever it asks. Raises ExhaustedError."""
    node = state.node(origin.node) or Node()
    if node.subnet_v4 is not None and node.subnet_v6 is not None:
        return Outcome({}, (_leased(origin.node, node),))
    pool = state.pool(SUBNETS)
    v4, next_v4 = plan.node_v4.free(pool.cursors.get("v4", 0), state.is_leased)
    v6, next_v6 = plan.node_v6.free(pool.cursors.get("v6", 0), state.is_leased)
    new = node.model_copy(update={"subnet_v4": v4, "subnet_v6": v6})
    changes: Changes = {SUBNETS: Pool(cursors={"v4": next_v4, "v6": next_v6}), node_key(origin.node): new}
    return Outcome(changes, (_leased(origin.node, new),))


def _leased(node: str, document: Node) -> Message:
    """The answer of existing clusters, and the prefix lengths, which they take for granted."""
    v4, v6 = document.subnet_v4, document.subnet_v6
    assert v4 is not None
    assert v6 is not None
    payload = {
        "address": str(v4.network_address),
        "addressv6": str(v6.network_address),
        "prefix": v4.prefixlen,
        "prefixv6": v6.prefixlen,
    }
    return Message(topics.subnet_result(node), payload)


# --- instances ----------------------------------------------------------------------------------


def deployed(state: State, plan: Plan, origin: Origin, request: Deployed) -> Outcome:
    """Places an instance where its node says it runs. Raises RefusedError for one that was not asked for.

    A node that has ports for exposed services announces itself, as the only instance of a job of its own.
    """
    made: Changes = {}
    if request.job == ingress_job(origin.node) and request.number == 0 and state.job(request.job) is None:
        instance, made = _ingress(state, plan, request.job)
    else:
        instance = _expected(state, request.job, request.number)
    _check_addresses(state, origin.node, request)
    if instance.announced_at > origin.number:
        return Outcome()
    placement = Placement(
        node=origin.node, address_v4=request.v4, address_v6=request.v6, host=request.host, port=request.port
    )
    moved = instance.placement is None or instance.placement.node != origin.node
    news = {"placement": placement, "announced_at": origin.number, **({"healthy": None} if moved else {})}
    placed = instance.model_copy(update=news)
    replaced = _replaced(state, origin, request)
    changes = {**made, **replaced, instance_key(request.job, request.number): placed, **_present(state, origin)}
    gone = [_job_of(key) for key in replaced]
    return Outcome(changes, notices([request.job], DEPLOYMENT) + notices(gone, UNDEPLOYMENT))


def _ingress(state: State, plan: Plan, job: str) -> tuple[Instance, Changes]:
    """The instance that a node itself is, with addresses of its own. Raises ExhaustedError."""
    pool, cursors, found = state.pool(SERVICES), {}, []
    for space in (plan.service_v4, plan.instance_v6):
        unit, cursors[space.name] = space.free(
            pool.cursors.get(space.name, 0), lambda unit: state.owner(unit.network_address) is not None
        )
        found.append(unit.network_address)
    instance = Instance.model_validate({"v4": found[0], "v6": found[1]})
    return instance, {SERVICES: Pool(cursors=pool.cursors | cursors), job_key(job): Job()}


def checked(state: State, origin: Origin, request: Checked) -> Outcome:
    """Takes an instance out of the choice, or in again, as its node finds. Another node has no say."""
    instance = state.instance(request.job, request.number)
    if instance is None or instance.placement is None or instance.placement.node != origin.node:
        return Outcome()
    if instance.checked_at > origin.number or instance.healthy == request.healthy:
        return Outcome()
    news = instance.model_copy(update={"healthy": request.healthy, "checked_at": origin.number})
    change = DEPLOYMENT if request.healthy else UNDEPLOYMENT
    return Outcome({instance_key(request.job, request.number): news}, notices([request.job], change))


def _expected(state: State, job: str, number: int) -> Instance:
    instance = state.instance(job, number)
    if instance is None:
        known = "instance_number" if state.job(job) else "appname"
        raise RefusedError(f"{known}: expected an instance that was deployed, got {job} {number}")
    return instance


def _check_addresses(state: State, node: str, request: Deployed) -> None:
    """A node announces addresses of its own subnets, or of nobody's if its subnets are not ours to give."""
    if request.v4 is None and request.v6 is None:
        raise RefusedError("nsip, nsipv6: expected at least one of them")
    own = state.node(node) or Node()
    for name, address, subnet in (("nsip", request.v4, own.subnet_v4), ("nsipv6", request.v6, own.subnet_v6)):
        if address is None:
            continue
        if subnet is not None and address not in subnet:
            raise RefusedError(f"{name}: expected an address in the node's subnet {subnet}, got {address}")
        holder = state.leased_to(address)
        if holder not in (None, node):
            raise RefusedError(f"{name}: expected an address of the node's own, got {address} of {holder}")


def _replaced(state: State, origin: Origin, request: Deployed) -> Changes:
    """Instances that had one of these addresses on this node before: the node took it from them."""
    wanted = {request.v4, request.v6} - {None}
    changes: dict[str, Instance] = {}
    for job, number in state.placed_on(origin.node):
        instance = state.instance(job, number)
        if instance is None or instance.placement is None or (job, number) == (request.job, request.number):
            continue
        if wanted & {instance.placement.address_v4, instance.placement.address_v6}:
            changes[instance_key(job, number)] = _unplaced(instance, origin)
    return changes


def _unplaced(instance: Instance, origin: Origin) -> Instance:
    return instance.model_copy(update={"placement": None, "announced_at": origin.number})


def _job_of(key: str) -> str:
    return key.removeprefix("instance.").rpartition(".")[0]


def undeployed(state: State, origin: Origin, request: Undeployed) -> Outcome:
    """Takes an instance out of the answers, if it is on that node. Unknown ones are gone already."""
    instance = state.instance(request.job, request.number)
    if instance is None or instance.announced_at > origin.number:
        return Outcome()
    if instance.placement is not None and instance.placement.node != origin.node:
        return Outcome()
    key = instance_key(request.job, request.number)
    told = notices([request.job], UNDEPLOYMENT, [(request.job, instance)])
    return Outcome({key: _unplaced(instance, origin)}, told)


def address_changed(state: State, origin: Origin, request: AddressChanged) -> Outcome:
    """Moves everything on a node to the node's new address."""
    changes: dict[str, Instance] = {}
    jobs = set()
    for job, number in state.placed_on(origin.node):
        instance = state.instance(job, number)
        if instance is None or instance.placement is None or instance.announced_at > origin.number:
            continue
        placement = instance.placement.model_copy(update={"host": request.host, "port": request.port})
        jobs.add(job)
        if placement != instance.placement:
            changes[instance_key(job, number)] = instance.model_copy(update={"placement": placement})
    return Outcome(changes, notices(jobs, DEPLOYMENT))


# --- queries and interests ----------------------------------------------------------------------


def query(state: State, cluster: str, origin: Origin, request: TableQuery) -> Outcome:
    """Answers a table query, and notes that the node follows the job from now on. There is always an answer."""
    job = request.key if request.by_name else state.owner(request.address) if request.address else None
    topic = topics.query_result(origin.node)
    if job is None or state.job(job) is None:
        return Outcome(_present(state, origin), (Message(topic, nothing(job or "", request.key)),))
    changes = {} if state.follows(origin.node, job) else {interest_key(origin.node, job): Interest()}
    changes_all: Changes = {**changes, **_present(state, origin)}
    return Outcome(changes_all, (Message(topic, found(state, cluster, job, request.key)),))


def interest_removed(state: State, origin: Origin, request: InterestRemoved) -> Outcome:
    """Forgets an interest. One that is not there is no error: nodes send this twice, and for addresses."""
    if not state.follows(origin.node, request.job):
        return Outcome()
    return Outcome({interest_key(origin.node, request.job): None})


# --- presence -----------------------------------------------------------------------------------


def came(state: State, origin: Origin, request: StatusChanged) -> Outcome:
    """A node is there. Its instances return as it announces them: it may have lost them with its power."""
    node = state.node(origin.node) or Node()
    if node.status_at > origin.number:
        return Outcome()
    said = {"online": True, "status_at": origin.number, "host": request.host, "port": request.port}
    return Outcome({node_key(origin.node): node.model_copy(update=said)})


def lost(state: State, origin: Origin) -> Outcome:
    """A node is gone: its instances leave all answers with this one write, and who follows them hears of it."""
    node = state.node(origin.node) or Node()
    if node.status_at > origin.number:
        return Outcome()
    gone = {"online": False, "status_at": origin.number, "lost_at": origin.number}
    placed = [(job, it) for job, number in state.placed_on(origin.node) if (it := state.instance(job, number))]
    told = notices((job for job, _ in placed), UNDEPLOYMENT, placed)
    return Outcome({node_key(origin.node): node.model_copy(update=gone)}, told)


def _present(state: State, origin: Origin) -> Changes:
    """A node that is said to be lost and speaks is there: the will of an earlier connection came late."""
    node = state.node(origin.node)
    if node is None or node.online is not False or node.status_at > origin.number:
        return {}
    return {node_key(origin.node): node.model_copy(update={"online": True, "status_at": origin.number})}


def missed(since: int, origin: Origin, state: State) -> Outcome:
    """Counts a node as lost that said it was there up to message `since`, and not again since then.

    For a broker that was restarted: it has no connection left whose end it could notice.
    """
    node = state.node(origin.node)
    here = node is None or not node.online or node.status_at > since
    return Outcome() if here else lost(state, origin)
