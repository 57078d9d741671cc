"""Descriptors: what a service needs of the network, in YAML or JSON.

    app: shop
    namespace: prod
    service: cart
    service_namespace: web
    instances: 3
    service_ips:
      rr: {v4: 10.30.30.30, v6: assigned}

    weights: {0: 3}
    states: {2: draining}

The name of the service is ``shop.prod.cart.web``. An address is ``assigned`` (the default), ``none``, or pinned.
Without `service_ips` there is one for `rr`; each policy may have `sticky` seconds, and `maglev` `hash_port`. Weights
are 1 and states `up` unless said. For names there are `default_policy`, `ports`, `metadata`, and `needs`: the jobs
that its instances are going to call. A file may hold several documents.

`exposed` opens ports of nodes to the world outside, `health` says how an instance is checked; `docs/north-south.md` is
the reference, and `schema` the same for editors.

An error names file, line, key and what was expected; PyYAML's node tree has the lines.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from difflib import get_close_matches
from ipaddress import IPv4Address, IPv6Address, ip_address
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from appliance import limits
from appliance.cluster.manager.requests import NODE_ID, canonical
from appliance.cluster.topics import INGRESS_APP
from appliance.config import ConfigError, Problem, expected

INSTANCES_MAX = 10_000
"""Instances of one service."""
PART = re.compile(r"[A-Za-z0-9]{1,30}")
"""Existing nodes accept no other names."""
PORT_NAME = re.compile(r"(?=.*[a-z])[a-z0-9]([a-z0-9-]{0,13}[a-z0-9])?")
"""RFC 6335 section 5.1."""
TXT_MAX = 255
"""Bytes of one string of a TXT record."""
SHOWN = 60
"""Characters of a wrong value that an error repeats."""
POLICIES = ("rr", "closest", "least-flows", "maglev")
Policy = Literal["rr", "closest", "least-flows", "maglev"]


STATES = ("up", "draining", "down")
"""Of an instance: a draining one keeps its connections, one that is down loses them."""


def _number(value: object) -> object:
    """An instance's number; JSON has it as text."""
    if isinstance(value, str) and value.isdecimal():
        value = int(value)
    return _count(value)


def _part(value: object) -> object:
    if not isinstance(value, str) or not PART.fullmatch(value):
        raise expected("a name of 1 to 30 letters and digits")
    return value


def _count(value: object) -> object:
    if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= INSTANCES_MAX:
        raise expected(f"an integer from 0 to {INSTANCES_MAX}")
    return value


def _upto(most: int) -> BeforeValidator:
    def check(value: object) -> object:
        if not isinstance(value, int) or isinstance(value, bool) or not 0 <= value <= most:
            raise expected(f"an integer from 0 to {most}")
        return value

    return BeforeValidator(check)


def _flag(value: object) -> object:
    if not isinstance(value, bool):
        raise expected("true or false")
    return value


def _state(value: object) -> object:
    if value not in STATES:
        raise expected(f"one of {', '.join(STATES)}")
    return value


def _address(kind: type[IPv4Address] | type[IPv6Address]) -> BeforeValidator:
    name = "an IPv4" if kind is IPv4Address else "an IPv6"

    def check(value: object) -> object:
        if value in ("assigned", "none"):
            return value
        try:
            return kind(str(value))
        except ValueError:
            raise expected(f'"assigned", "none" or {name} address') from None

    return BeforeValidator(check)


def _port(value: object) -> object:
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= 65535:
        raise expected("an integer from 1 to 65535")
    return value


def _port_name(value: object) -> object:
    if not isinstance(value, str) or not PORT_NAME.fullmatch(value):
        raise expected("a name of 1 to 15 lower-case letters, digits and inner '-', with a letter")
    return value


def _text(wanted: str) -> Callable[[object], object]:
    def check(value: object) -> object:
        if not isinstance(value, str):
            raise expected(wanted)
        return value

    return check


def _metadata(value: object) -> object:
    """What fits TXT records: each ``key=value`` one string of at most 255 bytes (RFC 6763 section 6)."""
    items = value.items() if isinstance(value, Mapping) else [(None, None)]
    for key, text in items:
        fits = isinstance(key, str) and isinstance(text, str) and key.isascii() and key.isprintable()
        if not fits or not key or "=" in key or len(f"{key}={text}".encode()) > TXT_MAX:
            raise expected(f"a mapping of names to text, each name=text at most {TXT_MAX} bytes")
    return value


def _jobs(value: object) -> object:
    jobs = value if isinstance(value, list | tuple) else [None]
    for job in jobs:
        parts = job.split(".") if isinstance(job, str) else []
        if len(parts) != 4 or not all(PART.fullmatch(part) for part in parts):
            raise expected("a list of jobs such as shop.prod.cart.web")
    return tuple(jobs)


def _one_of(*words: str) -> BeforeValidator:
    def check(value: object) -> object:
        if value not in words:
            raise expected(f"one of {', '.join(words)}")
        return value

    return BeforeValidator(check)


def _seconds(least: float, most: float) -> BeforeValidator:
    def check(value: object) -> object:
        if not isinstance(value, int | float) or isinstance(value, bool) or not least <= value <= most:
            raise expected(f"seconds from {least:g} to {most:g}")
        return float(value)

    return BeforeValidator(check)


def _from_to(least: int, most: int) -> BeforeValidator:
    def check(value: object) -> object:
        if not isinstance(value, int) or isinstance(value, bool) or not least <= value <= most:
            raise expected(f"an integer from {least} to {most}")
        return value

    return BeforeValidator(check)


def _any_address(value: object) -> object:
    """An address that packets from outside can be sent to; text only, as no file can mean a number."""
    if value is None or isinstance(value, IPv4Address | IPv6Address):
        return value
    try:
        found = ip_address(value) if isinstance(value, str) else None
    except ValueError:
        found = None
    if found is None or found.is_loopback or found.is_unspecified or found.is_multicast:
        raise expected("an address of the nodes such as 198.51.100.7")
    return found


def _nodes(value: object) -> object:
    if value in ("all", "hosting"):
        return value
    names = value if isinstance(value, list | tuple) else ()
    if not names or not all(isinstance(name, str) and NODE_ID.fullmatch(name) for name in names):
        raise expected("all, hosting, or a list of nodes' ids")
    return tuple(names)


def _path(value: object) -> object:
    if not isinstance(value, str) or not value.startswith("/") or not value.isascii() or not value.isprintable():
        raise expected("a path such as /healthz")
    if " " in value:
        raise expected("a path without spaces")
    return value


def _command(value: object) -> object:
    words = value if isinstance(value, list | tuple) else ()
    if not words or not all(isinstance(word, str) and "\0" not in word for word in words) or not words[0]:
        raise expected("a program and its arguments, such as [pg_isready, -q]")
    return tuple(words)


def _version(value: object) -> object:
    if value != 1 or isinstance(value, bool):
        raise expected("1, the version of descriptors that this is")
    return value


class _Part(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Wanted(_Part):
    """Addresses that one policy's ServiceIP is to have."""

    v4: Annotated[IPv4Address | Literal["assigned", "none"], _address(IPv4Address)] = "assigned"
    v6: Annotated[IPv6Address | Literal["assigned", "none"], _address(IPv6Address)] = "assigned"
    sticky: Annotated[int, _upto(limits.STICKY_MAX_S)] = 0
    hash_port: Annotated[bool, BeforeValidator(_flag)] = False

    @model_validator(mode="after")
    def _one(self) -> Self:
        if self.v4 == "none" and self.v6 == "none":
            raise expected("an address of at least one family")
        return self


def _policies(value: object) -> object:
    """Policies by name; ``rr:`` without more is both addresses assigned."""
    if not isinstance(value, Mapping):
        raise expected("a mapping of policies, such as {rr: {v4: assigned}}")
    return {name: {} if wanted is None else wanted for name, wanted in value.items()}


_Number = Annotated[int, BeforeValidator(_number)]


class ExposedPort(_Part):
    """A port on which every instance serves; the name is the one of DNS-SD."""

    port: Annotated[int, BeforeValidator(_port)]
    protocol: Annotated[Literal["tcp", "udp"], _one_of("tcp", "udp")] = "tcp"
    name: Annotated[str, BeforeValidator(_port_name)] = ""


class Exposure(_Part):
    """A port of nodes that leads to the service: of each node, or of an ingress address that a node has."""

    port: Annotated[int, BeforeValidator(_port)]
    to: Annotated[int, BeforeValidator(_port)] | None = Field(None, description="The instances' port; else the same.")
    protocol: Annotated[Literal["tcp", "udp"], _one_of("tcp", "udp")] = "tcp"
    address: Annotated[IPv4Address | IPv6Address | None, BeforeValidator(_any_address)] = Field(
        None, description="An ingress address; else all addresses of the node."
    )
    nodes: Annotated[Literal["all", "hosting"] | tuple[str, ...], BeforeValidator(_nodes)] = "all"
    policy: Annotated[str, BeforeValidator(_text("a policy of service_ips"))] = Field(
        "", description="Whose ServiceIP it leads to; else default_policy, else the first."
    )
    prefer: Annotated[Literal["policy", "local"], _one_of("policy", "local")] = Field(
        "policy", description="local: a node with instances answers with these alone, and they see the client."
    )

    @property
    def target(self) -> int:
        """The instances' port."""
        return self.port if self.to is None else self.to


class Http(_Part):
    """A GET that is answered with a status from 200 to 399."""

    port: Annotated[int, BeforeValidator(_port)]
    path: Annotated[str, BeforeValidator(_path)] = "/"


class Health(_Part):
    """How the hosting node finds out whether an instance works: exactly one of tcp, http and command."""

    tcp: Annotated[int, BeforeValidator(_port)] | None = Field(None, description="A port that takes connections.")
    http: Http | None = None
    command: Annotated[tuple[str, ...], BeforeValidator(_command)] = Field(
        (), description="Run in the instance's network namespace; exit status 0 is good."
    )
    interval: Annotated[float, _seconds(0.1, 3600)] = Field(5.0, description="Seconds between two checks.")
    timeout: Annotated[float, _seconds(0.1, 60)] = Field(2.0, description="Seconds that one may take.")
    rise: Annotated[int, _from_to(1, 100)] = Field(1, description="Good checks in a row that take it in.")
    fall: Annotated[int, _from_to(1, 100)] = Field(3, description="Bad ones in a row that take it out.")
    panic: Annotated[int, _from_to(0, 100)] = Field(
        50, description="Percent: if fewer of the instances are good, all are chosen among."
    )

    @model_validator(mode="after")
    def _one(self) -> Self:
        if sum(map(bool, (self.tcp, self.http, self.command))) != 1:
            raise expected("exactly one of tcp, http and command")
        return self


class Descriptor(_Part):
    """One service."""

    version: Annotated[Literal[1], BeforeValidator(_version)] = 1
    app: Annotated[str, BeforeValidator(_part)]
    namespace: Annotated[str, BeforeValidator(_part)]
    service: Annotated[str, BeforeValidator(_part)]
    service_namespace: Annotated[str, BeforeValidator(_part)]
    instances: Annotated[int, BeforeValidator(_count)] = 1
    service_ips: Annotated[dict[Policy, Wanted], BeforeValidator(_policies)] = Field({"rr": Wanted()})
    weights: dict[_Number, Annotated[int, _upto(limits.WEIGHT_MAX)]] = Field({})
    states: dict[_Number, Annotated[Literal["up", "draining", "down"], BeforeValidator(_state)]] = Field({})
    default_policy: Annotated[str, BeforeValidator(_text("a policy of service_ips"))] = ""
    ports: tuple[ExposedPort, ...] = ()
    metadata: Annotated[dict[str, str], BeforeValidator(_metadata)] = Field({})
    needs: Annotated[tuple[str, ...], BeforeValidator(_jobs)] = ()
    exposed: tuple[Exposure, ...] = ()
    health: Health | None = None
    drain: Annotated[float, _seconds(0, 3600)] = Field(
        0.0, description="Seconds that an instance keeps its connections before it is removed."
    )

    @model_validator(mode="after")
    def _ports_once(self) -> Self:
        seen = [(it.protocol, it.port, it.address) for it in self.exposed]
        if len(set(seen)) != len(seen):
            raise expected("each of exposed with a port of its own")
        wrong = next((it.policy for it in self.exposed if it.policy not in ("", *self.service_ips)), None)
        if wrong is not None:
            raise expected(f"exposed to name policies of service_ips ({', '.join(self.service_ips)})")
        return self

    @model_validator(mode="after")
    def _not_the_nodes_own(self) -> Self:
        if self.app == INGRESS_APP:
            raise expected(f"another app than {INGRESS_APP}, whose services are the nodes' own")
        return self

    @model_validator(mode="after")
    def _default(self) -> Self:
        if self.default_policy and self.default_policy not in self.service_ips:
            raise expected(f"default_policy to be a policy of service_ips ({', '.join(self.service_ips)})")
        return self

    def of_instance(self, number: int) -> dict[str, Any]:
        """Weight and state of an instance."""
        return {"weight": self.weights.get(number, 1), "state": self.states.get(number, "up")}

    def policy_of(self, exposure: Exposure) -> str:
        """Whose ServiceIP an exposed port leads to."""
        return exposure.policy or self.default_policy or next(iter(self.service_ips), "")

    @model_validator(mode="after")
    def _no_address(self) -> Self:
        if canonical(self.job) is not None:
            raise expected("names of which at least one has a letter, as they would else spell an address")
        return self

    @property
    def job(self) -> str:
        """The name by which the cluster knows it."""
        return f"{self.app}.{self.namespace}.{self.service}.{self.service_namespace}"


def of_job(job: str, instances: int) -> Descriptor:
    """The descriptor that a bare job name stands for. Raises ConfigError."""
    names = ("app", "namespace", "service", "service_namespace")
    parts = job.split(".")
    if len(parts) != len(names):
        raise ConfigError([Problem("request", None, "job_name", "app.namespace.service.service_namespace", job)])
    return from_data({**dict(zip(names, parts, strict=True)), "instances": instances}, "request")


def from_json(body: bytes) -> Descriptor:
    """The descriptor in a request's body. Raises ConfigError."""
    try:
        data = json.loads(body)
    except ValueError as error:
        raise ConfigError([Problem("request", None, "body", "JSON", str(error))]) from None
    return from_data(data, "request")


def from_data(data: object, source: str, lines: Mapping[tuple[Any, ...], int] | None = None) -> Descriptor:
    """The descriptor in plain data. Raises ConfigError with a problem for each wrong key."""
    try:
        return Descriptor.model_validate(data)
    except ValidationError as error:
        raise ConfigError(_problems(error.errors(), source, lines or {})) from None


def load(text: str, source: str) -> list[Descriptor]:
    """All descriptors of a YAML text. Raises ConfigError."""
    try:
        trees = list(yaml.compose_all(text, Loader=yaml.SafeLoader))
    except yaml.MarkedYAMLError as error:
        raise ConfigError([_syntax(error, source)]) from None
    found = [_from_tree(tree, source) for tree in trees if tree is not None]
    if not found:
        raise ConfigError([Problem(source, None, "file", "a descriptor", "nothing")])
    return found


def _from_tree(tree: yaml.Node, source: str) -> Descriptor:
    lines = dict(_lines(tree))
    twice = list(_twice(tree, source))
    if twice:
        raise ConfigError(twice)
    loader = yaml.SafeLoader("")
    return from_data(loader.construct_document(tree), source, lines)


def _syntax(error: yaml.MarkedYAMLError, source: str) -> Problem:
    line = error.problem_mark.line + 1 if error.problem_mark else None
    return Problem(source, line, "syntax", "YAML", error.problem or str(error))


def _lines(node: yaml.Node, at: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], int]]:
    """The line of each key, from 1."""
    if at == ():
        yield at, node.start_mark.line + 1
    if isinstance(node, yaml.MappingNode):
        for key, value in node.value:
            yield (*at, key.value), key.start_mark.line + 1
            yield from _lines(value, (*at, key.value))
    elif isinstance(node, yaml.SequenceNode):
        for number, value in enumerate(node.value):
            yield (*at, number), value.start_mark.line + 1
            yield from _lines(value, (*at, number))


def _twice(node: yaml.Node, source: str, at: str = "") -> Iterator[Problem]:
    """Keys that a mapping has more than once: YAML forbids it, and its parser takes the last."""
    if isinstance(node, yaml.SequenceNode):
        for number, value in enumerate(node.value):
            yield from _twice(value, source, f"{at}{number}.")
    if not isinstance(node, yaml.MappingNode):
        return
    seen: dict[str, int] = {}
    for key, value in node.value:
        line, name = key.start_mark.line + 1, f"{at}{key.value}"
        if key.value in seen:
            yield Problem(source, line, name, f"each key once (line {seen[key.value]} has it)", "it again")
        seen[str(key.value)] = line
        yield from _twice(value, source, f"{name}.")


def _problems(errors: Iterable[ErrorDetails], source: str, lines: Mapping[tuple[Any, ...], int]) -> Iterator[Problem]:
    """One for each wrong key: pydantic reports one for each member of a union."""
    seen = set()
    for error in errors:
        at = tuple(part for part in error["loc"] if part != "[key]")
        if at not in seen:
            seen.add(at)
            got = _shown(error["input"]) if error["type"] != "missing" else "nothing"
            key = ".".join(map(str, at)) or "descriptor"
            yield Problem(source, _line(lines, at), key, _expectation(error, at), got)


def _line(lines: Mapping[tuple[Any, ...], int], at: tuple[Any, ...]) -> int | None:
    """The line of a key, or of what it is missing from."""
    while at not in lines and at:
        at = at[:-1]
    return lines.get(at)


def _expectation(error: ErrorDetails, at: tuple[Any, ...]) -> str:
    match error["type"]:
        case "expected":
            return str(error["ctx"]["expected"])
        case "missing":
            return "a value"
        case "extra_forbidden":
            return _nearest(at)
        case "literal_error":
            return f"one of the policies {', '.join(POLICIES)}"
        case "tuple_type":
            return "a list"
    return "a mapping"


def _nearest(at: tuple[Any, ...]) -> str:
    """The keys that there are where one is unknown."""
    inner: dict[Any, type[BaseModel]] = {"service_ips": Wanted, "ports": ExposedPort, "exposed": Exposure}
    inner |= {"health": Http if "http" in at[:-1] else Health}
    model = Descriptor if len(at) == 1 else inner.get(at[0], Descriptor)
    names = list(model.model_fields)
    close = get_close_matches(str(at[-1]), names, n=1)
    return f"a known key (did you mean {close[0]}?)" if close else f"a known key ({', '.join(names)})"


def schema() -> dict[str, Any]:
    """The JSON schema of one descriptor."""
    return {"$schema": "https://json-schema.org/draft/2020-12/schema", **Descriptor.model_json_schema()}


def _shown(value: object) -> str:
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= SHOWN else text[: SHOWN - 1] + "…"
