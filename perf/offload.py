"""Switching a device's offloads for the time of one sample."""

from collections.abc import Iterator
from contextlib import contextmanager

from pyroute2.ethtool import Ethtool

from appliance.lab.network import entered

SEGMENTATION = (
    "tx-tcp-segmentation",
    "tx-tcp6-segmentation",
    "tx-udp-segmentation",
    "tx-udp_tnl-segmentation",
    "tx-udp_tnl-csum-segmentation",
    "tx-generic-segmentation",
)
"""All that lets a super-packet through a device, TCP's, UDP's and VXLAN's (names as of ethtool(8))."""
GRO = "rx-gro"


def _exchange(namespace: str, device: str, wanted: dict[str, bool]) -> dict[str, bool]:
    """Sets offloads of a device; what they were before."""
    with entered(namespace), Ethtool() as tool:
        features = tool.get_features(device)
        before = {name: bool(features.features[name].enable) for name in wanted}
        for name, enable in wanted.items():
            features.features[name].enable = enable
        tool.set_features(device, features)
    return before


@contextmanager
def switched(namespace: str, device: str, *, segmentation: bool, gro: bool | None = None) -> Iterator[None]:
    """The device with segmentation, and GRO unless None, as given; as it was when the block ends."""
    wanted = dict.fromkeys(SEGMENTATION, segmentation)
    if gro is not None:
        wanted[GRO] = gro
    with _held(namespace, device, wanted):
        yield


@contextmanager
def merging(namespace: str, device: str) -> Iterator[None]:
    """The device with GRO on; as it was when the block ends."""
    with _held(namespace, device, {GRO: True}):
        yield


@contextmanager
def _held(namespace: str, device: str, wanted: dict[str, bool]) -> Iterator[None]:
    before = _exchange(namespace, device, wanted)
    try:
        yield
    finally:
        _exchange(namespace, device, before)
