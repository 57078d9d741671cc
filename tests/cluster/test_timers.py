"""Deadlines by name."""

from hypothesis import given
from hypothesis import strategies as st

from appliance.cluster.timers import Timer, Timers

A, B = Timer("a"), Timer("b", "key")


def test_the_earliest_is_next_and_each_ends_once() -> None:
    timers = Timers()
    timers.set(A, 5)
    timers.set(B, 3)
    assert timers.next() == 3
    assert timers.due(2.9) == []
    assert timers.due(6) == [B, A]
    assert timers.due(6) == []
    assert timers.next() is None


def test_set_again_and_cancelled() -> None:
    timers = Timers()
    timers.set(A, 1)
    timers.set(A, 7)
    timers.set(B, 2)
    timers.cancel(B)
    timers.cancel(Timer("never set"))
    assert timers.next() == 7
    assert timers.due(6) == []
    assert timers.due(7) == [A]


@given(st.lists(st.tuples(st.sampled_from("abcd"), st.none() | st.integers(0, 9))))
def test_they_do_what_a_dictionary_would(acts: list[tuple[str, int | None]]) -> None:
    timers, model = Timers(), dict[str, int]()
    for name, when in acts:
        if when is None:
            timers.cancel(Timer(name))
            model.pop(name, None)
        else:
            timers.set(Timer(name), when)
            model[name] = when
        assert timers.next() == min(model.values(), default=None)
    for now in range(10):
        ended = {name for name, when in model.items() if when == now}
        assert {timer.kind for timer in timers.due(now)} == ended
