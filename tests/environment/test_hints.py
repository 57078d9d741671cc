"""What an event makes the watcher look at."""

from dataclasses import replace

import pytest

from appliance.environment import names
from appliance.environment.hints import AddressEvent, Event, Hints, LinkEvent, Pace, RouteEvent
from appliance.environment.plan import LINK_GROUP, ROUTE_PROTOCOL, Link
from tests.environment.netns import BRIDGE, TUN

VETH = names.veth_name("app.ns.web.test", 0)
UPLINK_LINK = Link("eth0", 2, up=True, carrier=True, mtu=1500)
BRIDGE_LINK = Link(BRIDGE, 3, "bridge", up=True, carrier=True, mtu=1450, group=LINK_GROUP)
TUN_LINK = Link(TUN, 4, "tun", up=True, carrier=True, mtu=1450, txqueuelen=1000)
VETH_LINK = Link(
    VETH,
    5,
    "veth",
    up=True,
    mtu=1450,
    master=3,
    group=LINK_GROUP,
    alias="edge1 …",
    peer=2,
    peer_namespace=1,
    carrier=True,
)
HALF_MADE = replace(VETH_LINK, alias="", carrier=False)


def seen(*events: Event) -> tuple[set[str], bool, bool]:
    """Suspects, damage, uplink: what events mean for a node that is whole."""
    hints = Hints(BRIDGE, TUN)
    hints.reset([UPLINK_LINK, BRIDGE_LINK, TUN_LINK, VETH_LINK], [VETH], [])
    assert hints.take_suspects() == set()
    assert hints.take_damage()
    assert hints.take_uplink()
    for event in events:
        hints.see(event)
    return hints.take_suspects(), hints.take_damage(), hints.take_uplink()


def now(link: Link, **changes: object) -> LinkEvent:
    """A link that changed."""
    return LinkEvent(replace(link, **changes), deleted=False)  # type: ignore[arg-type]


def gone(link: Link) -> LinkEvent:
    """A link that was deleted."""
    return LinkEvent(link, deleted=True)


Seen = tuple[set[str], bool, bool]
NOTHING: Seen = (set(), False, False)
SUSPECT: Seen = ({VETH}, False, False)
DAMAGE: Seen = (set(), True, False)
UPLINK: Seen = (set(), False, True)


@pytest.mark.parametrize(
    ("events", "expected"),
    [
        ([now(VETH_LINK)], NOTHING),
        ([gone(VETH_LINK)], SUSPECT),
        (
            [
                now(VETH_LINK, up=False, carrier=False),
                now(VETH_LINK, up=False, carrier=False, master=0),
                gone(VETH_LINK),
            ],
            SUSPECT,
        ),
        ([now(VETH_LINK, carrier=False)], SUSPECT),
        ([now(VETH_LINK, name="other")], SUSPECT),
        ([now(VETH_LINK, master=0)], DAMAGE),
        ([now(VETH_LINK, mtu=1400)], DAMAGE),
        ([now(VETH_LINK, up=False, carrier=False)], ({VETH}, True, False)),
        ([now(BRIDGE_LINK)], NOTHING),
        ([now(BRIDGE_LINK, carrier=False)], NOTHING),
        ([now(BRIDGE_LINK, up=False)], DAMAGE),
        ([now(BRIDGE_LINK, name="other")], DAMAGE),
        ([gone(BRIDGE_LINK)], DAMAGE),
        ([gone(BRIDGE_LINK), now(BRIDGE_LINK, index=9)], DAMAGE),
        ([now(TUN_LINK, mtu=1400)], DAMAGE),
        ([now(TUN_LINK, txqueuelen=500)], DAMAGE),
        ([gone(TUN_LINK)], DAMAGE),
        ([AddressEvent(BRIDGE_LINK.index)], DAMAGE),
        ([AddressEvent(TUN_LINK.index)], DAMAGE),
        ([AddressEvent(UPLINK_LINK.index)], UPLINK),
        ([AddressEvent(77)], UPLINK),
        ([AddressEvent(VETH_LINK.index)], NOTHING),
        ([RouteEvent(TUN_LINK.index, ROUTE_PROTOCOL)], DAMAGE),
        ([RouteEvent(UPLINK_LINK.index, ROUTE_PROTOCOL)], DAMAGE),
        ([RouteEvent(BRIDGE_LINK.index, 2)], DAMAGE),
        ([RouteEvent(UPLINK_LINK.index, 3)], UPLINK),
        ([RouteEvent(0, 3)], UPLINK),
        ([now(UPLINK_LINK, mtu=9000)], NOTHING),
        ([now(UPLINK_LINK, carrier=False)], UPLINK),
        ([now(UPLINK_LINK, name="wan")], UPLINK),
        ([gone(UPLINK_LINK)], UPLINK),
        ([now(UPLINK_LINK, name="eth1", index=8, up=False)], NOTHING),
        ([now(UPLINK_LINK, name="eth1", index=8)], UPLINK),
    ],
)
def test_what_an_event_means(events: list[Event], expected: Seen) -> None:
    assert seen(*events) == expected


def test_a_link_that_is_being_made_is_no_suspect() -> None:
    fresh = replace(HALF_MADE, index=6, master=0, up=False)
    steps = [fresh, replace(fresh, master=3), HALF_MADE, replace(HALF_MADE, carrier=True), VETH_LINK]
    assert seen(gone(VETH_LINK), *(now(step, index=6) for step in steps)) == SUSPECT
    assert seen(*(now(step, index=6) for step in steps)) == NOTHING


def test_a_link_that_lost_its_other_end_while_it_was_made_is_a_suspect() -> None:
    assert seen(now(HALF_MADE, index=6), now(VETH_LINK, index=6, carrier=False)) == SUSPECT


def test_everything_doubtful_is_looked_at_anew() -> None:
    hints = Hints(BRIDGE, TUN)
    impaired = replace(VETH_LINK, index=6, name=names.veth_name("b", 0), carrier=False)
    missing, restored = names.veth_name("c", 0), names.veth_name("d", 0)
    whole = replace(VETH_LINK, index=7, name=restored)
    hints.reset([VETH_LINK, impaired, whole], [VETH, impaired.name, missing, restored], [restored])
    assert hints.take_suspects() == {impaired.name, missing, restored}


def test_damage_time_and_again_is_looked_at_ever_more_slowly() -> None:
    pace, delays = Pace(), []
    for _ in range(8):
        delays.append(pace.delay(100.0))
        pace.found(100.0)
    assert delays == [0.1, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0]
    assert pace.delay(109.0) == 5.0
    assert pace.delay(110.0) == 0.1
