"""The command `appliance`.

Only the configuration model and click are imported here: a command that needs the supervisor, the
lab, rich or an HTTP client imports it when it runs, so that `appliance config` and `--help` stay
quick on a gateway's CPU (a test holds them to it).

Results go to standard output, as text or with --json as one JSON document. What goes wrong is one
line on standard error and exit status 1; a wrong command line is status 2.
"""

import json
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, TypeVar

import click

from appliance import __version__
from appliance.config import DEFAULT_PATH, Config, ConfigError, load

if TYPE_CHECKING:
    from rich.console import RenderableType

    from appliance.client import Client

Command = TypeVar("Command", bound=Callable[..., Any])


class Deferred(click.Command):
    """A subcommand that lives in another module, which is imported when it is called and not for `--help`."""

    def __init__(self, name: str, target: str, short_help: str) -> None:
        super().__init__(name, short_help=short_help)
        self._target = target

    def make_context(
        self, info_name: str | None, args: list[str], parent: click.Context | None = None, **extra: Any
    ) -> click.Context:
        """The context of the real command, which click then invokes."""
        return self.load().make_context(info_name, args, parent, **extra)

    def load(self) -> click.Command:
        """The real command."""
        module, attribute = self._target.split(":")
        command: click.Command = getattr(import_module(module), attribute)
        return command


@contextmanager
def one_line() -> Iterator[None]:
    """Turns an expected failure into its sentence on standard error and exit status 1."""
    from appliance.client import ApiError

    try:
        yield
    except ConfigError as error:
        click.echo(error, err=True)
    except ApiError as error:
        sentence = " ".join(str(error).split())
        click.echo(f"appliance: {sentence}", err=True)
    else:
        return
    sys.exit(1)


def emit(data: object, as_json: bool, text: Callable[[], "RenderableType"]) -> None:
    """Prints data as JSON, or the text that `text` makes of it: a string, or something for rich."""
    if as_json:
        click.echo(json.dumps(data, indent=2))
        return
    made = text()
    if isinstance(made, str):
        click.echo(made)
    else:
        from appliance.screens import show

        show(made)


def json_option(command: Command) -> Command:
    """--json"""
    return click.option("--json", "as_json", is_flag=True, help="Print JSON.")(command)


def config_option(command: Command) -> Command:
    """-c FILE"""
    return click.option(
        "-c",
        "--config",
        "config_path",
        type=click.Path(path_type=Path),
        default=DEFAULT_PATH,
        show_default=True,
        help="Configuration file.",
    )(command)


def socket_option(command: Command) -> Command:
    """--socket PATH"""
    return click.option(
        "--socket",
        type=click.Path(path_type=Path),
        envvar="APPLIANCE_SOCKET",
        show_envvar=True,
        help=f"Socket of the local API.  [default: api.socket of {DEFAULT_PATH}]",
    )(command)


def instance_options(command: Command) -> Command:
    """--service JOB --instance N"""
    command = click.option("--instance", type=click.IntRange(min=0), required=True, help="Instance number.")(command)
    return click.option("--service", required=True, help="Job name: app.namespace.service.namespace.")(command)


PORT = click.IntRange(0, 65_535)


def client(socket: Path | None) -> "Client":
    """A client of the API at a socket, or at the one that this node's configuration names."""
    from appliance.client import Client

    return Client(socket or _configured_socket())


def _configured_socket() -> Path:
    """The default file's api.socket. A file that is missing or wrong must not hide a running appliance."""
    try:
        return load(DEFAULT_PATH).api.socket
    except ConfigError:
        return Config().api.socket


@click.group(context_settings={"help_option_names": ["-h", "--help"]})
def main() -> None:
    """Edge appliance: joins the containers of all nodes into one service network."""


main.add_command(Deferred("lab", "appliance.lab.cli:lab", "A network of several nodes on this machine."))
for _name, _help in (
    ("cluster", "The cluster service manager: subnets, services, and who needs to know of them."),
    ("deploy", "Deploy the services that FILE describes, or change them to what it says."),
    ("diff", "Show what deploying FILE would change."),
    ("undeploy", "Remove a service from the cluster."),
    ("services", "Show the cluster's services with their addresses and instances."),
):
    main.add_command(Deferred(_name, f"appliance.cluster.manager.cli:{_name}", _help))


@main.command()
@config_option
def run(config_path: Path) -> None:
    """Run the appliance on this node until it is told to stop."""
    with one_line():
        config = load(config_path)
    from appliance.dataplane import cache

    cache.use(config.paths.cache)  # before anything is imported that has compiled functions
    from appliance.supervisor.main import run as supervise

    sys.exit(supervise(config, config_path))


@main.command()
@config_option
def warm(config_path: Path) -> None:
    """Compile the packet path into paths.cache, so that the workers start at once."""
    with one_line():
        config = load(config_path)
    from appliance.supervisor.warm import warm as compile_all

    click.echo(f"compiled in {compile_all(config):.1f} s")


@main.command()
@json_option
def version(as_json: bool) -> None:
    """Print the versions of the appliance and of what it stands on."""
    import platform
    from importlib.metadata import version as version_of

    libraries = {name: version_of(name) for name in ("numba", "numpy", "pyroute2", "uvloop")}
    data = {
        "appliance": __version__,
        "python": platform.python_version(),
        "kernel": platform.release(),
        **libraries,
    }
    emit(data, as_json, lambda: "\n".join(f"{name} {value}" for name, value in data.items()))


# --- appliance config ---------------------------------------------------------------------------


@main.group()
def config() -> None:
    """Check, show and explain the configuration file."""


@config.command()
@click.argument("file", type=click.Path(path_type=Path), default=DEFAULT_PATH)
@click.option("--cpus", type=click.IntRange(min=1), help="CPUs of the machine that the file is for.")
@json_option
def check(file: Path, cpus: int | None, as_json: bool) -> None:
    """Check FILE. Each thing wrong is a line FILE:LINE: key: expected …, got …"""
    try:
        load(file, cpus)
    except ConfigError as error:
        problems, lines = [asdict(it) for it in error.problems], str(error)
        emit({"ok": False, "problems": problems}, as_json, lambda: lines)
        sys.exit(1)
    emit({"ok": True, "problems": []}, as_json, lambda: "ok")


@config.command("show")
@config_option
@json_option
def show_config(config_path: Path, as_json: bool) -> None:
    """Print the configuration that FILE means, defaults included."""
    from appliance.config_text import in_force

    with one_line():
        config = load(config_path)
    emit(config.model_dump(mode="json"), as_json, lambda: in_force(config).rstrip())


@config.command("schema")
def print_schema() -> None:
    """Print the JSON schema of the configuration file."""
    from appliance.config_text import schema

    click.echo(json.dumps(schema(), indent=2))


@config.command("diff")
@click.argument("old", type=click.Path(path_type=Path))
@click.argument("new", type=click.Path(path_type=Path), default=DEFAULT_PATH)
@json_option
def diff_configs(old: Path, new: Path, as_json: bool) -> None:
    """Show which keys have another value in NEW than in OLD, and whether a reload would apply them."""
    from appliance.config import differences, is_reloadable
    from appliance.config_text import toml_value

    with one_line():
        before, after = load(old), load(new)
    dumped = [it.model_dump(mode="json") for it in (before, after)]
    rows = []
    for change in differences(before, after):
        section, name = change.key.split(".")
        was, now = (it[section][name] for it in dumped)
        rows.append({"key": change.key, "old": was, "new": now, "reloadable": is_reloadable(change.key)})
    lines = [
        f"{it['key']}: {toml_value(it['old'])} → {toml_value(it['new'])}"
        f" ({'reloadable' if it['reloadable'] else 'needs restart'})"
        for it in rows
    ]
    emit({"differences": rows}, as_json, lambda: "\n".join(lines) or "no difference")


@config.command("example")
def print_example() -> None:
    """Print a configuration file with every key explained, at its default."""
    from appliance.config_text import example

    click.echo(example(), nl=False)


# --- A running appliance ------------------------------------------------------------------------


@main.command()
@instance_options
@click.option("--netns", help="Name of the network namespace (ip netns).")
@click.option("--pid", type=click.IntRange(min=1), help="A process in the network namespace.")
@click.option("--path", help="File of the network namespace, such as /proc/123/ns/net.")
@click.option("--ports", default="", help="Ports of the node that lead to it, such as '8080:80;5353:53/udp'.")
@socket_option
@json_option
def attach(
    service: str,
    instance: int,
    netns: str | None,
    pid: int | None,
    path: str | None,
    ports: str,
    socket: Path | None,
    as_json: bool,
) -> None:
    """Join a container's network namespace to the service network."""
    given = {name: it for name, it in {"netns": netns, "pid": pid, "path": path}.items() if it is not None}
    if len(given) != 1:
        raise click.UsageError("expected exactly one of --netns, --pid and --path")
    with one_line():
        attachment = client(socket).attach(service, instance, given, ports)
    emit(attachment, as_json, lambda: _fields(attachment))


@main.command()
@instance_options
@socket_option
def detach(service: str, instance: int, socket: Path | None) -> None:
    """Take a container out of the service network again."""
    with one_line():
        client(socket).detach(service, instance)


@main.command()
@click.option("--counters", is_flag=True, help="Show all counters too.")
@socket_option
@json_option
def status(counters: bool, socket: Path | None, as_json: bool) -> None:
    """Show on one screen whether the node is well: node, cluster, tables, offloads, workers, drops, errors."""
    with one_line():
        data = client(socket).status()
    from appliance import screens

    emit(data, as_json, lambda: screens.status(data, counters))


@main.command()
@socket_option
@json_option
def drops(socket: Path | None, as_json: bool) -> None:
    """Show how many packets were dropped since the workers' counters began, by direction and reason."""
    with one_line():
        data = client(socket).status()
    from appliance import screens
    from appliance.observe.meanings import totals

    rows = totals(data["workers"])
    emit({"drops": rows}, as_json, lambda: screens.drops(rows))


@main.command()
@click.option("--interval", type=click.FloatRange(min=0.1, max=3600), default=1.0, show_default=True, help="Seconds.")
@click.option("--count", type=click.IntRange(min=1), help="End after so many. [default: until interrupted]")
@socket_option
@json_option
def top(interval: float, count: int | None, socket: Path | None, as_json: bool) -> None:
    """Show live rates: packets, bits, flows and system calls of each worker, and drops by reason.

    With --json, one JSON document a line and interval.
    """
    from appliance.top import watch

    with one_line():
        watch(client(socket), interval, count, as_json)


@main.command()
@socket_option
@json_option
def flows(socket: Path | None, as_json: bool) -> None:
    """Show the live flows of all workers."""
    with one_line():
        data = client(socket).flows()
    from appliance import screens

    emit({"flows": data}, as_json, lambda: screens.flows(data))


@main.command()
@click.argument("source")
@click.argument("destination")
@click.option("--protocol", default="tcp", show_default=True, help="tcp, udp, icmp, sctp or a number.")
@click.option("--sport", type=PORT, default=40_000, show_default=True, help="Source port; of icmp, the identifier.")
@click.option("--dport", type=PORT, default=80, show_default=True, help="Destination port.")
@click.option("--size", type=click.IntRange(min=0), default=0, help="Bytes of the IP packet.  [default: the least]")
@click.option("--fragmentable", is_flag=True, help="The packet may be fragmented (no DF).")
@click.option("--from-node", metavar="ADDRESS", help="The node that it comes from.  [default: a container sends it]")
@click.option("--ask", is_flag=True, help="Ask the cluster for what the tables lack, as the packet would.")
@socket_option
@json_option
def trace(socket: Path | None, as_json: bool, **packet: Any) -> None:
    """Show step by step what would happen to a packet from SOURCE to DESTINATION, by the live tables.

    Nothing is sent and nothing is changed. The packet goes through the packet path itself, over a copy of the flows.
    """
    with one_line():
        data = client(socket).trace({name: value for name, value in packet.items() if value is not None})
    emit(data, as_json, lambda: "\n  ".join([f"{data['verdict']}: {data['packet']}", *data["steps"]]))


@main.command()
@click.argument("file", type=click.File("wb"))
@click.option("--host", "hosts", multiple=True, help="An end of the flow, under any of its addresses; at most twice.")
@click.option("--port", "ports", type=PORT, multiple=True, help="A port of the flow; at most twice.")
@click.option("--protocol", default="", help="tcp, udp, icmp or sctp.")
@click.option("--drops", is_flag=True, help="Only packets that are dropped.")
@click.option("--count", type=click.IntRange(min=1), help="End after so many packets.")
@click.option("--seconds", type=click.FloatRange(min=0, min_open=True), help="End after so long.")
@socket_option
def capture(file: BinaryIO, socket: Path | None, **wanted: Any) -> None:
    """Write packets before and after translation to FILE (pcapng; "-": standard output), until interrupted.

    There is an interface for each place where packets pass; comments tell worker, node, and why a packet was dropped.
    `appliance capture - --host 10.18.0.2 | wireshark -k -i -` shows them as they come.
    """
    given = {name: value for name, value in wanted.items() if value not in (None, "", ())}
    with one_line(), suppress(KeyboardInterrupt), client(socket).capture(given) as pieces:
        for piece in pieces:
            file.write(piece)
            file.flush()


@main.command()
@config_option
@socket_option
@json_option
def doctor(config_path: Path, socket: Path | None, as_json: bool) -> None:
    """Look at what this node needs (kernel, capabilities, offloads, paths, broker …), and say how to mend it.

    The exit status is 1 if something is wrong; warnings leave it 0.
    """
    from appliance import screens
    from appliance.client import ApiError, Client
    from appliance.doctor import examine

    with one_line():
        settings = load(config_path)
    try:
        data, why = Client(socket or settings.api.socket).status(), ""
    except ApiError as error:
        data, why = None, str(error)
    findings = [asdict(it) for it in examine(settings, data, why)]
    emit({"findings": findings}, as_json, lambda: screens.table("findings", findings))
    sys.exit(any(it["state"] == "wrong" for it in findings))


@main.command("cli-reference", hidden=True)
def cli_reference() -> None:
    """Print docs/cli.md."""
    from appliance.reference import reference

    click.echo(reference(main), nl=False)


@main.group()
def profile() -> None:
    """See where a process of the appliance spends its time."""


@profile.command("supervisor")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--seconds", type=click.IntRange(min=1), default=10, show_default=True, help="How long to look.")
@config_option
def profile_supervisor(file: Path, seconds: int, config_path: Path) -> None:
    """Sample the supervisor with py-spy, and write a flame graph (SVG) to FILE. Needs root."""
    from appliance import profiling

    with one_line():
        profiling.supervisor(load(config_path).api.socket, file, seconds)


@profile.command("worker")
@click.argument("file", type=click.Path(path_type=Path))
@click.option("--worker", type=click.IntRange(min=0), help="Its number; the busiest, unless given.")
@click.option("--seconds", type=click.IntRange(1, 590), default=10, show_default=True, help="How long to look.")
@config_option
def profile_worker(file: Path, worker: int | None, seconds: int, config_path: Path) -> None:
    """Sample a worker with py-spy, and write a flame graph (SVG) to FILE: by its stages, asleep or not. Needs root.

    Meanwhile the worker calls its stages one by one, which costs it some microseconds each turn.
    """
    from appliance import profiling

    with one_line():
        click.echo(f"worker {profiling.worker(load(config_path).api.socket, file, seconds, worker)}")


@main.command()
@click.argument("name")
@socket_option
@json_option
def resolve(name: str, socket: Path | None, as_json: bool) -> None:
    """Explain where NAME leads: which record, from which table, by which policy, to which instances."""
    with one_line():
        data = client(socket).name(name)
    from appliance import screens

    emit(data, as_json, lambda: screens.name(data))


@main.command()
@socket_option
@json_option
def attachments(socket: Path | None, as_json: bool) -> None:
    """Show the containers that are attached to this node."""
    with one_line():
        data = client(socket).attachments()
    from appliance import screens

    emit({"attachments": data}, as_json, lambda: screens.attachments(data))


@main.command()
@socket_option
@json_option
def hosts(socket: Path | None, as_json: bool) -> None:
    """Show the containers of all nodes that this node knows."""
    with one_line():
        data = client(socket).hosts()
    from appliance import screens

    emit({"hosts": data}, as_json, lambda: screens.table(f"{len(data)} hosts", data))


@main.command()
@socket_option
@json_option
def reload(socket: Path | None, as_json: bool) -> None:
    """Apply the configuration file's reloadable keys and the static tables."""
    with one_line():
        changed = client(socket).reload()
    emit({"changed": changed}, as_json, lambda: "\n".join(changed) or "nothing changed")


@main.command()
@config_option
@click.option("--processes", is_flag=True, help="Only end what a supervisor that is gone has left running.")
@click.option("--purge", is_flag=True, help="Also remove what was to survive a reboot, and the compiled packet path.")
@json_option
def cleanup(config_path: Path, processes: bool, purge: bool, as_json: bool) -> None:
    """Remove all that the appliance made on this node, and nothing else; connections end."""
    from appliance import cleanup as cleaning
    from appliance.environment.errors import EnvironmentError_
    from appliance.supervisor.errors import StartError

    with one_line():
        config = load(config_path)
    try:
        removed = cleaning.processes(config) if processes else cleaning.everything(config, purge=purge)
    except (StartError, EnvironmentError_, OSError) as error:
        click.echo(f"appliance: {error}", err=True)
        sys.exit(1)
    emit({"removed": removed}, as_json, lambda: "\n".join(removed) or "nothing was there")


RESTART_S = 60.0
"""Seconds that a restart may take; a busy machine needs a few."""


@main.command()
@click.option("--workers", is_flag=True, help="Replace the workers instead, one at a time.")
@socket_option
@json_option
def restart(workers: bool, socket: Path | None, as_json: bool) -> None:
    """Restart the supervisor, as after an upgrade: workers, flows and connections go on."""
    api = client(socket)
    with one_line():
        if workers:
            renewed = api.renew_workers()
            lines = [f"worker {it['index']} {it['pid']}" for it in renewed]
            emit({"workers": renewed}, as_json, lambda: "\n".join(lines))
            return
        started = _await_restart(api)
    emit(started, as_json, lambda: f"supervisor {started['pid']} version {started['version']}")


def _await_restart(api: "Client") -> dict[str, Any]:
    """Restarts the supervisor; the node's status when it is back. Raises ApiError if it does not come."""
    import time

    from appliance.client import ApiError

    before = api.status()["node"]
    api.restart()
    deadline = time.monotonic() + RESTART_S
    while True:
        time.sleep(0.05)
        try:
            node: dict[str, Any] = api.status()["node"]
        except ApiError:
            if time.monotonic() > deadline:
                raise
            continue
        if node["started"] != before["started"]:
            return node


def _fields(data: dict[str, Any]) -> str:
    """One `name value` line for each field that has a value."""
    return "\n".join(f"{name} {value}" for name, value in data.items() if value not in (None, ""))
