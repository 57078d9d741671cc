"""What a comparison of two results calls a change, and what it calls noise."""

import itertools
import random
from math import comb

import pytest

from perf.compare import _outside, arrangements, compare, shift
from tests.perf.test_results import result, tcp1


def test_the_distribution_of_u_is_that_of_all_orders():
    orders = list(itertools.combinations(range(9), 4))
    for u in range(4 * 5 + 1):
        counted = sum(sum(place - rank for rank, place in enumerate(chosen)) == u for chosen in orders)
        assert arrangements(4, 5, u) == counted


def test_the_interval_is_that_of_the_tables():
    """Critical values of U, two-sided 5 %, in Mann and Whitney's tables: 0 for 4 and 4, 2 for 5 and 5, 23 for 10."""
    assert [_outside(n, n) - 1 for n in (3, 4, 5, 10)] == [-1, 0, 2, 23]


def test_noise_is_called_a_change_as_seldom_as_promised():
    chance, called = random.Random(1), 0
    for _ in range(2_000):
        old, new = ([chance.lognormvariate(0, 0.1) for _ in range(5)] for _ in range(2))
        found = shift(old, new)
        assert found is not None
        called += not found.low <= 1 <= found.high
    assert 0.01 < called / 2_000 < 0.05
    assert comb(10, 5) == sum(arrangements(5, 5, u) for u in range(26))


def test_a_slower_machine_is_no_change():
    before, after = tcp1([10, 11, 10, 12, 10], [5, 5.5, 5, 6, 5]), tcp1([5, 5, 6, 5, 5], [2.5, 2.5, 3, 2.5, 2.5])
    verdicts = {it.system: it.verdict for it in compare(before, after)}
    assert verdicts == {"vxlan": "worse", "appliance": "no difference"}


def test_a_slower_appliance_is_a_change():
    before = tcp1([10, 11, 10, 12, 10], [5, 5.6, 5, 6.1, 5])
    after = tcp1([10, 11, 10, 12, 10], [4, 4.6, 4, 4.9, 4])
    (found,) = (it for it in compare(before, after) if it.system == "appliance")
    assert (found.verdict, found.relative) == ("worse", True)
    assert found.factor is not None
    assert found.factor.median == pytest.approx(0.8, abs=0.03)
    assert found.factor.high < 1


def test_less_time_is_better():
    def rr(values: list[float]):
        return result(*(("rr", "vxlan", i, {"p50_us": value}) for i, value in enumerate(values)))

    (found,) = compare(rr([100, 101, 102, 103]), rr([90, 91, 92, 93]))
    assert found.verdict == "better"


def test_three_repeats_prove_nothing():
    (_, found) = compare(tcp1([10, 10, 10], [5, 5, 5]), tcp1([10, 10, 10], [1, 1, 1]))
    assert (found.verdict, found.factor) == ("too few repeats", None)
