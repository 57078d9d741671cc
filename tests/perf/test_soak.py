"""The verdict of a soak: what is flat, what a change explains, what is forgiven."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from random import Random

from perf import churn
from perf.load.calls import PAUSES_S, Failure
from perf.soak import FLAT, LATE_S, Change, Seen, judge, slope
from perf.watch import MACHINE, Growth, Memory, grown

MINUTES = 30


def seen(mib: Callable[[float], float] = lambda _: 100.0, **more: object) -> Seen:
    """A soak in which one worker had so much memory at each minute, and an instance was removed in the tenth."""
    memory = [Memory(60.0 * it, {"worker": mib(it)}, {"worker": 35}, {"worker": 1}) for it in range(MINUTES)]
    changes = [Change("instance removed", "web2", 600.0, 602.0)]
    return Seen(0.0, changes, memory, **{"calls": Counter(dict.fromkeys(PAUSES_S, 10)), **more})  # type: ignore[arg-type]


def wrong(it: Seen) -> list[str]:
    return [check.sentence for check in judge(it) if not check.true]


def test_nothing_that_happened_is_well() -> None:
    assert wrong(seen()) == []


def test_noise_warm_up_and_outliers_are_flat_and_a_leak_is_not() -> None:
    random = Random(4)
    assert wrong(seen(lambda it: 100 + random.uniform(-3, 3))) == []
    assert wrong(seen(lambda it: 100 + min(it, MINUTES / 2))) == []
    assert wrong(seen(lambda it: 900.0 if it == MINUTES - 1 else 100.0)) == []
    (sentence,) = wrong(seen(lambda it: 100 + it * 2.2 * FLAT["MiB"] / MINUTES))
    assert sentence.startswith("worker: MiB")


def test_the_slope_is_the_median_of_all_pairs() -> None:
    assert slope([(0, 0), (1, 2), (2, 4), (3, 6), (4, 8), (5, 99)]) == 2
    assert slope([(0, 5)]) == 0


def test_a_drop_needs_a_change_that_explains_it_and_happens_then() -> None:
    explained = Growth("wire", "not-local", 601.0, 602.0, 3)
    late = Growth("wire", "not-local", 602.0 + LATE_S + 0.1, 607.0, 3)
    strange = Growth("tun", "malformed", 601.0, 602.0, 1)
    assert wrong(seen(growths=[explained])) == []
    (sentence,) = wrong(seen(growths=[explained, late]))
    assert "unexplained: 3, at 605.1 s (no change)" in sentence
    (sentence,) = wrong(seen(growths=[strange]))
    assert "nothing explains it" in sentence


def test_a_call_may_fail_during_its_change_alone() -> None:
    def failed(kind: str, at: float) -> Seen:
        return seen(failures=[Failure(kind, at, at + 1, "timed out")])

    assert wrong(failed("datagram", 601)) == []
    assert len(wrong(failed("datagram", 700))) == 1
    assert len(wrong(failed("kept", 601))) == 1


def test_datagrams_that_the_machine_lost_are_forgiven_and_connections_are_not() -> None:
    lost = [Growth(*MACHINE, 700.0, 701.0, 9)]
    for kind, expected in (("datagram", 0), ("unstopped", 0), ("connection", 1), ("download", 1)):
        assert len(wrong(seen(growths=lost, failures=[Failure(kind, 700.5, 701.5, "timed out")]))) == expected


def test_a_soak_that_could_not_be_watched_is_none() -> None:
    assert len(wrong(seen(unread=1))) == 1


def test_what_grew() -> None:
    before, after = {("tun", "a"): 1, ("tun", "b"): 2}, {("tun", "a"): 1, ("tun", "b"): 5, ("wire", "c"): 1}
    assert grown(before, after, 1, 2) == [Growth("tun", "b", 1, 2, 3), Growth("wire", "c", 1, 2, 1)]


def test_kinds_of_calls_and_changes_are_those_that_there_are() -> None:
    assert set(churn.FORGIVEN) == set(PAUSES_S)
    named = {kind for kinds, _ in churn.EXPLAINED.values() for kind in kinds}
    assert named | {kind for kinds in churn.FORGIVEN.values() for kind in kinds} <= set(churn.KINDS)
