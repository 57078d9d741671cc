"""The packet path: Python compiled by numba, over numpy arrays in shared memory.

Glossary, which every name below obeys
--------------------------------------
packet        one IP packet, as it lies on the wire
super-packet  several packets of one flow under one header, cut or joined by segmentation offload (TSO, USO, GRO)
segment       one packet of a super-packet or train
train         several datagrams in one receive or send call (UDP_GRO, UDP_SEGMENT)
run           the train that is being put together for sending: one destination, one size, the last may be shorter
merge         the super-packet that is being put together for the TUN
batch         what one turn of a stage takes from its descriptor
stage         one of the two directions: ``outbound`` (TUN to wire) and ``inbound`` (wire to TUN)
queue         one queue of the multi-queue TUN device; worker *i* owns queue *i*
worker        one process, pinned to one core, with its queue, its sockets, its flow table
flow          a 5-tuple seen from a local container: local and remote address and port, protocol
dialled       the address that the container used; ``target``: the namespace address that was chosen for it;
              ``peer``: the address from which answers come on the wire (the target's instance IP)
instance      one container of a service
service       instances behind a ServiceIP
node          a machine with this appliance; peer node: another one

Theory of operation
-------------------
A worker shares nothing with its siblings but read-only tables. Both directions of a flow meet in the worker given by
``steering.steer`` (local namespace address, ports), computed by eBPF in the kernel on both sides. A packet whose next
step belongs to a sibling (a service on the same node, or a train that an older peer mixed) goes to it through the
tunnel port on the loopback, where the same eBPF program steers it: the kernel is the queue between workers.

No Python bytecode runs per packet, nothing is allocated, and all loops over packets are bounded by ``limits``.
"""
