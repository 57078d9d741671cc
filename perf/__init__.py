"""Measures the appliance beside direct routing and kernel VXLAN, in one run on one topology.

Words used here, and only in this sense:

system     a way to carry packets between two nodes: `direct`, `vxlan`, `appliance`
path       where a system's traffic goes in and out: client, server, and the address that the client dials
scenario   one kind of load, with the metrics that it yields
sample     the metrics of one scenario on one system, once
repeat     one round of every scenario on every system; samples of one repeat are compared pair by pair
"""
