"""The supervisor: makes the node's environment, owns the tables, starts and watches the workers."""
