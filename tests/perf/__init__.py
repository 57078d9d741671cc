"""Tests of the measurement: its statistics, its generators, and that it leaves nothing behind."""
