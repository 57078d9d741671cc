"""Runs: packets that leave together, as one train, in one system call.

Packets of one destination and one size (the last may be shorter) are gathered where they lie, as pairs of vectors,
and sent with ``UDP_SEGMENT`` (Documentation/networking/segmentation-offloads.rst, udp(7)). What a run points at must
stay in place until ``flush``; every stage flushes before it lets go of its buffers.

Several runs are open at a time, so that packets of many flows in turns still leave as trains: a flow's socket, node and
port lead to one of ``limits.RUNS`` places, always the same, so that its packets stay in order.

1. A packet that fits the run at its place joins it; any other sends that run first. What may be fragmented leaves from
   another socket than the rest of its flow: all runs are sent before it, and it before any other.
2. ``EIO`` means that the device cannot cut trains: that offload is cleared for good, counted, and the run goes out
   packet by packet. ``EINVAL`` and ``EMSGSIZE`` concern this run alone: it goes out packet by packet too.
3. A packet that cannot be sent is counted as ``send-failed``.
"""

from numba import njit

from appliance import limits
from appliance.dataplane import capture, libc, misses, stages
from appliance.dataplane.memory import counters
from appliance.dataplane.native import address_of, put_be16, put_le16, put_le64
from appliance.dataplane.state import (
    CONTROL,
    CONTROL_LENGTH,
    IOV,
    IOV_LENGTH,
    NAME,
    NAME_LENGTH,
    VECTORS,
)
from appliance.observe.counters import COUNTS, FROM_TUN, Count, Drop, Stage

_AF_INET6, _SOCKADDR_IN6 = 10, 28
_SOL_UDP, _UDP_SEGMENT = 17, 103
_CMSG_LENGTH, _CMSG_SPACE = 18, 24  # CMSG_LEN and CMSG_SPACE of a u16

_CALLS, _PACKETS = COUNTS + Count.SENT_CALLS.value, COUNTS + Count.SENT_PACKETS.value
_BYTES, _REFUSED = COUNTS + Count.SENT_BYTES.value, COUNTS + Count.GSO_REFUSED.value
_FAILED, _TOO_BIG = FROM_TUN + Drop.SEND_FAILED.value, FROM_TUN + Drop.TOO_BIG.value
_REPORT_NS = 20_000_000
_SEND = Stage.SEND.value


@njit
def prepare(w, fd, node_hi, node_lo, port, size):
    """Make room for a packet of ``size`` bytes: send the run at its place if the packet cannot join it.

    Gives where in ``run_headers`` the packet's header may be written before it is added.
    """
    last, fragmenting = w.run[w.run_place].fd, w.state[0].fragmenting
    if fd != last and (fd == fragmenting or last == fragmenting):
        flush(w)
    place = (fd ^ (node_lo >> 56) ^ (node_lo >> 48) ^ node_hi ^ port) & (limits.RUNS - 1)
    run = w.run[place]
    if run.segments > 0 and not _fits(w, run, fd, node_hi, node_lo, port, size):
        _flush(w, place)
    if run.segments == 0:
        run.fd, run.node_hi, run.node_lo, run.port = fd, node_hi, node_lo, port
        run.size, run.total, run.closed = size, 0, 0
    w.run_place = place
    return (place * (limits.UDP_SEGMENTS_MAX + 1) + run.segments) * limits.HEADER_MAX


@njit
def add(w, head, head_length, tail, tail_length):
    """Add the packet that was prepared for, as two ranges of memory; the second may be empty."""
    run = w.run[w.run_place]
    at = _vectors(w.run_place) + 4 * run.segments
    w.run_iov[at], w.run_iov[at + 1] = head, head_length
    w.run_iov[at + 2], w.run_iov[at + 3] = tail, tail_length
    w.run_open |= 1 << w.run_place
    run.segments += 1
    run.total += head_length + tail_length
    if head_length + tail_length < run.size:
        run.closed = 1


@njit
def _vectors(place):
    """Where in ``run_iov`` the vectors of a run begin."""
    return place * 2 * VECTORS


@njit
def _fits(w, run, fd, node_hi, node_lo, port, size):
    return (
        w.state[0].udp_gso != 0
        and run.closed == 0
        and run.segments < limits.UDP_SEGMENTS_MAX
        and size <= run.size
        and run.total + size <= limits.GSO_BYTES_MAX
        and run.fd == fd
        and fd != w.state[0].fragmenting  # which sends one by one: the kernel refuses trains whose segments are too big
        and run.node_lo == node_lo
        and run.node_hi == node_hi
        and run.port == port
    )


@njit
def flush(w):
    """Send all open runs."""
    place = 0
    while w.run_open:
        if w.run_open & (1 << place):
            _flush(w, place)
        place += 1


@njit
def _flush(w, place):
    """Send the run at a place."""
    run, first = w.run[place], _vectors(place)
    interrupted = stages.enter(w, _SEND)
    _address(w, run)
    if w.state[0].capturing and run.fd != w.state[0].handoff:
        _capture(w, run, first)
    if run.segments == 1 or not _send_train(w, run, first):
        for segment in range(run.segments):
            _send_packet(w, run, first + 4 * segment)
    run.segments = 0
    w.run_open &= ~(1 << place)
    stages.enter(w, interrupted)


@njit
def _capture(w, run, first):
    """Note each packet of the run."""
    for i in range(run.segments):
        at = first + 4 * i
        capture.note(
            w, capture.TO_NODE, w.run_iov[at], w.run_iov[at + 1], w.run_iov[at + 2], w.run_iov[at + 3],
            run.node_hi, run.node_lo, run.port,
        )  # fmt: skip


@njit
def _address(w, run):
    """The run's destination as struct sockaddr_in6; IPv4 nodes as mapped addresses on dual-stack sockets."""
    put_le16(w.run_name, 0, _AF_INET6)
    put_be16(w.run_name, 2, run.port)
    put_le64(w.run_name, 8, run.node_hi)
    put_le64(w.run_name, 16, run.node_lo)
    w.run_message[NAME], w.run_message[NAME_LENGTH] = address_of(w.run_name, 0), _SOCKADDR_IN6


@njit
def _send_train(w, run, first):
    """Send all segments in one call; False if the kernel wants them one by one."""
    message, control = w.run_message, w.run_control
    control[0], control[1], control[2] = _CMSG_LENGTH, _SOL_UDP | (_UDP_SEGMENT << 32), run.size
    message[IOV], message[IOV_LENGTH] = address_of(w.run_iov, first), 2 * run.segments
    message[CONTROL], message[CONTROL_LENGTH] = address_of(control, 0), _CMSG_SPACE
    sent = libc.sendmsg(w.libc, run.fd, address_of(message, 0))
    if sent >= 0:
        _account(w, run.segments, run.total)
        return True
    error = libc.errno(w.libc)
    if error == libc.EIO:
        w.state[0].udp_gso = 0
    if error == libc.EIO or error == libc.EINVAL or error == libc.EMSGSIZE:
        counters(w)[_REFUSED] += 1
        return False
    counters(w)[_FAILED] += run.segments
    return True


@njit
def _send_packet(w, run, at):
    """Send the segment whose vectors are there by itself."""
    message = w.run_message
    message[IOV], message[IOV_LENGTH] = address_of(w.run_iov, at), 2
    message[CONTROL], message[CONTROL_LENGTH] = 0, 0
    sent = libc.sendmsg(w.libc, run.fd, address_of(message, 0))
    if sent < 0:
        if libc.errno(w.libc) == libc.EMSGSIZE:
            _report_path(w, run)
            return
        counters(w)[_FAILED] += 1
        return
    _account(w, 1, sent)


@njit
def _report_path(w, run):
    """The path to a node is narrower than the tables say: have it measured, at most once in ``_REPORT_NS``."""
    state = w.state[0]
    counters(w)[_TOO_BIG] += 1
    if state.now >= state.next_report:
        state.next_report = state.now + _REPORT_NS
        misses.report(w, misses.TOO_BIG, run.node_hi, run.node_lo)


@njit
def _account(w, packets, length):
    counters(w)[_CALLS] += 1
    counters(w)[_PACKETS] += packets
    counters(w)[_BYTES] += length

