"""The guard's judgement, and that a slow-down reaches the packet path."""

import os
import subprocess
import sys

import pytest

from perf import slow, smoke
from perf.load.tool import ROOT
from perf.results import Plan, Result
from tests.perf.test_results import result

USUAL = {"tcp1": 0.6, "udp64-flows": 1.0, "rr": 1.25}
BASELINE = smoke.Baseline(command="", started=result().started, commit="", ratios=USUAL)


def measured(plan: Plan, **ratios: float) -> Result:
    """A run whose ratios are the usual ones, but for these."""
    samples = []
    for name in plan.scenarios:
        key, value = smoke.metric_of(name)[0], {**USUAL, **{k.replace("_", "-"): v for k, v in ratios.items()}}[name]
        samples += [(name, "vxlan", 0, {key: 10.0}), (name, "appliance", 0, {key: 10.0 * value})]
    return result(*samples, repeats=1)


HELD, LOST, UNDECIDED = smoke.Verdict.HELD, smoke.Verdict.LOST, smoke.Verdict.UNDECIDED


def tried(busy: float = 0.0, **ratios: float) -> tuple[smoke.Verdict, list[tuple[str, ...]]]:
    """What the guard says, and what it measured in each try."""
    tries: list[tuple[str, ...]] = []

    def measure(plan: Plan) -> Result:
        tries.append(plan.scenarios)
        return measured(plan, **ratios)

    return smoke.guard(BASELINE, measure, lambda _: None, lambda: busy), tries


def test_what_holds_is_measured_once():
    assert tried(tcp1=0.5, udp64_flows=0.85, rr=1.5) == (HELD, [smoke.GUARDED])


@pytest.mark.parametrize("lost", [{"tcp1": 0.47}, {"udp64_flows": 0.7}, {"rr": 1.6}])
def test_what_lost_more_than_a_fifth_is_tried_three_times_alone(lost):
    (name,) = (it.replace("_", "-") for it in lost)
    assert tried(**lost) == (LOST, [smoke.GUARDED, (name,), (name,)])


def test_a_disturbed_try_is_forgiven():
    ratios = iter([0.1, 0.6])
    assert smoke.guard(BASELINE, lambda plan: measured(plan, tcp1=next(ratios)), lambda _: None) is HELD


def judged_on(*busy: float) -> smoke.Verdict:
    """What the guard says of code that is slow, the machine being so busy when it is asked."""
    rest = iter(busy)
    return smoke.guard(BASELINE, lambda plan: measured(plan, tcp1=0.1), lambda _: None, lambda: next(rest, 0.0))


def test_a_busy_machine_is_not_measured_and_convicts_nobody():
    assert tried(busy=50.0, tcp1=0.1) == (UNDECIDED, [])


def test_two_quiet_tries_convict_and_one_does_not():
    assert judged_on(0.0, 50.0) is LOST
    assert judged_on(0.0, 50.0, 0.0, 50.0) is UNDECIDED


def test_what_could_not_be_measured_is_lost():
    assert not smoke.judge("tcp1", 0.6, None).held


def test_the_baseline_is_of_a_run_with_all_that_is_guarded():
    usual = Plan(systems=("vxlan", "appliance"), scenarios=smoke.GUARDED, repeats=1, seconds=1)
    assert smoke.Baseline.of(measured(usual)).ratios == pytest.approx(USUAL)
    with pytest.raises(ValueError, match="udp64-flows, rr"):
        smoke.Baseline.of(measured(usual.model_copy(update={"scenarios": ("tcp1",)})))


def test_the_committed_baseline_can_be_read():
    assert set(smoke.Baseline.model_validate_json(smoke.FILE.read_bytes()).ratios) == set(smoke.GUARDED)


@pytest.mark.parametrize("kind", slow.KINDS)
def test_a_slow_down_replaces_what_takes_packets_and_nothing_else(kind, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", str(ROOT))
    monkeypatch.setenv(slow.KIND, "")
    slow.enable(kind)
    code = """
import ctypes, os, time
from appliance.dataplane import libc
names = libc._NAMES
own = [ctypes.cast(getattr(ctypes.CDLL(None), name), ctypes.c_void_p).value for name in names]
table = libc.table()
print(*(name for name, a, b in zip(names, table, own) if a != b))
read = ctypes.CFUNCTYPE(ctypes.c_int64, *[ctypes.c_int64] * 3)(int(table[libc.READ]))
end, other = os.pipe()
os.write(other, bytes(100))
room = ctypes.create_string_buffer(1)
began = time.perf_counter_ns()
for _ in range(100):
    assert read(end, ctypes.addressof(room), 1) == 1
print(time.perf_counter_ns() - began)
"""
    said = subprocess.run([sys.executable, "-c", code], env=os.environ, capture_output=True, text=True, check=True)
    changed, took = said.stdout.splitlines()
    assert changed.split() == ["read", "recvmmsg"]
    assert int(took) > 100 * 4_000
