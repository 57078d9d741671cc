"""UDP header (RFC 768): offsets."""

LENGTH, CHECKSUM = 4, 6
HEADER = 8
