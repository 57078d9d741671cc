"""Where the servers of the loads listen."""

IPERF = 5301
"""The lab's own iperf3 servers have 5201 and on."""
UDP = 5302
TCP = 5303
ALL = (IPERF, UDP, TCP)
