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
RUNS: Final = 16  # trains that are open at a time, a power of two: as many as there are source ports by default
READ_BUFFER: Final = 4 * 65_536  # packets of one batch lie end to end here; wraps only when a run has been sent
COALESCE_SEGMENTS: Final = 512  # iovec entries of one write into the TUN; UIO_MAXIOV is 1,024

# --- flows ---------------------------------------------------------------------------------------------------------

FLOW_LOAD: Final = 4  # index slots a flow: two keys a flow keep linear probing at half load
SWEEP_STEP: Final = 256  # flow entries examined for expiry at each pause: the whole table about once a second when idle
EVICT_SCAN: Final = 128  # entries compared when the table is full: bounds the cost of one eviction
EVICT_SCANS: Final = 8  # times that, while only active TCP connections are found: they lie side by side
TCP_ESTABLISHED: Final = (2 * 3600 + 4 * 60) * SECOND  # RFC 5382 REQ-5
TCP_OPENING: Final = 30 * SECOND  # half-open: longer than any sane SYN retry interval, short under a SYN flood
TCP_CLOSING: Final = 10 * SECOND  # FIN or RST seen: late retransmissions still find their way
UDP_UNANSWERED: Final = 30 * SECOND  # RFC 4787 allows less than 2 min where nothing came back
UDP_ANSWERED: Final = 180 * SECOND  # RFC 4787 REQ-5: not less than 2 min, 5 recommended, 3 common
ICMP_TIMEOUT: Final = 30 * SECOND  # RFC 5508 REQ-1 wants at least 60 s for NATs; an echo here needs no port

# --- misses and learned hosts ---------------------------------------------------------------------------------------

HELD_ADDRESSES: Final = 256  # unknown addresses that a worker waits for at a time; a power of two
HELD_EACH: Final = 64  # packets kept for one of them: a TCP opening needs 1, a burst of datagrams may need more
HELD_NS: Final = 5 * SECOND  # the cluster's own time-out for a query
HELD_FROM_WIRE: Final = 64  # of the addresses: packets of unknown nodes may take so many, and never all
HELD_SLOT: Final = 2_048  # bytes of a place; larger packets take several
HELD_SLOTS: Final = 1_024  # places of a worker: 2 MiB, touched only when used
HELD_WINDOW: Final = 16  # places that an address may have in its table
REFUSED_NS: Final = 1 * SECOND  # an address that nobody has is not asked for again so long
MISS_RING: Final = 256  # reports to the supervisor that it has not read yet; a power of two
REFUSAL_RING: Final = 256  # answers to a worker that it has not read yet; a power of two
LEARNED_HOSTS: Final = 16_384  # senders that a worker remembers the node of; a power of two, 1 MiB
LEARNED_WINDOW: Final = 4  # places that a sender may have in that cache: one lookup touches 4 cache lines at most
LEARNED_NS: Final = 300 * SECOND  # longer than an idle UDP flow, so that a late answer still finds its way

# --- capture ----------------------------------------------------------------------------------------------------------

CAPTURE_SLOT: Final = 2_048  # bytes of a record: a whole packet of an Ethernet, the beginning of a super-packet
CAPTURE_SLOTS: Final = 2_048  # records that the supervisor has not read yet; a power of two. 4 MiB a worker, while used

# --- fragments -------------------------------------------------------------------------------------------------------

FRAGMENTED: Final = 32  # datagrams that a worker puts together at a time: 2 MiB, touched only when used
FRAGMENTS_EACH: Final = 64  # pieces of one datagram: 64 KiB over a path of 1,280 bytes has 53
FRAGMENT_NS: Final = 2 * SECOND  # pieces of one datagram arrive together; RFC 8200's 60 s only feeds attackers
EXTENSIONS_MAX: Final = 4  # IPv6 extension headers of one packet: more than any sane stack sends (RFC 9098)

# --- answers of our own ----------------------------------------------------------------------------------------------

REPLY_SOURCES: Final = 256  # token buckets, by hash of the source that is answered; a power of two
REPLY_BURST: Final = 10  # answers a source may get at once (RFC 1812 4.3.2.8 and RFC 4443 2.4(f) ask for a limit)
REPLY_INTERVAL: Final = SECOND // 20  # then one each 50 ms
REPLY_QUOTE_V4: Final = 548  # bytes of the packet that an ICMP error quotes: with headers 576 (RFC 1812 4.3.2.3)
REPLY_QUOTE_V6: Final = 1_232  # with headers 1,280 (RFC 4443 2.4(c))
IPV6_MTU_MIN: Final = 1_280  # RFC 8200 section 5

# --- balancing -----------------------------------------------------------------------------------------------------

STICKY_ENTRIES: Final = 65_536  # clients a node that sticky ServiceIPs remember, 64 bytes each: 4 MiB
WEIGHT_MAX: Final = 1_000  # of an instance: a tenth of a percent is finer than anybody balances by hand
STICKY_MAX_S: Final = 86_400  # a day; what must last longer belongs into the application

# --- workers -------------------------------------------------------------------------------------------------------

WORKERS_MAX: Final = 64  # queues of one TUN device are capped at 256; beyond 64 cores one UDP port is the bottleneck
SOURCE_PORTS_MAX: Final = 64  # sending sockets a worker
WAIT_NS: Final = 100_000_000  # longest sleep of an idle worker: bounds how old its heartbeat and expired flows get
WORKER_EXIT_S: Final = 2.0  # a worker that ignores the stop word this long is killed

# --- tables --------------------------------------------------------------------------------------------------------

CHOICES_MAX: Final = 4_096  # places of one ServiceIP's choice list: weights are scaled down to fit
HOSTS_MAX: Final = 4_194_304  # 64 bytes each: 256 MiB
