"""Who is attached: what is adopted at the start, and what becomes of addresses."""

from dataclasses import replace
from ipaddress import IPv4Address, IPv6Address, ip_network

import pytest

from appliance.environment import AddressesExhausted, EnvironmentError_, NetnsRef, names
from appliance.environment.attachment import Record
from appliance.environment.book import RESERVED_S, Book
from appliance.environment.plan import LINK_GROUP, Link

SUBNETS = (ip_network("10.18.0.0/29"), ip_network("fc00::/120"))
WEB = NetnsRef.by_name("web")
RECORD = Record("web", 0, "eth0", IPv4Address("10.18.0.3"), IPv6Address("fc00::3"), WEB)


def link_of(record: Record, index: int = 5) -> Link:
    """The complete link of an attachment."""
    name = names.veth_name(record.service, record.instance)
    return Link(name, index, kind="veth", group=LINK_GROUP, alias=record.encode())


def opened(*links: Link, subnets: tuple[object, ...] = SUBNETS) -> Book:
    """A book at the start, with these links in the kernel."""
    book = Book(subnets, lambda: 0.0)  # type: ignore[arg-type]
    book.adopt(links)
    return book


def test_what_is_complete_is_adopted() -> None:
    book = opened(link_of(RECORD))
    (attachment,) = book.attachments.values()
    assert (attachment.service, attachment.instance, attachment.netns) == ("web", 0, WEB)
    assert (attachment.address_v4, attachment.address_v6) == (RECORD.address_v4, RECORD.address_v6)
    assert (str(attachment.gateway_v4), str(attachment.gateway_v6)) == ("10.18.0.1", "fc00::1")


@pytest.mark.parametrize(
    "link",
    [
        replace(link_of(RECORD), alias=""),
        replace(link_of(RECORD), name="ea0123456789"),
        link_of(replace(RECORD, address_v4=IPv4Address("10.18.1.3"))),
        link_of(replace(RECORD, address_v4=IPv4Address("10.18.0.1"))),
        link_of(replace(RECORD, address_v6=None)),
    ],
    ids=["half-made", "another's record", "another subnet", "the gateway", "a family less than wanted"],
)
def test_what_is_not_as_wanted_is_not_adopted(link: Link) -> None:
    assert opened(link).attachments == {}


def test_of_two_with_one_address_the_older_is_adopted() -> None:
    book = opened(link_of(replace(RECORD, service="late"), index=8), link_of(RECORD, index=5))
    assert [it.service for it in book.attachments.values()] == ["web"]


def test_new_addresses_avoid_adopted_ones() -> None:
    with opened(link_of(RECORD)).placing("api", 0, WEB) as placement:
        assert [str(it) for it in placement.addresses] == ["10.18.0.4/29", "fc00::4/120"]
        assert [str(it) for it in placement.gateways] == ["10.18.0.1", "fc00::1"]


def test_an_attachment_that_fails_gives_its_addresses_back() -> None:
    book = opened()
    with pytest.raises(RuntimeError), book.placing("web", 0, WEB) as placement:
        raise RuntimeError
    with book.placing("web", 0, WEB) as again:
        assert again.addresses == placement.addresses


def test_an_attachment_keeps_its_addresses_when_it_is_made_again() -> None:
    book = opened(link_of(RECORD))
    with book.placing("web", 0, NetnsRef.by_name("other")) as placement:
        assert [it.ip for it in placement.addresses] == [RECORD.address_v4, RECORD.address_v6]
        book.enter(placement, "eth1")
    (attachment,) = book.attachments.values()
    assert (attachment.interface, attachment.netns) == ("eth1", NetnsRef.by_name("other"))


def test_an_attachment_that_fails_when_it_is_made_again_is_dropped() -> None:
    book = opened(link_of(RECORD))
    with pytest.raises(RuntimeError), book.placing("web", 0, WEB):
        raise RuntimeError
    assert book.attachments == {}


def test_if_one_family_is_exhausted_the_other_loses_nothing() -> None:
    book = opened(subnets=(ip_network("10.18.0.0/29"), ip_network("fc00::/127")))
    for _ in range(10):
        with pytest.raises(AddressesExhausted, match="fc00::/127"), book.placing("web", 0, WEB):
            pass


def test_a_node_without_subnets_attaches_nothing() -> None:
    with (
        pytest.raises(EnvironmentError_, match=r"network\.subnet_v4, network\.subnet_v6: expected a subnet"),
        opened(subnets=()).placing("web", 0, WEB),
    ):
        pass


def test_an_address_that_was_reserved_is_attached() -> None:
    book = opened(link_of(RECORD))
    reserved = book.reserve(4)
    assert reserved.ip not in {RECORD.address_v4}
    with book.placing("web", 0, WEB, (reserved.ip,)) as placement:
        assert placement.addresses[0] == reserved
        assert placement.addresses[1].ip != RECORD.address_v6, "those that it had rest"
    book.enter(placement, "edge0")
    book.unreserve(reserved.ip)
    assert reserved.ip != book.reserve(4).ip, "it is attached, so it is not given back"
    never = book.placing("web", 1, WEB, (IPv4Address("10.18.0.6"),))
    with pytest.raises(EnvironmentError_, match=r"address: expected one that was reserved, got 10\.18\.0\.6"), never:
        pass


def test_what_was_reserved_stays_so_if_the_attachment_fails_and_is_free_after_a_while() -> None:
    now = 0.0
    book = Book(SUBNETS, lambda: now)
    book.adopt([])
    every = [book.reserve(4).ip for _ in range(5)]
    with pytest.raises(RuntimeError), book.placing("web", 0, WEB, every[:1]):
        raise RuntimeError
    with pytest.raises(AddressesExhausted):
        book.reserve(4)
    book.unreserve(every[0])
    assert book.reserve(4).ip == every[0]
    now = RESERVED_S + 1
    assert book.reserve(4).ip in every


def test_two_keys_with_one_link_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(names, "veth_name", lambda service, instance: "ea0123456789")
    book = opened(link_of(RECORD))
    with pytest.raises(EnvironmentError_, match="ea0123456789 is web 0"), book.placing("api", 0, WEB):
        pass
