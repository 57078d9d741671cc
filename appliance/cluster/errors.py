"""What stops a node from being a member of its cluster."""


class ClusterError(Exception):
    """The configuration of the cluster cannot be used; the text names the key and what was expected."""
