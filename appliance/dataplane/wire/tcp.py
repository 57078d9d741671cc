"""TCP header (RFC 9293 section 3.1): offsets, flag bits and options."""

from numba import njit

SEQUENCE, ACKNOWLEDGEMENT, DATA_OFFSET, FLAGS, WINDOW, CHECKSUM = 4, 8, 12, 13, 14, 16
HEADER_MIN = 20
FIN, SYN, RST, PSH, ACK, URG, ECE, CWR = (1 << bit for bit in range(8))
OPTION_END, OPTION_NOP, OPTION_MSS, MSS_LENGTH = 0, 1, 2, 4


@njit
def header_length(buffer, at):
    """Length of the header with options, bytes."""
    return (buffer[at + DATA_OFFSET] >> 4) << 2
