"""A name server for one name: TXT records of SIZE bytes together, over UDP; a client that cannot take them is told so.

dns.py SIZE: prints "ready" and answers until it is ended.
"""

import socket
import sys

import dns.flags
import dns.message
import dns.rrset

TXT_MAX = 255


def answer(query: dns.message.Message, size: int) -> bytes:
    """The answer, truncated if the client said that it takes less (RFC 6891 section 6.2.3)."""
    found = dns.message.make_response(query)
    texts = [f'"{number}" "{"x" * TXT_MAX}"' for number in range(size // TXT_MAX)]
    found.answer.append(dns.rrset.from_text(query.question[0].name, 5, "IN", "TXT", *texts))
    data = found.to_wire(max_size=65535)
    if len(data) > max(512, query.payload):
        found.answer.clear()
        found.flags |= dns.flags.TC
        data = found.to_wire()
    return data


def main() -> None:
    with socket.socket(socket.AF_INET6, socket.SOCK_DGRAM) as server:
        server.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)
        server.bind(("::", 53))
        print("ready", flush=True)
        while True:
            data, peer = server.recvfrom(65535)
            server.sendto(answer(dns.message.from_wire(data), int(sys.argv[1])), peer)


main()
