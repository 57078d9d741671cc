"""An appliance for edge gateways: joins the containers of all nodes into one service network.

`docs/architecture.md` is the map. This module holds the version and imports nothing, so that
every command starts fast.
"""

__version__ = "0.1.0"
