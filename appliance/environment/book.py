"""Who is attached, and with which addresses: the manager's memory. No input or output.

It is opened by what the kernel holds at the start (`adopt`), and changed by `enter` and `drop` only when
the kernel was changed; in between, `placing` holds addresses for an attachment that is being made.
"""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager

from appliance.environment import names
from appliance.environment.addresses import AddressPool, IPAddress, IPInterface, IPNetwork, v4_of, v6_of
from appliance.environment.attachment import Attachment, NetnsRef, Placement, Record
from appliance.environment.errors import AddressesExhausted, AttachmentRefused, EnvironmentError_
from appliance.environment.plan import Link

VERSIONS = (4, 6)
RESERVED_S = 60.0
"""How long an address is kept for who asked for it: Docker attaches it at once, or says that it does not."""


class Book:
    """The attachments of a node and its address pools. `clock` gives monotonic seconds."""

    def __init__(self, subnets: Sequence[IPNetwork], clock: Callable[[], float]) -> None:
        self.attachments: dict[str, Attachment] = {}
        """By the name of the link's end on the node."""
        self._subnets = {version: [it for it in subnets if it.version == version] for version in VERSIONS}
        self._pools: dict[int, AddressPool] = {}
        self._clock = clock
        self._adopted = False
        self._reserved: dict[IPAddress, float] = {}
        """Addresses that somebody was told and has not attached yet, and when."""

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

    def reserve(self, version: int) -> IPInterface:
        """An address of a family for an attachment that is to come within `RESERVED_S`. Raises AddressesExhausted, or
        EnvironmentError_ if none can be given out at all."""
        self._check_open()
        for address in [it for it, since in self._reserved.items() if self._clock() - since > RESERVED_S]:
            self.unreserve(address)
        if not self._subnets[version]:
            raise EnvironmentError_(f"network.subnet_v{version}: expected a subnet, got none")
        address = self._pools[version].allocate(self._clock())
        self._reserved[address] = self._clock()
        return self._pools[version].interface(address)

    def unreserve(self, address: IPAddress) -> None:
        """Nobody attaches it; nothing if it is attached, or was not reserved."""
        if self._reserved.pop(address, None) is not None:
            self._pools[address.version].give_back(address)

    @contextmanager
    def placing(
        self, service: str, instance: int, netns: NetnsRef, given: Sequence[IPAddress] = ()
    ) -> Iterator[Placement]:
        """Addresses for an attachment: those that it has, or new ones; or `given`, which were reserved, instead of
        those that it had. If the body fails it has none, unless nothing was done to it (AttachmentRefused), and what
        was reserved stays so.

        Raises AddressesExhausted, or EnvironmentError_ if none can be given out at all.
        """
        name = names.veth_name(service, instance)
        known = self._known(name, service, instance)
        if given:
            with self._placing_reserved(service, instance, netns, given) as placement:
                yield placement
            return
        addresses = self._allocate() if known is None else known.addresses
        try:
            yield self._placement(service, instance, netns, addresses)
        except BaseException as error:
            if known is None:
                self._give_back(addresses)
            elif not isinstance(error, AttachmentRefused):
                self.drop(name)
            raise

    @contextmanager
    def _placing_reserved(
        self, service: str, instance: int, netns: NetnsRef, given: Sequence[IPAddress]
    ) -> Iterator[Placement]:
        for address in given:
            if address not in self._reserved:
                raise EnvironmentError_(f"address: expected one that was reserved, got {address}")
        others = self._allocate({it.version for it in given})
        name = names.veth_name(service, instance)
        if name in self.attachments:
            self.drop(name)
        try:
            addresses = sorted((*given, *others), key=lambda it: it.version)
            yield self._placement(service, instance, netns, addresses)
        except BaseException:
            self._give_back(others)
            raise

    def enter(self, placement: Placement, interface: str) -> Attachment:
        """The attachment that was made."""
        attachment = self._attachment(placement.record(interface))
        for address in attachment.addresses:
            self._reserved.pop(address, None)
        self.attachments[placement.veth] = attachment
        return attachment

    def rename(self, record: Record) -> Attachment:
        """The attachment of this record, which has another namespace now."""
        attachment = self._attachment(record)
        self.attachments[attachment.veth] = attachment
        return attachment

    def drop(self, name: str) -> Attachment:
        """Forgets an attachment whose link is gone; its addresses rest. Raises KeyError."""
        attachment = self.attachments.pop(name)
        for address in attachment.addresses:
            self._pools[address.version].release(address, self._clock())
        return attachment

    def _check_open(self) -> None:
        if not self.subnets:
            raise EnvironmentError_("network.subnet_v4, network.subnet_v6: expected a subnet, got none")
        if not self.is_open:
            raise EnvironmentError_("attach: expected the node's environment to have converged first")

    def _known(self, name: str, service: str, instance: int) -> Attachment | None:
        self._check_open()
        known = self.attachments.get(name)
        if known is not None and (known.service, known.instance) != (service, instance):
            raise EnvironmentError_(
                f"service: expected a link name of its own, but {name} is {known.service} {known.instance}"
            )
        return known

    def _allocate(self, but: Collection[int] = ()) -> tuple[IPAddress, ...]:
        """One address of each family that the node has a subnet of, `but` these."""
        addresses: list[IPAddress] = []
        try:
            for pool in (self._pools[it] for it in VERSIONS if self._subnets[it] and it not in but):
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
