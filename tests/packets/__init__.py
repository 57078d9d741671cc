"""What the packet path does with packets: as a list of examples (fixtures) and as properties of any packet.

`python -m tests.packets` prints the list, a sentence each; with --bytes also what goes in and out.
"""
