"""Who is attached, and with which addresses: the manager's memory. No input or output.

It is opened by what the kernel holds at the start (`adopt`), and changed by `enter` and `drop` only when
the kernel was changed; in between, `placing` holds addresses for an attachment that is being made.
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

from appliance.environment import names
from appliance.environment.addresses import AddressPool, IPAddress, IPNetwork, v4_of, v6_of
from appliance.environment.attachment import Attachment, NetnsRef, Placement, Record
from appliance.environment.errors import AddressesExhausted, EnvironmentError_, InterfaceRefused
from appliance.environment.plan import Link

VERSIONS = (4, 6)


class Book:
    """The attachments of a node and its address pools. `clock` gives monotonic seconds."""

    def __init__(self, subnets: Sequence[IPNetwork], clock: Callable[[], float]) -> None:
        self.attachments: dict[str, Attachment] = {}
        """By the name of the link's end on the node."""
        self._subnets = {version: [it for it in subnets if it.version == version] for version in VERSIONS}
        self._pools: dict[int, AddressPool] = {}
        self._clock = clock
        self._adopted = False

    @property
    def is_open(self) -> bool:
        """Whether it is known what the kernel held at the start."""
        return self._adopted

    @property
    def subnets(self) -> tuple[IPNetwork, ...]:
        """The subnets that containers' addresses are of, IPv4 first."""
        return tuple(subnet for version in VERSIONS for subnet in self._subnets[version])

    def assign(self, subnets: Sequence[IPNetwork]) -> None:
        """These are the subnets from now on. Raises EnvironmentError_ if one is missing while addresses are in use."""
        lost = [subnet for subnet in self.subnets if subnet not in subnets]
        if lost and any(pool.in_use for pool in self._pools.values()):
            raise EnvironmentError_(f"subnets: expected {lost[0]} among them, as containers have addresses of it")
        for version in VERSIONS:
            wanted = [it for it in subnets if it.version == version]
            if lost and version in self._pools:
                self._pools[version] = AddressPool(wanted)
            elif version in self._pools:
                self._pools[version].extend(it for it in wanted if it not in self._subnets[version])
            self._subnets[version] = wanted

    def adopt(self, links: Iterable[Link]) -> None:
        """Opens the book with the complete links of ours. One with an address that is not of our subnets,
        or that another one has, is left out."""
        records: dict[str, Record] = {}
        taken: set[IPAddress] = set()
        for link in sorted(links, key=lambda it: it.index):
            record = Record.decode(link.alias)
            if record is not None and self._fits(link, record, taken):
                records[link.name] = record
                taken.update(record.addresses)
        for version, subnets in self._subnets.items():
            mine = [it for it in taken if it.version == version]
            self._pools[version] = AddressPool(subnets, mine, self._clock())
        self.attachments = {name: self._attachment(record) for name, record in records.items()}
        self._adopted = True

    @contextmanager
    def placing(self, service: str, instance: int, netns: NetnsRef) -> Iterator[Placement]:
        """Addresses for an attachment: those that it has, or new ones. If the body fails it has none,
        unless nothing was done to it (InterfaceRefused).

        Raises AddressesExhausted, or EnvironmentError_ if none can be given out at all.
        """
        name = names.veth_name(service, instance)
        known = self._known(name, service, instance)
        addresses = self._allocate() if known is None else known.addresses
        try:
            yield self._placement(service, instance, netns, addresses)
        except BaseException as error:
            if known is None:
                self._give_back(addresses)
            elif not isinstance(error, InterfaceRefused):
                self.drop(name)
            raise

    def enter(self, placement: Placement, interface: str) -> Attachment:
        """The attachment that was made."""
        attachment = self._attachment(placement.record(interface))
        self.attachments[placement.veth] = attachment
        return attachment

    def drop(self, name: str) -> Attachment:
        """Forgets an attachment whose link is gone; its addresses rest. Raises KeyError."""
        attachment = self.attachments.pop(name)
        for address in attachment.addresses:
            self._pools[address.version].release(address, self._clock())
        return attachment

    def _known(self, name: str, service: str, instance: int) -> Attachment | None:
        if not self.subnets:
            raise EnvironmentError_("network.subnet_v4, network.subnet_v6: expected a subnet, got none")
        if not self.is_open:
            raise EnvironmentError_("attach: expected the node's environment to have converged first")
        known = self.attachments.get(name)
        if known is not None and (known.service, known.instance) != (service, instance):
            raise EnvironmentError_(
                f"service: expected a link name of its own, but {name} is {known.service} {known.instance}"
            )
        return known

    def _allocate(self) -> tuple[IPAddress, ...]:
        """One address of each family that the node has a subnet of."""
        addresses: list[IPAddress] = []
        try:
            for pool in (self._pools[version] for version in VERSIONS if self._subnets[version]):
                addresses.append(pool.allocate(self._clock()))
        except AddressesExhausted:
            self._give_back(addresses)
            raise
        return tuple(addresses)

    def _give_back(self, addresses: Iterable[IPAddress]) -> None:
        for address in addresses:
            self._pools[address.version].give_back(address)

    def _placement(self, service: str, instance: int, netns: NetnsRef, addresses: Sequence[IPAddress]) -> Placement:
        interfaces = tuple(self._pools[it.version].interface(it) for it in addresses)
        return Placement(service, instance, netns, interfaces, self._gateways(addresses))

    def _gateways(self, addresses: Iterable[IPAddress]) -> tuple[IPAddress, ...]:
        return tuple(self._pools[it.version].gateway(it) for it in addresses)

    def _attachment(self, record: Record) -> Attachment:
        gateways = self._gateways(record.addresses)
        return Attachment(
            service=record.service,
            instance=record.instance,
            interface=record.interface,
            address_v4=record.address_v4,
            address_v6=record.address_v6,
            gateway_v4=v4_of(gateways),
            gateway_v6=v6_of(gateways),
            netns=record.netns,
        )

    def _fits(self, link: Link, record: Record, taken: set[IPAddress]) -> bool:
        """Whether a link's record is its own, with an address of each of our families and no other."""
        addresses = record.addresses
        versions = [version for version in VERSIONS if self._subnets[version]]
        return (
            link.name == names.veth_name(record.service, record.instance)
            and [it.version for it in addresses] == versions
            and all(self._is_free(it, taken) for it in addresses)
        )

    def _is_free(self, address: IPAddress, taken: set[IPAddress]) -> bool:
        return address not in taken and AddressPool(self._subnets[address.version]).holds(address)
