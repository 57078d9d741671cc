"""struct virtio_net_hdr, little-endian, without num_buffers (include/uapi/linux/virtio_net.h): offsets and values."""

FLAGS, GSO_TYPE, HDR_LEN, GSO_SIZE, CSUM_START, CSUM_OFFSET = 0, 1, 2, 4, 6, 8
LENGTH = 10

NEEDS_CSUM = 1  # the checksum field holds the pseudo-header's sum, not inverted
DATA_VALID = 2  # the checksum was verified

GSO_NONE, GSO_TCPV4, GSO_TCPV6, GSO_UDP_L4 = 0, 1, 4, 5
GSO_ECN = 0x80  # CWR belongs to the first segment only
