"""Answers every TCP connection on port 8080, of both families, with the name given as argument."""

import socket
import sys

with socket.create_server(("::", 8080), family=socket.AF_INET6, dualstack_ipv6=True, backlog=128) as listener:
    while True:
        connection, _ = listener.accept()
        with connection:
            connection.sendall(sys.argv[1].encode())
