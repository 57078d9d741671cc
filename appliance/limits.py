"""Every capacity and time limit of the appliance, each with the sentence that justifies it.

Compiled functions freeze the globals they read, so a change here takes effect with a fresh compilation; the cache
directory is keyed by the sources (``appliance.dataplane.cache``), so that happens by itself.
"""

from typing import Final

SECOND: Final = 1_000_000_000  # nanoseconds; all times inside the packet path are CLOCK_MONOTONIC nanoseconds

# --- packets -------------------------------------------------------------------------------------------------------

PACKET_MAX: Final = 65_535  # largest IP packet, so also the largest super-packet (BIG TCP is never enabled on our TUN)
VNET_HEADER: Final = 10  # struct virtio_net_hdr without num_buffers, the TUN default
HEADER_MAX: Final = 128  # IP header (60) + TCP header (60), rounded up to two cache lines
UDP_SEGMENTS_MAX: Final = 63  # UDP_MAX_SEGMENTS is 64 before Linux 6.9; one less, as some kernels count from zero
GSO_BYTES_MAX: Final = 65_000  # a GSO send must fit one IPv4 datagram with its headers

# --- batches -------------------------------------------------------------------------------------------------------

TUN_BATCH: Final = 64  # packets read from the TUN before the wire side gets its turn: bounds latency under a flood
WIRE_BATCH: Final = 8  # receive slots of 64 KiB a system call: 512 KiB stay in a 1 MiB L2 cache, 32 slots do not
READ_BUFFER: Final = 4 * 65_536  # packets of one batch lie end to end here; wraps only when a run has been sent
COALESCE_SEGMENTS: Final = 512  # iovec entries of one write into the TUN; UIO_MAXIOV is 1,024

# --- flows ---------------------------------------------------------------------------------------------------------

FLOW_LOAD: Final = 4  # index slots a flow: two keys a flow keep linear probing at half load
SWEEP_STEP: Final = 256  # flow entries examined for expiry at each pause: the whole table about once a second when idle
EVICT_SCAN: Final = 128  # entries compared when the table is full: bounds the cost of one eviction
TCP_ESTABLISHED: Final = (2 * 3600 + 4 * 60) * SECOND  # RFC 5382 REQ-5
TCP_OPENING: Final = 30 * SECOND  # half-open: longer than any sane SYN retry interval, short under a SYN flood
TCP_CLOSING: Final = 10 * SECOND  # FIN or RST seen: late retransmissions still find their way
UDP_UNANSWERED: Final = 30 * SECOND  # RFC 4787 allows less than 2 min where nothing came back
UDP_ANSWERED: Final = 180 * SECOND  # RFC 4787 REQ-5: not less than 2 min, 5 recommended, 3 common
ICMP_TIMEOUT: Final = 30 * SECOND  # RFC 5508 REQ-1 wants at least 60 s for NATs; an echo here needs no port

# --- balancing -----------------------------------------------------------------------------------------------------

STICKY_ENTRIES: Final = 65_536  # clients a node that sticky ServiceIPs remember, 64 bytes each: 4 MiB
STICKY_MAX_S: Final = 86_400  # a day; what must last longer belongs into the application

# --- workers -------------------------------------------------------------------------------------------------------

WORKERS_MAX: Final = 64  # queues of one TUN device are capped at 256; beyond 64 cores one UDP port is the bottleneck
SOURCE_PORTS_MAX: Final = 64  # sending sockets a worker
WAIT_NS: Final = 100_000_000  # longest sleep of an idle worker: bounds how old its heartbeat and expired flows get
WORKER_EXIT_S: Final = 2.0  # a worker that ignores the stop word this long is killed

# --- tables --------------------------------------------------------------------------------------------------------

CHOICES_MAX: Final = 4_096  # places of one ServiceIP's choice list: weights are scaled down to fit
HOSTS_MAX: Final = 4_194_304  # 64 bytes each: 256 MiB
