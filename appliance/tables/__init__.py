"""Shared tables: one writer (the supervisor), any number of wait-free readers.

Theory of operation
-------------------
All tables of a node lie in one sealed memfd (``layout``). The supervisor maps it writable (``publish``); workers and
resolver get a descriptor that was opened read-only, and map that (``read``).

A table is a hash of chains: ``buckets`` holds the number of the first entry plus one, every entry the number of the
next plus one. An entry never changes while a reader can reach it: an update writes a new entry and swings one 32-bit
link, so a reader sees the old entry or the new one and never half of either. It takes no lock and repeats nothing.

An entry that was unlinked may still be in a reader's hand. Readers therefore announce the epoch at which they started
their batch (one word each, in their own memory); the writer frees what it unlinked in epoch *e* when every reader
that is not asleep has announced a later one (quiescent-state-based reclamation, as the kernel's RCU). The writer
never waits for it: retired entries rest in a list, and if a reader hangs for so long that the table fills up,
publishing fails with an error that says so, and the old content stays in force.

``epoch`` counts publications. A flow that was checked at this epoch needs no look at the tables at all.

Limits: the capacities of the configuration (``tables.*``); ``limits.CHOICES_MAX`` places a ServiceIP.
"""
