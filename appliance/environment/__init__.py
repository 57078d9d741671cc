"""The node's network environment: bridge, TUN link, containers' links, addresses, routes, sysctls.

=================  =================================================================================
`plan`             pure: what is wanted against what is there, in; typed commands, out
`observe`          reads what is there
`netlink`          carries commands out; nothing else here changes the kernel
`namespace`        the namespace of a container, and the thread that an operation runs in
`addresses`        which container gets which address; pure, time is an argument
`names`            names and hardware addresses that follow from what they belong to
`work`             the operations: observe, plan, carry out
`book`             who is attached, and with which addresses; pure
`attachment`       a container's place on the network, and its record on the kernel's link
`manager`          `EnvironmentManager`: what the supervisor asks for, made and kept
`hints`            what a change in the kernel may mean; pure
`firewall`         pure: the nftables rules that are wanted, in; nft scripts, out
`nft`              carries such scripts out, and reads rule sets
`portmap`          port mappings as a NodeEngine writes them; pure
`listeners`        who on this node listens on which port
`watch`            `Watcher`: tells the supervisor what others do to the environment
=================  =================================================================================
"""

from appliance.environment.attachment import Attachment, NetnsRef
from appliance.environment.errors import AddressesExhausted, EnvironmentError_
from appliance.environment.manager import EnvironmentManager
from appliance.environment.watch import Callbacks, Watcher

__all__ = [
    "AddressesExhausted",
    "Attachment",
    "Callbacks",
    "EnvironmentError_",
    "EnvironmentManager",
    "NetnsRef",
    "Watcher",
]
