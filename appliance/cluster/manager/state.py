"""The cluster's state in memory: all documents, and the indexes that decisions look things up in.

Theory of operation
-------------------
A `State` mirrors the bucket. It changes by `apply` only, which keeps the indexes right; decisions read it. Within
`trial`, changes are applied so that the next decision sees them, and undone at the end: what is wanted becomes true
only when the bucket has accepted it and it comes back from there. A trial contains no await, so nobody else ever sees
what was only tried.

A deleted key keeps the revision of its deletion, because that is what the next write to it has to expect.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from ipaddress import IPv4Network, IPv6Network
from typing import TypeVar

from appliance.cluster.manager.documents import (
    Document,
    Instance,
    Interest,
    Job,
    Node,
    Pool,
    instance_key,
    job_key,
    node_key,
)
from appliance.config import IPAddress, IPNetwork, overlap

Of = TypeVar("Of", bound=Document)
Changes = Mapping[str, Document | None]
"""Documents to be written by key; None deletes."""


class State:
    """All documents by key, with revisions and indexes."""

    def __init__(self) -> None:
        self._documents: dict[str, Document] = {}
        self._revisions: dict[str, int] = {}
        self._numbers: defaultdict[str, set[int]] = defaultdict(set)
        self._owners: defaultdict[IPAddress, set[str]] = defaultdict(set)
        self._placed: defaultdict[str, set[tuple[str, int]]] = defaultdict(set)
        self._interests: defaultdict[str, set[str]] = defaultdict(set)
        self._leases: dict[IPNetwork, str] = {}
        self._sizes: Counter[tuple[int, int]] = Counter()

    # --- documents ------------------------------------------------------------------------------

    def apply(self, key: str, document: Document | None, revision: int) -> None:
        """Takes over what the bucket holds for a key."""
        self._set(key, document)
        self._revisions[key] = revision

    def revision(self, key: str) -> int:
        """The revision that a write to a key has to expect; 0 if it was never written."""
        return self._revisions.get(key, 0)

    def node(self, node: str) -> Node | None:
        """A node, if it was ever heard of."""
        return self._get(node_key(node), Node)

    def job(self, job: str) -> Job | None:
        """A service, if there is one of that name."""
        return self._get(job_key(job), Job)

    def instance(self, job: str, number: int) -> Instance | None:
        """An instance of a job."""
        return self._get(instance_key(job, number), Instance)

    def pool(self, key: str) -> Pool:
        """Where searches in a group of spaces begin."""
        return self._get(key, Pool) or Pool()

    # --- indexes --------------------------------------------------------------------------------

    def jobs(self) -> list[str]:
        """Names of all jobs, sorted."""
        return sorted(key.removeprefix("job.") for key in self._documents if key.startswith("job."))

    def nodes(self) -> list[str]:
        """All nodes, sorted."""
        return sorted(key.removeprefix("node.") for key in self._documents if key.startswith("node."))

    def numbers(self, job: str) -> list[int]:
        """Numbers of a job's instances, sorted."""
        return sorted(self._numbers.get(job, ()))

    def owner(self, address: IPAddress) -> str | None:
        """The job that has an address as ServiceIP or instance IP; the first by name, should two claim it."""
        return min(self._owners.get(address, ()), default=None)

    def placed_on(self, node: str) -> list[tuple[str, int]]:
        """Jobs and numbers of the instances that a node announced last, also if it is lost."""
        return sorted(self._placed.get(node, ()))

    def with_instances(self) -> list[str]:
        """Nodes that instances were placed on."""
        return list(self._placed)

    def interested(self, job: str) -> list[str]:
        """Nodes that follow a job."""
        return sorted(self._interests.get(job, ()))

    def follows(self, node: str, job: str) -> bool:
        """Whether a node follows a job."""
        return node in self._interests.get(job, ())

    def leased_to(self, address: IPAddress) -> str | None:
        """The node whose subnet holds an address."""
        sizes = (size for version, size in self._sizes if version == address.version)
        networks = (_around(address, size) for size in sizes)
        return next((self._leases[network] for network in networks if network in self._leases), None)

    def is_leased(self, wanted: IPNetwork) -> bool:
        """Whether any node's subnet shares an address with a network."""
        if self.leased_to(wanted.network_address) is not None:
            return True
        smaller = any(size > wanted.prefixlen for version, size in self._sizes if version == wanted.version)
        return smaller and any(overlap(lease, wanted) for lease in self._leases)

    def live(self, job: str, number: int) -> Instance | None:
        """An instance that packets can be sent to: its node is there, and announced it since it was last lost."""
        instance = self.instance(job, number)
        if instance is None or instance.placement is None:
            return None
        node = self.node(instance.placement.node)
        lost = node is not None and (node.online is False or instance.announced_at <= node.lost_at)
        return None if lost else instance

    # --- trying ---------------------------------------------------------------------------------

    @contextmanager
    def trial(self) -> Iterator[Trial]:
        """Changes that the block tries are undone at its end. The block must not await."""
        trial = Trial(self)
        try:
            yield trial
        finally:
            trial.undo()

    def document(self, key: str) -> Document | None:
        """The document of a key."""
        return self._documents.get(key)

    def _get(self, key: str, kind: type[Of]) -> Of | None:
        document = self._documents.get(key)
        return document if isinstance(document, kind) else None

    def _set(self, key: str, document: Document | None) -> None:
        """Replaces a document, and what the indexes know of it."""
        old = self._documents.pop(key, None)
        if old is not None:
            self._index(key, old, False)
        if document is not None:
            self._documents[key] = document
            self._index(key, document, True)

    def _index(self, key: str, document: Document, there: bool) -> None:
        rest = key.split(".", 1)[1]
        match document:
            case Node():
                self._index_leases(rest, document, there)
            case Job():
                for service_ip in document.service_ips:
                    _toggle(self._owners, service_ip.addresses, rest, there)
            case Instance():
                job, _, number = rest.rpartition(".")
                self._index_instance(job, int(number), document, there)
            case Interest():
                node, job = rest.split(".", 1)
                _toggle(self._interests, [job], node, there)

    def _index_leases(self, node: str, document: Node, there: bool) -> None:
        for lease in (document.subnet_v4, document.subnet_v6):
            if lease is None:
                continue
            shape = (lease.version, lease.prefixlen)
            if there:
                self._leases[lease] = node
                self._sizes[shape] += 1
            else:
                self._leases.pop(lease, None)
                self._sizes -= Counter([shape])

    def _index_instance(self, job: str, number: int, document: Instance, there: bool) -> None:
        _toggle(self._numbers, [job], number, there)
        _toggle(self._owners, (document.v4, document.v6), job, there)
        if document.placement is not None:
            _toggle(self._placed, [document.placement.node], (job, number), there)


class Trial:
    """Changes to a state that are undone again, all or back to a mark."""

    def __init__(self, state: State) -> None:
        self._state = state
        self._before: list[tuple[str, Document | None]] = []
        self.changes: dict[str, Document | None] = {}

    def apply(self, changes: Changes) -> None:
        """Makes changes visible to the decisions that follow."""
        for key, document in changes.items():
            self._before.append((key, self._state.document(key)))
            self._state._set(key, document)
            self.changes[key] = document

    def undo(self) -> None:
        """Takes all back, last first."""
        while self._before:
            self._state._set(*self._before.pop())


def _around(address: IPAddress, size: int) -> IPNetwork:
    if address.version == 4:
        return IPv4Network((int(address), size), strict=False)
    return IPv6Network((int(address), size), strict=False)


Key = TypeVar("Key")
Value = TypeVar("Value")


def _toggle(index: defaultdict[Key, set[Value]], keys: Iterable[Key], value: Value, there: bool) -> None:
    """Adds a value under keys, or takes it away; a key without values is dropped."""
    for key in keys:
        if there:
            index[key].add(value)
        else:
            index[key].discard(value)
            if not index[key]:
                del index[key]
