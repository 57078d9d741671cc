"""What would happen to a packet, step by step.

Theory of operation
-------------------
The answer is not worked out a second time: the packet goes through the compiled packet path itself, over the live
tables and a copy of the live flows (``standin``), and the sentences explain what came of it. So it agrees with what
happens, but for what only a worker's private memory knows: whose turn it is in a round robin, which of equally loaded
instances ``least-flows`` draws, and hosts that were learned from packets. ``certain`` says whether a new flow's
instance is sure; ``candidates`` are those that it may get. ``later`` are the reasons for which it may still be dropped:
what the kernel refuses when it is asked, what becomes of the fragments before and after, what the cluster answers.

The supervisor has it done by a process of its own (``tracer``).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any, Final

import numpy as np

from appliance.dataplane import flow
from appliance.dataplane.state import Settings
from appliance.dataplane.steering import steer
from appliance.observe import counters, packets
from appliance.observe.counters import Drop
from appliance.observe.flows import describe
from appliance.observe.meanings import sentence
from appliance.observe.packets import Meaning
from appliance.observe.standin import Endpoint, Outcome, StandIn, copied_flows
from appliance.tables import layout
from appliance.tables.catalogue import Host, Service
from appliance.tables.layout import IPAddress, IPNetwork
from appliance.tables.read import Tables

SENT: Final = "sent"
DELIVERED: Final = "delivered"
HELD: Final = "held"
REFUSED: Final = {SENT: [Drop.SEND_FAILED.label], DELIVERED: [Drop.TUN_WRITE_FAILED.label]}
"""What the kernel's refusal is counted as, by verdict."""
_FRAGMENT: Final = [Drop.FRAGMENT.label, Drop.FRAGMENT_TIMEOUT.label]
_TAKES_TURNS: Final = ("rr", "closest", "least-flows")


@dataclass(frozen=True)
class Node:
    """What of a node a trace reads. ``sticky`` and ``flows``, of each worker, are copied; hosts and services may be
    only those that the packet's addresses have to do with."""

    tables: Tables
    hosts: Mapping[IPAddress, Host]
    services: Mapping[IPAddress, Service]
    ranges: tuple[IPNetwork, ...]
    flows: list[Any]
    sticky: Any
    settings: Settings
    counters: Any = field(default_factory=lambda: np.zeros(counters.WORDS, np.int64))
    """They have the trace's announcement as a reader of the tables."""


@dataclass(frozen=True)
class Answer:
    """What would happen to a packet."""

    packet: str
    verdict: str
    """``sent``, ``delivered``, ``held`` or the reason for the drop."""
    worker: int
    flow: dict[str, Any] | None
    is_new: bool
    certain: bool
    candidates: list[str]
    becomes: str | None
    node: str | None
    replies: list[str]
    later: list[str]
    steps: list[str] = field(default_factory=list)

    def reply(self) -> dict[str, Any]:
        """As the local API has it."""
        return asdict(self)


@dataclass(frozen=True)
class Question:
    """A packet of a container, or of the node ``sender``, that comes at ``now``, CLOCK_MONOTONIC nanoseconds.

    ``refused``: if the cluster is asked for an address, it says that nobody has it.
    """

    packet: bytes
    sender: Endpoint | None = None
    refused: bool = False
    now: int = 0


def trace(node: Node, question: Question) -> Answer:
    """What happens to a packet."""
    sender, meaning = question.sender, packets.read(question.packet)
    owner = _owner(node, meaning, sender)
    first = _run(node, question, owner, 0)
    record = None if sender else _flow_of(first.records, meaning)
    before = None if sender else _flow_of(node.flows[owner], meaning)
    if before is not None and _is_chosen_anew(node, question, owner, before, first, meaning):
        before = None
    candidates = _candidates(node, meaning) if before is None and record is not None else []
    certain = len(candidates) < 2 or _is_certain(node, question, owner, first, meaning)
    answer = Answer(
        packet=str(meaning or "no IP packet"),
        verdict=_verdict(first, meaning),
        worker=owner,
        flow=None if record is None else describe(owner, record),
        is_new=before is None,
        certain=certain,
        candidates=[str(it) for it in candidates],
        becomes=_becomes(first, meaning),
        node=_where(first),
        replies=[str(it) for it in map(packets.read, _replies(first, meaning))],
        later=_later(node, question, owner, first, meaning),
    )
    return Answer(**{**asdict(answer), "steps": list(_steps(node, answer, meaning, sender, first))})


def _run(node: Node, question: Question, owner: int, turn: int) -> Outcome:
    flows = copied_flows(node.flows, owner)
    stand_in = StandIn(
        node.tables, node.settings, flows, node.sticky.copy(), node.counters, question.now, turn
    )
    return stand_in.run(question.packet, question.sender, refused=question.refused)


def _owner(node: Node, meaning: Meaning | None, sender: Endpoint | None) -> int:
    """The worker that has the packet's flow."""
    if meaning is None:
        return 0
    hi, lo = layout.words(meaning.destination if sender else meaning.source)
    with np.errstate(over="ignore"):
        return int(steer.py_func(hi, lo, meaning.source_port, meaning.destination_port)) % len(node.flows)


def _flow_of(records: Any, meaning: Meaning | None) -> Any:
    """The record of a container's packet among some; None if there is none."""
    if meaning is None:
        return None
    mine = records[records["state"] != flow.FREE]
    for name, address in (("local", meaning.source), ("dialled", meaning.destination)):
        hi, lo = layout.words(address)
        mine = mine[(mine[f"{name}_hi"] == hi) & (mine[f"{name}_lo"] == lo)]
    mine = mine[mine["protocol"] == meaning.protocol]
    for name, port in (("local_port", meaning.source_port), ("remote_port", meaning.destination_port)):
        mine = mine[(mine[name] & 0xFFFF) == port]
    return mine[0] if len(mine) else None


def _candidates(node: Node, meaning: Meaning | None) -> list[IPAddress]:
    """The instances that a ServiceIP's policy may choose, where it does not depend on the client alone."""
    service = None if meaning is None else node.services.get(meaning.destination)
    if service is None:
        return []
    offered = [backend for backend, _ in service.weighted()]
    near = [backend for backend in service.backends[: service.near] if backend in offered]
    return near if service.policy == "closest" and near else offered


def _is_certain(node: Node, question: Question, owner: int, first: Outcome, meaning: Meaning | None) -> bool:
    """Whether another turn would have brought the same instance: so for ``maglev``, ``sticky``, or one that is left."""
    return len(set(_targets(node, question, owner, first, meaning))) == 1


def _is_chosen_anew(
    node: Node, question: Question, owner: int, before: Any, first: Outcome, meaning: Meaning | None
) -> bool:
    """Whether a flow that there is does not stay: its instance is gone, or the connection was over."""
    return any(it != _target(before) for it in _targets(node, question, owner, first, meaning))


def _targets(
    node: Node, question: Question, owner: int, first: Outcome, meaning: Meaning | None
) -> Iterator[tuple[int, int] | None]:
    """Which instances some turns bring."""
    yield _target(_flow_of(first.records, meaning))
    service = None if meaning is None else node.services.get(meaning.destination)
    if service is not None and service.policy in _TAKES_TURNS:
        yield from (_target(_flow_of(_run(node, question, owner, turn).records, meaning)) for turn in (1, 2, 3))


def _target(record: Any) -> tuple[int, int] | None:
    return None if record is None else (int(record["target_hi"]), int(record["target_lo"]))


def _verdict(outcome: Outcome, meaning: Meaning | None) -> str:
    if outcome.drops:
        return next(reason for _, reason in outcome.drops)
    if outcome.sent:
        return SENT
    return DELIVERED if len(outcome.written) > len(_replies(outcome, meaning)) else HELD


def _later(node: Node, question: Question, owner: int, first: Outcome, meaning: Meaning | None) -> list[str]:
    """For which reasons it may be dropped after this verdict. A datagram that became whole is judged as any packet."""
    verdict = _verdict(first, meaning)
    if verdict != HELD:
        return REFUSED.get(verdict, [])
    if not first.asked:
        return _FRAGMENT
    return [reason for _, reason in _run(node, replace(question, refused=True), owner, 0).drops]


def _replies(outcome: Outcome, meaning: Meaning | None) -> list[bytes]:
    """What the node itself says to the sender: a packet to it that was dropped is answered, if at all."""
    return outcome.written if outcome.drops and meaning is not None else []


def _becomes(outcome: Outcome, meaning: Meaning | None) -> str | None:
    """The packet as it goes on."""
    if outcome.sent:
        return str(packets.read(outcome.sent[0][1]))
    went = outcome.written if not _replies(outcome, meaning) else []
    return str(packets.read(went[0])) if went else None


def _where(outcome: Outcome) -> str | None:
    if not outcome.sent:
        return None
    address, port = outcome.sent[0][0]
    return f"[{address}]:{port}" if address.version == 6 else f"{address}:{port}"


# --- In words -----------------------------------------------------------------------------------


def _steps(
    node: Node, answer: Answer, meaning: Meaning | None, sender: Endpoint | None, outcome: Outcome
) -> Iterator[str]:
    if meaning is not None:
        yield _origin(node, meaning, sender)
        yield _destination(node, meaning)
    if sender is None and answer.flow is not None:
        yield _choice(answer)
    if answer.becomes is not None and answer.becomes != answer.packet:
        yield f"translated: {answer.becomes}"
    yield from _end(answer, outcome)


def _origin(node: Node, meaning: Meaning, sender: Endpoint | None) -> str:
    host = _host(node, meaning.source)
    if host is None:
        known = f"the source {meaning.source} is in no table"
    else:
        place = "this node" if host.local else f"node {host.node}"
        known = f"the source {meaning.source} is {_name(host)} on {place}"
    return known if sender is None else f"from node {sender[0]}; {known}"


def _destination(node: Node, meaning: Meaning) -> str:
    address = meaning.destination
    service, host = node.services.get(address), node.hosts.get(address)
    if service is not None and service.policy == "instance":
        return f"the destination {address} is the instance IP of {service.name or 'an instance'}"
    if service is not None:
        offered = ", ".join(f"{backend} (weight {weight})" for backend, weight in service.weighted()) or "nobody"
        kept = f", clients stay for {service.sticky} s" if service.sticky else ""
        name = service.name or "a service"
        return f"the destination {address} is a ServiceIP of {name}, policy {service.policy}{kept}, offered: {offered}"
    if host is not None:
        place = "this node" if host.local else f"node {host.node}"
        return f"the destination {address} is {_name(host)} on {place}"
    if any(address in network for network in node.ranges if network.version == address.version):
        return f"the destination {address} is in network.services and in no table"
    return f"the destination {address} is in no table"


def _host(node: Node, address: IPAddress) -> Host | None:
    """Whose address it is: a namespace address, or an instance IP."""
    service = node.services.get(address)
    if service is not None and service.policy == "instance" and service.backends:
        return node.hosts.get(service.backends[0])
    return node.hosts.get(address)


def _name(host: Host) -> str:
    return f"the container {host.owner}" if host.owner else "a container"


def _choice(answer: Answer) -> str:
    assert answer.flow is not None
    target = answer.flow["target"]
    if not answer.is_new:
        return f"worker {answer.worker} has the flow, and it stays with {target}"
    if answer.certain:
        return f"worker {answer.worker} opens a flow to {target}"
    others = ", ".join(it for it in answer.candidates if it != target)
    return f"worker {answer.worker} opens a flow to {target}, or by turns to {others}"


def _end(answer: Answer, outcome: Outcome) -> Iterator[str]:
    if answer.verdict == SENT:
        count = len(outcome.sent)
        parts = "" if count == 1 else f" as {count} packets"
        yield f"sent to node {answer.node}{parts}, {len(outcome.sent[0][1])} bytes inside the tunnel"
    elif answer.verdict == DELIVERED:
        yield "delivered to the container on this node"
    elif answer.verdict == HELD:
        asked = ", ".join(map(str, outcome.asked))
        what = f"the cluster is asked for {asked}" if asked else "the rest of its datagram is waited for"
        yield f"held: {what}; dropped if that does not come in time, as {' or '.join(answer.later)}"
    else:
        yield f"dropped, {answer.verdict}: {sentence(answer.verdict)}"
    for reply in answer.replies:
        yield f"the sender is told: {reply}"
