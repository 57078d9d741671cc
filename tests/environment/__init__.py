"""The environment manager, in network namespaces that these tests make and remove."""
