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
    ips = tuple(_service_ips(plan, descriptor, state, allocation))
    wanted = Job(service_ips=ips, names=_names(descriptor), drain=descriptor.drain)
    numbers = set(state.numbers(job))
    surplus = sorted(number for number in numbers if number >= descriptor.instances)
    missing = [number for number in range(descriptor.instances) if number not in numbers][:STEP]
    changes = dict(_parting(job, descriptor.drain, state, surplus))
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


def _parting(job: str, drain: float, state: State, numbers: list[int]) -> Iterator[tuple[str, Document | None]]:
    """A step of what becomes of instances that are not wanted any more: they go, or drain first if they run."""
    left = STEP
    for number in numbers:
        instance = state.instance(job, number)
        if not left or (instance is not None and instance.leaving_s):
            continue
        left -= 1
        if instance is None or not drain or state.live(job, number) is None:
            yield instance_key(job, number), None
        else:
            yield instance_key(job, number), instance.model_copy(update={"state": "draining", "leaving_s": drain})


def leave(job: str, number: int, state: State) -> Outcome:
    """Removes an instance that has drained, unless it is gone, or wanted again; a step towards the service being gone
    too, if it leaves and this is the last one."""
    instance, document = state.instance(job, number), state.job(job)
    if document is not None and document.leaving and set(state.numbers(job)) <= {number}:
        return remove(job, state)
    if instance is None or not instance.leaving_s:
        return Outcome()
    changes: dict[str, Document | None] = {SERVICES: state.pool(SERVICES), instance_key(job, number): None}
    return Outcome(changes, notices([job], UNDEPLOYMENT))


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
        instance, wanted = state.instance(descriptor.job, number), {**descriptor.of_instance(number), "leaving_s": 0.0}
        if instance is not None and any(getattr(instance, name) != value for name, value in wanted.items()):
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


def undeploy(job: str, state: State) -> Outcome:
    """A step towards the service being gone: instances that run drain before, for as long as its descriptor said."""
    document, numbers = state.job(job), state.numbers(job)
    if document is None or not document.drain or not any(state.live(job, it) for it in numbers):
        return remove(job, state)
    changes = dict(_parting(job, document.drain, state, numbers))
    if not document.leaving:
        changes = {job_key(job): document.model_copy(update={"leaving": True}), **changes}
    if not changes:
        return Outcome()
    return Outcome({SERVICES: state.pool(SERVICES), **changes}, notices([job], UNDEPLOYMENT))


def remove(job: str, state: State) -> Outcome:
    """A step towards the service being gone at once: its instances first, then the rest."""
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


def described(state: State, job: str) -> dict[str, Any]:
    """A service as a descriptor says it, with the addresses that it has; empty if there is none. What is as it is by
    default is left out."""
    document = state.job(job)
    if document is None:
        return {}
    instances = {number: it for number in state.numbers(job) if (it := state.instance(job, number)) is not None}
    stay = {number: it for number, it in instances.items() if not it.leaving_s}
    ips = {it.policy: it.model_dump(mode="json", exclude={"policy"}) for it in document.service_ips}
    return {
        "instances": len(stay),
        "service_ips": ips,
        "weights": {str(number): it.weight for number, it in stay.items() if it.weight != 1},
        "states": {str(number): it.state for number, it in stay.items() if it.state != "up"},
        "drain": document.drain,
        **document.names.model_dump(mode="json", exclude_defaults=True),
    }


def preview(plan: Plan, descriptor: Descriptor, state: State) -> list[dict[str, Any]]:
    """What `put` would change, key by key: before and after, None where there is nothing. Addresses that would be
    assigned are told as ``assigned``. Raises what `put` raises."""
    put(plan, descriptor, state)
    before = described(state, descriptor.job)
    held = before.get("service_ips", {})
    ips = {
        policy: {
            "v4": _preview_address(wanted.v4, held.get(policy, {}).get("v4")),
            "v6": _preview_address(wanted.v6, held.get(policy, {}).get("v6")),
            "sticky": wanted.sticky,
            "hash_port": wanted.hash_port,
        }
        for policy, wanted in descriptor.service_ips.items()
    }
    numbers = range(descriptor.instances)
    after = {
        "instances": descriptor.instances,
        "service_ips": ips,
        "weights": {str(n): it for n, it in sorted(descriptor.weights.items()) if n in numbers and it != 1},
        "states": {str(n): it for n, it in sorted(descriptor.states.items()) if n in numbers and it != "up"},
        "drain": descriptor.drain,
        **_names(descriptor).model_dump(mode="json", exclude_defaults=True),
    }
    return list(_different(before, after, ""))


def _preview_address(wanted: IPv4Address | IPv6Address | str, held: str | None) -> str | None:
    if wanted == "none":
        return None
    return (held or "assigned") if isinstance(wanted, str) else str(wanted)


def _different(before: Any, after: Any, at: str) -> Iterator[dict[str, Any]]:
    """Leaves of two trees that differ."""
    if isinstance(before, dict | None) and isinstance(after, dict | None) and (before or after):
        old, new = before or {}, after or {}
        for key in [*new, *(key for key in old if key not in new)]:
            yield from _different(old.get(key), new.get(key), f"{at}.{key}" if at else str(key))
    elif before != after and (before or after):
        yield {"key": at, "before": before, "after": after}


def view(state: State, job: str) -> dict[str, Any]:
    """A service for people and programs. The job must exist."""
    document = state.job(job) or Job()
    return {
        "name": job,
        "leaving": document.leaving,
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
