"""The commands `appliance cluster …`, `deploy`, `undeploy` and `services`.

The manager itself, with its broker's and HTTP libraries, is imported only by those that run it.
"""

from __future__ import annotations

import json
import re
import sys
from ipaddress import ip_network
from pathlib import Path
from typing import Any, Literal

import click

from appliance.cli import Command, emit, json_option, one_line
from appliance.cluster.manager.addresses import Plan, PlanError
from appliance.cluster.manager.client import ManagerClient
from appliance.cluster.manager.descriptor import Descriptor, load, schema
from appliance.cluster.manager.settings import ROLL_CALL_S, Settings
from appliance.config import ConfigError, IPNetwork, Problem

RANGES = (
    "subnets_v4",
    "subnets_v6",
    "services_v4",
    "instances_v6",
    "rr_v6",
    "closest_v6",
    "least_flows_v6",
    "maglev_v6",
)
"""Options that hold networks, named as in `Plan`."""


class Address(click.ParamType[tuple[str, int]]):
    """HOST:PORT, or [HOST]:PORT for version 6."""

    name = "host:port"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[str, int]:
        """The host without brackets, and the port."""
        if isinstance(value, tuple):
            return value
        host, _, port = str(value).rpartition(":")
        if not host or not port.isdecimal() or not 0 < int(port) < 65536:
            self.fail(f"expected HOST:PORT, got {value}", param, ctx)
        return host.strip("[]"), int(port)


class Network(click.ParamType[IPNetwork]):
    """An address range such as 10.18.0.0/15."""

    name = "network"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> Any:
        """The range."""
        try:
            return ip_network(value)
        except ValueError:
            self.fail(f"expected a network without host bits, got {value}", param, ctx)


class NodeId(click.ParamType[str]):
    """A node's identity."""

    name = "id"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> str:
        """24 lower-case hexadecimal digits."""
        if not re.fullmatch("[0-9a-f]{24}", str(value)):
            self.fail(f"expected 24 lower-case hexadecimal digits, got {value}", param, ctx)
        return str(value)


def broker_options(command: Command) -> Command:
    """What the broker and the managers have in common."""
    defaults = Settings()
    directory = click.Path(path_type=Path)
    options = [
        click.option("--cluster", default=defaults.cluster, show_default=True, help="Name of the cluster."),
        click.option(
            "--mqtt", type=Address(), default="0.0.0.0:10003", show_default=True, help="MQTT listener for the nodes."
        ),
        click.option("--nats-port", default=defaults.nats_port, show_default=True, help="NATS port on the loopback."),
        click.option("--state", type=directory, default=defaults.state, show_default=True, help="The broker's store."),
        click.option(
            "--pki", type=directory, help="Directory of `cluster init`: TLS, and each node its own topics only."
        ),
        click.option(
            "--route",
            type=Address(),
            multiple=True,
            help="Another broker of the cluster; repeatable, the same list for all. Needs --pki.",
        ),
        click.option(
            "--route-listen", type=Address(), default="0.0.0.0:6222", show_default=True, help="Where others join."
        ),
        click.option(
            "--broker-name",
            default=defaults.broker_name,
            show_default="the host's",
            help="Name among the brokers of the cluster, for ever.",
        ),
        click.option(
            "--replicas", type=click.IntRange(1, 5), default=1, show_default=True, help="Brokers that keep the state."
        ),
        click.option("--runtime", type=directory, default=defaults.runtime, show_default=True, help="Generated files."),
        click.option(
            "--sync", default=defaults.sync, show_default=True, help="Write to the disk always, or each such as 2m."
        ),
        click.option(
            "--log-level", type=click.Choice(["debug", "info", "warning", "error"]), default="info", show_default=True
        ),
    ]
    for option in reversed(options):
        command = option(command)
    return command


def plan_options(command: Command) -> Command:
    """The address plan."""
    plan = Plan()
    for name in reversed(RANGES):
        default = getattr(plan, name)
        shown = ", ".join(map(str, default))
        flag, text = f"--{name.replace('_', '-')}", f"Range for {name}; repeatable.  [default: {shown}]"
        command = click.option(flag, name, type=Network(), multiple=True, help=text)(command)
    for family, longest in (("v6", 126), ("v4", 30)):
        prefix = click.IntRange(1, longest)
        default = getattr(plan, f"prefix_{family}")
        text = f"Prefix length of a node's {family} subnet."
        command = click.option(f"--prefix-{family}", type=prefix, default=default, show_default=True, help=text)(
            command
        )
    return command


def manager_option(command: Command) -> Command:
    """--manager URL"""
    return click.option(
        "--manager",
        default="http://127.0.0.1:10110",
        envvar="APPLIANCE_MANAGER",
        show_default=True,
        show_envvar=True,
        help="REST interface of the cluster service manager.",
    )(command)


@click.group()
def cluster() -> None:
    """The cluster service manager: subnets, services, and who needs to know of them."""


@cluster.command()
@broker_options
@click.option("--broker", help="URL of an existing NATS server, such as nats://127.0.0.1:4222, instead of our own.")
@click.option("--rest", type=Address(), default="127.0.0.1:10110", show_default=True, help="REST interface.")
@click.option(
    "--roll-call",
    "roll_call_s",
    type=click.FloatRange(0),
    default=ROLL_CALL_S,
    show_default=True,
    help="Seconds that nodes have to come back after a start of our broker; then they are lost.",
)
@plan_options
def run(log_level: str, **options: Any) -> None:
    """Run a manager, and without --broker its broker, until it is told to stop."""
    try:
        plan = Plan(**_plan(options))
    except PlanError as error:
        raise click.UsageError(str(error)) from error
    _until_stopped(log_level, Settings(plan=plan, **options), "run")


@cluster.command()
@broker_options
def broker(log_level: str, **options: Any) -> None:
    """Run only the broker, for managers that are started with --broker."""
    _until_stopped(log_level, Settings(**options), "run_broker")


@cluster.command()
@click.argument("directory", type=click.Path(path_type=Path))
@click.option("--host", "hosts", multiple=True, help="Name or address that nodes reach the broker at; repeatable.")
@click.option("--node", "nodes", multiple=True, type=NodeId(), help="Identity of a node; repeatable.")
@click.option("--renew", is_flag=True, help="Make the brokers' certificate anew if it is not for every --host.")
@json_option
def init(directory: Path, hosts: tuple[str, ...], nodes: tuple[str, ...], renew: bool, as_json: bool) -> None:
    """Make the cluster's authority in DIRECTORY, and certificates for the broker, managers and nodes.

    What is there stays: call it again for further nodes, and send the manager a SIGHUP.
    """
    from appliance.cluster.manager import pki

    try:
        if not hosts and not pki.pair(directory, "server").certificate.exists():
            raise click.UsageError("expected --host: nodes check that the broker is where they look for it")
        made = [str(path) for path in pki.init(directory, hosts, nodes, renew=renew)]
    except (pki.PkiError, OSError) as error:
        click.echo(f"appliance cluster: {error}", err=True)
        sys.exit(1)
    emit({"made": made}, as_json, lambda: "\n".join(made) or "everything is there")


@cluster.command()
@manager_option
@json_option
def nodes(manager: str, as_json: bool) -> None:
    """Show the nodes with their subnets."""
    with one_line():
        found = ManagerClient(manager).nodes()
    emit({"nodes": found}, as_json, lambda: "\n".join(map(_node, found)) or "no nodes")


def _plan(options: dict[str, Any]) -> dict[str, Any]:
    """Takes the address plan out of the options; ranges that were not given keep their default."""
    prefixes = {name: options.pop(name) for name in ("prefix_v4", "prefix_v6")}
    return {**prefixes, **{name: ranges for name in RANGES if (ranges := options.pop(name))}}


def _until_stopped(log_level: str, settings: Settings, what: Literal["run", "run_broker"]) -> None:
    import uvloop

    from appliance.cluster.manager import manager
    from appliance.cluster.manager.broker import BrokerError
    from appliance.cluster.manager.pki import PkiError
    from appliance.cluster.manager.store import UnavailableError
    from appliance.observe.log import configure

    configure(log_level)
    main = manager.run if what == "run" else manager.run_broker
    status = 1
    try:
        status = uvloop.run(main(settings))
    except* (BrokerError, PkiError, UnavailableError, OSError) as group:
        for error in group.exceptions:
            click.echo(f"appliance cluster: {_innermost(error)}", err=True)
    sys.exit(status)


def _innermost(error: BaseException) -> BaseException:
    """What a task group wrapped."""
    while isinstance(error, BaseExceptionGroup):
        error = error.exceptions[0]
    return error


def files_options(command: Command) -> Command:
    """FILE… and -f FILE, which are the same."""
    path = click.Path(path_type=Path)
    command = click.option("-f", "--file", "files", type=path, multiple=True, help="The same as FILE.")(command)
    return click.argument("file", type=path, nargs=-1)(command)


@click.command()
@files_options
@click.option("--dry-run", is_flag=True, help="Only say what would change, or why it cannot.")
@click.option("--schema", "show_schema", is_flag=True, help="Print the JSON schema of descriptors, no more.")
@manager_option
@json_option
def deploy(
    file: tuple[Path, ...], files: tuple[Path, ...], dry_run: bool, show_schema: bool, manager: str, as_json: bool
) -> None:
    """Deploy the services that FILE describes, or change them to what it says."""
    if show_schema:
        click.echo(json.dumps(schema(), indent=2))
        return
    if dry_run:
        _preview((*file, *files), manager, as_json)
        return
    with one_line():
        descriptors = _read_all((*file, *files))
        client = ManagerClient(manager)
        made = [client.deploy(descriptor) for descriptor in descriptors]
    emit({"services": made}, as_json, lambda: "\n".join(map(_service, made)))


@click.command()
@files_options
@manager_option
@json_option
def diff(file: tuple[Path, ...], files: tuple[Path, ...], manager: str, as_json: bool) -> None:
    """Show what deploying FILE would change. Exit status 1: something; 0: nothing."""
    sys.exit(1 if _preview((*file, *files), manager, as_json) else 0)


def _preview(files: tuple[Path, ...], manager: str, as_json: bool) -> bool:
    """Prints what would change; whether anything would."""
    with one_line():
        client = ManagerClient(manager)
        changes = {it.job: client.preview(it) for it in _read_all(files)}
    lines = [line for job, found in changes.items() for line in _difference(job, found)]
    emit({"changes": changes}, as_json, lambda: "\n".join(lines) or "nothing would change")
    return any(changes.values())


def _difference(job: str, changes: list[dict[str, Any]]) -> list[str]:
    """A service's name, and a line for each key that changes; no line if none does."""
    lines = [f"  {_mark(it)} {it['key']}: {_values(it)}" for it in changes]
    return [job, *lines] if lines else []


def _mark(change: dict[str, Any]) -> str:
    return "+" if change["before"] is None else "-" if change["after"] is None else "~"


def _values(change: dict[str, Any]) -> str:
    values = [json.dumps(it) for it in (change["before"], change["after"]) if it is not None]
    return " -> ".join(values)


def _read_all(files: tuple[Path, ...]) -> list[Descriptor]:
    """The descriptors in all files. Raises ConfigError, and UsageError if there is no file."""
    if not files:
        raise click.UsageError("expected a FILE")
    return [descriptor for file in files for descriptor in _read(file)]


@click.command()
@click.argument("service")
@click.option("--now", is_flag=True, help="Do not wait until its instances have drained.")
@manager_option
def undeploy(service: str, now: bool, manager: str) -> None:
    """Remove SERVICE: a name (app.namespace.service.namespace), or a file that describes it.

    Instances that run keep their connections for the service's drain time before they go.
    """
    with one_line():
        client = ManagerClient(manager)
        names = [it.job for it in _read(Path(service))] if Path(service).is_file() else [service]
        for name in names:
            if client.undeploy(name, now=now):
                click.echo(f"{name} drains")


@click.command()
@manager_option
@json_option
def services(manager: str, as_json: bool) -> None:
    """Show the services with their addresses and instances."""
    with one_line():
        found = ManagerClient(manager).services()
    emit({"services": found}, as_json, lambda: "\n".join(map(_service, found)) or "no services")


def _read(file: Path) -> list[Descriptor]:
    """The descriptors in a file. Raises ConfigError."""
    try:
        text = file.read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "other bytes"
        raise ConfigError([Problem(str(file), None, "file", "a readable file in UTF-8", str(reason))]) from None
    return load(text, str(file))


def _service(service: dict[str, Any]) -> str:
    """A service with a line for each ServiceIP and instance."""
    lines = [service["name"]]
    for it in service["service_ips"]:
        lines.append(f"  {it['policy']:<8} {it['v4'] or '-':<15} {it['v6'] or '-'}")
    for it in service["instances"]:
        where = f"{it['node']} {it['host']}:{it['port']}" if "node" in it else ""
        lines.append(f"  {it['number']:<8} {it['v4']:<15} {it['v6']:<24} {_condition(it):<15} {where}".rstrip())
    lines += [f"  exposed  {_exposed(it)}" for it in service["exposed"]]
    return "\n".join(lines)


def _condition(instance: dict[str, Any]) -> str:
    """Whether an instance runs; what is wanted of it, and what its checks say, where that is not the usual."""
    words = [instance["status"]]
    if instance.get("state", "up") != "up":
        words.append(instance["state"])
    if instance.get("healthy") is False:
        words.append("unhealthy" if instance["chosen"] == "down" else "unhealthy, panic")
    return ", ".join(words)


def _exposed(port: dict[str, Any]) -> str:
    where = f"{port['address']} " if port["address"] else ""
    nodes = port["nodes"] if isinstance(port["nodes"], str) else ", ".join(port["nodes"])
    return f"{where}{port['port']}/{port['protocol']} -> {port['to'] or port['port']}, nodes: {nodes}"


def _node(node: dict[str, Any]) -> str:
    subnets = f"{node['subnet_v4'] or '-':<18} {node['subnet_v6'] or '-':<24}"
    return f"{node['id']:<24} {node['status']:<8} {subnets} {' '.join(node['instances'])}".rstrip()
