"""Times in a histogram of high dynamic range: counted by compiled code as they come, percentiles afterwards.

As in HdrHistogram, buckets are linear within a power of two: `STEPS` of them, so a value is known to within 1/STEPS
of itself, from 1 ns to 2^LARGEST ns, in 30 KiB. What is longer counts as the longest."""

import numpy as np
from numpy.typing import NDArray

from perf.load.native import compiled

BITS = 7
STEPS = 1 << BITS
"""Buckets of a power of two: an error of at most 0.8 %."""
LARGEST = 36
"""2^36 ns are 69 s."""
BUCKETS = (LARGEST - BITS + 1) * STEPS
PERCENTILES = (50.0, 90.0, 99.0, 99.9, 99.99, 100.0)
CURVE = (0.0, *np.linspace(1, 99, 99), *(100 - 10 ** -np.linspace(0.2, 4, 39)), 100.0)
"""Ranks of a distribution that is drawn, denser towards its end."""


def empty() -> NDArray[np.int64]:
    """Counts by bucket."""
    return np.zeros(BUCKETS, np.int64)


@compiled
def record(counts: NDArray[np.int64], value: int) -> None:
    """Counts a time in ns; one below 0 as 0."""
    shift = 0
    rest = max(0, value)
    while rest >= 2 * STEPS:
        rest >>= 1
        shift += 1
    counts[min(BUCKETS - 1, shift * STEPS + rest)] += 1


def highest(bucket: NDArray[np.int64]) -> NDArray[np.int64]:
    """The longest time of a bucket in ns."""
    shift = np.maximum(0, bucket // STEPS - 1)
    found: NDArray[np.int64] = ((bucket - shift * STEPS + 1) << shift) - 1
    return found


def percentiles(counts: NDArray[np.int64], ranks: tuple[float, ...] = PERCENTILES) -> dict[str, float]:
    """Percentiles in µs by name, as `p99.9`; none of an empty histogram."""
    return {f"p{rank:g}": time for rank, time in curve(counts, ranks)}


def curve(counts: NDArray[np.int64], ranks: tuple[float, ...] = CURVE) -> list[tuple[float, float]]:
    """Ranks in percent, each with the time in µs that so many did not exceed; none of an empty histogram."""
    total = int(counts.sum())
    if not total:
        return []
    wanted = np.maximum(1, np.ceil(np.array(ranks) / 100 * total))
    times = highest(np.searchsorted(np.cumsum(counts), wanted)) / 1e3
    return [(rank, round(float(time), 3)) for rank, time in zip(ranks, times, strict=True)]
