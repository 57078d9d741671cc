"""What this node knows of the cluster's jobs. No input or output.

*Owned* by the session. Two sources are kept apart and seen as one (``jobs``): the cluster's answers, one a job, each
replaced as a whole; and the instances that run here, of which the node itself knows better and at once. So an instance
that was deployed here is reachable before the cluster has heard of it, and one that the cluster lists at this node
although it does not run here, not any more or not yet again after a reboot, is not chosen.

An address that two jobs claim belongs to both here; the tables give it to the first by name (``messages.entries``).
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping

from appliance.cluster.messages import Instance, TableQueryResult
from appliance.cluster.requests import Deployment, Endpoint
from appliance.tables.layout import IPAddress


class Known:
    """The jobs, by name. What changes something gives the jobs that look different now."""

    def __init__(self, here: Endpoint) -> None:
        self.here = here
        self.answers: dict[str, TableQueryResult] = {}
        """What the cluster said last."""
        self._jobs: dict[str, TableQueryResult] = {}
        self._owners: dict[IPAddress, set[str]] = {}
        self._own: dict[str, dict[int, Deployment]] = {}

    @property
    def jobs(self) -> Mapping[str, TableQueryResult]:
        """What is seen: answers, corrected by what runs here."""
        return self._jobs

    def owner(self, address: IPAddress) -> str | None:
        """The first job by name that has an address, as a container's or a service's."""
        return min(self._owners.get(address, ()), default=None)

    def is_deployed(self, job: str) -> bool:
        """Whether an instance of a job runs here."""
        return job in self._own

    def is_addressed(self, deployment: Deployment) -> bool:
        """Whether the cluster said which ServiceIPs an instance that runs here has, its own among them."""
        instances = self._jobs[deployment.job].instances
        return any(it.number == deployment.number and it.service_ips for it in instances)

    def deployments(self) -> Iterator[Deployment]:
        """What runs here."""
        return (deployment for numbers in self._own.values() for deployment in numbers.values())

    def answer(self, result: TableQueryResult) -> set[str]:
        """Replaces all that the cluster said about a job."""
        if result.instances or result.service_ips:
            if self.answers.get(result.job) != result:
                self.answers[result.job] = result
        else:
            self.answers.pop(result.job, None)
        return self._look(result.job)

    def lose(self, job: str, gone: Collection[IPAddress | None]) -> set[str]:
        """Instances with these namespace addresses are no more, before the next answer says so. Of those that run here
        the node knows better."""
        answer = self.answers.get(job)
        if answer is None:
            return set()
        left = tuple(it for it in answer.instances if it.address_v4 not in gone and it.address_v6 not in gone)
        if len(left) == len(answer.instances):
            return set()
        self.answers[job] = answer.model_copy(update={"instances": left})
        return self._look(job)

    def forget(self, job: str) -> set[str]:
        """Drops what the cluster said about a job."""
        self.answers.pop(job, None)
        return self._look(job)

    def deploy(self, deployment: Deployment) -> set[str]:
        """An instance runs here from now on."""
        self._own.setdefault(deployment.job, {})[deployment.number] = deployment
        return self._look(deployment.job)

    def deployment(self, job: str, number: int) -> Deployment | None:
        """An instance that runs here."""
        return self._own.get(job, {}).get(number)

    def undeploy(self, deployment: Deployment) -> set[str]:
        """An instance runs here no more."""
        numbers = self._own[deployment.job]
        del numbers[deployment.number]
        if not numbers:
            del self._own[deployment.job]
        return self._look(deployment.job)

    def move(self, here: Endpoint) -> set[str]:
        """The node is reached elsewhere from now on, and so are the instances that run here."""
        self.here = here
        changed: set[str] = set()
        for job in self._own:
            changed |= self._look(job)
        return changed

    def _look(self, job: str) -> set[str]:
        before, after = self._jobs.get(job), self._seen(job)
        if after is not None:
            self._jobs[job] = after
        elif before is not None:
            del self._jobs[job]
        if before == after:
            return set()
        for address in _addresses(before):
            self._owners[address].discard(job)
            if not self._owners[address]:
                del self._owners[address]
        for address in _addresses(after):
            self._owners.setdefault(address, set()).add(job)
        return {job}

    def _seen(self, job: str) -> TableQueryResult | None:
        answer = self.answers.get(job)
        listed = {} if answer is None else {it.number: it for it in answer.instances}
        seen = {number: it for number, it in listed.items() if not self._is_here(it)}
        for number, deployment in self._own.get(job, {}).items():
            seen[number] = self._running(listed.get(number), deployment)
        instances = tuple(seen[number] for number in sorted(seen))
        if not seen and (answer is None or not answer.service_ips):
            return None
        if answer is None:
            return TableQueryResult(app_name=job, instance_list=instances)
        return answer.model_copy(update={"instances": instances, "query_key": ""})

    def _running(self, listed: Instance | None, deployment: Deployment) -> Instance:
        """An instance that runs here, with its ServiceIPs. A cluster that thinks us lost lists it no more for a while:
        its addresses are its own for its life, so the last ones stay; and what was drained stays so."""
        known = self._jobs.get(deployment.job)
        instances = () if known is None else known.instances
        last = next((it for it in instances if it.number == deployment.number), None)
        told = listed or last
        kept = {} if told is None else {"weight": told.weight, "state": told.state}
        service_ips = () if listed is None else listed.service_ips
        return Instance(
            instance_number=deployment.number,
            namespace_ip=deployment.v4,
            namespace_ip_v6=deployment.v6,
            host_ip=self.here.address,
            host_port=self.here.port,
            service_ip=service_ips or (() if last is None else last.service_ips),
            **kept,
        )

    def _is_here(self, instance: Instance) -> bool:
        return (instance.node, instance.port) == (self.here.address, self.here.port)


def _addresses(result: TableQueryResult | None) -> set[IPAddress]:
    """Every address of a job that packets can be sent to: its containers' and its services'."""
    instances = () if result is None else tuple(it for it in result.instances if it.is_deployed)
    own = {address for it in instances for address in (it.address_v4, it.address_v6)}
    services = {address for it in instances for ip in it.service_ips for address in (ip.v4, ip.v6)}
    return {address for address in own | services if address is not None}
