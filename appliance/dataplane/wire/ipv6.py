"""IPv6 header and extension headers (RFC 8200 sections 3 and 4): offsets and numbers."""

PAYLOAD_LENGTH, NEXT_HEADER, HOP_LIMIT, SOURCE, DESTINATION = 4, 6, 7, 8, 24
HEADER = 40

HOP_BY_HOP, ROUTING, FRAGMENT_HEADER, DESTINATION_OPTIONS = 0, 43, 44, 60
EXTENSION_UNIT = 8  # bytes; an extension header's length counts units beyond the first
SEGMENTS_LEFT = 3  # of a routing header

FRAGMENT_OFFSET, FRAGMENT_ID, FRAGMENT_LENGTH = 2, 4, 8  # of a fragment header
OFFSET_BITS, MORE_BIT = 0xFFF8, 1
