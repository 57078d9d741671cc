"""A plain-Python packet path, written from the rules alone, to check the compiled one against.

    checksum   the Internet checksum (RFC 1071, 1624) and its pseudo-headers
    build      packets spelled field by field: IPv4, IPv6, TCP, UDP, SCTP, ICMP, fragments
    packet     one packet read: which part is which, or why it may not pass
    virtio     the header that a TUN device puts before each packet
    segment    super-packets cut into packets, partial checksums finished
    fragments  fragments put together, and datagrams cut again
    errors     ICMP errors and the packets that they quote
    replies    what a node says itself: resets, unreachable, too big
    peers      which nodes are believed what, and where senders were heard from
    model      what a node knows (World) and what it did with a packet (Outcome)
    oracle     the packet path itself
    compare    two outcomes brought into one shape, so that they can be compared

Only struct, ipaddress and dataclasses: whoever reads it should need the RFCs and nothing else.
"""
