"""Services as operators want them: pure functions of state and descriptor to changes and messages.

A transaction has a limited size, so a decision goes only STEP instances far, and whoever executes it repeats it until
nothing is left to change. What was done up to then is a smaller service, never a wrong one. That also holds for each
beginning of a decision's documents in their order: a broker whose power fails may keep only the first of them.
"""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from ipaddress import IPv4Address, IPv6Address
from itertools import islice
from typing import Any

from appliance.cluster.manager.addresses import Plan, Space, is_usable, unit_of
from appliance.cluster.manager.answers import effective
from appliance.cluster.manager.decide import DEPLOYMENT, UNDEPLOYMENT, Outcome, RefusedError, notices
from appliance.cluster.manager.descriptor import Descriptor
from appliance.cluster.manager.descriptor import Exposure as Wish
from appliance.cluster.manager.documents import (
    SERVICES,
    SUBNETS,
    Document,
    Exposure,
    Instance,
    Job,
    Names,
    Node,
    Pool,
    ServiceIp,
    instance_key,
    interest_key,
    job_key,
    node_key,
)
from appliance.cluster.manager.state import State
from appliance.cluster.topics import ingress_job
from appliance.config import IPAddress, IPNetwork

STEP = 500
"""Documents that one decision writes or deletes at most; nats-server takes 1,000 in one transaction."""


class _Allocation:
    """Addresses given within one decision: free in the state, and not given before in the same decision."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._cursors = dict(state.pool(SERVICES).cursors)
        self._given: set[IPAddress] = set()

    def assign(self, space: Space) -> Any:
        """The next free address of a space. Raises ExhaustedError."""
        unit, self._cursors[space.name] = space.free(self._cursors.get(space.name, 0), self._is_taken)
        self._given.add(unit.network_address)
        return unit.network_address

    def pin(self, job: str, field: str, address: IPAddress, space: Space) -> Any:
        """A certain address, if it is in its space and nobody has it. Raises RefusedError."""
        if address not in space or not is_usable(unit_of(address)):
            raise RefusedError(f"{field}: expected an address in {', '.join(map(str, space.ranges))}, got {address}")
        owner = self._state.owner(address)
        if owner is not None or address in self._given:
            raise RefusedError(f"{field}: expected an address that is free, got {address} of {owner or job}")
        self._given.add(address)
        return address

    @property
    def pool(self) -> Pool:
        """Where the next search begins. It is written with every allocation, so that two cannot happen at once."""
        return Pool(cursors=self._cursors)

    def _is_taken(self, unit: IPNetwork) -> bool:
        address = unit.network_address
        return address in self._given or self._state.owner(address) is not None


def put(plan: Plan, descriptor: Descriptor, state: State) -> Outcome:
    """A step towards the service as described. Raises RefusedError or ExhaustedError.

    Addresses that it has and still wants are kept; instances are numbered from 0, so the highest go first.
    """
    _check_ports(descriptor, state)
    allocation = _Allocation(state)
    job = descriptor.job
    wanted = Job(service_ips=tuple(_service_ips(plan, descriptor, state, allocation)), names=_names(descriptor))
    numbers = set(state.numbers(job))
    surplus = sorted(number for number in numbers if number >= descriptor.instances)[:STEP]
    missing = [number for number in range(descriptor.instances) if number not in numbers][:STEP]
    changes: dict[str, Document | None] = {instance_key(job, number): None for number in surplus}
    changes |= {
        instance_key(job, number): _instance(plan, allocation).model_copy(update=descriptor.of_instance(number))
        for number in missing
    }
    room = max(0, STEP - len(changes))
    changes |= dict(islice(_adjusted(descriptor, state, numbers - set(surplus)), room))
    if state.job(job) != wanted:
        changes = {job_key(job): wanted, **changes}
    if not changes:
        return Outcome()
    return Outcome({SERVICES: allocation.pool, **changes}, notices([job], UNDEPLOYMENT if surplus else DEPLOYMENT))


def _check_ports(descriptor: Descriptor, state: State) -> None:
    """Raises RefusedError if a node would have to open a port for two services."""
    for index, wanted in enumerate(descriptor.exposed):
        for job in state.jobs():
            document = state.job(job)
            if job == descriptor.job or document is None:
                continue
            if any(_meet(wanted, it) for it in document.names.exposed):
                raise RefusedError(f"exposed.{index}.port: expected a port that is free, {wanted.port} is {job}'s")


def _meet(one: Exposure | Wish, other: Exposure | Wish) -> bool:
    """Whether two exposed ports may be one port of one node."""
    if (one.port, one.protocol) != (other.port, other.protocol):
        return False
    if None not in (one.address, other.address) and one.address != other.address:
        return False
    if isinstance(one.nodes, tuple) and isinstance(other.nodes, tuple):
        return bool(set(one.nodes) & set(other.nodes))
    return True


def _adjusted(descriptor: Descriptor, state: State, numbers: set[int]) -> Iterator[tuple[str, Document]]:
    """Instances whose weight or state is another one than wanted."""
    for number in sorted(numbers):
        instance, wanted = state.instance(descriptor.job, number), descriptor.of_instance(number)
        if instance is not None and (instance.weight, instance.state) != (wanted["weight"], wanted["state"]):
            yield instance_key(descriptor.job, number), instance.model_copy(update=wanted)


def _names(descriptor: Descriptor) -> Names:
    return Names.model_validate(descriptor.model_dump(include=set(Names.model_fields)))


def _service_ips(plan: Plan, descriptor: Descriptor, state: State, allocation: _Allocation) -> Iterator[ServiceIp]:
    existing = state.job(descriptor.job) or Job()
    by_policy = {service_ip.policy: service_ip for service_ip in existing.service_ips}
    for policy, wanted in descriptor.service_ips.items():
        held = by_policy.get(policy, ServiceIp(policy=policy))
        choose = partial(_choose, descriptor.job, allocation)
        v4 = choose(f"service_ips.{policy}.v4", wanted.v4, held.v4, plan.service_v4)
        v6 = choose(f"service_ips.{policy}.v6", wanted.v6, held.v6, plan.service_v6(policy))
        yield ServiceIp(policy=policy, v4=v4, v6=v6, sticky=wanted.sticky, hash_port=wanted.hash_port)


def _choose(
    job: str,
    allocation: _Allocation,
    field: str,
    wanted: IPv4Address | IPv6Address | str,
    held: IPAddress | None,
    space: Space,
) -> Any:
    """The address that a descriptor's word means, given the one that the service has."""
    if wanted == "none":
        return None
    if isinstance(wanted, str):
        return held or allocation.assign(space)
    return held if held == wanted else allocation.pin(job, field, wanted, space)


def _instance(plan: Plan, allocation: _Allocation) -> Instance:
    return Instance(v4=allocation.assign(plan.service_v4), v6=allocation.assign(plan.instance_v6))


def remove(job: str, state: State) -> Outcome:
    """A step towards the service being gone: its instances first, then the rest."""
    if state.job(job) is None:
        return Outcome()
    numbers = state.numbers(job)
    changes: dict[str, Document | None] = {instance_key(job, number): None for number in numbers[:STEP]}
    followers = state.interested(job)[: STEP - len(changes)]
    if len(numbers) < STEP:
        changes |= {interest_key(node, job): None for node in followers}
    if len(changes) < STEP:
        changes[job_key(job)] = None
    return Outcome({SERVICES: state.pool(SERVICES), **changes}, notices([job], UNDEPLOYMENT))


def view(state: State, job: str) -> dict[str, Any]:
    """A service for people and programs. The job must exist."""
    document = state.job(job) or Job()
    return {
        "name": job,
        "service_ips": [service_ip.model_dump(mode="json") for service_ip in document.service_ips],
        "instances": [_instance_view(state, job, number, chosen) for number, chosen in effective(state, job).items()],
        "interested": state.interested(job),
        "exposed": [it.model_dump(mode="json") for it in document.names.exposed],
        "health": None if document.names.health is None else document.names.health.model_dump(mode="json"),
    }


def _instance_view(state: State, job: str, number: int, chosen: str) -> dict[str, Any]:
    """``status``: where it runs; ``state``: what is wanted; ``healthy``: what its node found; ``chosen``: what follows
    from both, as nodes are told."""
    instance = state.instance(job, number)
    if instance is None:
        return {"number": number}
    live = state.live(job, number) is not None
    status = "up" if live else "lost" if instance.placement else "wanted"
    placement = instance.placement.model_dump(mode="json") if instance.placement else {}
    own = {"v4": str(instance.v4), "v6": str(instance.v6), "weight": instance.weight, "state": instance.state}
    return {"number": number, **own, "status": status, "healthy": instance.healthy, "chosen": chosen, **placement}


def node_view(state: State, name: str) -> dict[str, Any]:
    """A node for people and programs. It must exist."""
    node = state.node(name) or Node()
    status = {True: "online", False: "offline", None: "unknown"}[node.online]
    placed = [f"{job}.{number}" for job, number in state.placed_on(name)]
    subnets = {"subnet_v4": node.subnet_v4, "subnet_v6": node.subnet_v6}
    return {"id": name, "status": status, **{k: str(v) if v else None for k, v in subnets.items()}, "instances": placed}


def release(name: str, state: State) -> Outcome:
    """A step towards forgetting a node and its subnets. Raises RefusedError while it is there or runs something."""
    node = state.node(name)
    if node is None:
        return Outcome()
    placed = state.placed_on(name)
    if node.online or any(state.live(*it) for it in placed):
        raise RefusedError(f"node: expected one that is offline or runs nothing, got {name}")
    changes: dict[str, Document | None] = {}
    for job, number in placed[:STEP]:
        instance = state.instance(job, number)
        if instance is not None:
            changes[instance_key(job, number)] = instance.model_copy(update={"placement": None})
    if len(placed) <= STEP:
        changes |= {node_key(name): None, SUBNETS: state.pool(SUBNETS)}
        own = ingress_job(name)
        changes |= {instance_key(own, 0): None, job_key(own): None} if state.job(own) is not None else {}
    return Outcome(changes)
