"""A network of nodes on one machine: real supervisors, workers and packets, with namespaces as computers.

              lab-underlay (bridge, MTU 1500 or as asked for, 198.18.0.0/15 and 2001:db8::/64)
                   │ node1                          │ node2                    … any number of nodes, and the cluster:
                   │                                │                            lab-cluster, `appliance cluster run`
    ┌──────────────┴ uplink ─────────┐ ┌────────────┴ uplink ───────────┐
    │ lab-node1                      │ │ lab-node2                      │
    │   appliance run                │ │   appliance run                │
    │   edge-tun0, edge-br0          │ │   edge-tun0, edge-br0          │
    └──┬──────────────┬──────────────┘ └──┬──────────────┬──────────────┘
       │ eth0         │ eth0              │ eth0         │ eth0
    lab-client1    lab-web0            lab-client2    lab-web1

Words: a *lab* is one such network, known by its name, which begins the name of each of its namespaces.
A *node* is a namespace with an uplink and a supervisor, the *cluster* one with a broker and a manager, of which all
nodes are members; both are *hosts*. A *container* is a namespace that a node's local
API has attached; a *client* is the container of a node that calls; a *web* container is an instance of the
demo service.

`plan` says what a lab consists of and touches nothing; `network`, `processes` and `files` carry it out;
`cluster` asks the manager; `lifecycle` puts them in order; `cli` and `demo` are what a person uses; `trace` draws what
nodes and cluster say to each other.
"""
