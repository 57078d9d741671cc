"""The address pool: which address, when, and never twice."""

from ipaddress import IPv4Address, IPv6Address, ip_address, ip_network

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from appliance.environment import AddressesExhausted
from appliance.environment.addresses import REST_S, AddressPool, IPAddress, bounds, gateway_of

V4 = ip_network("10.18.0.0/26")
V6 = ip_network("fc00::/120")


@pytest.mark.parametrize(
    ("subnet", "gateway", "first", "last", "count"),
    [
        ("10.18.0.0/26", "10.18.0.1/26", "10.18.0.2", "10.18.0.61", 60),
        ("10.18.0.64/26", "10.18.0.65/26", "10.18.0.66", "10.18.0.125", 60),
        ("10.18.0.0/30", "10.18.0.1/30", "10.18.0.2", "10.18.0.2", 1),
        ("10.16.0.0/16", "10.16.0.1/16", "10.16.0.2", "10.16.255.253", 65532),
        ("fc00::/120", "fc00::1/120", "fc00::2", "fc00::fe", 253),
        ("fc00::/126", "fc00::1/126", "fc00::2", "fc00::3", 2),
    ],
)
def test_every_address_but_those_of_network_gateway_ingress_and_broadcast(
    subnet: str, gateway: str, first: str, last: str, count: int
) -> None:
    pool = AddressPool([ip_network(subnet)])
    given = [pool.allocate(0.0) for _ in range(count)]
    assert str(gateway_of(ip_network(subnet))) == gateway
    assert given[0] == ip_address(first)
    assert given[-1] == ip_address(last)
    assert len(set(given)) == count
    with pytest.raises(AddressesExhausted):
        pool.allocate(0.0)


def test_several_subnets_one_after_the_other() -> None:
    pool = AddressPool([ip_network("10.18.0.0/30"), ip_network("10.18.0.64/30")])
    given = [pool.allocate(0.0) for _ in range(2)]
    assert [str(pool.interface(it)) for it in given] == ["10.18.0.2/30", "10.18.0.66/30"]
    assert [str(pool.gateway(it)) for it in given] == ["10.18.0.1", "10.18.0.65"]


def test_a_huge_subnet_costs_nothing() -> None:
    pool = AddressPool([ip_network("fc00::/48")])
    assert [str(pool.allocate(0.0)) for _ in range(2)] == ["fc00::2", "fc00::3"]


def test_freed_addresses_rest_and_then_come_first_in_the_order_they_were_freed() -> None:
    pool = AddressPool([V4])
    a, b, c = (pool.allocate(0.0) for _ in range(3))
    pool.release(b, 10.0)
    pool.release(a, 11.0)
    assert str(pool.allocate(10.0 + REST_S - 0.1)) == "10.18.0.5", "fresh while others rest"
    assert pool.allocate(10.0 + REST_S) == b
    assert str(pool.allocate(10.0 + REST_S)) == "10.18.0.6"
    assert pool.allocate(11.0 + REST_S) == a
    assert c not in (a, b)


def test_an_address_that_nobody_had_does_not_rest() -> None:
    pool = AddressPool([V4])
    first = pool.allocate(0.0)
    pool.give_back(first)
    assert pool.allocate(0.0) == first


def test_exhaustion_tells_when_the_next_one_is_free() -> None:
    pool = AddressPool([ip_network("10.18.0.0/29")])
    given = [pool.allocate(0.0) for _ in range(5)]
    pool.release(given[0], 100.0)
    with pytest.raises(AddressesExhausted) as raised:
        pool.allocate(118.0)
    expected = "expected a free address in 10.18.0.0/29, got none (4 in use, the next is free in 42 s)"
    assert str(raised.value) == expected


def test_without_a_subnet() -> None:
    with pytest.raises(AddressesExhausted, match="a subnet"):
        AddressPool([]).allocate(0.0)


def test_after_a_restart_what_may_have_been_freed_just_before_rests() -> None:
    """10.18.0.2 and .4 were given out once, as .5 was; from .6 on nothing was."""
    taken = [IPv4Address("10.18.0.3"), IPv4Address("10.18.0.5")]
    pool = AddressPool([V4], taken, now=1000.0)
    assert pool.in_use == 2
    assert [str(pool.allocate(1000.0)) for _ in range(2)] == ["10.18.0.6", "10.18.0.7"]
    rest = {str(pool.allocate(1000.0 + REST_S)) for _ in range(56)}
    assert {"10.18.0.2", "10.18.0.4"} <= rest
    assert not {"10.18.0.3", "10.18.0.5"} & rest


def test_a_gap_of_a_huge_subnet_costs_nothing() -> None:
    pool = AddressPool([ip_network("fc00::/64")], [IPv6Address("fc00::ffff:ffff:0:0")], now=0.0)
    assert str(pool.allocate(0.0)) == "fc00::ffff:ffff:0:1"


@pytest.mark.parametrize("address", ["10.18.0.0", "10.18.0.1", "10.18.0.63", "10.18.1.2", "fc00::2"])
def test_what_no_container_can_have_is_no_taken_address(address: str) -> None:
    with pytest.raises(ValueError, match=r"expected a container's address in 10\.18\.0\.0/26"):
        AddressPool([V4], [ip_address(address)])


def test_releasing_what_is_not_in_use() -> None:
    pool = AddressPool([V4, V6])
    with pytest.raises(KeyError):
        pool.release(IPv4Address("10.18.0.2"), 0.0)


class PoolMachine(RuleBasedStateMachine):
    """Any sequence of calls, beside a model that remembers every address: when it was last freed."""

    subnets = (ip_network("10.18.0.0/29"), ip_network("10.18.0.16/30"))

    def __init__(self) -> None:
        super().__init__()
        self.now = 0.0
        self.pool = AddressPool(self.subnets)
        self.used: list[IPAddress] = []
        self.freed_at: dict[IPAddress, float] = {}
        self.all = {net[n - int(net[0])] for net in self.subnets for n in range(bounds(net)[0], bounds(net)[1] + 1)}

    @rule(seconds=st.floats(0, 40))
    def time_passes(self, seconds: float) -> None:
        """Up to two thirds of the rest."""
        self.now += seconds

    @rule()
    def allocate(self) -> None:
        """An address that is free and has rested; none only if there is none."""
        free = self.all - set(self.used)
        ready = {it for it in free if self.freed_at.get(it, -REST_S) + REST_S <= self.now}
        if not ready:
            with pytest.raises(AddressesExhausted):
                self.pool.allocate(self.now)
            return
        address = self.pool.allocate(self.now)
        assert address in ready
        rested = [it for it in ready if it in self.freed_at]
        if rested:
            assert self.freed_at[address] == min(self.freed_at[it] for it in rested)
        self.used.append(address)
        self.freed_at.pop(address, None)

    @precondition(lambda self: self.used)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        """A container goes."""
        address = self._take(data)
        self.pool.release(address, self.now)
        self.freed_at[address] = self.now

    @precondition(lambda self: self.used)
    @rule(data=st.data())
    def give_back(self, data: st.DataObject) -> None:
        """A container was not made."""
        self.pool.give_back(self._take(data))

    @invariant()
    def counts(self) -> None:
        """What is given out is in use."""
        assert self.pool.in_use == len(self.used)

    def _take(self, data: st.DataObject) -> IPAddress:
        return self.used.pop(data.draw(st.integers(0, len(self.used) - 1)))


PoolMachine.TestCase.settings = settings(max_examples=60, stateful_step_count=40, deadline=None)
TestPool = PoolMachine.TestCase
