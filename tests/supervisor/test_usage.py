"""Which addresses the live flows of workers use."""

from ipaddress import ip_address

import numpy as np

from appliance.dataplane import flow
from appliance.observe.usage import addresses_in_use
from appliance.tables import layout

NOW = 10**15


def test_addresses_of_live_flows_each_once() -> None:
    records = np.zeros(8, flow.FLOW)
    for number, (dialled, target, state) in enumerate(
        [
            ("10.30.30.30", "10.18.0.2", flow.ANSWERED),
            ("10.30.30.30", "10.18.0.66", flow.OPENING),
            ("fdff:2000::30", "fc00::2", flow.CLOSING),
            ("10.30.30.31", "10.18.0.3", flow.FREE),
        ]
    ):
        for name, address in (("dialled", dialled), ("target", target)):
            records[f"{name}_hi"][number], records[f"{name}_lo"][number] = layout.words(address)
        records["state"][number], records["deadline"][number] = state, NOW + 1
    wanted = {"10.30.30.30", "10.18.0.2", "10.18.0.66", "fdff:2000::30", "fc00::2"}
    assert sorted(addresses_in_use([records, records], NOW), key=str) == sorted(map(ip_address, wanted), key=str)
    assert addresses_in_use([], NOW) == addresses_in_use([records], NOW + 1) == []
