"""Wire formats: one module a header, each with its offsets, its bits and the few readers that need more than a load."""
