"""Names: what turns a service's name into one of its ServiceIPs, where the smart routing is decided.

    container ── DNS, mDNS ── resolver ── names over a socket pair ── supervisor ── cluster
                                 └ everything else: upstream servers

A name is ``[INSTANCE.][POLICY.]SERVICE.SERVICENS.APP.APPNS.ZONE``. Words used here:

- *job*: a service by the name that the cluster knows, ``APP.APPNS.SERVICE.SERVICENS``;
- *zone*: a domain that these names are below, ``local`` for one; also the state that answers for all of them;
- *labels*: a name as a tuple of lower-case labels without the root, the leftmost first;
- *hot answer*: an answer as bytes, found by the bytes of its question.

| module | does |
|---|---|
| ``service`` | what a name may lead to, as value; what the supervisor knows of a job, in that form |
| ``names`` | labels, and what they mean |
| ``zone`` | question and known services → answer; pure |
| ``packet`` | the wire format around an answer; the library (dnspython) does what is not hot |
| ``hot`` | hot answers |
| ``waiting`` | questions that the cluster has to answer first |
| ``responder`` | bytes in, bytes out: all of the above together |
| ``upstream`` | everything that is not ours |
| ``server`` | UDP and TCP sockets |
| ``multicast``, ``mdns`` | mDNS and DNS-SD: decisions, and their sockets |
| ``channel`` | frames between supervisor and resolver |
| ``process`` | the resolver: ``python -m appliance.naming.process FD`` |
| ``sockets``, ``resolv`` | what the supervisor makes for it: sockets, the containers' resolv.conf |

Theory of operation
-------------------
The resolver is one process with one thread of its own (and one of c-ares), no capability, and no way to change
anything: its sockets were opened by the supervisor. What it knows comes in frames on a stream socket: a snapshot, then
what changes; what it asks, and the answers, go the same way. A stream and not shared memory, because names are text
that is found by a hash of the text: the resolver needs dicts anyway, so a table in memory would be read once and
copied; and a frame says by itself that something has changed.

When the supervisor dies the stream ends, and the resolver goes on with what it knew last. The next supervisor starts
another resolver beside it (SO_REUSEPORT), and then tells the old one to leave (`process`).
"""
