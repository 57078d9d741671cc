"""What a node and its cluster say to each other."""
