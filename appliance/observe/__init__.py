"""What operators see: counters and, from them, metrics and the command line's tables."""
