"""The systems under test: one module each, all of the shape `perf.systems.system.System`."""

from perf.systems.appliance import Appliance
from perf.systems.direct import Direct
from perf.systems.system import System
from perf.systems.vxlan import Vxlan

ALL: tuple[System, ...] = (Direct(), Vxlan(), Appliance())
"""In the order in which they are measured."""
