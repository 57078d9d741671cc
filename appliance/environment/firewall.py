"""The node's nftables rules: exposed ports, egress, what may enter the overlay. Pure: wanted in, nft scripts out.

Theory of operation
-------------------
One table of ours (family inet) holds everything. All that it says is always replaced as a whole, by one transaction
(``nft -f``): a packet meets the rules of before or those of after, and nothing has to be compared. Connections are in
the kernel's connection table, which a replacement does not touch. ``script`` makes the table anew, whatever it was:
the kernel lists it last from then on. ``revision`` replaces what one that ``script`` made says, and the table keeps
its place among others'.

============  =============  =====================================================================================
chain         hook           does
============  =============  =====================================================================================
forged        prerouting     no container speaks as the node itself
whole         prerouting     keeps overlay packets out of the connection table, and their fragments as they are
untracked     prerouting     keeps tunnel packets out of it
leaving       output         the same for what the node itself sends through the tunnel
arriving      prerouting     node ports (``ports``)
calling       output         the same for programs on the node
ports         -              one look-up a map: protocol and port, or address, protocol and port, to the target
unasked       prerouting     the ingress address only takes answers
passing       forward        containers are reached through the overlay and node ports alone
translated    postrouting    sources: the ingress address into the overlay, egress, a container that calls its own node
============  =============  =====================================================================================

*The node's own addresses* are the node's: workers carry ICMP errors from the gateway's address, as the kernel sends
them about what it forwards, and cannot tell them from a container's. For IPv4 the kernel drops such packets itself
(fib_validate_source), for IPv6 it does not.

*Ports* count for addresses of this host alone (``fib daddr type local``), never for the loopback's: what is forwarded
or goes out is left alone. They come after other tables' rules (``PRIORITY``), so a port that Docker maps stays
Docker's. A target is a container of this node, or a ServiceIP. Where several containers of this node share a port,
each of ``SLOTS`` slots leads to one of them, and connections take the slots in turn.

*The ingress address* is one of the node's subnet that no link has. What goes to a ServiceIP through a node port goes
into the overlay with this source, as workers carry nothing else; the answers come back to it, and the connection table
knows whose they are.

*Others' tables* are theirs. But where a packet is dropped by any table, no other can save it. So a forward chain that
drops by default gets rules that accept our own two links, each marked with ``COMMENT``, in a form that iptables can
show; our chain ``passing`` says instead what may go in. ``acceptance`` and ``withdrawal`` plan them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from ipaddress import ip_address
from typing import Any, Final, Literal

from appliance.environment.addresses import IPAddress, IPNetwork

Protocol = Literal["tcp", "udp"]

SLOTS: Final = 16
"""Turns among the containers that share a node port; with more containers than slots, some get none."""
PRIORITY: Final = -95
"""After others, whose destination translation is at -100 (NF_IP_PRI_NAT_DST)."""
BEFORE_DEFRAGMENTATION: Final = -450
"""NF_IP_PRI_RAW_BEFORE_DEFRAG: at -400 the connection table puts fragments together, and a path that takes 1280 bytes
would get packets of more (seen with IPv6, which does not cut them again)."""
COMMENT: Final = "edge-appliance"
"""Marks our rules in others' chains."""
_DROPPING: Final = frozenset(("drop", "reject"))


@dataclass(frozen=True, slots=True)
class Target:
    """Where a node port leads."""

    address: IPAddress
    port: int


@dataclass(frozen=True, slots=True)
class NodePort:
    """A port of the node, on all its addresses or on one, and the targets that share it, of one IP version."""

    protocol: Protocol
    port: int
    targets: tuple[Target, ...]
    address: IPAddress | None = None

    @property
    def version(self) -> int:
        """The IP version of the targets."""
        return self.targets[0].address.version


@dataclass(frozen=True, slots=True)
class Rules:
    """What the table is to say. ``uplinks``: links that containers may go out by; empty: all but our own."""

    table: str
    bridge: str
    tun: str
    tunnel_port: int
    overlay: tuple[IPNetwork, ...] = ()
    subnets: tuple[IPNetwork, ...] = ()
    ingress: tuple[IPAddress, ...] = ()
    egress: bool = True
    uplinks: tuple[str, ...] = ()
    ports: tuple[NodePort, ...] = ()


# --- Our table ----------------------------------------------------------------------------------

_FAMILY: Final = {4: "ip", 6: "ip6"}
_PORT: Final = "meta l4proto . th dport"
_SLOT: Final = f"numgen inc mod {SLOTS}"


def script(rules: Rules) -> str:
    """Makes the table say this, whatever it said, or takes care that there is one."""
    return f"{removal(rules.table)}{_content(rules)}"


def revision(rules: Rules) -> str:
    """The same for a table that ``script`` made; the kernel refuses it for one that lacks a map.

    Maps are deleted and not flushed: nft 1.0.6 cannot flush one with ``typeof`` a concatenation of a port."""
    maps = [f"map inet {rules.table} {name}{version}" for version, it in _FAMILY.items() for name in _keys(it)]
    emptied = f"flush table inet {rules.table}\n" + "".join(f"delete {it}\n" for it in maps)
    return f"{emptied}{_content(rules)}"


def removal(table: str) -> str:
    """Takes the table away; no error if there is none."""
    return f"table inet {table}\ndelete table inet {table}\n"


def _content(rules: Rules) -> str:
    body = "\n".join((*_maps(rules), *_chains(rules)))
    return f"table inet {rules.table} {{\n{body}\n}}\n"


def _maps(rules: Rules) -> Iterator[str]:
    for version, family in _FAMILY.items():
        target = f"{family} daddr . th dport"
        for name, key in _keys(family).items():
            elements = ",\n".join(_elements(rules, name, version))
            listed = f" elements = {{ {elements} }}" if elements else ""
            yield f"map {name}{version} {{ typeof {key} : {target};{listed} }}"


def _keys(family: str) -> dict[str, str]:
    """The maps, in the order of the look-ups: the more particular first."""
    return {
        "address_slots": f"{family} daddr . {_PORT} . {_SLOT}",
        "address_ports": f"{family} daddr . {_PORT}",
        "slots": f"{_PORT} . {_SLOT}",
        "ports": _PORT,
    }


def _elements(rules: Rules, name: str, version: int) -> Iterator[str]:
    for it in rules.ports:
        if it.version == version and name == _map_of(it):
            key = f"{it.protocol} . {it.port}" if it.address is None else f"{it.address} . {it.protocol} . {it.port}"
            if len(it.targets) == 1:
                yield f"{key} : {it.targets[0].address} . {it.targets[0].port}"
                continue
            for slot in range(SLOTS):
                target = it.targets[slot % len(it.targets)]
                yield f"{key} . {slot} : {target.address} . {target.port}"


def _map_of(port: NodePort) -> str:
    shared = "slots" if len(port.targets) > 1 else "ports"
    return shared if port.address is None else f"address_{shared}"


def _chains(rules: Rules) -> Iterator[str]:
    ours = f"{{ {_quoted((rules.bridge, rules.tun))} }}"
    yield _chain("forged", "filter hook prerouting priority raw - 1", _forged(rules))
    yield _chain("whole", f"filter hook prerouting priority {BEFORE_DEFRAGMENTATION}", _overlay(rules))
    arriving = f"udp dport {rules.tunnel_port} fib daddr type local notrack"
    yield _chain("untracked", "filter hook prerouting priority raw", (arriving,))
    tunnel = f"udp dport {rules.tunnel_port} notrack", f"udp sport {rules.tunnel_port} notrack"
    yield _chain("leaving", "filter hook output priority raw", tunnel)
    yield _chain("ports", "", _look_ups())
    yield _chain("arriving", f"nat hook prerouting priority {PRIORITY}", ("jump ports",))
    yield _chain("calling", f"nat hook output priority {PRIORITY}", ("jump ports",))
    asked = (f'iifname "{rules.tun}" {_family(it)} daddr {it} drop' for it in rules.ingress)
    yield _chain("unasked", "filter hook prerouting priority filter", asked)
    entering = f"iifname != {ours} oifname {ours} ct state"
    passing = f"{entering} new ct status ! dnat drop", f"{entering} {{ invalid, untracked }} drop"
    yield _chain("passing", "filter hook forward priority filter", passing)
    yield _chain("translated", "nat hook postrouting priority srcnat + 5", _translated(rules, ours))


def _chain(name: str, hook: str, lines: Iterable[str]) -> str:
    head = (f"type {hook};",) if hook else ()
    return f"chain {name} {{\n" + "\n".join((*head, *lines)) + "\n}"


def _forged(rules: Rules) -> Iterator[str]:
    yield f'iifname "{rules.bridge}" fib saddr type local drop'
    for address in rules.ingress:
        yield f'iifname "{rules.bridge}" {_family(address)} saddr {address} drop'


def _overlay(rules: Rules) -> Iterator[str]:
    """By what every fragment has: one that is tracked and one that is not would never meet again."""
    for address in rules.ingress:
        yield f'iifname "{rules.tun}" {_family(address)} daddr {address} accept'
    yield f'iifname "{rules.tun}" notrack'
    for network in rules.overlay:
        yield f'iifname "{rules.bridge}" {_FAMILY[network.version]} daddr {network} fib daddr type != local notrack'


def _look_ups() -> Iterator[str]:
    yield "fib daddr type != local return"
    yield "meta l4proto != { tcp, udp } return"
    yield "ip daddr 127.0.0.0/8 return"
    yield "ip6 daddr ::1 return"
    for version, family in _FAMILY.items():
        for name, key in _keys(family).items():
            yield f"meta nfproto ipv{version} dnat {family} to {key} map @{name}{version}"


def _translated(rules: Rules, ours: str) -> Iterator[str]:
    for address in rules.ingress:
        yield f'oifname "{rules.tun}" ct status dnat snat {_family(address)} to {address}'
    for subnet in rules.subnets:  # br_netfilter does not tell the link that it came from
        yield f'oifname "{rules.bridge}" {_FAMILY[subnet.version]} saddr {subnet} ct status dnat masquerade'
    if not rules.egress:
        return
    out = f"{{ {_quoted(rules.uplinks)} }}" if rules.uplinks else f"!= {ours}"
    for subnet in rules.subnets:
        yield f"oifname {out} {_FAMILY[subnet.version]} saddr {subnet} masquerade"


def _quoted(names: Iterable[str]) -> str:
    return ", ".join(f'"{name}"' for name in names)


def _family(address: IPAddress) -> str:
    return _FAMILY[address.version]


# --- What is there ------------------------------------------------------------------------------


def mapped(listing: dict[str, Any], table: str) -> list[NodePort]:
    """The node ports with one target in a listing of ours (``nft -j list table``)."""
    maps = (it["map"] for it in listing.get("nftables", ()) if "map" in it)
    return [port for it in maps if it["table"] == table and it["name"] in ("ports4", "ports6") for port in _listed(it)]


def _listed(described: dict[str, Any]) -> Iterator[NodePort]:
    for key, value in described.get("elem", ()):
        (protocol, port), (address, target) = key["concat"], value["concat"]
        yield NodePort(protocol, port, (Target(ip_address(address), target),))


@dataclass(frozen=True, slots=True)
class Chain:
    """A chain of somebody else's at the forward hook."""

    family: str
    table: str
    name: str


def droppers(listing: dict[str, Any], table: str) -> list[Chain]:
    """Others' chains (``nft -j list ruleset``) that drop what they do not accept themselves."""
    found = listing.get("nftables", ())
    ends = {_chain_of(it["rule"]) for it in found if "rule" in it and _is_drop(it["rule"])}
    chains = (it["chain"] for it in found if "chain" in it)
    forward = (it for it in chains if it.get("hook") == "forward" and it["family"] in ("ip", "ip6", "inet"))
    theirs = (it for it in forward if (it["family"], it["table"]) != ("inet", table))
    return [_chain_of(it) for it in theirs if it.get("policy") == "drop" or _chain_of(it) in ends]


def _chain_of(described: dict[str, Any]) -> Chain:
    return Chain(described["family"], described["table"], described.get("chain") or described["name"])


def _is_drop(rule: dict[str, Any]) -> bool:
    """Whether a rule drops all that comes so far: nothing in it but that, and perhaps a counter or a log."""
    expressions = [it for it in rule.get("expr", ()) if not it.keys() & {"counter", "log"}]
    return len(expressions) == 1 and (bool(expressions[0].keys() & _DROPPING) or _is_xt_reject(expressions[0]))


def _is_xt_reject(expression: dict[str, Any]) -> bool:
    """As iptables-nft has it."""
    extension = expression.get("xt")
    return isinstance(extension, dict) and extension.get("name") == "REJECT"


def acceptance(listing: dict[str, Any], rules: Rules) -> str:
    """Adds our rules to the chains that need and lack them; empty if there is nothing to do."""
    wanted = [f'{way} "{link}" accept' for link in (rules.bridge, rules.tun) for way in ("iifname", "oifname")]
    marked = {chain for chain, _ in _marked(listing)}
    return "".join(
        f'insert rule {it.family} {it.table} {it.name} {rule} comment "{COMMENT} {rules.table}"\n'
        for it in droppers(listing, rules.table)
        if it not in marked
        for rule in wanted
    )


def withdrawal(listing: dict[str, Any]) -> str:
    """Takes our rules out of others' chains again; empty if there are none."""
    return "".join(f"delete rule {it.family} {it.table} {it.name} handle {n}\n" for it, n in _marked(listing))


def _marked(listing: dict[str, Any]) -> list[tuple[Chain, int]]:
    rules = (it["rule"] for it in listing.get("nftables", ()) if "rule" in it)
    return [(_chain_of(it), it["handle"]) for it in rules if str(it.get("comment", "")).startswith(COMMENT)]
