"""Load generators and their counterparts, each a process of its own in a container.

`python -m perf.load TOOL` prints a line `ready`, waits for a line on standard input, works, and prints its
result as one line of JSON. So the interpreter's start is over before the clock starts, and the driver
(`perf.load.tool`) can start two ends, then let both go. What runs per packet is compiled."""
