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

An error names file, line, key and what was expected; PyYAML's node tree has the lines.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from difflib import get_close_matches
from ipaddress import IPv4Address, IPv6Address
from typing import Annotated, Any, Literal, Self

import yaml
from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, model_validator
from pydantic_core import ErrorDetails

from appliance import limits
from appliance.cluster.manager.requests import canonical
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
    protocol: Literal["tcp", "udp"] = "tcp"
    name: Annotated[str, BeforeValidator(_port_name)] = ""


class Descriptor(_Part):
    """One service."""

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

    @model_validator(mode="after")
    def _default(self) -> Self:
        if self.default_policy and self.default_policy not in self.service_ips:
            raise expected(f"default_policy to be a policy of service_ips ({', '.join(self.service_ips)})")
        return self

    def of_instance(self, number: int) -> dict[str, Any]:
        """Weight and state of an instance."""
        return {"weight": self.weights.get(number, 1), "state": self.states.get(number, "up")}

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


def _twice(node: yaml.Node, source: str, at: str = "") -> Iterator[Problem]:
    """Keys that a mapping has more than once: YAML forbids it, and its parser takes the last."""
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
            return _nearest(str(at[-1]), Descriptor if len(at) == 1 else Wanted)
        case "literal_error":
            return f"one of the policies {', '.join(POLICIES)}"
    return "a mapping"


def _nearest(name: str, model: type[BaseModel]) -> str:
    names = list(model.model_fields)
    close = get_close_matches(name, names, n=1)
    return f"a known key (did you mean {close[0]}?)" if close else f"a known key ({', '.join(names)})"


def _shown(value: object) -> str:
    text = json.dumps(value, default=str, ensure_ascii=False)
    return text if len(text) <= SHOWN else text[: SHOWN - 1] + "…"
