"""The systems under test: one module each, all of the shape `perf.systems.system.System`."""

from perf.systems.appliance import MODES, Appliance
from perf.systems.direct import Direct
from perf.systems.nebula import Nebula
from perf.systems.openvpn import Openvpn
from perf.systems.system import System
from perf.systems.tinc import Tinc
from perf.systems.vip import VxlanVip
from perf.systems.vxlan import Vxlan
from perf.systems.wireguard import WireguardGo

USUAL: tuple[System, ...] = (Direct(), Vxlan(), Appliance())
"""The ceiling, the yardstick, and what is held against it."""
OTHERS: tuple[System, ...] = (VxlanVip(), WireguardGo(), Nebula(), Tinc(), Openvpn())
ALL: tuple[System, ...] = (*USUAL, *OTHERS, *MODES)
"""In the order in which they are measured."""

__all__ = ["ALL", "MODES", "OTHERS", "USUAL", "System"]
