"""Which addresses the live flows of workers use, from their records."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from appliance.dataplane import flow
from appliance.tables import layout
from appliance.tables.layout import IPAddress

SIDES = ("dialled", "target")
_SPREAD = np.int64(-7046029254386353131)  # 2**64 / golden ratio, as int64: spreads ``hi`` over the whole word


def addresses_in_use(tables: Sequence[Any], now: int) -> list[IPAddress]:
    """The addresses that the live flows in these arrays of ``flow.FLOW`` dialled or lead to, each once.

    ``now``: CLOCK_MONOTONIC nanoseconds; a flow whose time has passed counts no more, whenever its worker removes it.

    Reads while workers write: a record that changes meanwhile may be missed once, or seen half. Two addresses are told
    apart by a word made of both of theirs; that two of a node's meet in one has a chance of 2**-64 for each pair.
    """
    pairs = [_pairs(records, side, now) for records in tables for side in SIDES]
    words = np.concatenate(pairs) if pairs else np.empty((0, 2), np.int64)
    _, first = np.unique(words[:, 0] * _SPREAD ^ words[:, 1], return_index=True)
    return [layout.address(int(hi), int(lo)) for hi, lo in words[first]]


def _pairs(records: Any, side: str, now: int) -> Any:
    live = (records["state"] != flow.FREE) & (records["deadline"] > now)
    return np.stack([records[f"{side}_hi"][live], records[f"{side}_lo"][live]], axis=1)
