"""The tables follow the jobs: whatever changes in whatever order, they hold what deriving all anew would give."""

from ipaddress import IPv4Address, ip_address

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from appliance.cluster.feed import Tables
from appliance.cluster.messages import Instance, ServiceIp, TableQueryResult, entries
from appliance.cluster.requests import Endpoint
from appliance.supervisor.publication import Publication
from appliance.tables.catalogue import Catalogue, Host, Service
from appliance.tables.layout import Capacity, IPAddress
from appliance.tables.publish import Publisher, TableFullError

HERE, THERE = Endpoint(ip_address("192.0.2.1"), 50103), Endpoint(ip_address("192.0.2.2"), 50103)
NAMES = ("a.ns.web.test", "b.ns.web.test", "c.ns.web.test")


def publication(hosts: int = 64) -> Publication:
    return Publication(Catalogue(Publisher(Capacity(hosts, 64, 256))), HERE)


def instance(
    number: int, address: int, node: Endpoint = HERE, *, service: int = 30, own: int | None = None
) -> Instance:
    rr = ServiceIp(IpType="RR", Address=IPv4Address(f"10.30.30.{service}"))
    instance_ip = ServiceIp(IpType="instance_ip", Address=IPv4Address(f"10.30.0.{address if own is None else own}"))
    return Instance(
        instance_number=number,
        namespace_ip=IPv4Address(f"10.18.0.{address}"),
        host_ip=node.address,
        host_port=node.port,
        service_ip=(rr, instance_ip),
    )


def job(name: str, *instances: Instance) -> TableQueryResult:
    return TableQueryResult(app_name=name, instance_list=instances)


def told(publication: Publication, jobs: dict[str, TableQueryResult], *changed: str) -> list[str]:
    return publication.update(Tables(jobs, frozenset(changed or jobs))).changed


Content = tuple[dict[IPAddress, Host], dict[IPAddress, Service]]


def content(publication: Publication) -> Content:
    return dict(publication._catalogue.hosts), dict(publication._catalogue.services)


def anew(publication: Publication, here: Endpoint) -> Content:
    hosts, services = entries(publication.jobs.values(), here.address, here.port)
    return {it.address: it for it in hosts}, {it.address: it for it in services}


few = st.integers(2, 5)
instances = st.builds(instance, st.integers(0, 3), few, st.sampled_from([HERE, THERE]), service=few, own=few)
some = st.lists(instances, max_size=3, unique_by=lambda it: it.number)
steps: st.SearchStrategy[tuple[str, object, list[Instance]]] = st.one_of(
    st.tuples(st.just("cluster"), st.sampled_from(NAMES), some),
    st.tuples(st.just("static"), st.sampled_from(NAMES), some),
    st.tuples(st.just("move"), st.sampled_from([HERE, THERE]), st.just([])),
)


@settings(max_examples=300, deadline=None)
@given(st.lists(steps, max_size=12))
def test_it_holds_what_deriving_everything_anew_would_give(changes: list[tuple[str, object, list[Instance]]]) -> None:
    subject, here = publication(), HERE
    cluster: dict[str, TableQueryResult] = {}
    static: dict[str, TableQueryResult] = {}
    for kind, what, found in changes:
        if kind == "move":
            assert isinstance(what, Endpoint)
            here = what
            subject.move(here)
            continue
        name, jobs = str(what), cluster if kind == "cluster" else static
        jobs.pop(name, None)
        if found:
            jobs[name] = job(name, *found)
        if kind == "cluster":
            told(subject, cluster, name)
        else:
            subject.replace_static(static.values())
        assert content(subject) == anew(subject, here)
    assert subject.jobs == cluster | static


def test_a_change_touches_only_its_own_addresses() -> None:
    subject = publication()
    jobs = {name: job(name, instance(0, 10 + at, service=at)) for at, name in enumerate(NAMES)}
    assert len(told(subject, jobs)) == 9
    jobs[NAMES[1]] = job(NAMES[1], instance(0, 11, THERE, service=1))
    assert told(subject, jobs, NAMES[1]) == ["host 10.18.0.11"]
    assert told(subject, jobs, *NAMES) == []


def test_an_address_of_two_jobs_is_the_first_ones_and_comes_back() -> None:
    subject = publication()
    jobs = {name: job(name, instance(0, 10 + at)) for at, name in enumerate(NAMES)}
    shared = ip_address("10.30.30.30")
    for name in reversed(NAMES):
        told(subject, jobs, name)
        assert subject.job_of(shared) == name
    for name, heir in zip(NAMES, [*NAMES[1:], None], strict=True):
        del jobs[name]
        told(subject, jobs, name)
        assert subject.job_of(shared) == heir


def test_a_full_table_costs_nobody_else_and_is_filled_as_soon_as_it_can_be() -> None:
    subject = publication(hosts=4)
    jobs = {NAMES[0]: job(NAMES[0], *(instance(number, 10 + number) for number in range(3)))}
    told(subject, jobs)
    jobs[NAMES[1]] = job(NAMES[1], *(instance(number, 20 + number, service=31) for number in range(3)))
    with pytest.raises(TableFullError, match=r"tables\.hosts"):
        told(subject, jobs, NAMES[1])
    assert content(subject)[0].keys() >= {ip_address(f"10.18.0.{10 + it}") for it in range(3)}
    del jobs[NAMES[0]]
    told(subject, jobs, NAMES[0])
    assert content(subject) == anew(subject, HERE)


def test_listeners_hear_of_each_change_once_it_is_published() -> None:
    subject = publication()
    heard: list[tuple[set[str], frozenset[str], int]] = []

    def failing(_: Tables) -> None:
        raise RuntimeError

    subject.listeners.append(failing)
    subject.listeners.append(lambda it: heard.append((set(it.jobs), it.changed, len(content(subject)[0]))))
    told(subject, {NAMES[0]: job(NAMES[0], instance(0, 10))})
    subject.replace_static([job(NAMES[1], instance(0, 11))])
    assert heard == [
        ({NAMES[0]}, frozenset({NAMES[0]}), 1),
        ({NAMES[0], NAMES[1]}, frozenset({NAMES[1]}), 2),
    ]


def test_a_file_that_does_not_fit_leaves_the_old_one_in_force() -> None:
    subject = publication(hosts=4)
    subject.replace_static([job(NAMES[0], instance(0, 10))])
    before = content(subject)
    with pytest.raises(TableFullError):
        subject.replace_static([job(NAMES[1], *(instance(number, 20 + number) for number in range(6)))])
    assert content(subject) == before
    assert set(subject.jobs) == {NAMES[0]}


def test_a_job_in_the_file_is_taken_from_there() -> None:
    subject = publication()
    subject.replace_static([job(NAMES[0], instance(0, 10)), job(NAMES[0], instance(1, 11))])
    told(subject, {NAMES[0]: job(NAMES[0], instance(0, 12))})
    assert set(content(subject)[0]) == {ip_address("10.18.0.10"), ip_address("10.18.0.11")}
    subject.replace_static([])
    assert set(content(subject)[0]) == {ip_address("10.18.0.12")}
