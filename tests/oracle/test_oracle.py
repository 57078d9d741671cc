"""The oracle's own foundations, against numbers that others have published."""

from __future__ import annotations

from ipaddress import ip_address

import pytest

from tests.oracle import model
from tests.oracle.build import ACK, CWR, FIN, PSH, TCP, echo, ip, tcp, udp
from tests.oracle.checksum import checksum, fold, pseudo_sum, updated, words
from tests.oracle.compare import check_from_wire, comparable, pieces
from tests.oracle.model import Outcome
from tests.oracle.oracle import rewrite
from tests.oracle.packet import ECHO, DropError, read
from tests.oracle.segment import cut, finish
from tests.oracle.virtio import DATA_VALID, GSO_TCPV4, GSO_UDP_L4, NEEDS_CSUM, PLAIN, Vnet

A, B, C = "10.0.0.1", "10.0.0.2", "192.168.7.9"
A6, B6, C6 = "fd00::1", "fd00::2", "2001:db8:ffff::7"


def test_sum_of_rfc_1071() -> None:
    """RFC 1071 §3: the words 0001 f203 f4f5 f6f7 sum to ddf2."""
    assert words(bytes.fromhex("0001f203f4f5f6f7")) == 0xDDF2
    assert checksum(bytes.fromhex("0001f203f4f5f6f7")) == 0x220D


def test_odd_length_is_padded_with_zero() -> None:
    """RFC 1071 §1: an odd byte is the high half of a last word."""
    assert words(b"\x01\x02\x03") == 0x0102 + 0x0300


def test_sum_of_nothing_and_of_everything() -> None:
    """The two zeros: nothing sums to 0, all ones to 0xffff."""
    assert (words(b""), words(b"\xff" * 64), fold(0x1FFFE)) == (0, 0xFFFF, 0xFFFF)


def test_update_of_rfc_1624() -> None:
    """RFC 1624 §4: a word 5555 that becomes 3285 under a checksum dd2f makes it 0000, not ffff."""
    assert updated(0xDD2F, b"\x55\x55", b"\x32\x85") == 0x0000


def test_a_published_ipv4_header() -> None:
    """The header 4500 0073 … whose checksum is b861, of many textbooks."""
    header = bytes.fromhex("4500007300004000401100 00c0a80001c0a800c7".replace(" ", ""))
    assert checksum(header) == 0xB861
    assert words(header[:10] + b"\xb8\x61" + header[12:]) == 0xFFFF


def test_pseudo_header_of_both_families() -> None:
    """RFC 768 and RFC 8200 §8.1, summed by hand."""
    assert pseudo_sum(ip_address(A), ip_address(B), 17, 9) == 0x0A00 + 1 + 0x0A00 + 2 + 17 + 9
    assert pseudo_sum(ip_address(A6), ip_address(B6), 6, 0x10001) == fold(0xFD00 + 1 + 0xFD00 + 2 + 6 + 1 + 1)


@pytest.mark.parametrize(
    "packet",
    [
        make(*ends)
        for ends in ((A, B), (A6, B6))
        for make in (
            lambda s, d: tcp(s, d, 1, 2, b"odd"),
            lambda s, d: udp(s, d, 1, 2, b"even"),
            lambda s, d: echo(s, d, 1, b"odd"),
        )
    ],
)
def test_what_is_built_is_valid(packet: bytes) -> None:
    """A built packet has valid checksums, and one that is off by one has not."""
    view = read(packet)
    assert view.header_valid
    assert view.transport_valid
    at = (view.checksum_at or 0) + 1
    wrong = packet[:at] + bytes([packet[at] ^ 1]) + packet[at + 1 :]
    assert not read(wrong).transport_valid


def test_what_is_read_is_what_was_built() -> None:
    """The reader finds the fields that the builder was given."""
    view = read(tcp(A, B, 17, 18, b"payload", ip_options=bytes([1] * 8), options=bytes([1] * 4)))
    assert (str(view.source), str(view.destination), view.ports) == (A, B, (17, 18))
    assert (view.l4, view.payload_at, view.payload, view.protocol) == (28, 52, b"payload", TCP)
    assert view.dont_fragment


def test_an_echo_has_its_id_for_a_port() -> None:
    """A request counts as coming from the id, its reply as going to it; an id of 0 is no exception."""
    assert read(echo(A, B, 77)).ports == (77, ECHO)
    assert read(echo(A6, B6, 77, reply=True)).ports == (ECHO, 77)
    assert read(echo(A, B, 0)).ports != read(echo(A, B, 0, reply=True)).ports


@pytest.mark.parametrize(
    ("data", "reason"), [(b"", model.MALFORMED), (ip(A, B, 58, bytes(8)), model.UNSUPPORTED_PROTOCOL)]
)
def test_what_may_not_pass_has_a_reason(data: bytes, reason: str) -> None:
    """The exception carries the reason."""
    with pytest.raises(DropError) as caught:
        read(data)
    assert caught.value.reason == reason


@pytest.mark.parametrize("error", [0, 1, 0x7FFF, 0xFFFE])
def test_rewriting_keeps_what_is_wrong(error: int) -> None:
    """The update of a checksum equals one computed anew with the same error."""
    for old, new in (((A, B), (C, A)), ((A6, B6), (B6, C6))):
        view = read(tcp(*old, 1, 2, b"data", error=error))
        source, destination = map(ip_address, new)
        assert rewrite(view, source, destination).data == tcp(*new, 1, 2, b"data", error=error)


def test_cut_pieces_are_packets() -> None:
    """A super-packet's pieces have valid checksums and together its payload."""
    whole = read(tcp(A, B, 1, 2, bytes(range(250)), flags=ACK | PSH | FIN | CWR, checksum="partial"))
    views = [read(piece) for piece in cut(whole, 100)]
    assert b"".join(view.payload for view in views) == bytes(range(250))
    assert all(view.header_valid and view.transport_valid for view in views)
    assert [view.u8(33) for view in views] == [ACK | CWR, ACK, ACK | PSH | FIN]


def test_finishing_is_computing() -> None:
    """A partial checksum that is finished is the checksum."""
    assert finish(udp(A, B, 1, 2, b"odd", checksum="partial"), 20, 6) == udp(A, B, 1, 2, b"odd")


def super_packet(**fields: int) -> Outcome:
    """A write of three packets, with the virtio header's fields changed."""
    usual = Vnet(NEEDS_CSUM, GSO_TCPV4, 40, 100, 20, 16)
    return Outcome(tun=[(usual._replace(**fields).pack(), tcp(A, B, 1, 2, bytes(250), checksum="partial"))])


def test_a_merged_write_compares_as_its_packets() -> None:
    """Merged or not is no difference."""
    packets = cut(read(tcp(A, B, 1, 2, bytes(250))), 100)
    assert comparable(super_packet()) == comparable(Outcome(tun=[(PLAIN, packet) for packet in packets]))


@pytest.mark.parametrize(
    "fields",
    [
        {"flags": 0},
        {"gso_size": 0},
        {"gso_type": GSO_UDP_L4},
        {"csum_start": 22},
        {"csum_offset": 6},
        {"hdr_len": 999},
    ],
)
def test_a_write_that_the_kernel_would_misread_is_an_error(fields: dict[str, int]) -> None:
    """The virtio header of a super-packet is checked field by field."""
    with pytest.raises(AssertionError):
        comparable(super_packet(**fields))


def test_a_complete_checksum_in_a_super_packet_is_an_error() -> None:
    """The kernel expects the pseudo-header's sum there."""
    vnet, _ = super_packet().tun[0]
    with pytest.raises(AssertionError):
        pieces(Vnet.unpack(vnet), tcp(A, B, 1, 2, bytes(250)))


def test_declaring_a_wrong_checksum_valid_is_an_error() -> None:
    """DATA_VALID is a promise."""
    with pytest.raises(AssertionError):
        check_from_wire(Vnet(DATA_VALID), tcp(A, B, 1, 2, b"data", error=1))


@pytest.mark.parametrize("flags", [ACK | FIN, ACK | CWR, 0])
def test_merged_flags_are_checked(flags: int) -> None:
    """Only ACK and PSH may be merged."""
    vnet = Vnet(NEEDS_CSUM, GSO_TCPV4, 40, 100, 20, 16)
    with pytest.raises(AssertionError):
        check_from_wire(vnet, tcp(A, B, 1, 2, bytes(250), flags=flags, checksum="partial"))


def test_ids_compare_only_without_df() -> None:
    """RFC 6864 §4.1: the id of a packet that may not be fragmented means nothing."""
    for flags, same in ((2, True), (0, False)):
        one, other = (
            comparable(Outcome(tun=[(PLAIN, udp(A, B, 1, 2, ip_id=n, fragment_flags=flags))])) for n in (1, 2)
        )
        assert (one == other) is same


def test_the_two_zeros_compare_equal_except_for_udp() -> None:
    """0 and 0xffff are one number, but UDP's 0 means that there is no checksum."""
    for make, same in ((tcp, True), (udp, False)):
        one, other = (Outcome(wire=[(A, 1, make(A, B, 1, 2, checksum=n))]) for n in (0, 0xFFFF))
        assert (comparable(one) == comparable(other)) is same
