"""Probes: datagrams between our nodes, on the tunnel port, that measure the round-trip time.

    0       kind: 0xE0 request, 0xE1 answer; no version of IP, so an existing NetManager drops it
    1-7     "edgertt"
    8-15    the asker's token

A worker sends a well-formed request back to where it came from, with the answer's bit set and nothing else changed: an
answer is exactly as long as its request, so nobody gains anything by asking in somebody else's name. Whom the tables do
not have as a node gets none (``source.is_peer``). Answers are for the asker's own socket; one that comes to the tunnel
port is malformed, as any other datagram that is no packet.
"""

from numba import njit

from appliance.dataplane import run
from appliance.dataplane.memory import counters
from appliance.dataplane.native import address_of, be16, le64
from appliance.dataplane.state import NAME_SIZE
from appliance.observe.counters import COUNTS, Count

REQUEST, ANSWER = b"\xe0edgertt", b"\xe1edgertt"
LENGTH = 16
_REQUEST = int.from_bytes(REQUEST, "little", signed=True)
_ANSWER_BIT = 1
_ANSWERED = COUNTS + Count.PROBES_ANSWERED.value


@njit
def is_request(w, at, length):
    """Whether a datagram in the receive slots is a request."""
    return length == LENGTH and le64(w.slots, at) == _REQUEST


@njit
def answer(w, slot, at, length):
    """Send a request of a receive slot back."""
    w.slots[at] |= _ANSWER_BIT
    name = NAME_SIZE * slot
    host_hi, host_lo = le64(w.slot_names, name + 8), le64(w.slot_names, name + 16)
    run.prepare(w, w.state[0].wire, host_hi, host_lo, be16(w.slot_names, name + 2), length)
    run.add(w, address_of(w.slots, at), length, 0, 0)
    run.flush(w)
    counters(w)[_ANSWERED] += 1


def request(token: bytes) -> bytes:
    """A request with a token of eight bytes."""
    return REQUEST + token


def answer_of(payload: bytes) -> bytes | None:
    """The token of an answer; None if it is none."""
    return payload[8:] if len(payload) == LENGTH and payload.startswith(ANSWER) else None
