"""The address plan: what is given, in which order, and what never is."""

from ipaddress import IPv4Address, IPv4Network, IPv6Address, IPv6Network

import pytest
from hypothesis import given
from hypothesis import strategies as st

from appliance.cluster.manager.addresses import ExhaustedError, Plan, PlanError, Space, is_usable
from appliance.config import IPNetwork


def first(space: Space, count: int) -> list[str]:
    """The first units that a space gives when none comes back."""
    given_: list[IPNetwork] = []
    cursor = 0
    for _ in range(count):
        unit, cursor = space.free(cursor, given_.__contains__)
        given_.append(unit)
    return [str(unit) for unit in given_]


def test_the_default_plan_begins_like_existing_clusters() -> None:
    plan = Plan()
    assert first(plan.node_v4, 2) == ["10.18.0.0/26", "10.18.0.64/26"]
    assert first(plan.node_v6, 2) == ["fc00::/120", "fc00::100/120"]
    assert first(plan.service_v4, 2) == ["10.30.0.0/32", "10.30.0.1/32"]
    assert first(plan.instance_v6, 2) == ["fdff::/128", "fdff::1/128"]
    assert first(plan.service_v6("rr"), 1) == ["fdff:2000::/128"]


def test_the_default_plan_ends_where_services_begin() -> None:
    space = Plan().node_v4
    assert str(space[space.size - 1]) == "10.29.255.192/26"


def test_a_space_goes_on_in_its_next_range() -> None:
    space = Space("x", (IPv4Network("10.0.0.0/31"), IPv4Network("10.1.0.0/31")), 32)
    assert first(space, 4) == ["10.0.0.0/32", "10.0.0.1/32", "10.1.0.0/32", "10.1.0.1/32"]


def test_a_full_space_says_so() -> None:
    space = Space("services-v4", (IPv4Network("10.0.0.0/31"),), 32)
    with pytest.raises(ExhaustedError, match=r"services-v4: expected a free one of 2 in 10\.0\.0\.0/31"):
        space.free(0, lambda unit: True)


def test_what_came_back_is_given_last() -> None:
    space = Space("x", (IPv4Network("10.0.0.0/30"),), 32)
    unit, cursor = space.free(0, lambda unit: False)
    assert space.free(cursor, lambda unit: False)[0] != unit
    others = {space[number] for number in (1, 2, 3)}
    assert space.free(cursor, others.__contains__)[0] == unit


def test_octets_above_253_are_not_given() -> None:
    space = Space("x", (IPv4Network("10.30.0.248/29"),), 32)
    assert first(space, 6)[-1] == "10.30.0.253/32"
    with pytest.raises(ExhaustedError):
        first(space, 7)


@given(st.integers(min_value=0, max_value=(1 << 20) * 10))
def test_every_unit_is_inside_its_ranges_and_usable(cursor: int) -> None:
    for space in (Plan().node_v4, Plan().node_v6, Plan().service_v4, Plan().instance_v6):
        unit, after = space.free(cursor, lambda unit: False)
        assert unit.prefixlen == space.unit
        assert unit.network_address in space
        assert unit.broadcast_address in space
        assert is_usable(unit)
        assert 0 < after <= space.size


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"subnets_v4": (IPv4Network("10.30.0.0/17"),)}, "subnets-v4: expected ranges that do not overlap services-v4"),
        ({"prefix_v4": 8}, "subnets-v4: expected ranges of /8 or larger"),
        ({"rr_v6": (IPv6Network("fdff::/16"),)}, "expected ranges that do not overlap"),
    ],
)
def test_a_plan_that_contradicts_itself_is_refused(wrong: dict[str, object], words: str) -> None:
    with pytest.raises(PlanError, match=words):
        Plan(**wrong)  # type: ignore[arg-type]


def test_membership() -> None:
    assert IPv4Address("10.30.255.1") in Plan().service_v4
    assert IPv6Address("fdff:2000::9") not in Plan().instance_v6
