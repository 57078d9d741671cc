"""From what is known of jobs to the tables of the workers.

Theory of operation
-------------------
*Owns* the jobs of two sources, the file ``tables.static`` and the cluster, and each job's table entries. *Written* by
the supervisor's event loop alone; everything here runs to its end at once.

A job is taken from the file if it is there, else from the cluster. Its entries are derived anew when it changes, when
it begins or ends to be in the file, and all jobs' when the node gets another underlay address, as a host is local by
that. ``tables.claims`` tells which addresses this touches; only those are compared with the tables, so an update costs
what has changed and not what there is.

If the tables are full, what did not fit stays on a list that is tried again with the next change, and the error is
raised. Listeners are called once the change is in the tables; one that fails is logged and harms nobody else.
"""

from __future__ import annotations

import logging
from collections import ChainMap
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from itertools import groupby
from typing import Final

from appliance.cluster.feed import Tables
from appliance.cluster.messages import TableQueryResult, entries_of_job
from appliance.cluster.requests import Endpoint
from appliance.collector import aside
from appliance.tables.catalogue import Catalogue, Change, Host, Service
from appliance.tables.claims import Claims
from appliance.tables.layout import IPAddress
from appliance.tables.publish import TableFullError

log = logging.getLogger(__name__)

MANY: Final = 1_000
"""Jobs that change at once from which on the collector is kept away: a start or another uplink, not a notice."""

Jobs = Mapping[str, TableQueryResult]
Arrange = Callable[[Callable[[IPAddress], Host | None], list[Service]], list[Service]]
"""Puts the instances of ``closest`` services in order (``supervisor.prober``)."""
Listener = Callable[[Tables], None]
"""Is given all jobs, and the names of those that are different now, or gone."""


class Publication:
    """See the module. ``here`` is where the other nodes reach this one."""

    def __init__(self, catalogue: Catalogue, here: Endpoint) -> None:
        self.listeners: list[Listener] = []
        self._catalogue = catalogue
        self._here = here
        self._static: Jobs = {}
        self._cluster: Jobs = {}
        self._hosts: Claims[Host] = Claims()
        self._services: Claims[Service] = Claims()
        self._new_hosts: dict[IPAddress, Host | None] = {}
        self._new_services: dict[IPAddress, Service | None] = {}
        self._closest: dict[IPAddress, Service] = {}
        self.arrange: Arrange = lambda _find, services: services

    @property
    def jobs(self) -> Jobs:
        """Everything that is known, by job."""
        return ChainMap(dict(self._static), dict(self._cluster))

    def is_static(self, job: str) -> bool:
        """Whether a job is taken from the file."""
        return job in self._static

    def job_of(self, address: IPAddress) -> str | None:
        """The job that has an address, as a service's or a container's."""
        return self._services.owner(address) or self._hosts.owner(address)

    def replace_static(self, results: Iterable[TableQueryResult]) -> Change:
        """These are the jobs of the file. Raises TableFullError, and those of before stay in force."""
        before, self._static = self._static, _by_job(results)
        changed = {job for job in before.keys() | self._static.keys() if before.get(job) != self._static.get(job)}
        try:
            return self._publish(changed)
        except TableFullError:
            self._static = before
            with suppress(TableFullError):  # what does not fit now either is tried again with the next change
                self._publish(changed)
            raise

    def update(self, tables: Tables) -> Change:
        """The cluster's jobs, of which some changed. Raises TableFullError."""
        self._cluster = tables.jobs
        return self._publish(tables.changed)

    def move(self, here: Endpoint) -> Change:
        """The node is reached elsewhere: derives everything anew. Raises TableFullError."""
        self._here = here
        return self._publish(self._static.keys() | self._cluster.keys())

    def forget_cluster(self) -> Change:
        """The node is a member no more. Raises TableFullError."""
        left, self._cluster = frozenset(self._cluster), {}
        return self._publish(left)

    def rearrange(self) -> None:
        """Another node is the nearest of a ``closest`` service."""
        try:
            self._publish(())
        except TableFullError as error:
            log.error("tables refused, the old order stays in force", extra={"error": str(error)})

    def _publish(self, changed: Iterable[str]) -> Change:
        """Brings what is known of these jobs into the tables, and tells the listeners."""
        names = frozenset(changed)
        with aside(when=len(names) >= MANY):
            self._derive(names)
            change = self._catalogue.update(self._new_hosts, self._new_services | self._arranged())
        self._new_hosts.clear()
        self._new_services.clear()
        self._tell(names)
        return change

    def _derive(self, jobs: Iterable[str]) -> None:
        for job in jobs:
            result = self._static.get(job) or self._cluster.get(job)
            hosts, services = (
                ({}, {}) if result is None else entries_of_job(result, self._here.address, self._here.port)
            )
            self._new_hosts.update(self._hosts.replace(job, hosts))
            self._new_services.update(self._services.replace(job, services))

    def _arranged(self) -> dict[IPAddress, Service | None]:
        """All ``closest`` services in order: a host that came or went may be theirs."""
        for address, service in self._new_services.items():
            if service is not None and service.policy == "closest":
                self._closest[address] = service
            else:
                self._closest.pop(address, None)
        return {it.address: it for it in self.arrange(self._hosts.entry, list(self._closest.values()))}

    def _tell(self, changed: frozenset[str]) -> None:
        if not changed or not self.listeners:
            return
        tables = Tables(self.jobs, changed)
        for listener in self.listeners:
            try:
                listener(tables)
            except Exception:
                log.exception("a listener of the tables failed")


def _by_job(results: Iterable[TableQueryResult]) -> dict[str, TableQueryResult]:
    """A file may list the instances of a job in several places."""
    ordered = sorted(results, key=lambda result: result.job)
    found = {}
    for job, group in groupby(ordered, key=lambda result: result.job):
        results_of_job = list(group)
        instances = tuple(instance for result in results_of_job for instance in result.instances)
        found[job] = results_of_job[0].model_copy(update={"instances": instances, "query_key": ""})
    return found
