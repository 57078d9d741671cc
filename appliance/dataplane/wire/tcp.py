"""TCP header (RFC 9293 section 3.1): offsets and flag bits."""

from numba import njit

SEQUENCE, ACKNOWLEDGEMENT, DATA_OFFSET, FLAGS, WINDOW, CHECKSUM = 4, 8, 12, 13, 14, 16
HEADER_MIN = 20
FIN, SYN, RST, PSH, ACK, URG, ECE, CWR = (1 << bit for bit in range(8))


@njit
def header_length(buffer, at):
    """Length of the header with options, bytes."""
    return (buffer[at + DATA_OFFSET] >> 4) << 2
